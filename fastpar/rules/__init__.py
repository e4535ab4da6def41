"""What each operator does to layouts: one table, used forward and backward.

Importing this package fills the table; ``rule_for`` looks an operator up.
"""

from fastpar.rules import (  # noqa: F401  (imported for their registrations)
    attention,
    band,
    create,
    displaced,
    index,
    matmul,
    matrices,
    pointwise,
    quantize,
    reduce,
    resample,
    scan,
    spatial,
    terms,
    views,
)
from fastpar.rules.table import Call, Decision, Pos, Rule, has_rule, is_view, rule_for

__all__ = ["Call", "Decision", "Pos", "Rule", "has_rule", "is_view", "rule_for"]
