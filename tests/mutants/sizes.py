"""Mutants of graphs in which tensors decide sizes."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

READS, SIZES, UNBROKEN = "fastpar/graph/reads.py", "fastpar/graph/sizes.py", "fastpar/graph/unbroken.py"


def sizes(words: str) -> tuple[str, ...]:
    return ("tests/test_sizes.py", "-k", words)


MUTANTS = (
    Mutant(
        "masks that were written to are taken for what they were", SIZES,
        "all(t._version == version and ref() is t for", "all(ref() is t for",
        sizes("read_once"),
    ),
    Mutant(
        "what is read of tensors without a version is kept", SIZES,
        "isinstance(t, torch.Tensor) and not t.is_inference() for", "isinstance(t, torch.Tensor) for",
        sizes("read_once"),
    ),
    Mutant(
        "one program whatever sizes were read", SIZES,
        "lambda t: tuple(t.shape), tuple(taken)", "lambda t: t.dim(), tuple(taken)",
        sizes("one_program_for"),
    ),
    Mutant(
        "programs are kept for ever", SIZES,
        "if len(self.programs) > _PROGRAMS:", "if len(self.programs) > 1024:",
        sizes("let_go"),
    ),
    Mutant(
        "the first program goes, not that which was used least lately", SIZES,
        "self.programs.pop(self._key(read), None) or", "self.programs.get(self._key(read)) or",
        sizes("let_go"),
    ),
    Mutant(
        "every integer that is read is a constant", SIZES,
        "gm, examples, inputs, numbers = self.worked_out(read, self.sizes)",
        "gm, examples, inputs, numbers = self.worked_out(read, self.sizes | set(range(len(read))))",
        sizes("constant_only_where or among_the_arguments"),
    ),
    Mutant(
        "weights behind a read", READS,
        '(node in given and given[node].kind == "parameter")', '(node in given and given[node].kind == "none")',
        sizes("cannot_come_first"),
    ),
    Mutant(
        "memory that is written to on the way to a read", READS,
        "isinstance(value, torch.Tensor) and written_to(gm.graph.nodes, value)",
        "isinstance(value, torch.Tensor) and False",
        sizes("cannot_come_first"),
    ),
    Mutant(
        "rows are chosen of what has been written to since they were read", READS,
        "if any(written_to(between, n.meta", "if any(written_to([], n.meta",
        sizes("changed_where"),
    ),
    Mutant(
        "frames of other backends are traced through reads", UNBROKEN,
        "if not _marked(self._torchdynamo_orig_backend):", "if False:",
        sizes("left_alone"),
    ),
    Mutant(
        "Dynamo's own errors reach the user", UNBROKEN,
        "except GuardOnDataDependentSymNode as error:", "except ZeroDivisionError as error:",
        sizes("cannot_come_first"),
    ),
)
