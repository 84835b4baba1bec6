"""Search: which option each unit takes so that the sum of their costs is least for a sum of errors.

A Lagrangian relaxation (Shoham and Gersho 1988): for a price of an error each unit takes the option of the least cost +
price x error, whatever the others do. As the price falls, units move along the lower convex hulls of their options, one
move at a time; `front` lists all states on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """What a unit may become: `choice`, at that cost and error (any units; errors add up)."""

    choice: T
    cost: float
    error: float


def hull(options: Sequence[Option[T]]) -> list[Option[T]]:
    """The options that are best for some price of an error, by rising error and falling cost."""
    kept: list[Option[T]] = []
    for option in sorted(options, key=lambda o: (o.error, o.cost)):
        if kept and option.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option[T], b: Option[T]) -> float:
    """Cost saved for an error added."""
    return (a.cost - b.cost) / max(b.error - a.error, 1e-300)


def front(units: Sequence[Sequence[Option[T]]]) -> list[list[Option[T]]]:
    """All states, an option a unit, from the least sum of errors to the least sum of costs."""
    hulls = [hull(options) for options in units]
    moves = [
        (_slope(before, after), place, unit)
        for unit, points in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(points), 1)
    ]
    states = [[points[0] for points in hulls]]
    for _, place, unit in sorted(moves, key=lambda move: (-move[0], move[1])):
        states.append([*states[-1][:unit], hulls[unit][place], *states[-1][unit + 1 :]])
    return states
