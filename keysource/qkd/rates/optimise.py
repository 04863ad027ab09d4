"""The best settings for a rate: a simplex search (Nelder and Mead 1965) from several starts, on any few numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

Point = tuple[float, ...]


def maximise(
    goal: Callable[[Point], float], box: Sequence[tuple[float, float]], starts: Sequence[Point], rounds: int = 600
) -> tuple[Point, float]:
    """(where, value) of the largest ``goal`` found inside ``box``; ``goal`` is 0 where there is nothing.

    Inside the simplex each coordinate is a logit of its place in the box, so no step leaves it.
    """

    def inside(point: Point) -> Point:
        return tuple(low + (high - low) / (1.0 + math.exp(-x)) for x, (low, high) in zip(point, box, strict=True))

    def cost(point: Point) -> float:
        value = goal(inside(point))
        return -math.log(value) if value > 0.0 else 1e9

    best, lowest = starts[0], math.inf
    good = sorted({*starts, *_grid(box)}, key=lambda start: -goal(start))[: max(2, len(starts))]
    for start in good:
        at = tuple(_logit(x, edges) for x, edges in zip(start, box, strict=True))
        for size in (0.5, 0.1, 0.3):  # a collapsed simplex begins anew where it lies
            at, value = _descend(cost, at, size, rounds)
        if value < lowest:
            best, lowest = at, value
    return inside(best), math.exp(-lowest) if lowest < 1e8 else 0.0


def _grid(box: Sequence[tuple[float, float]]) -> list[Point]:
    """Coarse, so that a search does not begin where there is nothing."""
    axes = [[low + (high - low) * share for share in (0.2, 0.5, 0.85)] for low, high in box]
    return list(itertools.product(*axes))


def _logit(x: float, edges: tuple[float, float]) -> float:
    share = min(1.0 - 1e-9, max(1e-9, (x - edges[0]) / (edges[1] - edges[0])))
    return math.log(share / (1.0 - share))


def _descend(cost: Callable[[Point], float], start: Point, size: float, rounds: int) -> tuple[Point, float]:
    corners = [start] + [tuple(x + size * (i == j) for j, x in enumerate(start)) for i in range(len(start))]
    simplex = sorted((cost(corner), corner) for corner in corners)
    for _ in range(rounds):
        if simplex[-1][0] - simplex[0][0] < 1e-10:
            break
        centre = tuple(sum(column) / len(start) for column in zip(*(c for _v, c in simplex[:-1]), strict=True))
        simplex[-1:] = [_better(cost, simplex, centre)]
        if simplex[-1][0] >= 1e300:  # nothing was better: draw everything towards the best
            shrunk = [tuple((x + b) / 2.0 for x, b in zip(c, simplex[0][1], strict=True)) for _v, c in simplex[1:]]
            simplex[1:] = [(cost(corner), corner) for corner in shrunk]
        simplex.sort()
    return simplex[0][1], simplex[0][0]


def _better(cost: Callable[[Point], float], simplex: list[tuple[float, Point]], centre: Point) -> tuple[float, Point]:
    """Reflected, stretched or contracted; an infinite value where none helps."""
    worst = simplex[-1]

    def along(t: float) -> tuple[float, Point]:
        point = tuple(c + t * (c - w) for c, w in zip(centre, worst[1], strict=True))
        return cost(point), point

    mirrored = along(1.0)
    if mirrored[0] < simplex[0][0]:
        return min(mirrored, along(2.0))
    if mirrored[0] < simplex[-2][0]:
        return mirrored
    nearer = along(0.5 if mirrored[0] < worst[0] else -0.5)
    return nearer if nearer[0] < min(mirrored[0], worst[0]) else (1e300, worst[1])
