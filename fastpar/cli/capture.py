"""Capture a loaded model; where its forward does not take the inputs, say so in one line."""

from __future__ import annotations

import re

from fastpar.cli.inputs import parameters
from fastpar.cli.models import Loaded
from fastpar.core.errors import CaptureError, FastparError
from fastpar.graph.capture import Captured, call_arguments, capture

_GOT = re.compile(r": got (\w+\(.*\))\s*$", re.MULTILINE)


def captured(loaded: Loaded) -> Captured:
    """All graphs of one call of the model. Raises CaptureError where the call fails, with the signature."""
    try:
        return capture(loaded.model, loaded.inputs)
    except FastparError:
        raise
    except Exception as error:  # whatever the model's own code raises on inputs that are not its own
        raise not_its_inputs(loaded, error) from error


def not_its_inputs(loaded: Loaded, error: Exception) -> CaptureError:
    """What to say of an error that a model's own code has raised: what it was given, and what it takes."""
    args, kwargs = call_arguments(loaded.inputs)
    given = [*(f"{len(args)} positional" for _ in args[:1]), *kwargs]
    lines = str(error).strip().splitlines()
    got = _GOT.search(str(error))  # Dynamo tells of the error, in a line of its own
    said = got[1] if got else f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return CaptureError(
        f"the model does not run on these inputs: {said}. "
        f"Given: {', '.join(given) or 'nothing'}; it takes: {', '.join(parameters(loaded.model))} "
        "(--debug shows the traceback)"
    )
