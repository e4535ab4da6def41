"""``fastpar doctor``: what this machine can do for fastpar, and what to do where it cannot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from fastpar.cli.failures import FAILED, reported
from fastpar.cli.options import Debug, JsonFile

if TYPE_CHECKING:
    from fastpar.cli.health.fact import Fact


@reported
def doctor(json: JsonFile = None, debug: Debug = False) -> None:
    """Look at versions, compiler, processes, GPUs and the environment. Exit status 1 if something needed is not there.

    It takes seconds, starts two processes that add up a tensor over gloo, and changes nothing. Under torchrun the first
    process of each machine speaks for it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from fastpar.cli.tables import show_facts, write_json

    examined = Examined(facts())
    if json is None or str(json) != "-":
        show_facts(examined.facts)
    if json is not None:
        write_json(examined, json)
    if not examined.ok:
        raise typer.Exit(FAILED)


class Examined:
    """All facts; ``ok`` unless something that is needed has failed."""

    def __init__(self, facts: list[Fact]) -> None:
        self.facts = facts

    @property
    def ok(self) -> bool:
        return all(fact.status != "failed" for fact in self.facts)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "facts": [vars(fact) for fact in self.facts]}


def facts() -> list[Fact]:
    """Everything that is looked at, in the order of the table."""
    from fastpar.cli.health import processes, software
    from fastpar.cli.health.fact import FAILED as BROKEN
    from fastpar.cli.health.fact import elsewhere, looked

    found = [*looked("Python", software.python), *looked("torch", software.torch)]
    found += [*looked("packages", software.packages), *looked("C++ compiler", software.compiler)]
    if not any(fact.name == "torch" and fact.status == BROKEN and "import" in fact.found for fact in found):
        found += looked("backend", software.entry_point)
        found += looked("process groups", processes.groups)
        found += looked("two processes", processes.meeting)
        found += elsewhere("GPUs", "fastpar.cli.health.gpus:gpus")
        found += looked("cache", software.cache)
        found += looked("environment", software.variables)
    return [*found, *looked("launcher", software.launched)]
