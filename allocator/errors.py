"""The named ways an allocation can fail. Every message says what, why and what to do."""

from __future__ import annotations


class BitrankError(ValueError):
    """Base of every error that a user can mend, on any floor."""


class AllocationError(BitrankError):
    """Base of every error raised by `allocator`."""


class BudgetSyntaxError(AllocationError):
    """The budget text is not `700MiB`, `25%` or `3.25bpw`."""


class InvalidProblemError(AllocationError):
    """A cost is NaN or infinite, a size is negative or fractional, or a group is empty."""


class InfeasibleError(AllocationError):
    """No choice fits; `smallest_bytes` is the least budget that would."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class BudgetAboveOriginalError(AllocationError):
    """The budget is larger than the uncompressed checkpoint: there is nothing to decide."""


class PlanError(AllocationError):
    """A plan file is malformed, from a newer schema, or belongs to another model."""


class StrategyError(AllocationError):
    """A strategy text is unknown or malformed, or a layer does not offer the option it asks for."""


class TargetError(AllocationError):
    """No target has this name."""


class FormatError(AllocationError):
    """No export format has this name."""


class ExportError(AllocationError):
    """The plan cannot be written in a format; the message says what it cannot hold and what to do instead."""


class ConstraintError(AllocationError):
    """Base of the ways constraints can be wrong on their own, before any budget."""


class UnmatchedPatternError(ConstraintError):
    """A layer glob of a constraint matches no layer."""


class ContradictoryPinsError(ConstraintError):
    """Two pins give one layer different options, or a pin is banned or breaks a floor or bits limit."""


class ExhaustedMenuError(ConstraintError):
    """Constraints leave a layer or tie group without an option; the message says how far the nearest one is."""


class ProblemTooLargeError(AllocationError):
    """The problem has more options than the documented cap; the message gives both numbers."""


class UnreachableCostError(AllocationError):
    """No choice of options has so little cost; `least_cost` is the least there is, at any budget."""

    def __init__(self, message: str, least_cost: float) -> None:
        super().__init__(message)
        self.least_cost = least_cost
