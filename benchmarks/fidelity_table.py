"""What the allocator makes of the published fidelity table of Qwen2-1.5B, with bits fixed at 3 and with bits free.

    python -m benchmarks.fidelity_table                  # the shares of a block by weights
    python -m benchmarks.fidelity_table --shares rows    # by output rows
    python -m benchmarks.fidelity_table --r0 absolute    # r₀ in ranks, as measured, not relative to n

What lives here: `fidelities` (28 values), `build_menu` (cost = fidelity × share × E(bits, rank)), `ultra` (the
published assignment) and `compare`, which puts the proven optima beside it at the same bytes.

**The table.** Published are the mean, 0.120, and blocks 27, 0, 1 and 25. The other 24 values are not known here:
each is set to the one value, 0.105125, that gives the published mean exactly. Costs have the unit of the table.
With bits fixed, no matrix has less rank than the same one of a block of lower fidelity: exchanging their options would
gain. So the order follows from the table; how far the ranks part is what is found.

**'ultra'.** 3 bits everywhere; rank 256 on the two blocks of highest fidelity, 128 on the next two, 40 elsewhere.

**The share of a matrix** in its block's fidelity is its share of the block's weights: the table says nothing within
a block, so every weight counts the same. `rows` shares by outputs instead, to show what rests on that choice.

**The errors** are relative and squared, E(b, r) = c · 2^(−βb) · (1 + r/r₀)^(−δ) · (1 − r/n)^η, n the smaller side. The
constants, `FITS`, are medians over the 12 blocks of llama-22m of what `bitrank profile` fitted at 2-8 bits and
ranks 16, 32 and 64 (n = 384; k and v 128), group 64, 4-bit factors; r₀ is carried over relative to n:

    kind      c    β     r₀/n   δ     η          kind      c    β     r₀/n   δ     η
    q         0.60 2.01  0.0133 0.194 2.53       gate      0.71 2.01  0.0158 0.111 2.18
    k         0.49 2.01  0.0450 0.274 1.48       up        1.12 2.01  0.0540 0.231 1.75
    v         1.14 2.01  0.1360 0.581 0.73       down      1.57 2.01  0.0343 0.196 1.63
    o         0.58 2.03  0.0813 0.275 2.99

Nothing of Qwen2 was measured, and below n/24 (rank 64 of 1536) the form extrapolates; with `--r0 absolute`, the other
guess, the first ranks do more. As in a profile, ranks above n/2 are not offered: k and v (n = 256) stop at 128, also
in 'ultra'. Norms and biases are left out, embeddings are kept.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from allocator.allocation import allocate
from allocator.problem import Floats, Integers, LayerMenu, Menu, Problem, Solution
from allocator.solver.knapsack import solve
from allocator.storage import Option, layer_bytes
from allocator.strategies.strategies import choice_bytes, choice_cost
from benchmarks.instances import MODELS
from profiler.prediction.error_model import ErrorModel

BLOCKS = 28
MEAN_FIDELITY = 0.120
PUBLISHED_FIDELITY = {27: 0.308, 0: 0.199, 1: 0.166, 25: 0.164}
ULTRA_RANKS, ULTRA_REST = (256, 256, 128, 128), 40
"""Rank of the blocks of highest fidelity, in order, and of all others."""

BLOCK_RANKS = tuple(range(0, 513, 8))
"""Offered where the matrices of a block share one rank, as in 'ultra'."""

BITS = (2, 3, 4, 5, 6, 8)
RANKS = (0, 8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256)
GROUP_SIZE, FACTOR_BITS = 64, 4
FIXED_BITS = 3
KEPT = {"model.embed_tokens.weight": 151936 * 1536 * 2}
MIB = 2**20

FITS = {
    "q": (0.60, 2.01, 0.0133, 0.194, 2.53),
    "k": (0.49, 2.01, 0.0450, 0.274, 1.48),
    "v": (1.14, 2.01, 0.1360, 0.581, 0.73),
    "o": (0.58, 2.03, 0.0813, 0.275, 2.99),
    "gate": (0.71, 2.01, 0.0158, 0.111, 2.18),
    "up": (1.12, 2.01, 0.0540, 0.231, 1.75),
    "down": (1.57, 2.01, 0.0343, 0.196, 1.63),
}
"""c, β, r₀ relative to n, δ, η by kind of matrix, in the order of the matrices of a block."""
MEASURED_N = dict.fromkeys(FITS, 384) | {"k": 128, "v": 128}
SHAPES = dict(zip(FITS, MODELS["Qwen2-1.5B"], strict=False))

SHARES: dict[str, Callable[[int, int], int]] = {
    "weights": lambda rows, columns: rows * columns,
    "rows": lambda rows, columns: rows,
}
"""What a matrix's share of its block's fidelity is proportional to."""


def fidelities() -> Floats:
    """(28,) float64: the published values, and elsewhere the one value that gives the published mean."""
    rest = (BLOCKS * MEAN_FIDELITY - sum(PUBLISHED_FIDELITY.values())) / (BLOCKS - len(PUBLISHED_FIDELITY))
    return np.array([PUBLISHED_FIDELITY.get(block, rest) for block in range(BLOCKS)])


@dataclass(frozen=True, slots=True)
class Guess:
    """What the table leaves open: shares, a key of `SHARES`; absolute_r0, that r₀ does not grow with n."""

    shares: str = "weights"
    absolute_r0: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix. sensitivity: its share of the block's fidelity, cost per unit of error."""

    kind: str
    block: int
    rows: int
    columns: int
    sensitivity: float
    absolute_r0: bool

    @property
    def name(self) -> str:
        part = "self_attn" if self.kind in "qkvo" else "mlp"
        return f"model.layers.{self.block}.{part}.{self.kind}_proj"

    @property
    def original_bytes(self) -> int:
        return 2 * self.rows * self.columns

    @property
    def most_rank(self) -> int:
        return min(self.rows, self.columns) // 2

    def option(self, bits: int, rank: int) -> Option:
        """With the highest rank on offer where `rank` exceeds it."""
        rank = min(rank, self.most_rank)
        return Option(bits, rank, GROUP_SIZE, FACTOR_BITS if rank else 0)

    def error(self, option: Option) -> float:
        n = min(self.rows, self.columns)
        c, beta, r0, delta, eta = FITS[self.kind]
        r0 *= MEASURED_N[self.kind] if self.absolute_r0 else n
        model = ErrorModel(c, beta, r0, delta, eta, n, {GROUP_SIZE: 1.0}, r_squared=1.0, worst_ratio=1.0)
        return model.error(option.bits, option.rank, option.group_size)

    def menu(self, options: tuple[Option, ...]) -> LayerMenu:
        sizes = [layer_bytes(self.rows, self.columns, option, self.original_bytes) for option in options]
        error = np.array([self.error(option) for option in options])
        shape, size = (self.rows, self.columns), np.array(sizes, dtype=np.int64)
        return LayerMenu(
            self.name, *shape, self.original_bytes, options, size, error, error * self.sensitivity
        )


def matrices(guess: Guess) -> list[Matrix]:
    """Block by block, every block in the order of `FITS`."""
    weight = {kind: SHARES[guess.shares](*shape) for kind, shape in SHAPES.items()}
    total = sum(weight.values())
    return [
        Matrix(kind, block, *shape, float(fidelity * weight[kind] / total), guess.absolute_r0)
        for block, fidelity in enumerate(fidelities())
        for kind, shape in SHAPES.items()
    ]


def build_menu(guess: Guess, bits: tuple[int, ...] = BITS, ranks: tuple[int, ...] = RANKS) -> Menu:
    layers = []
    for matrix in matrices(guess):
        offered = dict.fromkeys(matrix.option(b, rank) for b in bits for rank in ranks)
        layers.append(matrix.menu(tuple(offered)))
    return Menu(tuple(layers), KEPT)


@dataclass(frozen=True)
class Assignment:
    """One option for each of 28 × 7 matrices, as bits and ranks (28, 7); the bytes are of the whole checkpoint."""

    bits: Integers
    ranks: Integers
    weights: Integers
    loss: float
    total_bytes: int
    solution: Solution | None = None

    @classmethod
    def of(cls, menu: Menu, choice: Integers) -> Assignment:
        taken = [layer.options[k] for layer, k in zip(menu.layers, choice, strict=True)]
        table = np.array(
            [(o.bits, o.rank, layer.weights) for o, layer in zip(taken, menu.layers, strict=True)]
        )
        bits, ranks, weights = table.reshape(BLOCKS, len(FITS), 3).transpose(2, 0, 1)
        return cls(bits, ranks, weights, choice_cost(menu, choice), choice_bytes(menu, choice))

    @property
    def mean_rank(self) -> Floats:
        """(28,): over the seven matrices of each block."""
        return np.asarray(self.ranks.mean(axis=1))

    @property
    def mean_bits(self) -> Floats:
        """(28,): of the quantized weights of each block, without scales and factors."""
        return np.asarray((self.bits * self.weights).sum(axis=1) / self.weights.sum(axis=1))

    @property
    def by_rank(self) -> list[int]:
        """The blocks by mean rank, the highest first; of equal ones that of higher fidelity."""
        return np.lexsort((-fidelities(), -self.mean_rank)).tolist()

    @property
    def most_rank(self) -> list[int]:
        """The four blocks of highest mean rank, the highest first."""
        return self.by_rank[: len(PUBLISHED_FIDELITY)]

    @property
    def concentration(self) -> float:
        """The share of those four in all rank; the even share is 4/28."""
        return self._share(self.most_rank)

    @property
    def published_share(self) -> float:
        """The same of the four blocks whose fidelity is published."""
        return self._share(list(PUBLISHED_FIDELITY))

    def _share(self, blocks: list[int]) -> float:
        return float(self.ranks[blocks].sum() / self.ranks.sum())


def ranked(guess: Guess, rank_of_block: Callable[[int], int]) -> Assignment:
    """`FIXED_BITS` everywhere and one rank per block, on the menu or not."""
    layers = [m.menu((m.option(FIXED_BITS, rank_of_block(m.block)),)) for m in matrices(guess)]
    return Assignment.of(Menu(tuple(layers), KEPT), np.zeros(len(layers), dtype=np.int64))


def ultra(guess: Guess) -> Assignment:
    order = np.argsort(-fidelities(), kind="stable").tolist()
    rank = dict(zip(order, ULTRA_RANKS, strict=False))
    return ranked(guess, lambda block: rank.get(block, ULTRA_REST))


def uniform(guess: Guess, total_bytes: int) -> Assignment:
    """The highest rank, the same on every block, that fits `total_bytes`; any whole number, not only `RANKS`."""
    low, high = 0, max(RANKS)
    while high - low > 1:
        middle = (low + high) // 2
        fits = ranked(guess, lambda _, rank=middle: rank).total_bytes <= total_bytes
        low, high = (middle, high) if fits else (low, middle)
    return ranked(guess, lambda _: low)


def optimum(menu: Menu, total_bytes: int) -> Assignment:
    solution = allocate(menu, total_bytes)
    return replace(Assignment.of(menu, solution.choice), solution=solution)


def one_rank_per_block(guess: Guess, total_bytes: int) -> Assignment:
    """The optimum among what 'ultra' could have been: `FIXED_BITS` and one of `BLOCK_RANKS` for each block."""
    menus = [m.menu(tuple(m.option(FIXED_BITS, r) for r in BLOCK_RANKS)) for m in matrices(guess)]
    shape = (BLOCKS, len(FITS), len(BLOCK_RANKS))
    cost = np.reshape([menu.cost for menu in menus], shape).sum(axis=1)
    size = np.reshape([menu.total_bytes for menu in menus], shape).sum(axis=1)
    start = np.arange(BLOCKS + 1) * len(BLOCK_RANKS)
    solution = solve(Problem(cost.ravel(), size.ravel(), start, total_bytes - sum(KEPT.values())))
    chosen = ranked(guess, lambda block: BLOCK_RANKS[solution.choice[block]])
    return replace(chosen, solution=solution)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All at the bytes of `ultra`. per_block: the optimum at `FIXED_BITS` with one rank for all of a block;
    fixed: at `FIXED_BITS`; free: with every width; rankless: with every width but no rank."""

    ultra: Assignment
    uniform: Assignment
    per_block: Assignment
    fixed: Assignment
    free: Assignment
    rankless: Assignment


def compare(guess: Guess) -> Comparison:
    published = ultra(guess)
    budget = published.total_bytes
    return Comparison(
        published,
        uniform(guess, budget),
        one_rank_per_block(guess, budget),
        optimum(build_menu(guess, bits=(FIXED_BITS,)), budget),
        optimum(build_menu(guess), budget),
        optimum(build_menu(guess, ranks=(0,)), budget),
    )


def blocks_text(blocks: list[int]) -> str:
    """Runs of three or more blocks as a range."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(b) for b in run] for run in runs]
    return ", ".join(text for part in parts for text in part) or "none"


def counted(values: Integers) -> str:
    """'3 bits: 84, 4 bits: 112' without the unit."""
    return ", ".join(f"{value}: {count}" for value, count in sorted(Counter(values.ravel().tolist()).items()))


def raised_text(free: Assignment) -> str:
    """The blocks with more bits per weight than the median block, those of most bits first."""
    bits = free.mean_bits.round(2)
    levels = sorted(set(bits[bits > np.median(bits)].tolist()), reverse=True)
    texts = [f"{level:.2f} in {blocks_text(np.flatnonzero(bits == level).tolist())}" for level in levels]
    return "; ".join(texts) or "no more in any"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rank against one more bit: left_by_bit, the part of the error that the bit leaves; left_by_rank, what `rank`
    leaves, the most for the bytes of that bit; break_even, the most rank that does more per byte than the bit."""

    kind: str
    left_by_bit: float
    rank: int
    left_by_rank: float
    break_even: int


def exchange(matrix: Matrix) -> Exchange:
    plain, more = matrix.option(FIXED_BITS, 0), matrix.option(FIXED_BITS + 1, 0)
    menu = matrix.menu((plain, more, *(matrix.option(FIXED_BITS, r) for r in range(1, matrix.most_rank + 1))))
    left, price = menu.error / menu.error[0], menu.total_bytes - menu.total_bytes[0]
    in_bits = price / price[1]
    affordable, better = np.flatnonzero(in_bits <= 1)[-1], left < left[1] ** in_bits
    return Exchange(
        matrix.kind,
        float(left[1]),
        menu.options[affordable].rank,
        float(left[affordable]),
        max((o.rank for o, wins in zip(menu.options, better, strict=True) if wins), default=0),
    )


def findings(comparison: Comparison, guess: Guess) -> list[str]:
    """What the optimum with free bits does instead, in sentences made from the result."""
    fixed, free, rankless = comparison.fixed, comparison.free, comparison.rankless
    exchanges = [exchange(matrix) for matrix in matrices(guess)[: len(FITS)]]
    bought = ", ".join(f"{e.kind} {e.left_by_rank:.2f} (rank {e.rank})" for e in exchanges)
    break_even = ", ".join(f"{e.kind} {e.break_even}" for e in exchanges)
    return [
        f"Bits: matrices at {counted(free.bits)}; {np.median(free.mean_bits):.2f} per weight in the median block, "
        f"{raised_text(free)}.",
        f"Rank: {(free.ranks > 0).sum()} of {free.ranks.size} matrices have any ({(fixed.ranks > 0).sum()} with bits "
        f"fixed), {free.ranks.mean():.1f} in the mean ({fixed.ranks.mean():.1f}), {free.ranks.max()} at most "
        f"({fixed.ranks.max()}); blocks {blocks_text(list(PUBLISHED_FIDELITY))} have {free.published_share:.0%} of it "
        f"({fixed.published_share:.0%}).",
        f"Without any rank the loss is {rankless.loss:.6f}: {rankless.loss / free.loss - 1:+.1%} against free bits "
        f"with rank, {rankless.loss / fixed.loss - 1:+.1%} against fixed bits with rank.",
        f"Why: a fourth bit leaves {max(e.left_by_bit for e in exchanges):.2f} of an error; its bytes spent on rank "
        f"leave {bought}. Rank does more per byte than that bit only up to rank {break_even}; but bits come whole, and "
        "rank takes what is left.",
    ]


def print_loss(name: str, assignment: Assignment, reference: Assignment, budget: int) -> None:
    print(f"    {name:34} {assignment.loss:10.6f} {assignment.loss / reference.loss:7.3f}", end="")
    print(f" {(budget - assignment.total_bytes) / 1024:12.1f}", end="")
    if (solution := assignment.solution) is not None:
        print(f"   {'proven' if solution.proven else 'unproven'}, gap {solution.gap:.1e}", end="")
    print()


def print_losses(comparison: Comparison) -> None:
    budget = comparison.ultra.total_bytes
    print(f"    {'':34} {'loss':>10} {'ratio':>7} {'KiB left':>12}")
    same_rank = f"3 bits, rank {comparison.uniform.ranks.max()} everywhere"
    for name, assignment in (
        ("3 bits, 'ultra'", comparison.ultra),
        (same_rank, comparison.uniform),
        ("3 bits, one rank a block, optimum", comparison.per_block),
        ("3 bits, optimum", comparison.fixed),
        ("bits free, optimum", comparison.free),
        ("bits free, no rank, optimum", comparison.rankless),
    ):
        print_loss(name, assignment, comparison.fixed, budget)


def print_ranks(comparison: Comparison) -> None:
    fixed, per_block, published = comparison.fixed, comparison.per_block, comparison.ultra
    fidelity = fidelities()
    print("\n(a) 3 bits: blocks by mean rank over their seven matrices\n")
    print(
        f"    {'block':>5} {'fidelity':>9} {'ultra':>7} {'a block':>8} {'optimum':>8}   ranks of {' '.join(FITS)}"
    )
    for block in fixed.by_rank:
        means = [published.mean_rank[block], per_block.mean_rank[block], fixed.mean_rank[block]]
        print(f"    {block:5} {fidelity[block]:9.4f} {means[0]:7.1f} {means[1]:8.1f} {means[2]:8.1f}", end="")
        print(f"   {' '.join(str(rank) for rank in fixed.ranks[block])}")
    for name, assignment in (
        ("the optimum", fixed),
        ("the optimum of one rank a block", per_block),
        ("'ultra'", published),
    ):
        share = f"{assignment.concentration:.0%} of all rank"
        print(f"    most rank in {name}: blocks {', '.join(map(str, assignment.most_rank))}, with {share}")


def print_bits(comparison: Comparison) -> None:
    free, fidelity = comparison.free, fidelities()
    print("\n(b) bits free, same bytes: by block\n")
    print(f"    {'block':>5} {'fidelity':>9} {'bits':>6} {'rank':>6}   bits and ranks of {' '.join(FITS)}")
    for block in range(BLOCKS):
        print(
            f"    {block:5} {fidelity[block]:9.4f} {free.mean_bits[block]:6.2f} {free.mean_rank[block]:6.1f}",
            end="",
        )
        print(
            f"   {' '.join(str(b) for b in free.bits[block])} | {' '.join(str(r) for r in free.ranks[block])}"
        )


def report(guess: Guess) -> None:
    comparison = compare(guess)
    scale = "as measured" if guess.absolute_r0 else "relative to n"
    unknown = [block for block in range(BLOCKS) if block not in PUBLISHED_FIDELITY]
    print(
        f"Qwen2-1.5B, {BLOCKS} × {len(FITS)} matrices; a block's fidelity shared by {guess.shares}, r₀ {scale}."
    )
    print(f"Fidelity: mean {fidelities().mean():.3f}; published for blocks {list(PUBLISHED_FIDELITY)};")
    print(
        f"blocks {blocks_text(unknown)} are NOT known: all {fidelities()[unknown[0]]:.6f}, to give that mean."
    )
    print(
        f"Budget: the bytes of 'ultra', {comparison.ultra.total_bytes / MIB:.1f} MiB with 16-bit embeddings.\n"
    )
    print_losses(comparison)
    print_ranks(comparison)
    print_bits(comparison)
    print("\nWhat it does instead:")
    for sentence in findings(comparison, guess):
        print(f"    {sentence}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", choices=list(SHARES), default="weights")
    parser.add_argument("--r0", choices=["relative", "absolute"], default="relative")
    arguments = parser.parse_args()
    report(Guess(arguments.shares, arguments.r0 == "absolute"))


if __name__ == "__main__":
    main()
