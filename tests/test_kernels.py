"""Every kernel behind ``attention_lse``: blocks hidden from some rows or from all, rows that no block shows a key."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastpar.ops import ring
from fastpar.ops.ring import attention_lse, merge

torch.set_num_threads(1)

B, H, S = 2, 3, 5  # and three blocks of 8 keys, which is what the kernels of a GPU want
CUTS = (0, 8, 16, 24)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Kernel(NamedTuple):
    """Operands that lead to ``target``, one of the operators that compute a block."""

    target: str
    device: str
    dtype: torch.dtype
    q: tuple[int, ...] = (B, H, S, 8)
    k: tuple[int, ...] = (B, H, CUTS[-1], 8)
    v: tuple[int, ...] = (B, H, CUTS[-1], 8)


CUDNN = "_scaled_dot_product_cudnn_attention"
FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
KERNELS = {
    "flash on the CPU": Kernel(f"{FLASH}_for_cpu", "cpu", torch.float64),
    "flash on the CPU, float32": Kernel(f"{FLASH}_for_cpu", "cpu", torch.float32),
    "flash on the CPU, bfloat16": Kernel(f"{FLASH}_for_cpu", "cpu", torch.bfloat16),
    "written out, values of another width": Kernel("logsumexp", "cpu", torch.float64, v=(B, H, CUTS[-1], 6)),
    "written out, heads and batch in one": Kernel(
        "logsumexp", "cpu", torch.float32, (B * H, S, 8), (B * H, CUTS[-1], 8), (B * H, CUTS[-1], 8)
    ),
    "written out, keys without a batch": Kernel(
        "logsumexp", "cpu", torch.float64, k=(1, H, CUTS[-1], 8), v=(1, H, CUTS[-1], 8)
    ),
    "efficient on a GPU": Kernel(EFFICIENT, "cuda", torch.bfloat16),
    "written out on a GPU": Kernel("logsumexp", "cuda", torch.float64),
}
PLAIN = KERNELS["flash on the CPU"][3:]
ON_ITS_DEVICE = [pytest.param(n, marks=pytest.mark.gpu if k.device == "cuda" else ()) for n, k in KERNELS.items()]


def masks() -> dict[str, torch.Tensor]:
    """Which keys [S, keys] each row sees, by what is hidden."""
    names = ("a block for some rows", "a block for all rows", "the first block", "a row in every block", "all")
    shown = {name: torch.ones(S, CUTS[-1], dtype=torch.bool) for name in names}
    shown["a block for some rows"][1:3, CUTS[1] : CUTS[2]] = False
    shown["a block for all rows"][:, CUTS[1] : CUTS[2]] = False
    shown["the first block"][:, : CUTS[1]] = False
    shown["a row in every block"][2] = False
    shown["all"][:] = False
    scattered = torch.rand(S, CUTS[-1], generator=torch.Generator().manual_seed(0)) < 0.5
    return {**shown, "some keys": scattered}


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
    """The blocks, merged in every order, are the whole attention and its log-sum-exp; rows without a key are 0."""
    blocks = [
        attention_lse(q, k[..., a:b, :], v[..., a:b, :], mask if mask is None else mask[..., a:b])
        for a, b in itertools.pairwise(CUTS)
    ]
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + (torch.zeros(mask.shape).masked_fill(~mask.cpu(), -math.inf).to(q.device) if
                           mask.dtype == torch.bool else mask.double())  # fmt: skip
    lse = torch.logsumexp(scores, -1)
    out = scores.softmax(-1).nan_to_num(0.0) @ v.double()
    tolerance = TOLERANCE[q.dtype]
    for order in itertools.permutations(blocks):
        total = order[0]
        for block in order[1:]:
            total = merge(*total, *block)
        torch.testing.assert_close(total[0].double(), out, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(total[1].double(), lse, atol=tolerance, rtol=tolerance)


def called_by(monkeypatch: pytest.MonkeyPatch, *args: Any) -> set[str]:
    """Names of the operators that the blocks of ``merged`` ran."""
    kernel, called = ring._kernel, Called()

    def watched(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with called:
            return kernel(*given)

    monkeypatch.setattr(ring, "_kernel", watched)
    merged(*args)
    return called.names


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("hidden", masks())
@pytest.mark.parametrize("name", ON_ITS_DEVICE)
def test_hidden_blocks_and_rows(name: str, hidden: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, shown = KERNELS[name], masks()[hidden]
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).to(kernel.device, kernel.dtype) for s in kernel[3:])
    mask = shown if kind == "bool" else torch.randn(shown.shape).to(kernel.dtype).masked_fill(~shown, -math.inf)
    assert kernel.target in called_by(monkeypatch, q, k, v, mask.to(kernel.device))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "target"), [(SDPBackend.FLASH_ATTENTION, FLASH), (SDPBackend.CUDNN_ATTENTION, CUDNN)]
)
def test_without_a_mask_a_block_takes_what_torch_would_take(
    backend: SDPBackend, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).to("cuda", torch.bfloat16) for s in PLAIN)
    with sdpa_kernel(backend):
        if torch._fused_sdp_choice(q, k, v) != backend.value:
            pytest.skip(f"torch has no {backend} here")
        assert target in called_by(monkeypatch, q, k, v, None)


def test_cudnn_s_logsumexp_has_a_dimension_more() -> None:
    """On the CPU, where the operator is torch's reference in that form."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).double() for s in PLAIN)

    def kernel(q: Any, k: Any, v: Any, bias: Any, lse: bool, *args: Any, scale: Any = None) -> tuple[Any, ...]:
        assert bias is None and lse and not any(args)
        scores = q @ k.mT * scale
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True), None, None, 0, 0, None, None, None

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(CUDNN, kernel, "CPU")
        out, lse = ring._cudnn(q, k, v, 0.25)
    want = attention_lse(q, k, v, None, 0.25)
    torch.testing.assert_close((out, lse), want, atol=1e-12, rtol=1e-12)


NONSENSE = {"0": (0.0, 0.0), "nan": (math.nan, math.nan), "inf": (1.0, math.inf), "a mean of values": (0.5, -1e30)}


@pytest.mark.parametrize("hidden", masks())
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_what_a_kernel_gives_for_a_row_without_keys_is_not_believed(
    nonsense: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels differ there: zero, NaN or infinity as the sum, anything as the output."""
    shown = masks()[hidden]

    def kernel(q: Any, k: Any, v: Any, bias: Any, scale: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        blind = (bias == -math.inf).all(-1).broadcast_to(scores.shape[:-1])
        out, lse = NONSENSE[nonsense]
        return (
            (scores.softmax(-1) @ v).masked_fill(blind[..., None], out),
            torch.logsumexp(scores, -1).masked_fill(blind, lse),
        )

    monkeypatch.setattr(ring, "_kernel", kernel)
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).double() for s in PLAIN)
    merged(q, k, v, shown)


def test_the_reference_is_torch_s_own() -> None:
    """``merged`` writes attention out; where every row has a key, torch gives the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(s).double() for s in PLAIN)
    shown = masks()["a block for some rows"]
    merged(q, k, v, shown)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
    torch.testing.assert_close(attention_lse(q, k, v, shown)[0], want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_features_need_not_be_dense(which: str) -> None:
    """Attention over pixels has its channels in front of them."""
    torch.manual_seed(0)
    operands = {name: torch.randn(2, 3, 7, 8, dtype=torch.float64) for name in "qkv"}
    q, k, v = (x.mT.contiguous().mT if name == which else x for name, x in operands.items())
    out, lse = attention_lse(q, k, v)
    scores = q @ k.mT / 8**0.5
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=1e-12)
