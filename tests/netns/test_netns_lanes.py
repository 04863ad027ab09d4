"""Two sites with several lanes: real processes, real queues of one TUN, real ports."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload, sites
from qvpn.demo.sites import INNER4, INNER6

MARKER = payload.new_marker()
pytestmark = pytest.mark.timeout(180)


def with_lanes(tunnel: Any, alice: int, bob: int, *options: str, **peer: object) -> Any:
    tunnel.configure(*(options or ("--rekey", "5s")), **peer)
    for site, lanes in zip(topology.SITES, (alice, bob), strict=True):
        sites.change(tunnel.lab, site, lambda table, lanes=lanes: table["tunnel"].update(lanes=lanes))
    return tunnel


def lanes(tunnel: Any, site: str) -> list[dict[str, Any]]:
    """Processes of the lanes beside lane 0."""
    return tunnel.daemons[site].status()["lanes"]


def wait_for(what: str, ready: Callable[[], object], within: float = 15.0) -> float:
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def wait_in_use(tunnel: Any, within: float = 15.0) -> None:
    """Every lane of both sites has proved its way to the peer."""
    for site in topology.SITES:
        wait_for(
            f"all lanes of {site} in use",
            lambda site=site: all(lane["used"] for lane in lanes(tunnel, site)),
            within,
        )


def streams(tunnel: Any, count: int, source: str = "alice", sink: str = "bob", total: int = 2_000_000) -> None:
    """So many transfers one after the other, each a flow of its own, so that they spread over the queues."""
    for _ in range(count):
        assert measure.transfer(tunnel.lab, source, sink, INNER4[sink], MARKER, total=total).same_hash


def test_flows_spread_over_lanes_and_counters_add_up(tunnel: Any) -> None:
    with_lanes(tunnel, 3, 3)
    tunnel.up()
    wait_in_use(tunnel)
    for inner in (INNER4, INNER6):
        assert measure.ping(tunnel.lab, "alice", inner["bob"], count=3)["received"] == 3
    streams(tunnel, 8)
    time.sleep(1.5)  # a lane reports once a second
    for site in topology.SITES:
        peer = tunnel.daemons[site].peer()
        assert [lane["number"] for lane in peer["lanes"]] == [0, 1, 2]
        for name in ("sent_packets", "sent_bytes", "received_packets", "received_bytes"):
            assert peer[name] == sum(lane[name] for lane in peer["lanes"])
        assert peer["opened"] == peer["marked"]
        assert peer["source_checks"] == peer["tun_writes"] + peer["tun_refused"]
        assert sum(lane["received_packets"] > 4 for lane in peer["lanes"]) >= 2, peer["lanes"]  # a flow has more
    assert tunnel.daemons["bob"].peer()["received_bytes"] > 16_000_000


def test_a_peer_with_one_lane_gets_all_on_lane_0(tunnel: Any) -> None:
    with_lanes(tunnel, 3, 1)
    tunnel.up()
    streams(tunnel, 2)
    streams(tunnel, 1, source="bob", sink="alice")
    alice = tunnel.daemons["alice"].status()
    assert [(lane["up"], lane["used"]) for lane in alice["lanes"]] == [(True, False), (True, False)]
    assert [lane["up"] for lane in alice["peers"][0]["lanes"]] == [True, False, False]
    assert [lane["sent_packets"] for lane in alice["peers"][0]["lanes"]][1:] == [0, 0]
    assert tunnel.daemons["bob"].status()["lanes"] == []


def test_lanes_of_a_site_behind_a_nat_are_found_by_their_records(tunnel: Any) -> None:
    """The NAT gives each lane a port of its own that nobody can guess."""
    with_lanes(tunnel, 2, 2)
    tunnel.lab["net"].run(
        ["nft", "-f", "-"],
        text="table ip n {\n chain p {\n type nat hook postrouting priority 100;\n"
        ' oifname "to-bob" masquerade random\n }\n}\n',
    )
    sites.change(tunnel.lab, "bob", lambda table: table["peer"][0].pop("endpoint"))
    tunnel.up()
    wait_in_use(tunnel)
    streams(tunnel, 4)
    streams(tunnel, 4, source="bob", sink="alice")
    ends = [lane["endpoint"] for lane in tunnel.daemons["bob"].peer()["lanes"]]
    ports = [int(end.rpartition(":")[2]) for end in ends]
    assert ports[1] != ports[0] + 1, "the NAT was no hindrance"
    assert {end.rpartition(":")[0] for end in ends} == {"198.51.100.1"}, ends


def a_lane(pid: int | None) -> bool:
    """Whether that process is one of a lane, and not another that got its number since."""
    try:
        return pid is not None and b"qvpn.lanes" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class Loads:
    """Many small flows at once, so that every queue has some."""

    def __init__(self, tunnel: Any, flows: int = 8, rate: float = 60.0) -> None:
        self._loads = [
            measure.Load(tunnel.lab, INNER4, MARKER, rate=rate, port=9000 + flow, linger=0.3, name=f"load-{flow}")
            for flow in range(flows)
        ]

    def begin(self) -> None:
        for load in self._loads:
            load.begin()

    def finish(self) -> list[measure.Loss]:
        return [load.finish() for load in self._loads]


def start_nonces(tunnel: Any, lanes: int) -> Any:
    script = str(Path(__file__).with_name("nonces.py"))
    command = [sys.executable, script, "wan", str(sites.PORT), str(lanes)]
    process = tunnel.lab["alice"].start("nonces", command)
    process.until_output(15)
    return process


@pytest.mark.timeout(420)
def test_killed_lanes_repeat_no_nonce_and_come_back(tunnel: Any, full_count: Any, tracebacks: Any) -> None:
    """kill -9 at random moments under traffic.  A lane's keys die with its process: no nonce passes twice."""
    with_lanes(tunnel, 3, 3, "--rekey", "2s")
    tunnel.up()
    wait_in_use(tunnel)
    capture = start_nonces(tunnel, 3)
    loads = Loads(tunnel)
    loads.begin()
    chance, killed, wanted = random.Random(MARKER), 0, full_count(40)
    until = time.monotonic() + 90
    while killed < wanted and time.monotonic() < until:
        site = chance.choice(topology.SITES)
        pid = chance.choice(lanes(tunnel, site))["pid"]
        if a_lane(pid):
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(chance.uniform(0.0, 0.8))
    assert all(daemon.state() == "qkd" for daemon in tunnel.daemons.values())
    wait_in_use(tunnel, within=60)
    losses = loads.finish()
    streams(tunnel, 4, total=500_000)
    seen = capture.finish()
    assert killed == wanted
    assert seen["repeated"] == [] and seen["missed"] == 0, seen
    assert seen["records"] > 2_000 and seen["keys"] > 6
    assert len(seen["data"]) >= 4, f"the flows were on one lane: {seen['data']}"
    assert sum(lane["restarts"] for site in topology.SITES for lane in lanes(tunnel, site)) >= killed
    assert sum(loss.received for loss in losses) > 0.5 * sum(loss.sent for loss in losses), losses
    assert tracebacks() == []


def test_rekeys_lose_nothing_on_any_lane(tunnel: Any) -> None:
    """The other end's process hears of an epoch a little earlier or later: packets leave when both have it."""
    with_lanes(tunnel, 3, 3, "--rekey", "1s")
    tunnel.up()
    wait_in_use(tunnel)
    loads, before = Loads(tunnel), tunnel.rekeys()
    loads.begin()
    for daemon in tunnel.daemons.values():
        daemon.wait_epochs(before + 6, within=30)
    losses = loads.finish()
    assert sum(loss.sent for loss in losses) > 1_000
    assert [loss.lost for loss in losses] == [0] * len(losses), (losses, tunnel.drops())
    time.sleep(1.2)
    used = [lane["received_packets"] for lane in tunnel.daemons["bob"].peer()["lanes"]]
    assert sum(count > 50 for count in used) >= 2, used


def block(tunnel: Any, port: int | None) -> None:
    """Let the untrusted network drop what goes to a UDP port (None takes the rule away)."""
    tunnel.lab["net"].run(["nft", "flush", "ruleset"])
    if port is not None:
        rule = f"udp dport {port} drop"
        table = f"table inet shut {{\n chain forward {{\n type filter hook forward priority 0;\n {rule}\n }}\n}}\n"
        tunnel.lab["net"].run(["nft", "-f", "-"], text=table)


def test_a_closed_port_costs_a_lane_and_not_the_tunnel(tunnel: Any) -> None:
    with_lanes(tunnel, 2, 2)
    block(tunnel, sites.PORT + 1)
    tunnel.up()
    streams(tunnel, 2, total=500_000)
    assert not any(lane["used"] for site in topology.SITES for lane in lanes(tunnel, site))
    block(tunnel, None)
    wait_in_use(tunnel)
    loads = Loads(tunnel, flows=4)
    loads.begin()
    time.sleep(1)
    block(tunnel, sites.PORT + 1)  # with flows on it, which must come back by lane 0
    wait_for("nothing is sent into the hole", lambda: not lanes(tunnel, "alice")[0]["used"], within=15)
    streams(tunnel, 2, total=500_000)
    losses = loads.finish()
    assert max(loss.longest_gap for loss in losses) < 10, losses


def test_a_lane_alone_stops_at_the_hard_end(tunnel: Any) -> None:
    """The daemon is stopped: nobody makes a new epoch, nobody tells the lanes; they still end with the old one."""
    with_lanes(tunnel, 3, 3, "--rekey", "2s", hard_end="7s")
    tunnel.up()
    wait_in_use(tunnel)
    loads = Loads(tunnel)
    loads.begin()
    capture = start_nonces(tunnel, 3)
    process = tunnel.daemons["alice"].status()["pid"]
    os.kill(process, signal.SIGSTOP)
    stopped = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        time.sleep(9)
        seen = capture.finish()
    finally:
        os.kill(process, signal.SIGCONT)
    loads.finish()
    own = {
        name: when - stopped
        for name, when in seen["last_data"].items()
        if name.startswith(f"{topology.WAN4['alice']} ")
    }
    assert any(when > 1 for name, when in own.items() if not name.endswith("lane 0")), own
    assert all(when < 7.5 for when in own.values()), own
    tunnel.wait(within=30)
    wait_in_use(tunnel)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_lanes_end_with_the_daemon(tunnel: Any, signum: signal.Signals) -> None:
    with_lanes(tunnel, 3, 3)
    tunnel.up()
    alice = tunnel.daemons["alice"]
    pids = [lane["pid"] for lane in lanes(tunnel, "alice")]
    assert all(a_lane(pid) for pid in pids)
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert not any(word.isalpha() for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[4:])
    os.kill(alice.status()["pid"], signum)
    wait_for("the lanes to end", lambda: not any(a_lane(pid) for pid in pids))
    wait_for("the TUN to go", lambda: "qvpn0" not in tunnel.lab["alice"].interfaces())
    if signum == signal.SIGTERM:
        assert alice.process.wait(10) == 0
