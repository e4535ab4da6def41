"""Mutants of what decides a program: layouts, rules, passes, the simulator, the clock."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LAYOUT, CASES = "tests/test_layout.py", "tests/test_cases.py"


def layout(words: str) -> tuple[str, ...]:
    return (LAYOUT, "-k", words)


def plan(name: str) -> tuple[str, ...]:
    return (f"{CASES}::test_plan[{name}]",)


def operator(name: str) -> tuple[str, ...]:
    return (f"{CASES}::test_operator[{name}]",)


def tp(words: str) -> tuple[str, ...]:
    return ("tests/test_tp.py", "-k", words)


def fp8(words: str) -> tuple[str, ...]:
    return ("tests/test_fp8.py", "-k", words)


def index(words: str) -> tuple[str, ...]:
    return ("tests/test_index.py", "-k", words)


MUTANTS = (
    # -- which rows a rank has
    Mutant(
        "segments of a dimension in another order on the ranks", "fastpar/core/layout.py",
        "local = np.concatenate(pieces) if", "local = np.concatenate(pieces[::-1]) if",
        plan("joint attention, uneven, one text token"),
    ),
    Mutant(
        "a product of factors runs the wrong way", "fastpar/core/layout.py",
        "index = (index[:, None] * atom.size + local[None, :]).reshape(-1)",
        "index = (index[None, :] * atom.size + local[:, None]).reshape(-1)", layout("regroups"),
    ),
    Mutant(
        "a segment's rows lose their offset", "fastpar/core/layout.py",
        "np.arange(offset + start, offset + start + length", "np.arange(start, start + length", layout("redistribute"),
    ),
    Mutant(
        "the remainder goes to the last ranks", "fastpar/core/layout.py",
        "(held[rank] + parts[rank] + 1) / shares[rank], rank)", "(held[rank] + parts[rank] + 1) / shares[rank], -rank)",
        layout("examples"),
    ),
    Mutant(
        "parts that adjoin are not joined", "passes/attention_ulysses.py",
        "step = mesh.size(seg.axes) // mesh.size(kept)", "step = 1",
        plan("grouped heads in a ring"),
    ),
    Mutant(
        "what was the host's is returned on the accelerator", "fastpar/graph/devices.py",
        "if isinstance(before, torch.Tensor) and now.device != before.device:", "if before is None:",
        ("tests/test_devices.py",),
    ),
    # -- slices and copies
    Mutant(
        "a part off by one in a slice", "fastpar/core/regroup.py",
        "max(0, -(-(low - start) // step))", "max(0, (low - start) // step)", layout("slices"),
    ),
    Mutant(
        "a slice keeps one row too many", "fastpar/rules/views.py",
        "(rows >= start) & (rows < stop)", "(rows >= start) & (rows <= stop)",
        plan("text in front and behind, cut across"),
    ),
    Mutant(
        "a slice with a step takes any rows for a slice", "fastpar/rules/views.py",
        "np.diff(_kept(dim, start, stop, step, mesh, rank)) == step)",
        "np.diff(_kept(dim, start, stop, step, mesh, rank)) > 0)", operator("slices with a step of several segments"),
    ),
    Mutant(
        "copies stand behind the rows instead of in front", "fastpar/rules/views.py",
        "Dim.of([Atom((Seg(int(r)),)), *dim.atoms])", "Dim.of([*dim.atoms, Atom((Seg(int(r)),))])",
        operator("copies in front of every dimension"),
    ),
    # -- sums
    Mutant(
        "text counted once per rank", "fastpar/core/regroup.py",
        "{*seg.axes} == atom.axes and not seg.offsets", "not seg.offsets",
        operator("a sum over rows that some ranks hold and rows that all hold"),
    ),
    Mutant(
        "rows that some ranks share count once for each", "fastpar/core/regroup.py",
        "{*seg.axes} == atom.axes and not seg.offsets", "seg.axes and not seg.offsets",
        (f"{CASES}::test_text_that_several_ranks_have_is_attended_once",),
    ),
    Mutant(
        "a split sum is not marked partial", "fastpar/rules/factor.py",
        "partial = [Partial(op, mesh.ordered(axes)) for op, axes in over.items()]", "partial = []",
        plan("linear attention"),
    ),
    Mutant(
        "a contracted factor leaves no partial value", "fastpar/rules/matmul.py",
        '(("b", "m", "n"),), reduced={"k": "sum"})', '(("b", "m", "n"),))', plan("linear attention"),
    ),
    Mutant(
        "rows and columns of a product swapped", "fastpar/rules/matmul.py",
        'return Factors((("m", "k"), ("k", "n")), (("m", "n"),), reduced={"k": "sum"})',
        'return Factors((("m", "k"), ("k", "n")), (("n", "m"),), reduced={"k": "sum"})',
        operator("products over a split dimension"),
    ),
    Mutant(
        "a mean divided by the rank's own count", "fastpar/sharding/expand_reduce.py",
        "dims, keepdim, dtype=dtype), 1.0 / count)",
        "dims, keepdim, dtype=dtype), 1.0 / math.prod(layouts[0].local_shape(mesh, 0)[d] for d in dims))",
        plan("means over uneven rows"),
    ),
    Mutant(
        "the all-reduce is left out", "passes/lower.py",
        "x = collective(all_reduce,", "collective(all_reduce,", plan("linear attention"),
    ),
    # -- attention
    Mutant(
        "a causal mask forgets the scale", "fastpar/sharding/expand.py",
        "attention.default(q, k, v, mask, False, scale, gqa)", "attention.default(q, k, v, mask, False, None, gqa)",
        plan("causal with a scale of its own"),
    ),
    Mutant(
        "a causal row does not see itself", "fastpar/sharding/expand.py",
        ".view(rows, 1) >= torch.arange", ".view(rows, 1) > torch.arange", plan("causal with a scale of its own"),
    ),
    Mutant(
        "the mask stays where it was", "passes/attention_ulysses.py",
        'args[3] = redistributed(node, args[3], mask, "mask")', "pass", plan("a mask of rows and heads"),
    ),
    Mutant(
        "the mask's rows do not follow the queries", "fastpar/rules/attention.py",
        "dims.append(dim if dim is not None and dim.size == size > 1 else Dim.whole(size))",
        "dims.append(Dim.whole(size))", plan("a mask of rows and heads"),
    ),
    Mutant(
        "query heads cut without regard to their groups", "passes/attention_ulysses.py",
        "return Dim.shared(dim.size, spent, mesh, unit)", "return Dim.shared(dim.size, spent, mesh)",
        plan("grouped heads that do not divide"),
    ),
    Mutant(
        "as many key heads as query heads on a rank", "fastpar/rules/attention.py",
        "group, seg = dim.size // size, atom.segs[0]", "group, seg = 1, atom.segs[0]",
        plan("grouped heads that do not divide"),
    ),
    # -- weights that are cut
    Mutant(
        "every chunk of a fused weight cut like the first", "fastpar/sharding/weights.py",
        "replace(pos, start=pos.start + start)", "replace(pos, start=pos.start)", tp("chunks"),
    ),
    Mutant(
        "rows of a weight cut where its columns are", "fastpar/rules/spatial.py",
        "filters = Pos(0, pos.outer", "filters = Pos(1, pos.outer", tp("convolutions"),
    ),
    Mutant(
        "products give columns and contract rows at once", "fastpar/sharding/weights.py",
        "if a.columns & b.rows or a.rows & b.columns or a.rows & b.rows:", "if a.rows & b.rows:", tp("closed_form"),
    ),
    Mutant(
        "a bias added by every rank", "fastpar/sharding/expand.py",
        "out = written_padded(x, w, None, stride", "out = written_padded(x, w, b, stride", tp("convolutions"),
    ),
    Mutant(
        "weights cut inside a head", "fastpar/sharding/weights.py",
        "factor.grains = math.gcd(factor.grains, pos.size)", "factor.grains = pos.size * pos.inner", tp("chunks"),
    ),
    Mutant(
        "channels cut inside a group", "fastpar/rules/spatial.py",
        "pos.size % count == 0:", "pos.size < 0:", tp("convolutions"),
    ),
    Mutant(
        "a part of a weight read from its start", "fastpar/run/weights.py",
        "slice(boxes[d][i][0], sum(boxes[d][i]))", "slice(0, boxes[d][i][1])",
        ("tests/test_shard_weights.py", "-k", "memory_and_from_a_file"),
    ),
    # -- the ring
    Mutant(
        "the mask's columns stay those of the first step", "passes/attention_ring.py",
        "self.come[step], self._keys(step)", "self.come[step], self._keys(0)",
        plan("a mask of rows and keys on a ring"),
    ),
    Mutant(
        "the ring ends one step early", "passes/attention_ring.py",
        "for step in range(self.steps):", "for step in range(self.steps - 1):",
        plan("a mask of rows and keys on a ring"),
    ),
    Mutant(
        "a ring passes on to the wrong rank", "passes/attention_ring.py",
        "(c - steps) % n", "(c - steps // 2) % n", plan("a mask of rows and keys on a ring"),
    ),
    Mutant(
        "one block attended twice", "passes/attention_ring.py",
        "self.attend(self.q, self.come[step],", "self.attend(self.q, self.come[step and step - 1],",
        plan("an empty block of keys on a ring"),
    ),
    Mutant(
        "what is for one peer goes to the one before it", "fastpar/core/transfer.py",
        "sends = tuple(_boxes(src, dst, mesh, rank, peer) for peer in group)",
        "sends = tuple(_boxes(src, dst, mesh, rank, peer) for peer in (*group[1:], group[0]))",
        plan("a mask of rows and keys on a ring"),
    ),
    Mutant(
        "blocks are merged by the larger of their sums", "fastpar/ops/ring.py",
        "total = torch.logaddexp(lse, block_lse)", "total = torch.maximum(lse, block_lse)",
        plan("a mask of rows and keys on a ring"),
    ),
    Mutant(
        "what a kernel gives for a row without keys is believed", "fastpar/ops/ring.py",
        "out = out.masked_fill(blind[..., None], 0.0)", "pass",
        ("tests/test_kernels.py", "-k", "not_believed"),
    ),
    Mutant(
        "only masks of True and False hide keys", "fastpar/ops/ring.py",
        "shown = mask if mask.dtype == torch.bool else mask > -math.inf",
        "shown = mask if mask.dtype == torch.bool else torch.ones_like(mask, dtype=torch.bool)",
        ("tests/test_kernels.py", "-k", "hidden_blocks"),
    ),
    Mutant(
        "what is proved lies in another order than what was placed", "fastpar/run/build.py",
        "mesh = mesh_for(plan, program.graph, order)", "mesh = mesh_for(plan, program.graph)",
        ("tests/test_planner.py", "-k", "places_it"),
    ),
    Mutant(
        "an empty block counts as a key", "fastpar/ops/ring.py",
        "empty = q.new_full(shape, -math.inf, dtype=wide)", "empty = q.new_full(shape, 0.0, dtype=wide)",
        plan("an empty block of keys on a ring"),
    ),
    Mutant(
        "a row that sees no key weighs in the merge", "fastpar/ops/ring.py",
        "lse = lse.masked_fill(blind, -math.inf)", "lse = lse.masked_fill(blind, 0.0)",
        plan("rows that see no key on a ring"),
    ),
    Mutant(
        "neither total nor block has a key, and -inf minus -inf is weighed", "fastpar/ops/ring.py",
        "base = total.masked_fill(total == -math.inf, 0.0)", "base = total", plan("rows that see no key on a ring"),
    ),
    # -- the torus
    Mutant(
        "outputs are pushed a stage before they are complete", "passes/attention_torus.py",
        "block, last = following, stage + 1 == self.stages", "block, last = following, stage == 1",
        plan("heads in stages between machines"),
    ),
    Mutant(
        "the stages of keys in another order than their mask", "passes/attention_torus.py",
        "columns = Dim.whole(self.keys.size) if self.over else rotated(self.keys, stage,",
        "columns = Dim.whole(self.keys.size) if self.over else rotated(self.keys, -stage,",
        plan("heads in stages between machines"),
    ),
    Mutant(
        "the same keys are pulled again", "passes/attention_torus.py",
        "following = self._pull(stage + 1)", "following = self._pull(stage)", plan("heads in stages between machines"),
    ),
    Mutant(
        "queries of the first stage in every stage", "passes/attention_torus.py",
        "queries.append(self._queries(i + 1))", "queries.append(self._queries(0))",
        plan("heads in stages between machines"),
    ),
    Mutant(
        "outputs are pushed to the wrong machine", "passes/attention_torus.py",
        "rotated(self.heads[-1], -stage,", "rotated(self.heads[-1], stage,", plan("heads in stages between machines"),
    ),
    Mutant(
        "heads are put together in the order in which they came", "fastpar/ops/join.py",
        "order = sorted((i for i, rows in enumerate(held) if len(rows)), key=lambda i: int(held[i][0]))",
        "order = [i for i, rows in enumerate(held) if len(rows)]", plan("heads in stages between machines"),
    ),
    Mutant(
        "a text that is too short to be split stands in every stage", "passes/attention_ring.py",
        "        if not over:\n", "        if not over or seg.size == 1:\n",
        plan("joint attention in stages, one text token"),
    ),
    Mutant(
        "the keys of one machine's ring for all machines", "passes/attention_ring.py",
        "rounds.setdefault((self.k, self.v), {0: (self.k, self.v)})",
        "rounds.setdefault(self.axes, {0: (self.k, self.v)})  # type: ignore[call-overload]",
        plan("a ring inside the machines of a torus"),
    ),
    Mutant(
        "a ring inside turns between machines", "passes/attention_ring.py",
        "return rotated(self.keys, step, self.mesh, self.axes)", "return rotated(self.keys, step, self.mesh)",
        plan("a ring inside the machines of a torus"),
    ),
    # -- windows
    Mutant(
        "a halo is one row short", "fastpar/rules/spatial.py",
        "(n - 1) * stride + reach if n", "(n - 1) * stride + reach - 1 if n", plan("a convolution over uneven rows"),
    ),
    Mutant(
        "every rank pads", "fastpar/rules/spatial.py",
        "(before if at == 0 else 0)", "before", plan("a convolution over uneven rows"),
    ),
    # -- who sends what to whom
    Mutant(
        "boxes are received in another order than they are sent", "fastpar/ops/collectives.py",
        "return [n for p in range(len(self.group)) for n in self.receive_boxes_from(p)]",
        "return [n for p in reversed(range(len(self.group))) for n in self.receive_boxes_from(p)]", layout("exchange"),
    ),
    Mutant(
        "every box from the start of what its owner holds", "fastpar/core/transfer.py",
        "src_row + row - bounds[i]", "src_row", layout("exchange"),
    ),
    Mutant(
        "replicas send what one of them should", "fastpar/core/transfer.py",
        "if mesh.coordinate(source, free) != mesh.coordinate(target, free):", "if False:", layout("exchange"),
    ),
    Mutant(
        "two changes of layout joined to the middle one", "passes/cancel.py",
        "node.args = (inner.args[0], str(src), str(dst))", "node.args = (inner.args[0], str(src), str(middle))",
        (f"{CASES}::test_an_attention_on_the_result_of_another_keeps_its_heads",),
    ),
    Mutant(
        "rank 0's sizes for every rank", "passes/localise.py",
        "self.localiser = Localiser(mesh)",
        "self.localiser = Localiser(mesh); one = self.localiser.call; self.localiser.call = lambda n, r: one(n, 0)",
        plan("joint attention, uneven, one text token"),
    ),
    # -- what is not sent, and what is predicted
    Mutant(
        "own sums are not scaled to all ranks", "fastpar/ops/alone.py", "        scale *= n\n", "        scale *= 1\n",
        ("tests/test_naive.py", "-k", "as_if_it_were_the_image"),
    ),
    Mutant(
        "rows turned round stay where they were counted", "fastpar/rules/views.py",
        "seg.size - start - part for", "start for", operator("rows turned round and rolled"),
    ),
    Mutant(
        "a sum over split rows is the rank's own largest", "fastpar/sharding/expand_reduce.py",
        "        total = aten.sum.dim_IntList(e, [d], True)\n", "        total = aten.amax.default(e, [d], True)\n",
        operator("softmax and its logarithm along split rows"),
    ),
    Mutant(
        "a variance about zero", "fastpar/ops/moments.py",
        "(square - mean * mean)", "square",
        operator("deviations and norms along split rows"),
    ),
    Mutant(
        "a machine's link for each of its devices", "fastpar/plan/topology.py",
        "np.bincount(end[crosses], size[crosses]).max()", "size[crosses].max()",
        ("tests/test_planner.py", "-k", "shared_by_its_devices"),
    ),
    Mutant(
        "a wait ends when the exchange starts", "fastpar/plan/engine.py",
        "exchange.end = self.now", "exchange.end = exchange.begin",
        ("tests/test_clock.py", "-k", "prediction_agree"),
    ),
    Mutant(
        "every exchange has its links alone", "fastpar/plan/links.py",
        "found[i] = min(found[i], levels[link] / loads[i].links[link])", "found[i] = 1.0",
        ("tests/test_clock.py", "-k", "twice_as_long"),
    ),
    Mutant(
        "an exchange does not wait for its stream", "fastpar/plan/engine.py",
        "or any(r.queues[axes][0] is not exchange for r, axes in members)", "",
        ("tests/test_clock.py", "-k", "one_after_the_other"),
    ),
    # -- what pays
    Mutant(
        "hoist: a check costs nothing", "passes/hoist.py", "saved.get(n, 0.0) - cost.get(n, 0.0)", "saved.get(n, 0.0)",
        ("tests/test_hoist_pays.py", "-k", "costs_more"),
    ),
    Mutant(
        "hoist: whole weights are checked", "fastpar/graph/prologue.py",
        "return parts if sum(map(size, parts)) < size(given) else [given]", "return [given]",
        ("tests/test_hoist_pays.py", "-k", "only_the_part"),
    ),
    Mutant(
        "hoist: what is free comes without what it needs", "passes/hoist.py",
        "worth[node] >= 0 and all(m in found for m in needs.get(node, ()))", "worth[node] >= 0",
        ("tests/test_hoist_pays.py", "-k", "costs_more or nothing_pays"),
    ),
    # -- what travels in 8 bits
    Mutant(
        "hoist: ranks that check different parts do not agree", "fastpar/graph/prologue.py",
        "return any(isinstance(layout, Layout) and bool(layout.split_axes) for layout in layouts)", "return False",
        ("tests/test_hoist_pays.py", "-k", "only_the_part"),
    ),
    Mutant(
        "hoist: what hides exchanges goes", "passes/hoist.py",
        "if check + after > (1 + SLACK) * (before + fused):", "if False:",
        ("tests/test_hoist_pays.py", "-k", "hides"),
    ),
    Mutant(
        "split-weights: what hides exchanges is shared out", "passes/split_weights.py",
        "if takes <= (1 + SLACK) * seconds or self.always:", "if True:",
        ("tests/test_split_weights.py", "-k", "hides"),
    ),
    Mutant(
        "ring: rows that a large number hides are added up", "fastpar/sharding/blockwise.py",
        "torch.finfo(accumulated(dtype)).eps > 1", "torch.finfo(accumulated(dtype)).eps < 0",
        ("tests/test_ring.py", "-k", "large_number and shape0"),
    ),
    Mutant(
        "ring: queries stay where their scores are lost", "fastpar/sharding/blockwise.py",
        "(q, lost, 0.0), queries)", "(q, kept, 0.0), queries)",
        ("tests/test_ring.py", "-k", "large_number and shape0"),
    ),
    Mutant(
        "band: a window lacks its last row", "fastpar/rules/band.py",
        "max(at) + found.width - min(at) if at else 0", "max(at) + max(found.width - 1, 1) - min(at) if at else 0",
        ("tests/test_spatial.py", "-k", "bilinear"),
    ),
    Mutant(
        "band: numbers from outside a window count", "fastpar/ops/band.py",
        ".masked_fill(weight == 0, lowest if largest else 0.0)", "",
        ("tests/test_band.py",),
    ),
    Mutant(
        "fp8: the receiver's scale", "fastpar/ops/quantize.py", "scale.view(torch.float32).to(wide)",
        "scale.view(torch.float32).to(wide).flatten()[0]", fp8("magnitudes or format"),
    ),
    Mutant(
        "fp8: the scale is not sent", "fastpar/ops/quantize.py", "torch.cat([codes, scale.view",
        "torch.cat([codes, torch.ones_like(scale).view", fp8("magnitudes or format"),
    ),
    Mutant(
        "fp8: infinity arrives as the largest number", "fastpar/ops/quantize.py",
        "units.masked_fill(~torch.isfinite(x), torch.nan)", "units", fp8("not_finite"),
    ),
    Mutant(
        "fp8: a scale is not counted", "fastpar/ops/quantize.py", "return min(width + SCALE_BYTES,",
        "return min(width,", fp8("formula"),
    ),
    Mutant(
        "fp8: K as well, although not asked for", "passes/quantize.py",
        "asked = fp8_letters(self.what)", 'asked = fp8_letters("".join({*self.what, "k"}))', fp8("keys"),
    ),
    Mutant(
        "fp8: what stays on its rank is not rounded", "passes/quantize.py", "            if here:\n",
        "            if here and not here:\n", fp8("one_rounded_function and ring"),
    ),
    Mutant(
        "fp8: numbers are made before they are needed", "passes/quantize.py", "self._apply(x, users, back,",
        "self._apply(x, [x] if x in self.bytes else users, back,", fp8("golden"),
    ),
    # -- rows by index, and what is written out
    Mutant(
        "held rows: digits of a merged dimension are not weighed", "fastpar/ops/held.py",
        "place * before + among", "place + among", index("add_up"),
    ),
    Mutant(
        "held rows: a row that does not exist is read as zeros", "fastpar/ops/held.py",
        "place, count + 1)", "place, count)", index("does_not_exist"),
    ),
    Mutant(
        "an index reads a small table as often as it is asked to", "fastpar/rules/index.py",
        ">= call.bytes(0):", ">= 2**62:", index("few_rows"),
    ),
    Mutant(
        "a reduce-scatter counts as an all-reduce", "fastpar/core/transfer.py",
        "*(by_terms or (src, dst))", "*(src, dst)", index("one_exchange"),
    ),
    Mutant(
        "values are turned where gathering them is less", "fastpar/rules/factor.py",
        "if taken or moved + back >= ranks * moved:", "if taken:",
        ("tests/test_written_out.py", "-k", "two_ranks"),
    ),
    Mutant(
        "a loop over rows gathers them", "fastpar/sharding/expand_rows.py",
        "if beside is None:", "if True:", ("tests/test_written_out.py", "-k", "one_after or channels"),
    ),
    Mutant(
        "operators without a rule are not written out", "fastpar/sharding/expand.py",
        "return None if has_rule(call) else _as_torch_does(call)", "return None",
        ("tests/test_written_out.py", "-k", "hardswish"),
    ),
    Mutant(
        "blocks: a single query is taken to have the mask's row", "fastpar/sharding/blockwise.py",
        "lost = self.to(lost, ", "self.to(lost, ", ("tests/test_ring.py", "-k", "single_query"),
    ),
)  # fmt: skip
