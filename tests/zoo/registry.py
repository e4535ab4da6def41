"""What a case of the zoo is, and the table of all of them.

A case is a tiny configuration of one diffusers model class, random weights and an input factory. It is written as
one function from `Knobs` (batch, prompt length, token grid) to a configuration and a function that draws inputs:

    @entry("SomeTransformer2DModel", "image", size=(7, 11))
    def some(k: Knobs) -> Spec:
        def inputs(d: Draw) -> dict[str, Any]:
            return dict(hidden_states=d.randn(k.batch, 4, *k.size), return_dict=False)

        return dict(in_channels=4, num_layers=1), inputs

A class that is not built from a configuration alone (its modules come from another model) gives a function that builds
it instead.

diffusers is imported when a model is built, not before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What a caller may vary.

    `size` counts tokens per axis after patching: (height, width), (frames, height, width) or (length,). Models without
    tokens (U-Nets, autoencoders, adapters) count what comes in per axis instead: pixels or latents.
    `text` counts prompt tokens before masking, of the main prompt where a model has several.
    """

    batch: int
    text: int
    size: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.size)


class Draw:
    """Seeded inputs. Everything is drawn in float64 and then cast, so all dtypes see the same numbers."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.rng = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64 in [0, high)."""
        return torch.randint(0, high, shape, generator=self.rng)

    def times(self, batch: int, scale: float = 1.0) -> torch.Tensor:
        """Unequal times in (0, scale), in the model's dtype, [batch]."""
        steps = torch.arange(1, batch + 1, dtype=torch.float64) / (batch + 1.3)
        return (scale * steps).to(self.dtype)

    def steps(self, batch: int) -> torch.Tensor:
        """Unequal int64 time steps in (0, 1000), [batch]."""
        return self.times(batch, 1000.0).long()

    def full(self, value: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=self.dtype)

    def mask(self, batch: int, length: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """[batch, length], ones before zeros; row i keeps about (i+2)/(batch+2) of it, at least one."""
        kept = [max(1, math.ceil(length * (i + 2) / (batch + 2))) for i in range(batch)]
        return (torch.arange(length)[None] < torch.tensor(kept)[:, None]).to(dtype)

    def rotary(self, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of random angles, each [tokens, dim], every angle twice in a row."""
        angles = torch.randn((tokens, dim // 2), generator=self.rng, dtype=torch.float64)
        angles = angles.repeat_interleave(2, 1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def grid(self, *size: int) -> torch.Tensor:
        """Coordinates of a token grid, row-major, [prod(size), len(size)], in the model's dtype."""
        return torch.cartesian_prod(*(torch.arange(n) for n in size)).reshape(-1, len(size)).to(self.dtype)

    def ids(self, size: tuple[int, ...], axes: int, text: int = 0) -> torch.Tensor:
        """FLUX's position ids: zeros for `text` tokens, then the grid on the last axes, [tokens, axes]."""
        grid = self.grid(*size)
        ids = self.full(0.0, text + len(grid), axes)
        ids[text:, axes - len(size) :] = grid
        return ids


Inputs = Callable[[Draw], dict[str, Any]]
Config = dict[str, Any] | Callable[[], torch.nn.Module]
Spec = tuple[Config, Inputs]


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model. `family` is image, video, audio or other; `prompt` names the input that conditions it.

    `dtype` is the widest floating type in which the model's own forward runs: float64, or float32 where the
    model casts to float32 and then meets a float64 weight. `fixed` names the knobs whose value the model (or
    diffusers' code for it) constrains, as the case's docstring says: sweeps should leave them alone. `ready` names
    methods without arguments that the model wants to be called before its forward.

    A few configurations depend on the knobs (learned position tables, prompt lengths): use `at` to fix the
    knobs once for the model and its inputs.
    """

    name: str
    family: str
    knobs: Knobs
    prompt: str
    make: Callable[[Knobs], Spec] = dataclasses.field(repr=False)
    dtype: torch.dtype = torch.float64
    fixed: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()

    @property
    def cls(self) -> str:
        """Name of the diffusers class."""
        return self.name.partition("/")[0]

    @property
    def tokens(self) -> int:
        return self.knobs.tokens

    def at(self, **knobs: Any) -> Case:
        """The same case with other `batch`, `text` or `size`."""
        return dataclasses.replace(self, knobs=dataclasses.replace(self.knobs, **knobs)) if knobs else self

    def build(self, dtype: torch.dtype | None = None, seed: int = 0, **knobs: Any) -> torch.nn.Module:
        """The model in eval mode, without gradients, all floating parameters random, in the widest dtype."""
        import diffusers

        config, _ = self.make(self.at(**knobs).knobs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = config() if callable(config) else getattr(diffusers, self.cls)(**config)
        randomise(model, seed)
        for method in self.ready:
            getattr(model, method)()
        return cast(model, dtype or self.dtype).eval().requires_grad_(False)

    def inputs(self, dtype: torch.dtype | None = None, seed: int = 0, **knobs: Any) -> dict[str, Any]:
        """Keyword arguments for `forward`. Fresh on every call: some models change lists in place."""
        _, draw = self.make(self.at(**knobs).knobs)
        return draw(Draw(dtype or self.dtype, seed + 1))


CASES: dict[str, Case] = {}


def entry(
    name: str,
    family: str,
    size: tuple[int, ...],
    *,
    batch: int = 2,
    text: int = 7,
    prompt: str = "encoder_hidden_states",
    dtype: torch.dtype = torch.float64,
    fixed: tuple[str, ...] = (),
    ready: tuple[str, ...] = (),
) -> Callable[[Callable[[Knobs], Spec]], Callable[[Knobs], Spec]]:
    """Put a case into `CASES`. `name` is the diffusers class, or `Class/variant`."""

    def register(make: Callable[[Knobs], Spec]) -> Callable[[Knobs], Spec]:
        if name in CASES:
            raise ValueError(f"two cases named {name}")
        CASES[name] = Case(name, family, Knobs(batch, text, size), prompt, make, dtype, fixed, ready)
        return make

    return register


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """To `dtype`, except that 16 bit keeps in float32 what the class asks for, as `from_pretrained` does."""
    torch.nn.Module.to(model, dtype)
    if dtype in (torch.float16, torch.bfloat16):
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, p in model.named_parameters():
            if kept & set(name.split(".")):
                p.data = p.data.float()
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every floating parameter anew: zero-initialised gates and output layers would hide wrong results.

    Matrices and kernels get 1/sqrt(fan in), kept within 0.05 and 0.2; norm weights lie around 1, as do the norms of
    kernels that are parametrised by them; the rest (biases, tables, tokens) is small noise.
    """
    rng = torch.Generator().manual_seed(seed)
    kinds = {n: type(m).__name__.lower() for n, m in model.named_modules()}
    norms = [n for n, kind in kinds.items() if "norm" in kind or "dynamictanh" in kind]
    scales = {f"{n}.{name}" for n in norms for name in ("weight", "gamma", "alpha")}
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        norm = name.endswith(("weight_g", "parametrizations.weight.original0"))  # weight_norm's, old and new
        if norm or (name in scales and p.ndim == 1):
            p.copy_(1 + 0.1 * noise)
        elif p.ndim < 2:
            p.copy_(0.1 * noise)
        else:
            p.copy_(noise * min(0.2, max(0.05, p[0].numel() ** -0.5)))


def model_classes() -> list[str]:
    """Names of all model classes that the installed diffusers exports."""
    import diffusers

    base = diffusers.ModelMixin
    names = (name for name in dir(diffusers) if not name.startswith("_") and name[0].isupper())
    found = ((name, getattr(diffusers, name, None)) for name in names)
    return [name for name, cls in found if isinstance(cls, type) and issubclass(cls, base) and cls is not base]


def missing() -> list[str]:
    """Exported model classes that have neither a case nor an entry in `UNAVAILABLE`."""
    have = {case.cls for case in CASES.values()} | set(UNAVAILABLE)
    return [name for name in model_classes() if name not in have]


UNAVAILABLE: dict[str, str] = {}
"""Classes without a case: name -> the exact error where they cannot run on the CPU, or why there is nothing to run."""
