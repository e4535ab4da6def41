"""What random programs are made of: blocks as diffusion transformers have them, in ordinary torch code.

A block takes the state's image tokens ``x [B, S, C]`` and text tokens ``t [B, T, C]`` and leaves
such (S may change). Its options are finite lists of values, the simplest first. ``pick`` options
choose among what the sizes at hand allow, such as a divisor of the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpar.ops.attention  # noqa: F401  (registers torch.ops.fastpar.attention)

Option = Sequence[Any]
NO_YES: Option = (False, True)
PICK: Option = (0, 1, 2, 3, 4, 5, 6)


@dataclass
class State:
    """Tokens on their way through the blocks. ``make`` gives inputs (see ``tests.programs.Maker``)."""

    make: Any
    batch: int
    tokens: int  # asked for; the number at hand is x.shape[1]
    text: int
    heads: int
    width: int
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    t: Tensor = field(default_factory=lambda: torch.empty(0))
    vector: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, C]: time and pooled prompt
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.heads * self.width

    def linear(self, x: Tensor, out: int, bias: bool = True) -> Tensor:
        w = self.make.weight(out, x.shape[-1])
        return F.linear(x, w, self.make.weight(out) if bias else None)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), eps=1e-3)

    def split_heads(self, x: Tensor, heads: int | None = None) -> Tensor:
        """[B, S, h*D] -> [B, h, S, D]"""
        heads = heads or self.heads
        return x.view(*x.shape[:-1], heads, -1).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[B, h, S, D] -> [B, S, h*D]"""
    return x.transpose(-2, -3).flatten(-2)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def picked(values: Sequence[Any], pick: int) -> Any:
    """One of the values, from the middle outwards: divisors of equal size first, 1 and n last."""
    order = sorted(range(len(values)), key=lambda i: abs(2 * i + 1 - len(values)))
    return values[order[pick % len(values)]]


@dataclass(frozen=True)
class Block:
    apply: Callable[..., None]
    options: dict[str, Option]
    weight: int  # how often it is drawn


STARTS: dict[str, Block] = {}
BLOCKS: dict[str, Block] = {}
ENDS: dict[str, Block] = {}


def into(table: dict[str, Block], weight: int = 1, **options: Option) -> Callable[[Callable[..., None]], Any]:
    def add(fn: Callable[..., None]) -> Callable[..., None]:
        table[fn.__name__] = Block(fn, options, weight)
        return fn

    return add


# -- starts -----------------------------------------------------------------------------------


def _text_and_vector(s: State, embed: bool = False) -> None:
    if embed:
        s.t = F.embedding(s.make.index((s.batch, s.text), 9), s.make.weight(9, s.channels))
    else:
        s.t = s.make.user(s.batch, s.text, s.channels)
    s.vector = s.make.user(s.batch, s.channels)


@into(STARTS, weight=2, embed=NO_YES)
def tokens(s: State, embed: bool = False) -> None:
    """Image tokens as the caller packed them, and a linear layer."""
    s.x = s.linear(s.make.user(s.batch, s.tokens, 6), s.channels)
    _text_and_vector(s, embed)


@into(STARTS, weight=2, kernel=(2, 1), pick=PICK, position=NO_YES)
def patches(s: State, kernel: int = 2, pick: int = 0, position: bool = False) -> None:
    """[B, 3, H, W] through a patch embedding; H/k * W/k tokens, with position embeddings."""
    rows = picked(divisors(s.tokens), pick)
    space = s.make.user(s.batch, 3, rows * kernel, s.tokens // rows * kernel)
    x = F.conv2d(space, s.make.weight(s.channels, 3, kernel, kernel), s.make.weight(s.channels), stride=kernel)
    s.x = x.flatten(2).transpose(1, 2)
    if position:
        s.x = s.x + s.make.weight(1, s.tokens, s.channels)
    _text_and_vector(s)


@into(STARTS, pick=PICK)
def video(s: State, pick: int = 0) -> None:
    """[B, 3, F, H, 1] through a 3-D patch embedding."""
    frames = picked(divisors(s.tokens), pick)
    space = s.make.user(s.batch, 3, frames, s.tokens // frames * 2, 2)
    x = F.conv3d(space, s.make.weight(s.channels, 3, 1, 2, 2), s.make.weight(s.channels), stride=(1, 2, 2))
    s.x = x.flatten(2).transpose(1, 2)
    _text_and_vector(s)


@into(STARTS)
def token_ids(s: State) -> None:
    """Tokens looked up in a table, and their positions computed in the graph."""
    x = F.embedding(s.make.index((s.batch, s.tokens), 11), s.make.weight(11, s.channels))
    position = torch.arange(s.tokens, dtype=torch.float64)[:, None] * s.make.weight(s.channels)
    s.x = x + position.sin()
    _text_and_vector(s)


# -- ends -------------------------------------------------------------------------------------


@into(ENDS, weight=2, both=NO_YES)
def tokens_out(s: State, both: bool = False) -> None:
    """A last modulated norm and a linear layer; the text as a second output."""
    s.outputs.append(s.linear(s.norm(s.x) * (1 + s.vector[:, None]), 5))
    if both:
        s.outputs.append(s.norm(s.t))


@into(ENDS, weight=2, pick=PICK, patch=(2, 1))
def unpatchify(s: State, pick: int = 0, patch: int = 2) -> None:
    """[B, h*w, p*p*3] -> [B, 3, h*p, w*p]"""
    x = s.linear(s.norm(s.x), patch * patch * 3)
    h = picked(divisors(x.shape[1]), pick)
    x = x.view(s.batch, h, x.shape[1] // h, patch, patch, 3)
    x = x.permute(0, 5, 1, 3, 2, 4) if patch == 2 else torch.einsum("bhwpqc->bchpwq", x)
    s.outputs.append(x.reshape(s.batch, 3, x.shape[2] * patch, x.shape[4] * patch))


@into(ENDS)
def pooled(s: State) -> None:
    """One vector per picture, and the tokens themselves."""
    s.outputs += [s.x.mean(1), s.linear(s.x, 3)]


# -- per token --------------------------------------------------------------------------------


@into(BLOCKS, bias=NO_YES, merged=NO_YES)
def feed_forward(s: State, bias: bool = False, merged: bool = False) -> None:
    """Up, activation, down; on [B, S, C] or on rows that are merged with the batch first."""
    b, n, c = s.x.shape
    x = s.norm(s.x)
    x = x.reshape(b * n, c) if merged else x
    x = s.linear(F.gelu(s.linear(x, 2 * c, bias), approximate="tanh"), c, bias)
    s.x = s.x + x.reshape(b, n, c)


@into(BLOCKS)
def gated(s: State) -> None:
    """SwiGLU: one product, cut along the channels."""
    a, b = s.linear(s.norm(s.x), 4 * s.channels).chunk(2, -1)
    s.x = s.x + s.linear(F.silu(a) * b, s.channels)


@into(BLOCKS, weight=2, per=("batch", "token", "rows", "both"))
def modulate(s: State, per: str = "batch") -> None:
    """AdaLN: shift, scale and gate from the time; per picture, or per token (Wan 2.2's ti2v)."""
    b, n, c = s.x.shape
    if per == "batch":
        shift, scale, gate = s.linear(F.silu(s.vector), 3 * c)[:, None].chunk(3, -1)
    elif per == "token":
        shift, scale, gate = s.linear(F.silu(s.make.user(b, n, c)), 3 * c).chunk(3, -1)
    elif per == "rows":
        shift, scale, gate = s.make.user(1, n, 1), s.make.user(n, c), s.make.user(b, 1, 1)
    else:
        six = s.linear(s.vector, 3 * c).view(b, 3, c) + s.make.weight(1, 3, c)
        shift, scale, gate = (row[:, None] for row in six.unbind(1))
    s.x = s.x + gate * s.linear(s.norm(s.x) * (1 + scale) + shift, c)
    s.t = s.t + 0.1 * s.linear(s.t, c)


@into(BLOCKS, kind=("layer", "rms", "l2", "group"))
def normalise(s: State, kind: str = "layer") -> None:
    b, n, c = s.x.shape
    if kind == "layer":
        s.x = F.layer_norm(s.x, (c,), s.make.weight(c), s.make.weight(c), eps=1e-3)
    elif kind == "rms":
        s.x = s.x * torch.rsqrt(s.x.pow(2).mean(-1, keepdim=True) + 1e-3) * s.make.weight(c)
    elif kind == "l2":
        s.x = s.x / (torch.linalg.vector_norm(s.x, dim=-1, keepdim=True) + 1e-3)
    else:  # statistics over tokens and groups of channels
        groups = picked(divisors(c), 1)
        s.x = F.group_norm(s.x.transpose(1, 2), groups, s.make.weight(c), s.make.weight(c), eps=1e-3).transpose(1, 2)


@into(BLOCKS, kind=("chain", "where", "scalar", "range", "fill"))
def pointwise(s: State, kind: str = "chain") -> None:
    b, n, c = s.x.shape
    if kind == "chain":
        s.x = torch.tanh(s.x) * 0.5 + F.silu(s.x).clamp(-3, 3) - (s.x * s.x + 1).reciprocal()
    elif kind == "where":
        s.x = torch.where(s.make.flags(b, n, 1), s.x, s.make.weight(c))
    elif kind == "scalar":
        s.x = s.x * s.make.user().sigmoid() + torch.full((), 0.25, dtype=s.x.dtype)
    elif kind == "range":
        even = (torch.arange(n) % 2 == 0)[None, :, None]
        s.x = s.x * even + torch.linspace(0, 1, n, dtype=s.x.dtype)[:, None]
    else:
        s.x = s.x.masked_fill(s.make.flags(n, 1), 0.1) + torch.ones_like(s.x) * 0.01


# -- attention --------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return torch.ops.fastpar.attention(q, k, v, mask, **options)


def rotary(s: State, q: Tensor, kind: str, rows: int) -> Tensor:
    """Rotate pairs of channels of [B, H, S, D] by tables over rows."""
    d = q.shape[-1]
    if kind == "half":
        cos, sin = s.make.user(rows, d), s.make.user(rows, d)
        a, b = q.chunk(2, -1)
        return q * cos + torch.cat([-b, a], -1) * sin
    if kind == "pairs":
        angle = torch.arange(rows, dtype=q.dtype)[:, None] * s.make.weight(d // 2)
        a, b = q.unflatten(-1, (d // 2, 2)).unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)
    if kind == "complex":
        table = torch.complex(s.make.user(1, 1, rows, d // 2), s.make.user(1, 1, rows, d // 2))
        turned = torch.view_as_complex(q.reshape(*q.shape[:-1], d // 2, 2)) * table
        return torch.view_as_real(turned).flatten(-2)
    return q


def make_mask(s: State, kind: str, shape: tuple[int, ...], bits: int, drop: int) -> Tensor | None:
    """A mask that broadcasts to ``shape`` [B, H, S, T]: bit i of ``bits`` keeps dimension i."""
    if kind == "none":
        return None
    if kind == "tokens":  # a mask of valid keys, made pairwise in the graph
        valid = s.make.flags(shape[0], shape[-1])[:, None, None, :]
        return valid.expand(shape[0], 1, shape[-2], shape[-1]) if bits % 2 else valid
    return _values(s, kind, [n if bits >> i & 1 else 1 for i, n in enumerate(shape)][min(drop, len(shape) - 2) :])


def _values(s: State, kind: str, sizes: Sequence[int]) -> Tensor:
    if kind == "add":
        return s.make.user(*sizes)
    if kind == "inf":  # as a bias; a row may see no key at all, and then attention gives zero
        shown = s.make.flags(*sizes, blind=True)
        return torch.zeros(sizes, dtype=torch.float64).masked_fill(~shown, float("-inf"))
    return s.make.flags(*sizes, blind=kind == "blind")


MASKS: Option = ("none", "none", "bool", "add", "tokens", "blind", "inf")
BITS: Option = (8, 12, 13, 15, 4, 9, 10, 14, 0, 5)
ROPES: Option = ("none", "half", "pairs", "complex")


@into(BLOCKS, weight=4, mask=MASKS, bits=BITS, drop=(0, 1, 2), rope=ROPES, fused=NO_YES)
def self_attention(
    s: State, mask: str = "none", bits: int = 8, drop: int = 0, rope: str = "none", fused: bool = False
) -> None:
    b, n, c = s.x.shape
    x = s.norm(s.x)
    if fused:
        q, k, v = s.linear(x, 3 * c).chunk(3, -1)
    else:
        q, k, v = (s.linear(x, c) for _ in range(3))
    q, k, v = (s.split_heads(y) for y in (q, k, v))
    q, k = rotary(s, q, rope, n), rotary(s, k, rope, n)
    m = make_mask(s, mask, (b, s.heads, n, n), bits, drop)
    s.x = s.x + s.linear(merge_heads(attend(q, k, v, m)), c)


@into(BLOCKS, weight=2, kv=("grouped", "one", "shared", "same"), causal=NO_YES, pick=PICK, scale=(None, 0.3))
def odd_heads(s: State, kv: str = "grouped", causal: bool = False, pick: int = 0, scale: float | None = None) -> None:
    """Grouped heads, one K/V head for all, K/V without a batch; some causal."""
    b, n, c = s.x.shape
    x = s.norm(s.x)
    q = s.split_heads(s.linear(x, c))
    groups = {"grouped": picked(divisors(s.heads), pick), "one": 1, "shared": s.heads, "same": s.heads}[kv]
    source = x[:1] if kv == "shared" else x
    k, v = (s.split_heads(s.linear(source, groups * s.width), groups) for _ in range(2))
    if kv == "shared":
        k, v = (y.expand(b, -1, -1, -1) for y in (k, v))
    out = attend(q, k, v, causal=causal, scale=scale, gqa=kv == "grouped")
    s.x = s.x + s.linear(merge_heads(out), c)


@into(BLOCKS, merged=NO_YES, causal=NO_YES, mask=MASKS, bits=(3, 2, 7, 1))
def flat_attention(s: State, merged: bool = False, causal: bool = False, mask: str = "none", bits: int = 3) -> None:
    """q, k and v with three dimensions: one head, or heads merged with the batch."""
    b, n, c = s.x.shape
    q, k, v = (s.linear(s.norm(s.x), c) for _ in range(3))
    m = None
    if mask not in ("none", "tokens") and not causal:
        lead = b * s.heads if merged else b
        m = _values(s, mask, [m if bits >> i & 1 else 1 for i, m in enumerate((n, n, lead))][::-1])
    if merged:
        q, k, v = (s.split_heads(y).reshape(b * s.heads, n, s.width) for y in (q, k, v))
    out = attend(q, k, v, m, causal=causal)
    if merged:
        out = merge_heads(out.view(b, s.heads, n, s.width))
    s.x = s.x + s.linear(out, c)


@into(BLOCKS, weight=4, text_first=(True, False), cut=("exact", "across", "stride", "joint"), pick=PICK, mask=MASKS,
       bits=BITS, rope=ROPES, separate=NO_YES)  # fmt: skip
def joint_attention(
    s: State, text_first: bool = True, cut: str = "exact", pick: int = 0, mask: str = "none", bits: int = 8,
    rope: str = "none", separate: bool = False,
) -> None:  # fmt: skip
    """Text and image in one attention (SD3, FLUX); then cut where they meet, beside it, or with a step."""
    b, n, c = s.x.shape
    m = s.t.shape[1]
    pair = [s.norm(s.t), s.norm(s.x)] if text_first else [s.norm(s.x), s.norm(s.t)]
    if separate:
        qkv = [torch.cat([s.linear(y, c) for y in pair], 1) for _ in range(3)]
        q, k, v = (s.split_heads(y) for y in qkv)
    else:
        joined = torch.cat(pair, 1)
        q, k, v = (s.split_heads(s.linear(joined, c)) for _ in range(3))
    q, k = rotary(s, q, rope, n + m), rotary(s, k, rope, n + m)
    out = merge_heads(attend(q, k, v, make_mask(s, mask, (b, s.heads, n + m, n + m), bits, 0)))
    if cut == "joint":
        out = s.linear(out, c)
    first = m if text_first else n
    text, image = out[:, :first], out[:, first:]
    if not text_first:
        text, image = image, text
    if cut == "across":
        at = pick % (m + 1)
        image = out[:, at : at + n]
        text = out[:, n : n + m]
    elif cut == "stride":
        image = out[:, pick % 2 :: 2]
        image = image if image.shape[1] else out[:, ::2]
        s.x = image
        s.t = s.t + s.linear(text, c)
        return
    s.x = s.x + s.linear(image, c)
    s.t = s.t + s.linear(text, c)


@into(BLOCKS, weight=2, mask=MASKS, bits=BITS, pooled=NO_YES)
def cross_attention(s: State, mask: str = "none", bits: int = 8, pooled: bool = False) -> None:
    """Image rows against whole text keys; the text may have been pooled from the image before."""
    b, n, c = s.x.shape
    text = torch.cat([s.t, s.x.mean(1, keepdim=True)], 1) if pooled else s.t
    q = s.split_heads(s.linear(s.norm(s.x), c))
    k, v = (s.split_heads(s.linear(text, c)) for _ in range(2))
    m = make_mask(s, mask, (b, s.heads, n, text.shape[1]), bits, 0)
    s.x = s.x + s.linear(merge_heads(attend(q, k, v, m)), c)


@into(BLOCKS)
def text_attention(s: State) -> None:
    """The text reads the image (cross attention the other way), whole queries against split keys."""
    q = s.split_heads(s.linear(s.norm(s.t), s.channels))
    k, v = (s.split_heads(s.linear(s.norm(s.x), s.channels)) for _ in range(2))
    s.t = s.t + merge_heads(attend(q, k, v))
    s.x = s.x * (1 + 0.1 * s.t.mean(1, keepdim=True))


@into(BLOCKS, weight=2, pick=PICK, how=("merged", "five", "space", "time"))
def factorised(s: State, pick: int = 0, how: str = "merged") -> None:
    """[B, F, S, C]: attention over space, then over time (Latte, video U-Nets)."""
    b, n, c = s.x.shape
    f = picked(divisors(n), pick)
    x = s.norm(s.x).view(b, f, n // f, c)
    if how != "time":
        q, k, v = (s.split_heads(s.linear(x, c)) for _ in range(3))  # [B, F, H, P, D]
        if how == "merged":
            q, k, v = (y.reshape(b * f, s.heads, n // f, s.width) for y in (q, k, v))
        x = x + s.linear(merge_heads(attend(q, k, v)).reshape(b, f, n // f, c), c)
    if how != "space":
        y = x.transpose(1, 2)
        q, k, v = (s.split_heads(s.linear(y, c)) for _ in range(3))
        if how == "merged":
            q, k, v = (z.reshape(b * (n // f), s.heads, f, s.width) for z in (q, k, v))
        x = x + s.linear(merge_heads(attend(q, k, v)).reshape(b, n // f, f, c), c).transpose(1, 2)
    s.x = s.x + x.reshape(b, n, c)


@into(BLOCKS, weight=2, how=("matmul", "bmm", "baddbmm", "columns", "capped"),
       mask=("none", "bias", "hidden", "padding", "temperature"))
def decomposed(s: State, how: str = "matmul", mask: str = "none") -> None:
    """Scores, softmax and product written out. Where the scores are capped, they are no attention."""
    b, n, c = s.x.shape
    q, k, v = (s.split_heads(s.linear(s.norm(s.x), c)) for _ in range(3))
    if how in ("bmm", "baddbmm", "columns"):
        q, k, v = (y.reshape(b * s.heads, n, s.width) for y in (q, k, v))
    if how == "baddbmm":
        scores = torch.baddbmm(s.make.user(1, 1, n), q, k.transpose(-1, -2), beta=1, alpha=0.4)
    elif how == "columns":
        scores = (k @ q.transpose(-1, -2)).transpose(-1, -2) / 2
    else:
        scores = q @ k.transpose(-1, -2) * 0.4
    if how == "capped":
        scores = 3 * torch.tanh(scores / 3)
    if mask == "bias":
        scores = scores + s.make.user(n, n)
    elif mask == "hidden":  # from some queries all keys
        scores = scores.masked_fill(s.make.user(n, n) > 0.5, -1e9)
    elif mask == "padding":
        scores = scores.masked_fill(s.make.user(n) > 0.5, -1e9) * 0.5
    elif mask == "temperature":
        scores = scores * s.make.user(n, 1)
    out = scores.softmax(-1) @ v
    s.x = s.x + s.linear(merge_heads(out.reshape(b, s.heads, n, s.width)), c)


@into(BLOCKS, weight=2, normalised=NO_YES)
def linear_attention(s: State, normalised: bool = False) -> None:
    """K^T V first (Sana): a sum over all tokens."""
    b, n, c = s.x.shape
    q, k, v = (s.split_heads(s.linear(s.norm(s.x), c)) for _ in range(3))
    q, k = F.relu(q), F.relu(k)
    out = q @ (k.transpose(-1, -2) @ v)
    if normalised:
        out = out / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 1.0)
    else:
        out = out / n
    s.x = s.x + s.linear(merge_heads(out), c)


@into(BLOCKS)
def guidance(s: State) -> None:
    """The batch doubled, one attention over both, and the two halves combined."""
    x = torch.cat([s.x, s.x * s.make.weight(s.channels)], 0)
    q, k, v = (s.split_heads(s.linear(s.norm(x), s.channels)) for _ in range(3))
    a, b = merge_heads(attend(q, k, v)).chunk(2)
    s.x = s.x + a + 1.5 * (b - a)
