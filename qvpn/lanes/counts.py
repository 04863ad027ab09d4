"""Counters of lanes: one plane's in the form in which they are told, and sums."""

from __future__ import annotations

from dataclasses import replace

from qvpn.dataplane.stats import PeerTraffic
from qvpn.lanes.messages import COUNTS, LaneTraffic


def lane_traffic(stats: PeerTraffic, *, up: bool) -> LaneTraffic:
    """What one plane counted for a peer, in the form in which lanes tell it."""
    return LaneTraffic(
        up=up,
        endpoint=None if stats.endpoint is None else str(stats.endpoint),
        drops=stats.drops,
        **{name: getattr(stats, name) for name in COUNTS},
    )


def add(one: LaneTraffic, other: LaneTraffic) -> LaneTraffic:
    """Counters summed; what is now, from the second."""
    counts = {name: getattr(one, name) + getattr(other, name) for name in COUNTS}
    return replace(other, **counts, drops=summed(one.drops, other.drops))


def summed(*counts: dict[str, int]) -> dict[str, int]:
    """Counters by name, added up."""
    total: dict[str, int] = {}
    for each in counts:
        for name, number in each.items():
            total[name] = total.get(name, 0) + number
    return total
