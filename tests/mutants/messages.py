"""Mutants of messages: which boxes they are of, in which order, and what is computed around them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LAYOUT, ARRANGE, ORDER = "tests/test_layout.py", "tests/test_arrange.py", "tests/test_message_order.py"


def arrange(words: str) -> tuple[str, ...]:
    return (ARRANGE, "-k", words)


MUTANTS = (
    # -- boxes
    Mutant(
        "boxes with gaps between them are a run", "fastpar/ops/folded.py",
        "return d if len(moved) == 1 and box[1][d] - first[1][d] == count * first[2][d] else _ELSEWHERE",
        "return d if len(moved) == 1 else _ELSEWHERE", ("tests/test_folded.py", "-k", "message_is_that_of_its_boxes"),
    ),
    Mutant(
        "whatever is packed, what came is sent on", "fastpar/graph/forward.py",
        "return source.args[0] if sent == decode(source.args[2]) else None", "return source.args[0]",
        ("tests/test_folded.py", "-k", "in_another_order"),
    ),
    Mutant(
        "rows that stay are put where they came from", "fastpar/ops/collectives.py",
        "tiles[i].append((box.dst, box.size, x if", "tiles[i].append((box.src, box.size, x if",
        (LAYOUT, "-k", "exchange"),
    ),
    Mutant(
        "rows that adjoin in the source are one box", "fastpar/core/transfer.py",
        "if (cell.src, cell.dst) == (last.src + last.size, last.dst + last.size):",
        "if cell.src == last.src + last.size:", (LAYOUT, "-k", "exchange"),
    ),
    Mutant(
        "columns that adjoin are one box", "fastpar/ops/collectives.py",
        "if adjoin and math.prod(sizes[:d]) == 1:", "if adjoin:", arrange("adjoin"),
    ),
    # -- tokens first
    Mutant(
        "heads stand in front of tokens", "passes/arrange.py",
        "first = changed[:1]", "first = changed[-1:]", arrange("takes_and_gives"),
    ),
    Mutant(
        "what came in another order is not turned back", "passes/arrange.py",
        "return tuple(sorted(range(len(order)), key=lambda d: order[d]))", "return order", arrange("exact_after"),
    ),
    Mutant(
        "of what lies beside each other all take the first", "passes/pack.py",
        "(came, 1, i)", "(came, 1, 0)", arrange("in_one_message"),
    ),
    Mutant(
        "values of other shapes lie beside each other", "passes/pack.py",
        "len(set(values)) == 1", "bool(values)", arrange("other_shapes"),
    ),
    # -- rows as they arrived
    Mutant(
        "keys under a mask stay as they came", "fastpar/graph/arrival.py",
        "        if mask is not None:  # has", "        if any(unlike):  # has", arrange("under_a_mask"),
    ),
    Mutant(
        "a mask's rows stay as they came wherever its queries are", "fastpar/graph/arrival.py",
        "        region.needs.append((q, _rank(q) - 2))", "        pass", arrange("row_of_the_mask"),
    ),
    Mutant(
        "queries need not agree with the rows of their mask", "fastpar/graph/arrival.py",
        "        region.needs.append((mask, _rank(mask) - 2))", "        pass",
        arrange("row_of_the_mask or under_a_mask"),
    ),
    Mutant(
        "rows of queries are the same dimension of the output", "fastpar/graph/arrival.py",
        "    dim = _rank(user) - 2  # which", "    # which", arrange("broadcast"),
    ),
    Mutant(
        "keys and values need not agree", "fastpar/graph/arrival.py",
        "region.needs += [(k, _rank(k) - 2), (v, _rank(v) - 2)]", "pass", arrange("rows_stay"),
    ),
    Mutant(
        "rows that are returned stay as they came", "fastpar/graph/arrival.py",
        "        return all(_cut_in_front(box, dim) for box in decode(args[1]) if box[0] in places)\n    return False",
        "        return all(_cut_in_front(box, dim) for box in decode(args[1]) if box[0] in places)\n    return True",
        arrange("rows_stay"),
    ),
    Mutant(
        "narrow boxes are moved row by row", "fastpar/graph/arrival.py",
        "return math.prod(box[2][:dim]) == 1", "return True", arrange("rows_stay or exact_after"),
    ),
    # -- in the message's order
    Mutant(
        "what is needed elsewhere is computed again", "backends/message_order.py",
        "or not below.issuperset(node.users)", "", (ORDER, "-k", "elsewhere"),
    ),
    Mutant(
        "a cut stays in the dimension that it was in", "backends/message_order.py",
        "return _Step(((args[0], order[d]),)", "return _Step(((args[0], d),)", (ORDER, "-k", "any_chain"),
    ),
    Mutant(
        "views regroup what is cut", "backends/message_order.py",
        "if had[i] == has[d] and math.prod(had[:i]) == before", "if had[i] == has[d]", (ORDER, "-k", "any_chain"),
    ),
)
