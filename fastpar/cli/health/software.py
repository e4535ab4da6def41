"""Versions, the entry point, the compiler, and what the environment says."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from fastpar.cli.health.fact import FAILED, OK, WARNING, Fact, said
from fastpar.core.errors import FastparError
from fastpar.core.text import unknown

GROUP = "torch_dynamo_backends"
TORCH = ((2, 11), (2, 15))
"""The first and the last version that is supported."""


def python() -> Iterator[Fact]:
    good = sys.version_info >= (3, 11)
    yield Fact("Python", OK if good else FAILED, f"{platform.python_version()}, {platform.platform(terse=True)}",
               "" if good else "fastpar needs Python 3.11 or newer")  # fmt: skip


def torch() -> Iterator[Fact]:
    low, high = (".".join(map(str, v)) for v in TORCH)
    advice = f"install a torch from {low} to {high}: pip install 'torch>={low},<{TORCH[1][0]}.{TORCH[1][1] + 1}'"
    try:
        found = version("torch")
    except PackageNotFoundError:
        yield Fact("torch", FAILED, "not installed", advice)
        return
    try:
        import torch  # noqa: F401
    except Exception as error:  # ImportError, OSError of a library that is missing, whatever it raises
        yield Fact("torch", FAILED, f"{found} does not import: {said(error)}", advice)
        return
    number = _number(found)
    if number < TORCH[0]:
        yield Fact("torch", FAILED, f"{found}; supported are {low} to {high}", advice)
    elif number > TORCH[1]:
        yield Fact("torch", WARNING, f"{found}, which is newer than what was tested ({low} to {high})", advice)
    else:
        yield Fact("torch", OK, found)


def packages() -> Iterator[Fact]:
    """What is only needed for some things."""
    for name, least, use in (
        ("triton", (3, 6), "kernels on a GPU; on the CPU nothing needs it"),
        ("diffusers", (0, 38), "models by class, config or folder, pipelines, the demo"),
        ("safetensors", (0, 0), "weights from files, the demo"),
    ):
        wanted = ".".join(map(str, least)) if any(least) else ""
        try:
            found = version(name)
        except PackageNotFoundError:
            needless = name == "triton" and not _built_for_gpus()
            yield Fact(name, OK if needless else WARNING, f"not installed; it is for {use}",
                       "" if needless else f"pip install '{name}{f'>={wanted}' if wanted else ''}'")  # fmt: skip
            continue
        good = _number(found) >= least
        yield Fact(name, OK if good else WARNING, found if good else f"{found}; supported from {wanted} on",
                   "" if good else f"pip install '{name}>={wanted}'")  # fmt: skip


def entry_point() -> Iterator[Fact]:
    name, advice = "backend", "install fastpar into this Python: pip install -e . in its checkout"
    found = [e for e in entry_points(group=GROUP) if e.name == "fastpar"]
    if not found:
        yield Fact(name, FAILED, f"no 'fastpar' in the group {GROUP}: torch.compile does not find it", advice)
        return
    try:
        found[0].load()
    except Exception as error:  # of whatever it imports
        yield Fact(name, FAILED, f"the entry point does not load: {said(error)}", advice)
        return
    yield Fact(name, OK, f'torch.compile(backend="fastpar") is {found[0].value}, {version("fastpar")}')


def compiler() -> Iterator[Fact]:
    names = ("g++", "clang++", "c++", "cl")
    found = os.environ.get("CXX") or next((name for name in names if shutil.which(name)), None)
    use = "lowering 'inductor' on the CPU"
    if found is None or shutil.which(found) is None:
        yield Fact("C++ compiler", WARNING, f"none on the path; {use} needs one, lowering 'eager' does not",
                   "install g++ or clang++")  # fmt: skip
    elif not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        yield Fact("C++ compiler", WARNING, f"{found}, without Python's headers, which {use} needs",
                   "install python3-dev, or the like")  # fmt: skip
    else:
        yield Fact("C++ compiler", OK, f"{found}, for {use}")


def variables() -> Iterator[Fact]:
    """Every ``FASTPAR_*`` that is set: whether it is one, and whether its value is one."""
    from fastpar.core.options import VARIABLES, Options

    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTPAR_")}
    if not given:
        yield Fact("environment", OK, f"none of {', '.join(VARIABLES)} is set")
    for name, value in given.items():
        if name not in VARIABLES:
            yield Fact(name, FAILED, unknown("variable", name, VARIABLES), f"unset {name}")
            continue
        try:
            Options.from_user(env={name: value})
        except FastparError as error:
            yield Fact(name, FAILED, str(error), f"set it to something else, or unset {name}")
            continue
        if name == "FASTPAR_VERIFY" and Options.from_user(env={name: value}).verify:
            yield Fact(name, WARNING, f"{value}: every call also runs the whole graph", f"unset {name} for speed")
        else:
            yield Fact(name, OK, value or "set, but empty: not read")


def cache() -> Iterator[Fact]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Fact("cache", WARNING, f"compiled code is kept in {folder}, which cannot be written: {error.strerror}",
                   "set TORCHINDUCTOR_CACHE_DIR to a folder of your own; compiling works without")  # fmt: skip
        return
    from torch._inductor import config

    if not config.fx_graph_cache:
        yield Fact("cache", WARNING, "Inductor's cache is switched off: every process compiles anew",
                   "unset TORCHINDUCTOR_FX_GRAPH_CACHE")  # fmt: skip
        return
    yield Fact("cache", OK, f"compiled code is kept in {folder}")


def launched() -> Iterator[Fact]:
    """Where torchrun has started this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        yield Fact("launcher", OK, "none: torchrun has not started this process")
        return
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing:
        yield Fact("launcher", WARNING, f"{text}; {' and '.join(missing)} not set, which init_process_group reads",
                   "start with torchrun, or unset what is left of it")  # fmt: skip
    else:
        yield Fact("launcher", OK, text)


def _number(text: str) -> tuple[int, int]:
    digits = [int(x) for x in re.findall(r"\d+", text)[:2]]
    return (digits[0], digits[1]) if len(digits) == 2 else (0, 0)


def _built_for_gpus() -> bool:
    try:
        import torch
    except Exception:  # a fact of its own
        return False
    return torch.version.cuda is not None or torch.version.hip is not None
