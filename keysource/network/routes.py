"""Which ways a block takes: ``k`` paths that have no inner node in common, over links with enough key.

Wanted, in this order: every link has at least the units that a block costs; no path has more than ``max_hops``
trusted nodes; the poorest link is as rich as possible, where more than :data:`PLENTY` times the cost counts as
plenty; few nodes in all.

Finding length-bounded disjoint paths is NP-hard in general, so two steps: successive shortest augmenting paths
(Suurballe 1974; the nodes are split, and the sum of lengths is the least there is), which answers nearly always; and
where its answer has a path that is too long, a search through the paths that are short enough, bounded by
:data:`MOST_TRIED`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping

from keysource.network.errors import NoRoute

PLENTY = 8
MOST_TRIED = 20_000
Capacity = Mapping[tuple[str, str], int]
"""(from, to) -> units that the first node can send to the second now."""
Path = tuple[str, ...]
_Edge = tuple[str, str]


def disjoint_paths(capacity: Capacity, start: str, goal: str, count: int, max_hops: int, need: int) -> list[Path]:
    """``count`` paths, shortest first; each names its nodes with both ends.

    Raises:
        NoRoute: there are not so many (or none was found among :data:`MOST_TRIED`).
    """
    worth = {edge: min(units, PLENTY * need) for edge, units in capacity.items() if units >= need}
    for floor in sorted(set(worth.values()), reverse=True):
        edges = {edge for edge, units in worth.items() if units >= floor}
        paths = _least_total(edges, start, goal, count)
        if paths and any(len(path) - 2 > max_hops for path in paths):
            paths = _bounded(edges, start, goal, count, max_hops)
        if paths:
            return sorted(paths, key=lambda path: (len(path), path))
    what = "path" if count == 1 else f"{count} disjoint paths"
    raise NoRoute(
        f"no {what} from {start!r} to {goal!r} with at most {max_hops} trusted nodes"
        f" and {need} units of key on every link"
    )


def _least_total(edges: set[_Edge], start: str, goal: str, count: int) -> list[Path]:
    """``count`` node-disjoint paths with the least sum of lengths; empty where there are not so many."""
    used: set[_Edge] = set()
    for _ in range(count):
        way = _augmenting(edges, used, start, goal)
        if way is None:
            return []
        for step in way:
            if step[::-1] in used:
                used.discard(step[::-1])
            else:
                used.add(step)
    after = {left: right for left, right in used if left != start}
    return [_followed(first, after, start, goal) for left, first in sorted(used) if left == start]


def _followed(node: str, after: Mapping[str, str], start: str, goal: str) -> Path:
    path = [start, node]
    while path[-1] != goal:
        path.append(after[path[-1]])
    return tuple(path)


def _augmenting(edges: set[_Edge], used: set[_Edge], start: str, goal: str) -> list[_Edge] | None:
    """A cheapest way that adds one path to ``used`` (a step along a used edge backwards takes it out again, for -1).

    Bellman and Ford over states (node, entered by a used edge backwards): who comes forward to a node that a path
    passes already can only go back along that path.
    """
    busy = {left for left, _right in used if left != start}
    origin = (start, False)
    cost: dict[tuple[str, bool], int] = {origin: 0}
    before: dict[tuple[str, bool], tuple[str, bool]] = {}
    queue = deque([origin])
    forward, backward = _neighbours(edges - used), _neighbours({(right, left) for left, right in used})
    while queue:
        state = queue.popleft()
        node, back = state
        steps: list[tuple[tuple[str, bool], int]] = []
        if node not in busy or back:
            steps += [((other, False), 1) for other in forward.get(node, ()) if other != start]
        if node in busy:
            steps += [((other, True), -1) for other in backward.get(node, ()) if other != start]
        for following, price in steps if node != goal else ():
            if cost[state] + price < cost.get(following, 1 << 30):
                cost[following] = cost[state] + price
                before[following] = state
                queue.append(following)
    state = (goal, False)
    if state not in cost:
        return None
    way: list[_Edge] = []
    while state != origin:
        way.append((before[state][0], state[0]))
        state = before[state]
    return way[::-1]


def _neighbours(edges: set[_Edge]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for left, right in sorted(edges):
        found.setdefault(left, []).append(right)
    return found


def _bounded(edges: set[_Edge], start: str, goal: str, count: int, max_hops: int) -> list[Path]:
    ways = list(itertools.islice(_simple(_neighbours(edges), start, goal, max_hops), MOST_TRIED))
    ways.sort(key=lambda path: (len(path), path))
    left = MOST_TRIED

    def choose(place: int, chosen: list[Path], taken: frozenset[str]) -> list[Path]:
        nonlocal left
        if len(chosen) == count:
            return chosen
        for index in range(place, len(ways)):
            left -= 1
            if left < 0:
                return []
            if taken.isdisjoint(ways[index][1:-1]):
                found = choose(index + 1, [*chosen, ways[index]], taken | set(ways[index][1:-1]))
                if found:
                    return found
        return []

    return choose(0, [], frozenset())


def _simple(after: Mapping[str, list[str]], start: str, goal: str, max_hops: int) -> Iterator[Path]:
    """Every path that does not cross itself, the short ones first."""
    queue: deque[Path] = deque([(start,)])
    tried = 0
    while queue and tried < 4 * MOST_TRIED:
        path = queue.popleft()
        tried += 1
        for other in after.get(path[-1], ()):
            if other == goal:
                yield (*path, goal)
            elif other not in path and len(path) - 1 < max_hops:
                queue.append((*path, other))
