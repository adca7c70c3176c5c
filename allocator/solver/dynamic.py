"""The textbook dynamic programme over bucketed bytes, kept as a cross-check of the exact solver.

best[b] is the least cost of the groups so far within b buckets; each group takes best'[b] = min over its
options of cost + best[b − buckets of the option] (Dudziński & Walukiewicz 1987). Time is options × buckets:
minutes where `knapsack.py` takes milliseconds.
"""

from __future__ import annotations

import numpy as np

from allocator.errors import InfeasibleError, InvalidProblemError, ProblemTooLargeError
from allocator.problem import Floats, Integers, Problem, Solution

CELL_CAP = 200_000_000
"""Most groups × buckets: the table of choices takes four bytes a cell."""


def solve_by_buckets(problem: Problem, bucket_bytes: int) -> Solution:
    """The optimum when sizes are rounded up to buckets, bounded by the optimum when they are rounded down.

    Exact and proven where `bucket_bytes` divides every size. The shadow price is the cost that one more
    bucket saves, per byte. Raises `InfeasibleError`, or `ProblemTooLargeError` above `CELL_CAP` cells.
    """
    if bucket_bytes < 1:
        raise InvalidProblemError(f"buckets have {bucket_bytes} bytes; they need at least one")
    buckets = problem.budget_bytes // bucket_bytes
    if problem.group_count * (buckets + 1) > CELL_CAP:
        raise ProblemTooLargeError(
            f"{problem.group_count} groups × {buckets + 1} buckets exceed the cap of {CELL_CAP} cells; "
            "use larger buckets"
        )
    rounded_up = -(-problem.size // bucket_bytes)
    least = int(np.minimum.reduceat(rounded_up, problem.start[:-1]).sum())
    if least > buckets:
        raise InfeasibleError(
            f"the smallest options take {least} buckets of {bucket_bytes} bytes, {least - buckets} more than "
            "the budget; raise it or use smaller buckets",
            least * bucket_bytes,
        )
    choice, best = _table(problem, rounded_up, buckets)
    divides = not (problem.size % bucket_bytes).any()
    taken = problem.start[:-1] + choice
    cost = float(problem.cost[taken].sum())
    bound = (
        cost if divides else min(cost, float(_table(problem, problem.size // bucket_bytes, buckets)[1][-1]))
    )
    saved = float(best[-2] - best[-1]) if len(best) > 1 and np.isfinite(best[-2]) else 0.0
    size = int(problem.size[taken].sum())
    return Solution(choice, cost, size, bound, cost - bound, divides or cost == bound, saved / bucket_bytes)


def _table(problem: Problem, size: Integers, buckets: int) -> tuple[Integers, Floats]:
    """The best choice (G,) within `buckets`, and the least cost within 0..buckets."""
    best = np.zeros(buckets + 1)
    taken = np.zeros((problem.group_count, buckets + 1), dtype=np.int32)
    for group, (first, end) in enumerate(zip(problem.start[:-1], problem.start[1:], strict=True)):
        following = np.full(buckets + 1, np.inf)
        for option in range(first, end):
            step = int(size[option])
            if step > buckets:
                continue
            reached = problem.cost[option] + best[: buckets + 1 - step]
            better = reached < following[step:]
            following[step:][better] = reached[better]
            taken[group, step:][better] = option - first
        best = following
    choice = np.zeros(problem.group_count, dtype=np.int64)
    left = buckets
    for group in range(problem.group_count - 1, -1, -1):
        choice[group] = taken[group, left]
        left -= int(size[problem.start[group] + choice[group]])
    return choice, best
