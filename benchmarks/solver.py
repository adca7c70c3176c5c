"""Times the exact solver against HiGHS and CP-SAT, on the same instances in the same run.

    python -m benchmarks.solver                                    # every cell, 40 instances each
    python -m benchmarks.solver --cells Qwen2-1.5B:35 --peer-instances 10 --peer-seconds 60

Ours is timed per instance from `Problem` to `Solution`, proof included, in wall and in processor time: where
others share the cores the latter is the steadier. The first incumbent is what `time_limit_seconds=0` returns.

A peer is timed in its solve call alone, without building its model, and ours is timed again in the same
process, just before and just after it (the median of `REPEATS`), so that both meet the same load; ratios come
from there. Every cell, and every peer, has a process of its own: highspy and ortools cannot share one, and
peak memory is that of the process, instance included. A peer that runs out of time counts with the time it
had and its ratio is marked ≥. Costs are scaled for HiGHS until the absolute gap of 1e-6 at which it stops
means nothing; CP-SAT takes whole costs only, rounded to 2⁻⁴⁰ of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from time import perf_counter, process_time
from typing import Any

import numpy as np

from allocator.problem import Floats, Problem, Solution
from allocator.solver.certificate import verify
from allocator.solver.frontier import frontier
from allocator.solver.knapsack import solve
from benchmarks.instances import model_instance

CELLS = (
    "Qwen2-1.5B:35",
    "Llama-3-70B:119",
    "MoE-5k:35",
    "MoE-45k:35",
    "Qwen2-1.5B:119",
    "Llama-3-70B:35",
    "MoE-45k:119",
)
TARGETS = {
    "Qwen2-1.5B:35": "median ≤ 6 ms, ≥ 130× HiGHS",
    "Llama-3-70B:119": "median ≤ 20 ms, max ≤ 150 ms, ≥ 190× HiGHS",
    "MoE-5k:35": "median ≤ 60 ms",
    "MoE-45k:35": "gap ≤ 1e-6 in ≤ 60 ms; median ≤ 150 ms, p95 ≤ 500 ms; ≥ 1000× HiGHS's LP; ≤ 1.5 GiB",
}
RELAXED = {"MoE-45k:35", "MoE-45k:119"}
"""Cells where HiGHS gets the linear relaxation only: its integer program is at its first node after ten
minutes."""


REPEATS = 6
"""Runs of ours beside each run of a peer, half before and half after."""


def instance(cell: str, seed: int) -> Problem:
    model, options = cell.split(":")
    return model_instance(model, int(options), seed)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer said: seconds in its solve call, whether it had finished, the cost it found (None:
    none)."""

    seconds: float
    finished: bool
    cost: float | None


def highs(problem: Problem, seconds: float, *, relaxed: bool) -> Answer:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(problem.cost)
    group = np.repeat(np.arange(problem.group_count), np.diff(problem.start))
    one_each = csr_array((np.ones(count), (group, np.arange(count))))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(problem.size[None].astype(np.float64)), -np.inf, problem.budget_bytes),
    ]
    scale = 1e4 / float(np.median(problem.cost)) / problem.group_count
    begin = perf_counter()
    answer = milp(
        problem.cost * scale,
        integrality=np.zeros(count) if relaxed else np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0, "time_limit": seconds},
    )
    return Answer(
        perf_counter() - begin, answer.status == 0, None if answer.x is None else float(answer.fun) / scale
    )


def cp_sat(problem: Problem, seconds: float) -> Answer:
    from ortools.sat.python import cp_model

    unit = 2.0**-40 * float(np.abs(problem.cost).max())
    cost = np.rint(problem.cost / unit).astype(np.int64).tolist()
    model = cp_model.CpModel()
    take = [model.new_bool_var("") for _ in cost]
    for first, last in zip(problem.start[:-1].tolist(), problem.start[1:].tolist(), strict=True):
        model.add_exactly_one(take[first:last])
    model.add(cp_model.LinearExpr.weighted_sum(take, problem.size.tolist()) <= problem.budget_bytes)
    model.minimize(cp_model.LinearExpr.weighted_sum(take, cost))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    begin = perf_counter()
    status = solver.solve(model)
    found = solver.objective_value * unit if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
    return Answer(perf_counter() - begin, status == cp_model.OPTIMAL, found)


def timed(problem: Problem, time_limit_seconds: float = 10.0) -> tuple[Solution, float, float]:
    """The answer, and the seconds it took by the wall and by the processor."""
    wall, processor = perf_counter(), process_time()
    solution = solve(problem, time_limit_seconds=time_limit_seconds)
    return solution, perf_counter() - wall, process_time() - processor


def run_peer(peer: str, cell: str, seed: int, seconds: float) -> None:
    """In a process of its own: prints one JSON line."""
    problem = instance(cell, seed)
    solution = solve(problem)
    ours = [timed(problem)[1] for _ in range(REPEATS // 2)]
    answer = (
        cp_sat(problem, seconds) if peer == "CP-SAT" else highs(problem, seconds, relaxed=cell in RELAXED)
    )
    ours += [timed(problem)[1] for _ in range(REPEATS // 2)]
    optimum = answer.finished and answer.cost is not None and cell not in RELAXED
    differs = optimum and not np.isclose(answer.cost, solution.cost, rtol=1e-7)
    print(json.dumps({"ours": float(np.median(ours)), "differs": bool(differs), **asdict(answer)}))


def run_ours(cell: str, instances: int) -> None:
    """In a process of its own: prints one JSON line."""
    solve(instance(cell, 10_000))
    rows = []
    for seed in range(instances):
        problem = instance(cell, seed)
        first, *first_seconds = timed(problem, 0)
        solution, *seconds = timed(problem)
        certificate = verify(problem, solution)
        if not certificate.holds:
            raise SystemExit(f"{cell} seed {seed}: {certificate.faults}")
        rows.append([*seconds, *first_seconds, first.gap / first.cost, solution.proven])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begin = perf_counter()
    line = frontier(problem)
    print(
        json.dumps({"rows": rows, "peak": peak, "frontier": perf_counter() - begin, "breakpoints": len(line)})
    )


def child(*arguments: str) -> dict[str, Any] | None:
    """Runs this module again and reads the last line it prints; None where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.solver", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        print(f"    {' '.join(arguments)}: {process.stderr.strip().splitlines()[-1:]}")
        return None
    answer: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return answer


def milliseconds(wall: Floats, processor: Floats) -> str:
    three = [(np.median(times), np.quantile(times, 0.95), times.max()) for times in (wall, processor)]
    by_wall, by_processor = (" / ".join(f"{1e3 * value:.1f}" for value in values) for values in three)
    return f"{by_wall} ms (processor {by_processor})"


def report_ours(cell: str, instances: int) -> None:
    print(f"\n{cell}, {instances} instances; target: {TARGETS.get(cell, 'none')}")
    ours = child("--ours", "--cells", cell, "--instances", str(instances))
    if ours is None:
        return
    wall, processor, first_wall, first_processor, gap, proven = np.array(ours["rows"], dtype=np.float64).T
    print(f"    proven {int(proven.sum())}/{instances}; median / p95 / max {milliseconds(wall, processor)}")
    print(f"    first incumbent {milliseconds(first_wall, first_processor)},", end=" ")
    print(f"relative gap median {np.median(gap):.1e} max {gap.max():.1e}")
    print(f"    peak memory {ours['peak']:.2f} GiB", end="; ")
    print(f"frontier {1e3 * ours['frontier']:.0f} ms, {ours['breakpoints']:,} breakpoints", flush=True)


def report_peer(cell: str, peer: str, instances: int, seconds: float) -> None:
    answers = []
    for seed in range(instances):
        answer = child("--peer", peer, "--cells", cell, "--seed", str(seed), "--peer-seconds", str(seconds))
        if answer is None:
            return
        if answer["differs"]:
            print(f"    {peer} disagrees on seed {seed}: it says {answer['cost']!r}")
        answers.append(answer)
    if not answers:
        return
    finished = sum(answer["finished"] for answer in answers)
    ratios = [answer["seconds"] / answer["ours"] for answer in answers]
    peer = f"{peer}'s LP relaxation" if cell in RELAXED and peer == "HiGHS" else peer
    at_least = "" if finished == len(answers) else "≥ "
    print(f"    {peer}: finished {finished}/{len(answers)} within {seconds:.0f} s,", end=" ")
    print(f"median {np.median([answer['seconds'] for answer in answers]):.2f} s,", end=" ")
    print(f"ours beside it {1e3 * np.median([answer['ours'] for answer in answers]):.1f} ms;", end=" ")
    print(f"ratio median {at_least}{np.median(ratios):.0f}×, least {at_least}{min(ratios):.0f}×", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="MODEL:OPTIONS")
    parser.add_argument("--instances", type=int, default=40)
    parser.add_argument("--peers", nargs="*", default=["HiGHS", "CP-SAT"], choices=["HiGHS", "CP-SAT"])
    parser.add_argument("--peer-instances", type=int, default=3)
    parser.add_argument("--peer-seconds", type=float, default=60.0)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        return run_ours(arguments.cells[0], arguments.instances)
    if arguments.peer:
        return run_peer(arguments.peer, arguments.cells[0], arguments.seed, arguments.peer_seconds)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, one thread per process")
    for cell in arguments.cells:
        report_ours(cell, arguments.instances)
        for peer in arguments.peers:
            report_peer(cell, peer, arguments.peer_instances, arguments.peer_seconds)


if __name__ == "__main__":
    main()
