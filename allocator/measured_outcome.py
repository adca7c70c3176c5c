"""What a measurement says of a plan: its KL beside that of uniform compression at the same bytes.

What lives here: the record and its verdict. Measuring is the profiler's (`gate.py`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["better", "equal", "worse", "nothing to compare"]
CONFIDENCE_ERRORS = 1.645
"""Standard errors that a difference must exceed to count: one side of a 90 % interval."""


class Verification(BaseModel):
    """KL in nats/token on `tokens` tokens that the calibration did not see, the same windows for every model, and the
    perplexity of those windows under the plan and under the original, None where an earlier version measured.

    uniform_kl is log-interpolated in bytes between the uniform plans on either side, None where there is none on one
    side. difference is measured_kl − uniform_kl, with its standard error by a bootstrap over windows. `swaps` counts
    the neighbouring plans that were measured too; `swapped` tells whether one of them is what this plan is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    tokens: int = Field(ge=1)
    measured_kl: float
    standard_error: float
    perplexity: float | None = None
    reference_perplexity: float | None = None
    uniform_kl: float | None
    difference: float | None
    difference_error: float | None
    swaps: int = Field(ge=0)
    swapped: bool
    verdict: Verdict


def verdict(difference: float | None, error: float | None) -> Verdict:
    """Whether a plan lost less than uniform, counting only what exceeds the measurement's own error."""
    if difference is None or error is None:
        return "nothing to compare"
    if abs(difference) <= CONFIDENCE_ERRORS * error:
        return "equal"
    return "better" if difference < 0 else "worse"
