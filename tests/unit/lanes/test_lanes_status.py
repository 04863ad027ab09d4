"""What status tells of lanes: sums and each lane, a process that is not there and why."""

from __future__ import annotations

import dataclasses
import ipaddress

from qvpn.cli.show import _show_lane
from qvpn.dataplane.stats import PeerTraffic
from qvpn.lanes.counts import add, lane_traffic
from qvpn.lanes.lanes import LaneState
from qvpn.lanes.messages import COUNTS, LaneTraffic
from qvpn.netio.base import Address
from qvpn.siteview import lane_view
from qvpn.tunnel.drops import DropReason


def show(**changes: object) -> str:
    state = LaneState(number=2, port=51842, pid=77, up=True, attached=True, restarts=0, reason="")
    return _show_lane(dataclasses.asdict(lane_view(dataclasses.replace(state, **changes))))  # type: ignore[arg-type]


def test_a_lane_in_one_line() -> None:
    assert show() == "lane 2: in use  port 51842  pid 77"
    assert show(attached=False) == "lane 2: no peer to send to  port 51842  pid 77"
    assert (
        show(up=False, attached=False, pid=None, restarts=3, reason="ended with signal 9")
        == "lane 2: not running  port 51842  restarts 3, last: ended with signal 9"
    )


def test_every_counter_of_a_plane_is_taken_over_and_summed() -> None:
    fields = {field.name for field in dataclasses.fields(PeerTraffic)}
    counters = {name: 3 + place for place, name in enumerate(COUNTS)}
    assert set(COUNTS) <= fields
    others = dict.fromkeys(fields - set(COUNTS))
    stats = PeerTraffic(
        **{  # type: ignore[arg-type]
            **others,
            **counters,
            "endpoint": Address(ipaddress.ip_address("192.0.2.1"), 5),
            "drops": {DropReason.REPLAY.value: 4},
        }
    )
    lane = lane_traffic(stats, up=True)
    assert (lane.up, lane.endpoint, lane.drops) == (True, "192.0.2.1:5", {"replay": 4})
    assert {name: getattr(lane, name) for name in COUNTS} == counters
    total = add(lane, LaneTraffic(sent_bytes=1, drops={"replay": 1, "limit": 2}))
    assert total.sent_bytes == counters["sent_bytes"] + 1 and total.opened == counters["opened"]
    assert total.drops == {"replay": 5, "limit": 2} and not total.up


def test_counters_that_status_sums_over_lanes_are_told_by_lanes() -> None:
    """Whoever adds a number of packets to the packet path's statistics must let lanes tell it too."""
    numbers = {field.name for field in dataclasses.fields(PeerTraffic) if field.type == "int"}
    assert numbers == set(COUNTS)
