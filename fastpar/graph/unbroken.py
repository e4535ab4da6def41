"""``unbroken``: Dynamo keeps the frames that fastpar compiles in one graph where tensors decide sizes.

At ``mask.nonzero()`` or ``int(lengths.max())`` Dynamo by default ends a graph, and where that stands in a loop it
gives up the whole frame: what is in no graph of its own then runs on every rank, all of it (Mochi's attentions, which
drop the padding of each prompt, are such a case). Its options ``capture_scalar_outputs`` and
``capture_dynamic_output_shape_ops`` trace on, with a symbol for the size, and :mod:`fastpar.graph.sizes` makes programs
of such graphs. The options are global, and other backends in the process are none of our business; so they are set
here while Dynamo converts a frame for a backend that is marked, and for no other.

A number of numpy's among a module's attributes (``i < np.log2(ratio)``, in diffusers' autoencoders) is a tensor to
Dynamo, and a branch on it another such read. It becomes the Python number that it was meant to be.

Dynamo does not always come through with them, and not every graph that it comes back with can be used (``Broken``).
Then the frame is converted once more without them. All ranks run the same Python, so all decide alike.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

log = logging.getLogger("fastpar")
F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
_MARK = "_fastpar_unbroken"


class Broken(Exception):
    """Raised by a marked backend: this graph is of no use, the frame should break where it reads tensors' values."""


def unbroken(backend: F) -> F:
    """Mark a ``torch.compile`` backend: what it compiles is traced through reads of tensors' values."""
    _install()
    setattr(backend, _MARK, True)
    return backend


def _marked(backend: Any) -> bool:
    """Whether a backend, or what torch has wrapped around it, is one of ours."""
    while backend is not None:
        if getattr(backend, _MARK, False):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return False


def _python_numbers(values: Iterable[Any]) -> None:
    """Replace numpy's numbers among the attributes of modules and what is in them."""
    generic = getattr(sys.modules.get("numpy"), "generic", None)
    if generic is None:
        return
    for value in values:
        for module in value.modules() if isinstance(value, torch.nn.Module) else ():
            numbers = {k: v.item() for k, v in vars(module).items() if isinstance(v, generic)}
            vars(module).update((k, v) for k, v in numbers.items() if isinstance(v, (bool, int, float)))


@functools.cache
def _install() -> None:
    """Put ourselves around the conversion of frames. Where this torch has none such, graphs break as they ever did."""
    from torch._dynamo import convert_frame

    converter = getattr(convert_frame, "ConvertFrameAssert", None)
    if converter is None:
        log.warning("torch %s converts frames otherwise: graphs break where sizes depend on values", torch.__version__)
        return
    plain = converter.__call__

    @functools.wraps(plain)
    def convert(self: Any, frame: Any, *args: Any, skip: int = 0, **kwargs: Any) -> Any:
        if not _marked(self._torchdynamo_orig_backend):
            return plain(self, frame, *args, skip=skip, **kwargs)
        _python_numbers(frame.f_locals.values())
        try:
            with torch._dynamo.config.patch(dict.fromkeys(_OPTIONS, True)):
                return plain(self, frame, *args, skip=skip + 1, **kwargs)
        except GuardOnDataDependentSymNode as error:
            reason = str(error).split("\n", 1)[0]
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, Broken):
                raise
            reason = str(error.inner_exception)
        log.info("a graph ends where values of tensors are read: %s", reason)
        with torch._dynamo.config.patch(dict.fromkeys(_OPTIONS, False)):
            return plain(self, frame, *args, skip=skip + 1, **kwargs)

    converter.__call__ = convert
