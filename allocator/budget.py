"""The budget grammar: `700MiB`, `1.5GB`, `25%` of the checkpoint, `3.25bpw` over compressible weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from allocator.errors import BudgetSyntaxError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[A-Za-z]+)\s*\Z")
_ADVICE = "write it like 700MiB, 1.5GB, 25% or 3.25bpw"


@dataclass(frozen=True, slots=True)
class Budget:
    """A parsed budget: an amount and its unit (`%`, `BPW`, or a byte unit in capitals)."""

    text: str
    amount: Decimal
    unit: str

    def total_bytes(self, original_bytes: int, kept_bytes: int, compressible_weights: int) -> int:
        """Bytes of the whole checkpoint that the budget allows, rounded down.

        `original_bytes` counts every tensor of the uncompressed checkpoint, `kept_bytes` those that no option
        touches, `compressible_weights` the weights that bits per weight is an average over.
        """
        if self.unit == "%":
            return math.floor(self.amount * original_bytes / 100)
        if self.unit == "BPW":
            return kept_bytes + math.floor(self.amount * compressible_weights / 8)
        return math.floor(self.amount * _UNITS[self.unit])


def parse_budget(text: str) -> Budget:
    """Read a budget, or raise `BudgetSyntaxError` saying what is wrong and what would be right."""
    match = _PATTERN.match(text)
    if match is None:
        raise BudgetSyntaxError(f"budget {text!r} is not a number with a unit; {_ADVICE}")
    number, unit = match.groups()
    unit = unit.upper()
    if unit not in _UNITS and unit not in ("%", "BPW"):
        raise BudgetSyntaxError(f"budget {text!r} has the unknown unit {match.group(2)!r}; {_ADVICE}")
    try:
        amount = Decimal(number)
    except InvalidOperation:
        raise BudgetSyntaxError(f"budget {text!r} is not a number with a unit; {_ADVICE}") from None
    if amount <= 0 or amount >= 10**18:
        raise BudgetSyntaxError(f"budget {text!r} is out of range; {_ADVICE}")
    return Budget(text.strip(), amount, unit)
