"""The tunnel over QUIC in namespaces: what passes, what stops it, what a restart and a change of address cost."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qvpn import uapi
from qvpn.demo import lab as topology
from qvpn.demo import measure, payload, sites
from qvpn.demo.lab import Lab
from qvpn.demo.sites import INNER4, INNER6, Daemon
from qvpn.demo.steps import wait_for

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
long_only = pytest.mark.skipif(not LONG, reason="QVPN_TEST_LONG=1 runs it")
MARKER = payload.new_marker()
SWEEP, FLOOD = (str(Path(__file__).with_name(name)) for name in ("mtu_sweep.py", "quic_flood.py"))
SIZE = 1400
"""Bytes of UDP payload that a QUIC packet has at the most where nothing is set."""
AROUND = {4: 28, 6: 48}
"""Outer IP and UDP headers."""
IN_QUIC, IN_RECORD = 30, 42
"""What QUIC takes of a UDP payload, and a record of a datagram."""
pytestmark = pytest.mark.timeout(600 if LONG else 120)


def configure(tunnel, transport: object, **more: Any) -> None:
    tunnel.configure("--rekey", "2s", transport=transport, **more)


def test_both_families_pass_over_quic_with_rekeys_and_no_plaintext_outside(tunnel) -> None:
    configure(tunnel, "quic")
    tunnel.up()
    lab: Lab = tunnel.lab
    inner = ("10.90.0.0/24", "fd90::/64")
    outside = measure.start_capture(lab, "alice", "wan", MARKER, inner=inner, port=51840)
    for family in (INNER4, INNER6):
        pinged = measure.ping(lab, "alice", family["bob"], count=3)
        assert pinged["received"] == 3, (pinged, tunnel.tails())
    total = 50_000_000 if LONG else 3_000_000
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=total).same_hash
    if LONG:
        assert measure.transfer(lab, "bob", "alice", INNER6["alice"], MARKER, total=total).same_hash
    before = tunnel.rekeys()
    load = measure.Load(lab, INNER4, MARKER, rate=300, linger=0.5)
    load.begin()
    for daemon in tunnel.daemons.values():
        daemon.wait_epochs(before + (20 if LONG else 2), within=80)
    loss = load.finish()
    assert (loss.lost, loss.duplicates, loss.refused) == (0, 0, 0), (loss, tunnel.drops())
    seen = outside.finish()
    assert seen["frames"] > 200
    assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == seen["tunnel_records"] == 0
    for daemon in tunnel.daemons.values():
        status, peer = daemon.status(), daemon.peer()
        assert peer["carrier"] == "quic" and peer["transports"] == ["quic"]
        assert status["mtu"] == SIZE - IN_QUIC - IN_RECORD and status["carriers"]["quic"]["up"] >= 1


def sent(tunnel) -> list[int]:
    return [int(daemon.peer()["sent_packets"]) for daemon in tunnel.daemons.values()]


@long_only
def test_an_alarm_stops_the_tunnel_and_nothing_leaves_until_it_is_cleared(tunnel) -> None:
    """The connection stays, so it is the policy that stops the packets and not a missing carrier."""
    configure(tunnel, "quic", on_alarm="block-now")
    tunnel.up()
    lab: Lab = tunnel.lab
    outside = measure.start_capture(lab, "alice", "wan", MARKER, inner=("10.90.0.0/24",), port=51840)
    load = measure.Load(lab, INNER4, MARKER, rate=200, linger=0.2)
    load.begin()
    wait_for("packets", lambda: min(sent(tunnel)) > 50, within=5)
    alarm = {"source": "courier", "reason": "a test"}
    uapi.ask(tunnel.daemons["alice"].control, "alarm", {**alarm, "active": True})
    tunnel.wait("blocked", within=15)
    before = sent(tunnel)
    time.sleep(1)
    assert sent(tunnel) == before
    loss, seen = load.finish(), outside.finish()
    assert loss.lost > 100 and loss.received > 50
    assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == seen["tunnel_records"] == 0
    assert any(daemon.status()["carriers"]["quic"]["up"] for daemon in tunnel.daemons.values())
    uapi.ask(tunnel.daemons["alice"].control, "alarm", {**alarm, "active": False})
    tunnel.wait("qkd", within=25)
    assert measure.ping(lab, "alice", INNER4["bob"], count=3)["received"] == 3


@pytest.mark.parametrize("victim", ["bob", pytest.param("alice", marks=long_only)])
def test_traffic_comes_back_after_kill_9_of_either_daemon(tunnel, victim: str, tracebacks, record_property) -> None:
    """Alice dials and bob listens: one notices that her connection leads nowhere, the other leaves an old one."""
    configure(tunnel, "quic")
    sites.change(tunnel.lab, "bob", lambda table: table["peer"][0].pop("endpoint"))
    tunnel.up()
    lab: Lab = tunnel.lab

    def answered() -> bool:
        assert all(daemon.running() for daemon in tunnel.daemons.values())
        return bool(measure.ping(lab, "alice", INNER4["bob"], count=1, timeout=0.3)["received"])

    assert answered()
    for _ in range(5 if LONG else 1):
        killed = time.monotonic()
        tunnel.daemons[victim].process.kill()
        tunnel.daemons[victim].start()
        wait_for("the daemon to start", tunnel.daemons[victim].answers, within=15)
        wait_for("an answer through the tunnel", answered, within=25)
        back = time.monotonic() - killed
        record_property("recovery_seconds", round(back, 1))
        print(f"kill -9 of {victim}: an answer after {back:.1f} s")
    tunnel.wait("qkd", within=10)
    assert tracebacks() == []


def carriers(tunnel) -> set[str]:
    return {daemon.peer()["carrier"] for daemon in tunnel.daemons.values()}


def only_quic_passes(lab: Lab, on: bool) -> None:
    """A firewall that looks at the first byte of every UDP datagram: QUIC's has bit 0x40 set."""
    lab["net"].run(["nft", "flush", "ruleset"])
    if on:
        chain = (
            "chain forward {\n type filter hook forward priority 0;\n udp dport 51840 @th,64,8 & 0x40 == 0 drop\n }"
        )
        lab["net"].run(["nft", "-f", "-"], text=f"table inet inspects {{\n {chain}\n}}\n")


def move(lab: Lab, site: str, old: str, new: str) -> None:
    """Another address on the same line; the old one is gone."""
    run = lab[site].run
    lab[site].sysctl("ipv4/conf/all/promote_secondaries", "1")
    run(["ip", "address", "add", f"{new}/24", "dev", "wan"])
    run(["ip", "address", "del", f"{old}/24", "dev", "wan"])
    run(["ip", "route", "replace", "default", "via", topology.ROUTER4[site]])


def test_an_address_that_changes_in_mid_transfer_is_followed(tunnel, record_property) -> None:
    configure(tunnel, "quic")
    tunnel.set("bob", initiate="never")  # alice dials, so that it is the client who moves
    tunnel.up()
    lab: Lab = tunnel.lab
    opened = tunnel.daemons["alice"].status()["carriers"]["quic"]["opened"]
    bob, here = tunnel.daemons["bob"], topology.WAN4["alice"]
    for number in range(5 if LONG else 1):
        load = measure.Load(lab, INNER4, MARKER, rate=500, linger=0.5, name=f"load-{number}")
        load.begin()
        time.sleep(1)
        there = f"192.0.2.{50 + number}"
        move(lab, "alice", here, there)
        here = there
        wait_for("bob sees the new address", lambda place=there: place in str(bob.peer()["endpoint"]), within=5)
        time.sleep(1)
        loss = load.finish()
        record_property("recovery_seconds", loss.longest_gap)
        print(f"migration: longest gap {loss.longest_gap:.3f} s, {loss.lost} of {loss.sent} packets lost")
        assert loss.longest_gap < 2 and loss.duplicates == 0, (loss, tunnel.drops())
    assert tunnel.daemons["alice"].status()["carriers"]["quic"]["opened"] == opened  # the same connection
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=1_000_000).same_hash


@long_only
def test_a_listener_that_moves_is_found_again(tunnel, record_property) -> None:
    """QUIC lets only clients move: he opens a connection of his own, from where he is now."""
    configure(tunnel, "quic")
    tunnel.up()
    lab: Lab = tunnel.lab
    load = measure.Load(lab, INNER4, MARKER, rate=500, linger=0.5)
    load.begin()
    time.sleep(1)
    move(lab, "bob", topology.WAN4["bob"], "198.51.100.50")
    alice = tunnel.daemons["alice"]
    wait_for("alice sees the new address", lambda: "198.51.100.50" in str(alice.peer()["endpoint"]), within=30)
    time.sleep(2)
    loss = load.finish()
    record_property("recovery_seconds", loss.longest_gap)
    print(f"the listener moved: longest gap {loss.longest_gap:.1f} s")
    assert loss.longest_gap < 15
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=1_000_000).same_hash


@pytest.mark.skipif(not LONG, reason="half a minute; tests/unit/daemon has it in virtual time")
def test_a_firewall_that_passes_nothing_but_quic_is_got_round_and_udp_taken_again(tunnel) -> None:
    configure(tunnel, ["udp", "quic"])
    tunnel.up()
    lab: Lab = tunnel.lab
    assert carriers(tunnel) == {"udp"}
    load = measure.Load(lab, INNER4, MARKER, rate=200, linger=0.5)
    load.begin()
    only_quic_passes(lab, True)
    left = wait_for("both on QUIC", lambda: carriers(tunnel) == {"quic"}, within=15)
    assert measure.ping(lab, "alice", INNER4["bob"], count=3)["received"] == 3
    time.sleep(1)
    only_quic_passes(lab, False)
    back = wait_for("both on UDP", lambda: carriers(tunnel) == {"udp"}, within=25)
    loss = load.finish()
    print(f"left UDP after {left:.1f} s, back after {back:.1f} s, longest gap {loss.longest_gap:.1f} s")
    assert loss.longest_gap < 15
    assert all(daemon.peer()["carrier_changes"] == 2 for daemon in tunnel.daemons.values())


def known_path(daemon: Daemon) -> tuple[int, str]:
    path = daemon.peer()["path"]
    return path["mtu"], path["found"]


PATHS = [(path, 4, SIZE) for path in (*range(1280, 1380, 20), 1379, 1380, 1400, 1428, 1450, 1492, 1500, 9000)]
PATHS += [(1280, 6, SIZE), (1300, 6, SIZE), (1400, 6, SIZE), (1500, 6, SIZE), (1500, 4, 1472), (9000, 4, 8972)]


@pytest.mark.parametrize(("path", "outer", "most"), PATHS if LONG else PATHS[:1])
def test_every_size_passes_or_is_answered_over_every_path_with_ipv6_inside(
    tunnel, path: int, outer: int, most: int
) -> None:
    """No packet of any size is lost without a word, whatever the path carries, and IPv6 stays.

    Below 1380 bytes of path (IPv4 outside) an IPv6 packet of 1280 does not fit one frame, and travels in two.
    ``most``: what ``max_datagram_size`` is set to.
    """
    configure(tunnel, "quic", outer=topology.WAN4 if outer == 4 else topology.WAN6)
    lab: Lab = tunnel.lab
    lab["net"].run(["nft", "-f", "-"], text=QUIET_ROUTER)
    for site in topology.SITES:
        lab["net"].run(["ip", "link", "set", f"to-{site}", "mtu", str(path)])
        if path > topology.MTU:
            lab[site].run(["ip", "link", "set", "wan", "mtu", str(path)])
        if most != SIZE:
            sites.change(lab, site, lambda table: table.update(carrier={"quic": {"max_datagram_size": most}}))
    tunnel.up(within=40)
    carried = min(path, most + AROUND[outer])
    for daemon in tunnel.daemons.values():
        wait_for(f"a path of {carried}", lambda d=daemon: known_path(d) == (carried, "probe"), within=40)
    room = carried - AROUND[outer] - IN_QUIC - IN_RECORD
    for site, daemon in tunnel.daemons.items():
        wait_for(f"the MTU of {site}", lambda d=daemon: d.status()["mtu"] == max(room, 1280), within=10)
    for inner in (INNER4, INNER6):
        swept = {mode: sweep(lab, inner, mode) for mode in ("df", "cut")}
        assert [swept[mode]["lost"] for mode in swept] == [[], []], (path, inner, swept, tunnel.drops())
        assert swept["cut"]["told"] == 0, "what may be cut needs no answer"
        assert swept["df"]["largest"] <= (max(room, 1280) if inner is INNER6 else room)
        assert swept["df"]["largest"] > (max(room, 1280) if inner is INNER6 else room) - STEP
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=1_000_000).same_hash
    assert measure.transfer(lab, "alice", "bob", INNER6["bob"], MARKER, total=1_000_000).same_hash
    for site in topology.SITES:
        assert INNER6[site] in lab[site].run(["ip", "-6", "address", "show", "dev", "qvpn0"]), "IPv6 went silently"


QUIET_ROUTER = """table inet quiet {
 chain o {
  type filter hook output priority 0;
  icmp type destination-unreachable drop
  icmpv6 type packet-too-big drop
 }
}
"""
STEP = 7 if LONG else 61


def sweep(lab: Lab, inner: dict[str, str], mode: str) -> dict[str, Any]:
    """A packet of each size from alice to bob; ``df``: it must not be cut inside, ``cut``: it may."""
    echo = lab["bob"].start("echo", [sys.executable, SWEEP, "echo", inner["bob"]])
    echo.until_output(15)
    command = [sys.executable, SWEEP, "sweep", inner["alice"], inner["bob"], mode, str(STEP)]
    outcome = lab["alice"].start("sweep", command).result(300 if LONG else 60)
    echo.stop()
    print(json.dumps({"inner": inner["bob"], "mode": mode, **outcome}))
    return outcome


def memory(tunnel, site: str) -> int:
    """Kilobytes that a daemon has in memory."""
    text = Path(f"/proc/{tunnel.daemons[site].process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])


@long_only
def test_a_flood_of_strangers_costs_the_tunnel_little_and_leaves_nothing(tunnel, tracebacks) -> None:
    configure(tunnel, "quic")
    tunnel.up()
    lab: Lab = tunnel.lab
    bob = tunnel.daemons["bob"]

    def flood(seconds: float) -> dict[str, Any]:
        command = [sys.executable, FLOOD, topology.WAN4["bob"], "51840", str(seconds), "1500"]
        running = lab["net"].start("flood", command)
        running.until_output(20)
        pinged = measure.ping(lab, "alice", INNER4["bob"], count=int(seconds * 18), interval=0.05)
        outcome = {**running.result(30), "pings": pinged["sent"], "answered": pinged["received"]}
        print(json.dumps({**outcome, "kilobytes": memory(tunnel, "bob")}))
        return outcome

    flood(4)  # what is allocated once
    before, epochs = memory(tunnel, "bob"), bob.peer()["epochs"]
    for _ in range(3):
        outcome = flood(8)
        assert outcome["sent"] > 5000, "no flood"
        assert outcome["answered"] >= 0.95 * outcome["pings"], (outcome, tunnel.drops())
        assert outcome["bytes_back"] < 3 * 1200 * outcome["sent"] / 4
    assert memory(tunnel, "bob") - before < 8000
    assert bob.peer()["epochs"] >= epochs + 6 and tunnel.rekeys() >= 6
    wait_for("strangers to be gone", lambda: bob.status()["carriers"]["quic"]["connections"] <= 2, within=15)
    assert bob.status()["carriers"]["quic"]["accepted"] > 20, "nobody was let in to be half open"
    assert tracebacks() == []


def carried(daemon: Daemon) -> dict[str, str]:
    """By peer that rests on a key: what its records travel in."""
    if not daemon.answers():
        return {}
    return {peer["name"]: peer["carrier"] for peer in daemon.status()["peers"] if peer["state"] == "qkd"}


@long_only
def test_two_peers_share_one_port_and_one_of_them_may_speak_udp(tunnel, third_site) -> None:
    """Bob comes over QUIC and carol over plain UDP, then both over QUIC; alice has one port, and dials neither."""
    configure(tunnel, "quic")
    third_site(tunnel, mtu=1500, transport="udp")
    lab: Lab = tunnel.lab
    alice = tunnel.daemons["alice"]
    for transport in ("udp", "quic"):

        def spoken_by_carol(table: dict[str, Any], by: str = transport) -> None:
            next(peer for peer in table["peer"] if peer["name"] in ("carol", "alice")).update(transport=by)

        for site in ("alice", "carol"):
            sites.change(lab, site, spoken_by_carol)
        sites.change(lab, "alice", lambda table: [peer.pop("endpoint", None) for peer in table["peer"]])
        tunnel.start()
        wanted = {"bob": "quic", "carol": transport}
        wait_for("both peers", lambda want=wanted: carried(alice) == want, within=30)
        for name, address in (("bob", INNER4["bob"]), ("carol", "10.90.0.3")):
            assert measure.transfer(lab, name, "alice", INNER4["alice"], MARKER, total=2_000_000).same_hash
            assert measure.ping(lab, "alice", address, count=5)["received"] == 5
        counts = alice.status()["carriers"]["quic"]
        assert counts["up"] == (1 if transport == "udp" else 2) and counts.get("opened", 0) == 0
        for daemon in tunnel.daemons.values():
            daemon.process.stop()
