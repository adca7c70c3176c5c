"""Plans next to the optimum: one or two layers with another option, still within the budget.

What lives here: listing them in the order of their predicted loss, each of other layers, so that a handful measured
covers many near ties. Whether one is better in truth is for a measurement to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from allocator.problem import Integers, Menu

MOVES = 300
"""Single moves kept for pairing, the least penalised first."""


@dataclass(frozen=True, slots=True)
class Move:
    """Another option for one layer: the change of cost (nats/token) and of bytes."""

    layer: int
    option: int
    cost: float
    size: int


def neighbours(
    menu: Menu, choice: Integers, total_bytes: int, price_per_byte: float, count: int
) -> list[Integers]:
    """At most `count` choices one or two moves away that fit `total_bytes`, no layer moved in two of them.

    price_per_byte: the shadow price in nats per byte; a move's penalty is its cost plus the price of its bytes.
    """
    slack = total_bytes - menu.kept_bytes - sum(_size(menu, choice, index) for index in range(len(choice)))
    moves = sorted(_moves(menu, choice), key=lambda move: move.cost + price_per_byte * move.size)[:MOVES]
    steps: list[tuple[Move, ...]] = [(move,) for move in moves if move.size <= slack]
    steps += [
        (first, second)
        for index, first in enumerate(moves)
        for second in moves[index + 1 :]
        if first.layer != second.layer and first.size + second.size <= slack
    ]
    found: list[Integers] = []
    moved: set[int] = set()
    for step in sorted(steps, key=lambda step: sum(move.cost for move in step)):
        if len(found) == count:
            break
        if moved.isdisjoint(move.layer for move in step):
            moved |= {move.layer for move in step}
            found.append(_moved(choice, step))
    return found


def _moves(menu: Menu, choice: Integers) -> list[Move]:
    return [
        Move(
            index,
            option,
            float(layer.cost[option] - layer.cost[now]),
            int(layer.total_bytes[option] - layer.total_bytes[now]),
        )
        for index, (layer, now) in enumerate(zip(menu.layers, choice.tolist(), strict=True))
        for option in range(len(layer.options))
        if option != now
    ]


def _size(menu: Menu, choice: Integers, index: int) -> int:
    return int(menu.layers[index].total_bytes[choice[index]])


def _moved(choice: Integers, step: tuple[Move, ...]) -> Integers:
    other = choice.copy()
    for move in step:
        other[move.layer] = move.option
    return other
