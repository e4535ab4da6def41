"""Random weights that hide nothing: many models start with gates and output layers at zero."""

from __future__ import annotations

import torch


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every floating parameter anew, the same for every dtype that the model is cast to afterwards.

    Matrices and kernels get 1/sqrt(fan in), kept within 0.05 and 0.2 so that values neither vanish nor grow
    with depth; one-dimensional weights of norms lie around 1; what is left (biases, tables) is small noise.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(0.1 * noise + (name in norms))
        else:
            parameter.copy_(noise * min(0.2, max(0.05, parameter[0].numel() ** -0.5)))
