"""Instances for the solver's benchmarks and tests: real model shapes, and adversarial knapsacks.

What lives here: `MODELS` and `model_instance` (the matrix shapes of a model, noisy and non-convex costs),
`FAMILIES` (small adversarial generators by name) and `random_instance`. One generator state, one instance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from allocator.problem import Floats, Integers, Problem
from allocator.storage import Option, layer_bytes

Shapes = list[tuple[int, int]]
Generator = np.random.Generator


def _dense(blocks: int, hidden: int, key_value: int, intermediate: int) -> Shapes:
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    return blocks * (attention + [(intermediate, hidden)] * 2 + [(hidden, intermediate)])


def _mixture(
    blocks: int, hidden: int, intermediate: int, experts: int, attention: Shapes, count: int
) -> Shapes:
    expert = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return (blocks * (attention + experts * expert))[:count]


MODELS: dict[str, Shapes] = {
    "Qwen2-1.5B": _dense(28, 1536, 256, 8960),
    "Llama-3-70B": _dense(80, 8192, 1024, 28672),
    "MoE-5k": _mixture(26, 2048, 1408, 64, [(3072, 2048), (576, 2048), (4096, 512), (2048, 2048)], 5_000),
    "MoE-45k": _mixture(
        59, 7168, 2048, 256, [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)], 45_000
    ),
}
"""Every matrix of Qwen2-1.5B and Llama-3-70B; mixtures of experts shaped after DeepSeek-V2-Lite and
DeepSeek-V3."""

BITS = (2, 3, 4, 5, 6, 7, 8)
OPTIONS: dict[int, tuple[Option, ...]] = {
    35: tuple(
        option
        for bits in BITS
        for option in (
            *(Option(bits, 0, group) for group in (32, 64, 128)),
            *(Option(bits, rank, 64, 4) for rank in (32, 64)),
        )
    ),
    119: tuple(
        option
        for bits in BITS
        for option in (
            *(Option(bits, 0, group) for group in (32, 64, 128)),
            *(Option(bits, rank, group, 4) for group in (64, 128) for rank in (8, 16, 24, 32, 48, 64, 96)),
        )
    ),
}
"""Seven bit widths by five, or by seventeen, pairs of group size and rank."""


def model_sizes(shapes: Shapes, options: tuple[Option, ...]) -> Integers:
    """(G, K) int64: the exact stored bytes of every option of every matrix."""
    row = {
        shape: np.array([layer_bytes(*shape, option, 2 * shape[0] * shape[1]) for option in options])
        for shape in set(shapes)
    }
    return np.stack([row[shape] for shape in shapes]).astype(np.int64)


def model_costs(shapes: Shapes, options: tuple[Option, ...], noise: float, generator: Generator) -> Floats:
    """(G, K) float64, nats: sensitivity × E(bits, rank, group size), every entry with its own log-normal
    noise, which makes the costs of a matrix neither convex nor monotone in bytes."""
    bits, rank, group_size = np.array([(o.bits, o.rank, o.group_size) for o in options], dtype=np.float64).T
    error = 2.0 ** (-1.9 * bits) * (1 + rank / 40) ** -0.25 * (group_size / 64) ** 0.35
    weights = np.array([rows * columns for rows, columns in shapes], dtype=np.float64)
    sensitivity = weights / weights.sum() * generator.lognormal(0.0, 0.8, len(shapes))
    costs = np.multiply.outer(20 * sensitivity, error)
    costs *= generator.lognormal(0.0, noise, costs.shape)
    return costs


def model_instance(model: str, option_count: int, seed: int, *, noise: float = 0.15) -> Problem:
    """A budget drawn between 2.5 and 6 bits per weight over every matrix of `model`."""
    generator = np.random.default_rng(seed)
    shapes, options = MODELS[model], OPTIONS[option_count]
    sizes = model_sizes(shapes, options)
    costs = model_costs(shapes, options, noise, generator)
    weights = sum(rows * columns for rows, columns in shapes)
    budget = int(generator.uniform(2.5, 6.0) * weights / 8)
    return Problem(costs.ravel(), sizes.ravel(), np.arange(len(shapes) + 1) * len(options), budget)


def _problem(cost: Floats, size: Integers, count: Integers, budget: int) -> Problem:
    start = np.concatenate(([0], np.cumsum(count))).astype(np.int64)
    return Problem(np.asarray(cost, dtype=np.float64), np.asarray(size, dtype=np.int64), start, int(budget))


def _counts(generator: Generator, most_groups: int = 9, most_options: int = 7) -> Integers:
    return generator.integers(1, most_options + 1, generator.integers(1, most_groups + 1))


def _between(generator: Generator, size: Integers, count: Integers) -> int:
    """A budget between the smallest and the largest choice, now and then at either end."""
    start = np.concatenate(([0], np.cumsum(count)[:-1]))
    least, most = np.minimum.reduceat(size, start).sum(), np.maximum.reduceat(size, start).sum()
    return int(generator.choice([least, most, *generator.integers(least, most + 1, 8)]))


def _free(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 200, count.sum())
    return _problem(generator.integers(0, 200, count.sum()), size, count, _between(generator, size, count))


def _noisy(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(1, 10**9, count.sum())
    cost = generator.lognormal(0, 1, count.sum()) / size
    return _problem(cost, size, count, _between(generator, size, count))


def _strongly_correlated(generator: Generator) -> Problem:
    count = _counts(generator, 8, 5)
    size = generator.integers(1, 100, count.sum())
    return _problem(1000 - size - 10 * (size > 30), size, count, _between(generator, size, count))


def _subset_sum(generator: Generator) -> Problem:
    groups = int(generator.integers(2, 13))
    weight = generator.integers(1, 10**6, groups)
    size = np.stack((np.zeros(groups, dtype=np.int64), weight), axis=1).ravel()
    count = np.full(groups, 2)
    return _problem(2 * weight.sum() - size, size, count, _between(generator, size, count))


def _all_ties(generator: Generator) -> Problem:
    count = _counts(generator)
    size = np.full(count.sum(), generator.integers(0, 5))
    return _problem(np.full(count.sum(), 3.0), size, count, _between(generator, size, count))


def _equal_costs(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 50, count.sum())
    return _problem(np.full(count.sum(), 7.0), size, count, _between(generator, size, count))


def _duplicate_weights(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.choice([4, 4, 6, 9], count.sum())
    return _problem(generator.integers(0, 100, count.sum()), size, count, _between(generator, size, count))


def _wide(generator: Generator) -> Problem:
    count = _counts(generator, 7, 5)
    size = generator.integers(1, 10**12, count.sum()) // 10 ** generator.integers(0, 12, count.sum())
    cost = generator.integers(1, 10**12, count.sum()) // 10 ** generator.integers(0, 12, count.sum())
    return _problem(cost, size, count, _between(generator, size, count))


def _one_option(generator: Generator) -> Problem:
    count = np.where(generator.random(generator.integers(1, 10)) < 0.7, 1, 3)
    size = generator.integers(0, 100, count.sum())
    return _problem(generator.integers(0, 100, count.sum()), size, count, _between(generator, size, count))


def _common_divisor(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 40, count.sum()) * int(generator.integers(2, 5000))
    budget = _between(generator, size, count) + int(generator.integers(0, 5000))
    return _problem(generator.integers(0, 100, count.sum()), size, count, budget)


def _zero_weights(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 60, count.sum()) * (generator.random(count.sum()) < 0.5)
    return _problem(generator.integers(0, 100, count.sum()), size, count, _between(generator, size, count))


def _identical_layers(generator: Generator) -> Problem:
    groups, options = int(generator.integers(2, 16)), int(generator.integers(2, 5))
    size = np.tile(np.sort(generator.integers(1, 60, options)), groups)
    cost = np.tile(np.sort(generator.integers(1, 60, options))[::-1], groups)
    count = np.full(groups, options)
    return _problem(cost, size, count, _between(generator, size, count))


def _some_identical(generator: Generator) -> Problem:
    kinds, options = int(generator.integers(1, 4)), int(generator.integers(2, 4))
    kind = np.sort(generator.integers(0, kinds, generator.integers(2, 14)))
    size = generator.integers(1, 80, (kinds, options))[kind].ravel()
    cost = generator.integers(1, 80, (kinds, options))[kind].ravel()
    count = np.full(len(kind), options)
    return _problem(cost, size, count, _between(generator, size, count))


def _linear(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 300, count.sum())
    return _problem(3000 - 3 * size, size, count, _between(generator, size, count))


def _on_a_breakpoint(generator: Generator) -> Problem:
    count = _counts(generator)
    size, cost = generator.integers(0, 200, count.sum()), generator.integers(0, 200, count.sum())
    start = np.concatenate(([0], np.cumsum(count)[:-1]))
    value = cost + generator.uniform(0.05, 5.0) * size
    taken = [
        first + int(value[first : first + number].argmin())
        for first, number in zip(start, count, strict=True)
    ]
    return _problem(cost, size, count, size[taken].sum())


def _just_infeasible(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(1, 200, count.sum())
    least = int(np.minimum.reduceat(size, np.concatenate(([0], np.cumsum(count)[:-1]))).sum())
    budget = least - int(generator.integers(0, 2))
    return _problem(generator.integers(0, 200, count.sum()), size, count, budget)


def _negative_costs(generator: Generator) -> Problem:
    count = _counts(generator)
    size = generator.integers(0, 100, count.sum())
    cost = generator.integers(-(10**6), 10**6, count.sum())
    return _problem(cost, size, count, _between(generator, size, count))


def _many_groups(generator: Generator) -> Problem:
    count = generator.integers(1, 5, generator.integers(20, 60))
    size = generator.integers(0, 30, count.sum())
    return _problem(generator.integers(0, 1000, count.sum()), size, count, _between(generator, size, count))


FAMILIES: dict[str, Callable[[Generator], Problem]] = {
    "free": _free,
    "noisy": _noisy,
    "strongly correlated": _strongly_correlated,
    "subset sum": _subset_sum,
    "all ties": _all_ties,
    "equal costs": _equal_costs,
    "duplicate weights": _duplicate_weights,
    "ranges of 1e12": _wide,
    "one option": _one_option,
    "common divisor": _common_divisor,
    "zero weights": _zero_weights,
    "identical layers": _identical_layers,
    "some identical": _some_identical,
    "linear costs": _linear,
    "budget on a breakpoint": _on_a_breakpoint,
    "just infeasible": _just_infeasible,
    "negative costs": _negative_costs,
    "many groups": _many_groups,
}
"""Small enough for an exact reference; all costs but those of `noisy` are whole numbers, so that sums are
exact."""


def random_instance(seed: int, number: int) -> tuple[str, Problem]:
    """The `number`-th instance of a seed and the name of its family; families take turns."""
    name = list(FAMILIES)[number % len(FAMILIES)]
    return name, FAMILIES[name](np.random.default_rng((seed, number)))
