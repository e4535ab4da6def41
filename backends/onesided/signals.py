"""The kernel that waits for flags on a GPU.

One program of one warp looks at one flag after the other, in the memory of its own GPU. What it waits for is a number
that lies on the device as well, so a captured graph that is replayed waits for a new one every time; a number in the
launch (as ``cuStreamWaitValue`` takes it, or a pad that goes from 0 to 1 and back) would be that of the capture.
"""

from __future__ import annotations

from fastpar.backends.kernels.launch import jit, tl


@jit
def await_kernel(
    flags, epoch, which, pieces, memory, failed, lag, limit, COUNT: tl.constexpr, PIECES: tl.constexpr,
    CLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns when every ``flags[which[i]]`` has reached ``epoch - lag``, or ``limit`` is over.

    ``limit`` is in nanoseconds, or in looks where there is no CLOCK (in the interpreter). A flag that does not come is
    named in ``failed`` (its number plus 1), its piece (offset and bytes, in ``pieces``) becomes NaN, and from then on
    nobody waits any more: a kernel that spins for ever could not be told of.
    """
    wanted = tl.load(epoch) - lag
    patience = tl.where(tl.load(failed) == 0, limit, 0)
    for i in range(COUNT):
        flag = tl.load(which + i)
        seen = tl.atomic_add(flags + flag, 0, sem="acquire", scope="sys")
        if CLOCK:
            begin = tl.extra.cuda.globaltimer()
            passed = begin - begin
        else:
            passed = limit - limit
        while (seen < wanted) & (passed < patience):
            seen = tl.atomic_add(flags + flag, 0, sem="acquire", scope="sys")
            if CLOCK:
                passed = tl.extra.cuda.globaltimer() - begin
            else:
                passed += 1
        if seen < wanted:
            if tl.load(failed) == 0:
                tl.store(failed, flag + 1)
            if PIECES:
                start, size = tl.load(pieces + 2 * i), tl.load(pieces + 2 * i + 1)
                at = size - size
                while at < size:
                    offsets = at + tl.arange(0, BLOCK)
                    tl.store(memory + start + offsets, tl.full([BLOCK], 255, tl.uint8), mask=offsets < size)
                    at += BLOCK
