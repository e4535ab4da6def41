"""The house stands: data flows one way, so a module imports only from its own floor or from below.

``FLOORS`` is the order, lowest first; a part is what follows ``fastpar.`` in a module's name. Imports inside
functions and under TYPE_CHECKING count. ``registry.py`` is the one exception: it names passes and backends in
thunks, and what is named there is imported when somebody asks for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "core",
        "ops",
        "rules",
        "sharding",
        "graph",
        "passes",
        "backends",
        "registry",
        "plan",
        "run",
        "backend",
        "cli report demo diffusers emulate",  # and fastpar/__init__.py, the user's surface
    )
)
FLOOR = {part: i for i, floor in enumerate(FLOORS) for part in floor} | {"": len(FLOORS) - 1}
LAZY = {"registry"}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """All modules of the installed package, by the name that they have there."""
    for folder, prefix in (("fastpar", ""), ("passes", "passes"), ("backends", "backends")):
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            parts = (*([prefix] if prefix else []), *inner)
            yield ".".join(("fastpar", *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def imported(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and module of everything from fastpar that the module ``name`` imports, wherever it does."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from fastpar.core import plan` imports a module, `from fastpar.core.plan import Plan` does not.
            # What a package says about itself (its __version__) is no dependency on what it offers.
            inner = [f"{base}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
            found = [module if module in known else base for module in inner]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        yield from ((node.lineno, module) for module in found if module.split(".")[0] == "fastpar")


def part(module: str) -> str:
    return (module.split(".") + [""])[1]


def offences(root: Path) -> list[str]:
    """Every import that runs against the grain, and every part that stands on no floor."""
    named = dict(modules(root))
    found = []
    for name, path in named.items():
        where = path.relative_to(root)
        if part(name) not in FLOOR:
            found.append(f"{where}: {part(name)!r} stands on no floor; give it one in tests/test_imports.py")
        elif part(name) not in LAZY:
            for line, module in imported(name, path, set(named)):
                mine, other = FLOOR[part(name)], FLOOR.get(part(module))
                if other is None:
                    found.append(f"{where}:{line}: imports {module}, which stands on no floor")
                elif other > mine:
                    found.append(f"{where}:{line}: {part(name)} imports {module}, which stands above it")
    return found


def test_imports_run_downwards():
    assert len(dict(modules(ROOT))) > 10
    assert not offences(ROOT), "\n" + "\n".join(offences(ROOT))


def test_every_folder_with_modules_is_a_package():
    """Without ``__init__.py`` a folder is left out of the wheel."""
    folders = {path.parent for _, path in modules(ROOT)}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_the_package_does_not_know_its_tests_and_benchmarks():
    for _, path in modules(ROOT):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            outside = {name.split(".")[0] for name in names} & {"tests", "benchmarks", "passes", "backends"}
            assert not outside, f"{path.relative_to(ROOT)} imports {outside}; passes are fastpar.passes"


@pytest.mark.parametrize(
    ("file", "text", "offence"),
    [
        ("fastpar/core/a.py", "from fastpar.graph.b import x", "core imports fastpar.graph.b, which stands above"),
        ("fastpar/core/a.py", "import fastpar.plan", "core imports fastpar.plan"),
        ("fastpar/core/a.py", "from fastpar import graph", "core imports fastpar.graph"),
        ("fastpar/core/a.py", "from fastpar import verify", "core imports fastpar, which stands"),
        ("fastpar/core/a.py", "from ..graph import b", "core imports fastpar.graph.b"),
        ("fastpar/core/a.py", "from .. import graph", "core imports fastpar.graph"),
        ("fastpar/core/__init__.py", "from ..graph.b import x", "core imports fastpar.graph.b"),
        ("fastpar/core/a.py", "def f():\n    from fastpar.graph import b", "a.py:2: core imports"),
        ("fastpar/core/a.py", "if TYPE_CHECKING:\n    import fastpar.graph.b", "a.py:2: core imports"),
        ("fastpar/core/a.py", "importlib.import_module('fastpar.graph.b')", "core imports fastpar.graph.b"),
        ("passes/shard.py", "import fastpar.backends.eager", "passes imports fastpar.backends.eager"),
        ("passes/deep/er.py", "import fastpar.registry", "passes imports fastpar.registry"),
        ("backends/eager.py", "import fastpar.run.stream", "backends imports fastpar.run.stream"),
        ("fastpar/rules/a.py", "import fastpar.sharding.c", "rules imports fastpar.sharding.c"),
        ("fastpar/core/a.py", "import fastpar.nowhere", "imports fastpar.nowhere, which stands on no floor"),
        ("fastpar/attic/a.py", "import os", "'attic' stands on no floor"),
        ("passes/shard.py", "import fastpar.graph.b, fastpar.core.a", None),
        ("fastpar/graph/a.py", "from . import b\nfrom fastpar.sharding import candidates", None),
        ("fastpar/run/a.py", "from fastpar import __version__", None),
        ("fastpar/registry.py", "def f():\n    import fastpar.run.verify", None),
        ("fastpar/__init__.py", "from fastpar.run.verify import verify", None),
        ("fastpar/core/a.py", "import numpy, torch.distributed\nfrom fastparish import x", None),
    ],
)  # fmt: skip
def test_the_test_sees(tmp_path, file, text, offence):
    empty = ("fastpar/__init__.py", "fastpar/graph/__init__.py", "fastpar/graph/b.py", "fastpar/core/a.py")
    for path, content in (*((path, "") for path in empty), (file, text)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    found = offences(tmp_path)
    assert found == [] if offence is None else any(offence in said for said in found), found
