"""The module of the model that each node belongs to, for names that a user knows: in profiles, in messages.

Dynamo notes for every operator the modules whose ``forward`` was under way (``nn_module_stack``). The innermost one's
path is kept as ``meta["module"]``, which passes hand on (``fastpar.core.inherit``).
"""

from __future__ import annotations

from torch import fx

MODEL = "model"
"""Stands for the path of the model itself, which is empty."""
SHOWN = 3
"""So many modules of one kernel are named; of more, their number."""


def name_modules(graph: fx.Graph) -> None:
    """Note the path of its module on every node that AOT made: ``blocks.3.attn.to_q``, empty for the model itself."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = next(reversed(stack.values()))[0]
            node.meta["module"] = _path(path)
        elif node.op == "call_function" and "stack_trace" in node.meta:
            node.meta["module"] = ""


def _path(text: str) -> str:
    """``L['self'].blocks.3.attn``, ``L['fn']._modules['blocks']._modules['3']`` -> ``blocks.3.attn``, ``blocks.3``."""
    parts = [part.strip("'\"") for part in text.replace("[", ".").replace("]", "").split(".")]
    parts = [part for part in parts if part and part != "_modules"]
    if parts and parts[0] in ("L", "G"):
        parts = parts[2:]  # and the variable that holds the model
    return ".".join(parts)


def complete(graph: fx.Graph) -> None:
    """Give nodes without a module that of the first node that uses them, or else of the first that they use."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "module" not in node.meta:
            for user in node.users:
                if "module" in user.meta:
                    node.meta["module"] = user.meta["module"]
                    break
    for node in graph.nodes:
        if node.op == "call_function" and "module" not in node.meta:
            given = next((x for x in node.all_input_nodes if "module" in x.meta), None)
            if given is not None:
                node.meta["module"] = given.meta["module"]


def label(node: fx.Node) -> str:
    """What a profile calls a node: its module, and for a part of an exchange which part of which."""
    module, exchange = node.meta.get("module") or MODEL, node.meta.get("exchange")
    return f"{module}: {exchange}" if exchange else module


def joint(labels: list[str]) -> str:
    """One name for a kernel of nodes with these labels, in their order."""
    several = list(dict.fromkeys(labels))
    rest = len(several) - SHOWN
    return " + ".join(several[:SHOWN]) + (f" + {rest} more" if rest > 0 else "")
