"""The checksum by which hoisted values are known to be current: what it notices, in every dtype and memory order."""

from __future__ import annotations

import pytest
import torch

from fastpar.ops.checksum import checksum_of, checksums

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (70, 129), (2, 3, 4099)])
def test_the_checksum_notices(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.complex64) if dtype.is_complex else 9 * torch.randn(shape)).to(dtype)
    x.view(-1)[0], x.view(-1)[1] = 1, 0
    mine = checksum_of(x)
    assert torch.equal(mine, checksum_of(x.clone()))
    other = [x.flip(-1), x.roll(1, 0), x.clone()]
    other[2].view(-1)[-1] = 0 if x.view(-1)[-1] != 0 else 1
    other += [x.clone()]
    other[3].view(-1)[[0, 1]] = x.view(-1)[[1, 0]]
    if dtype.is_floating_point or dtype.is_complex:
        for signs in ([0], [0, 2], [0, 2, 3, 5], list(range(x.numel()))):  # of one, of pairs, of all
            other.append(x.clone())
            other[-1].view(-1)[signs] *= -1
    different = [o for o in other if not torch.equal(o, x)]
    assert int(mine) not in checksums(different).tolist()
    assert len(different) >= 3


def test_the_checksum_of_views_with_gaps_offsets_and_other_orders() -> None:
    base = torch.randn(6, 11, 13)
    for view in (base[1:, 2:, 1:], base.permute(2, 0, 1), base[:1].expand(6, 11, 13), base[..., ::2], base[3, 3, 3],
                 base[:0], base.bfloat16()[0, 1:, :]):  # fmt: skip
        mine = checksum_of(view)
        assert mine.shape == () and mine.dtype == torch.int64
        if view.numel():
            changed = view.clone(memory_format=torch.preserve_format)
            assert torch.equal(checksum_of(changed), checksum_of(changed.clone(memory_format=torch.preserve_format)))
            changed.view(-1)[-1:].neg_() if changed.is_contiguous() else changed.select(0, -1).neg_()
            assert not torch.equal(checksum_of(changed), mine)
