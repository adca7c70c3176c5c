"""Times tie groups and a second resource against peers on the same instances, in the same run.

    python -m benchmarks.constraints                 # everything, a few minutes
    python -m benchmarks.constraints --repeats 3 --only ties

ties: a mixture of experts of 45,124 matrices and 119 options, gate/up of every expert and q/k/v of every
block tied, from menu to proven choice. Peer, on the last instance: the product formed tie group by tie group
in a Python loop. resources: bytes and a latency table on Llama-3-70B's 560 matrices and 35 options. Peer:
HiGHS's LP relaxation, whose optimum our bound must reach.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TypeVar

import numpy as np

from allocator.allocation import allocate
from allocator.constraints.rules import Constraints, tie_groups
from allocator.problem import LayerMenu, Menu, Problem
from allocator.resources.lagrangian import solve_resources
from allocator.resources.problem import ResourceProblem
from allocator.solver.knapsack import solve
from benchmarks.instances import MODELS, OPTIONS, model_costs, model_sizes

TIED = Constraints(auto_ties=True)
Answer = TypeVar("Answer")


def mixture_names(blocks: int, experts: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of a mixture of experts with separate q, k and v."""
    for block in range(blocks):
        for part, shape in (("q", (4096, 4096)), ("k", (512, 4096)), ("v", (512, 4096)), ("o", (4096, 4096))):
            yield f"model.layers.{block}.self_attn.{part}_proj", shape
        for expert in range(experts):
            for part, shape in (("gate", (1536, 4096)), ("up", (1536, 4096)), ("down", (4096, 1536))):
                yield f"model.layers.{block}.mlp.experts.{expert}.{part}_proj", shape


def mixture(blocks: int, experts: int, seed: int) -> tuple[Menu, int]:
    """A menu and the bytes of a budget drawn between 2.5 and 6 bits per weight."""
    generator = np.random.default_rng(seed)
    named = list(mixture_names(blocks, experts))
    shapes, options = [shape for _, shape in named], OPTIONS[119]
    sizes, costs = model_sizes(shapes, options), model_costs(shapes, options, 0.15, generator)
    layers = (
        LayerMenu(name, *shape, 2 * shape[0] * shape[1], options, size, cost, cost)
        for (name, shape), size, cost in zip(named, sizes, costs, strict=True)
    )
    menu = Menu(tuple(layers), {})
    return menu, int(generator.uniform(2.5, 6.0) * menu.compressible_weights / 8)


def looped_product(menu: Menu, total_bytes: int) -> float:
    """The optimum of the tied menu, each group's product formed and pruned on its own."""
    sizes, costs = [], []
    for group in tie_groups(menu, TIED):
        nothing = np.zeros(1, dtype=np.int64), np.zeros(1)
        merged: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for position, index in enumerate(group):
            layer = menu.layers[index]
            bits = np.array([option.bits for option in layer.options])
            for width in set(bits.tolist()):
                own = bits == width
                before = merged[width] if position else nothing
                merged[width] = pareto(
                    np.add.outer(before[0], layer.total_bytes[own]).ravel(),
                    np.add.outer(before[1], layer.cost[own]).ravel(),
                )
        best = pareto(*(np.concatenate(part) for part in zip(*merged.values(), strict=True)))
        sizes.append(best[0])
        costs.append(best[1])
    start = np.append(0, np.cumsum([len(size) for size in sizes])).astype(np.int64)
    return solve(Problem(np.concatenate(costs), np.concatenate(sizes), start, total_bytes)).cost


def pareto(size: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((cost, size))
    size, cost = size[order], cost[order]
    better = np.append(True, cost[1:] < np.minimum.accumulate(cost)[:-1])
    return size[better], cost[better]


def timed(call: Callable[[], Answer]) -> tuple[float, Answer]:
    gc.collect()
    start = perf_counter()
    answer = call()
    return perf_counter() - start, answer


def measure_ties(repeats: int) -> None:
    ours = []
    for seed in range(repeats):
        menu, total_bytes = mixture(58, 258, seed)
        seconds, found = timed(lambda menu=menu, total=total_bytes: allocate(menu, total, TIED))
        assert found.proven, f"seed {seed} is not proven: gap {found.gap}"
        ours.append(seconds)
    print(f"ties, {len(menu.layers)} matrices × 119, {repeats} instances, all proven")
    print(f"  ours            median {statistics.median(ours):.3f} s, max {max(ours):.3f} s (target 1.2 s)")
    loop, looped = timed(lambda: looped_product(menu, total_bytes))
    assert abs(found.cost - looped) <= 1e-12 * looped
    print(f"  Python loop     {loop:.3f} s on the last instance, {loop / ours[-1]:.0f}× ours")


def two_resources(seed: int) -> ResourceProblem:
    """Bytes, and a latency table in nanoseconds that doesn't follow bytes: odd widths unpack slower."""
    generator = np.random.default_rng(seed)
    shapes, options = MODELS["Llama-3-70B"], OPTIONS[35]
    size, cost = model_sizes(shapes, options), model_costs(shapes, options, 0.15, generator)
    weights = np.array([rows * columns for rows, columns in shapes], dtype=np.float64)
    speed = {2: 0.30, 3: 0.42, 4: 0.45, 5: 0.70, 6: 0.75, 7: 0.95, 8: 0.90}
    per_weight = np.array([speed[option.bits] + 0.004 * option.rank for option in options])
    latency = np.multiply.outer(weights, per_weight) * generator.uniform(0.9, 1.1, size.shape) / 1000
    start = np.arange(len(shapes) + 1) * len(options)
    total = int(generator.uniform(2.6, 5.0) * weights.sum() / 8)
    problem = Problem(cost.ravel(), size.ravel(), start, total)
    use = latency.astype(np.int64).ravel()
    limit = int(use[start[:-1] + solve(problem).choice].sum() * generator.uniform(0.9, 0.99))
    return ResourceProblem.of(problem).with_resource("latency", use, limit)


def highs_bound(problem: ResourceProblem) -> float:
    """The optimum of the LP relaxation, by HiGHS; costs scaled."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    options = len(problem.cost)
    one = csr_array((np.ones(options), np.arange(options), problem.start), dtype=np.float64)
    scale = 1000 / float(problem.cost.max())
    rows, limit = problem.use / problem.limit[:, None], np.ones(len(problem.limit))
    answer = linprog(problem.cost * scale, rows, limit, one, np.ones(problem.group_count), method="highs")
    return float(answer.fun) / scale


def measure_resources(repeats: int) -> None:
    ours, peer, gaps = [], [], []
    highs_bound(two_resources(0))
    for seed in range(repeats):
        problem = two_resources(seed)
        seconds, found = timed(lambda problem=problem: solve_resources(problem))
        highs, bound = timed(lambda problem=problem: highs_bound(problem))
        assert abs(found.lower_bound - bound) <= 1e-6 * bound, (found.lower_bound, bound)
        ours.append(seconds)
        peer.append(highs)
        gaps.append(found.gap / found.cost)
    print(f"two resources, 560 matrices × 35, {repeats} instances")
    print(f"  ours            median {statistics.median(ours):.3f} s, max {max(ours):.3f} s (target 0.2 s)")
    print(f"  relative gap    median {statistics.median(gaps):.1e}, max {max(gaps):.1e} (target 2e-4)")
    print(
        f"  HiGHS LP        median {statistics.median(peer):.3f} s, {ratio(peer, ours)} ours, a bound alone"
    )


def ratio(peer: list[float], ours: list[float]) -> str:
    return f"{statistics.median(peer) / statistics.median(ours):.1f}×"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=("ties", "resources"))
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.only != "resources":
        measure_ties(arguments.repeats)
    if arguments.only != "ties":
        measure_resources(4 * arguments.repeats)


if __name__ == "__main__":
    main()
