"""Mutants of what runs a program: captured graphs, compiled code, one-sided exchanges, the choice of a plan."""

from __future__ import annotations

from tests.mutants.mutant import Mutant


def graphs(words: str) -> tuple[str, ...]:
    return ("tests/test_cudagraph.py", "-k", words)


def onesided(words: str) -> tuple[str, ...]:
    return ("tests/test_onesided.py", "-k", words)


def memory(words: str) -> tuple[str, ...]:
    return ("tests/test_onesided_memory.py", "-k", words)


def ranges(words: str) -> tuple[str, ...]:
    return ("tests/test_ranges.py", "-k", words)


MUTANTS = (
    Mutant(
        "cudagraph: results stay in the graph's memory", "backends/cudagraph/captured.py",
        "return result.clone() if isinstance(result, torch.Tensor) else result", "return result", graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: what the user passes is read where it was", "backends/cudagraph/captured.py",
        "            _once(own).copy_(_once(args[i]))", "            pass", graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: a weight that moved is read where it was", "backends/cudagraph/captured.py",
        "return bool(moved)", "return False", graphs("weight_that_moves"),
    ),
    Mutant(
        "cudagraph: the call that captures runs before it as well", "backends/cudagraph/captured.py",
        "        try:\n            self.replay, self.results",
        "        self.device.aside(lambda: self.run(list(static)), [])\n"
        "        try:\n            self.replay, self.results",
        graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: state is taken for the same whatever comes", "backends/cudagraph/captured.py",
        "if i in self.seen and self.seen[i]() is args[i]:", "if i in self.seen:", graphs("state"),
    ),
    Mutant(
        "cudagraph: process groups end before graphs do", "fastpar/run/capturing.py",
        "        release(talking=True)\n        return inner(*args, **kwargs)",
        "        inner(*args, **kwargs)\n        return release(talking=True)", graphs("before_process_groups"),
    ),
    Mutant(
        "cudagraph: steps that queue up share one limit", "backends/cudagraph/cuda.py",
        "                    self._line.popleft()\n                    self._since = time.monotonic()",
        "                    self._line.popleft()", graphs("queue_up"),
    ),
    Mutant(
        "cache: the key leaves out what a program was made from", "backends/cache.py",
        '{source_hash()} {program.origin} "', '{source_hash()} "', ("tests/test_cache.py", "-k", "key_sees"),
    ),
    Mutant(
        "auto: a schedule that is slower overturns the prediction", "fastpar/plan/planner.py",
        "if best == was or seconds[best] >=", "if best == was or seconds[best] <=",
        ("tests/test_planner.py", "-k", "schedule_does"),
    ),
    # -- one-sided exchanges
    Mutant(
        "a flag is raised before its data", "backends/onesided/heap.py",
        "        with self.sending(channel):\n",
        "        self.raise_flags([(p, self.message_flag(channel, self.rank)) for p, *_ in pieces if p != self.rank])\n"
        "        import time; time.sleep(0.002)\n        with self.sending(channel):\n",
        memory("real_heaps"),
    ),
    Mutant(
        "no credit where one is needed", "backends/onesided/order.py",
        "if self.beside[rank, reader] < event:", "if self.beside[rank, reader] < event and lag:",
        onesided("overwrites or every_credit"),
    ),
    Mutant(
        "no credits between calls", "backends/onesided/order.py",
        "if read is None or lag > call:", "if read is None or lag:", onesided("overwrites or every_credit"),
    ),
    Mutant(
        "what a put waited for is known to the program at once", "backends/onesided/order.py",
        "            np.maximum(self.beside[rank], knowledge, out=self.beside[rank])\n",
        "            np.maximum(self.beside[rank], knowledge, out=self.beside[rank])\n"
        "            np.maximum(self.known[rank], knowledge, out=self.known[rank])\n",
        onesided("what_a_put_waits_for"),
    ),
    Mutant(
        "a flag of the call before will do", "backends/onesided/shared.py",
        "wanted = self.flags[self.rank], self.calls - lag", "wanted = self.flags[self.rank], self.calls - lag - 1",
        memory("belong or never_comes"),
    ),
    Mutant(
        "a piece goes to the start of the slot", "backends/onesided/rewrite.py",
        "offset = slots.offsets[channel] + traffic.pieces(channel, peer)[rank][0]", "offset = slots.offsets[channel]",
        onesided("every_plan"),
    ),
    Mutant(
        "all ranks are taken to exchange what the first one does", "backends/onesided/skeleton.py",
        "[_skeleton(steps, mesh, rank) for", "[_skeleton(steps, mesh, 0) for", onesided("without_their"),
    ),
    Mutant(
        "exchanges are thought to be waited for at the end", "backends/onesided/skeleton.py",
        "elif read := [number[x] for x in node.all_input_nodes if x in number]:", "elif read := []:",
        onesided("without_their"),
    ),
    Mutant(
        "ranges: a program has the names of code in the cache", "backends/ranges.py",
        "names.nodes[number] = label(node), ", "names.nodes[number] = 'blocks_.0', ", ranges("from_the_cache"),
    ),
    Mutant(
        "ranges: what passes insert belongs to no module", "fastpar/core/inherit.py",
        'OF_THE_MODEL = ("stack_trace", "module")', 'OF_THE_MODEL = ("stack_trace",)', ranges("belong_to_modules"),
    ),
    Mutant(
        "slots of messages under way overlap", "backends/onesided/slots.py",
        "if low - at >= size:", "if low - at >= size // 2:", onesided("every_plan or overwrites"),
    ),
    Mutant(
        "the second half of a sum takes the first one's piece", "backends/onesided/skeleton.py",
        "side(1, [(peer, 0, chunks[me]) for peer in group], chunks)",
        "side(1, [(peer, 0, chunks[0]) for peer in group], [chunks[0]] * n)", onesided("sums"),
    ),
    Mutant(
        "a message that is missing is not told", "backends/onesided/symmetric.py",
        "self.told.copy_(self.failed", "self.told.copy_(self.told", memory("interpreter"),
    ),
    Mutant(
        "whatever ranks are called with is the same", "fastpar/run/alike.py",
        "    if not all((p - q) ** 2", "    if all((p - q) ** 2", ("tests/test_alike.py", "-k", "values or noise"),
    ),
    Mutant(
        "parts of weights are compared", "fastpar/run/alike.py",
        'elif not (held and given.kind == "parameter"):', "else:", ("tests/test_alike.py", "-k", "parts"),
    ),
    Mutant(
        "every call is compared", "fastpar/run/alike.py",
        "            seen.append(True)\n", "", ("tests/test_alike.py", "-k", "first_call"),
    ),
)  # fmt: skip
