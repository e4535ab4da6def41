"""Capture a loaded model; where its forward does not take the inputs, say so in one line."""

from __future__ import annotations

from fastpar.cli.inputs import parameters
from fastpar.cli.models import Loaded
from fastpar.core.errors import CaptureError, FastparError
from fastpar.graph.capture import Captured, call_arguments, capture


def captured(loaded: Loaded) -> Captured:
    """All graphs of one call of the model. Raises CaptureError where the call fails, with the signature."""
    try:
        return capture(loaded.model, loaded.inputs)
    except FastparError:
        raise
    except Exception as error:  # whatever the model's own code raises on inputs that are not its own
        args, kwargs = call_arguments(loaded.inputs)
        given = [*(f"{len(args)} positional" for _ in args[:1]), *kwargs]
        said = str(error).strip().splitlines()
        raise CaptureError(
            f"the model does not run on these inputs: {type(error).__name__}: {said[0] if said else 'no message'}. "
            f"Given: {', '.join(given) or 'nothing'}; it takes: {', '.join(parameters(loaded.model))} "
            "(--debug shows the traceback)"
        ) from error
