"""The tunnel over QUIC in namespaces: what passes, what a change of address costs, what falls back."""

from __future__ import annotations

import os
import time

import pytest

from qvpn.demo import measure, payload
from qvpn.demo.lab import Lab
from qvpn.demo.sites import INNER4, INNER6
from qvpn.demo.steps import wait_for

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
MARKER = payload.new_marker()
pytestmark = pytest.mark.timeout(120)


def configure(tunnel, transport: object) -> None:
    tunnel.configure("--rekey", "2s", transport=transport)


def test_both_families_pass_over_quic_with_rekeys_and_no_plaintext_outside(tunnel) -> None:
    configure(tunnel, "quic")
    tunnel.up()
    lab: Lab = tunnel.lab
    inner = ("10.90.0.0/24", "fd90::/64")
    outside = measure.start_capture(lab, "alice", "wan", MARKER, inner=inner, port=51840)
    for family in (INNER4, INNER6):
        pinged = measure.ping(lab, "alice", family["bob"], count=3)
        assert pinged["received"] == 3, (pinged, tunnel.tails())
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=3_000_000).same_hash
    before = tunnel.rekeys()
    load = measure.Load(lab, INNER4, MARKER, rate=300, linger=0.5)
    load.begin()
    for daemon in tunnel.daemons.values():
        daemon.wait_epochs(before + 2, within=20)
    loss = load.finish()
    assert (loss.lost, loss.duplicates, loss.refused) == (0, 0, 0), (loss, tunnel.drops())
    seen = outside.finish()
    assert seen["frames"] > 200
    assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == seen["tunnel_records"] == 0
    for daemon in tunnel.daemons.values():
        status, peer = daemon.status(), daemon.peer()
        assert peer["carrier"] == "quic" and peer["transports"] == ["quic"]
        assert status["mtu"] == 1328 and status["carriers"]["quic"]["up"] >= 1


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


def test_an_address_that_changes_in_mid_transfer_is_followed(tunnel, record_property) -> None:
    configure(tunnel, "quic")
    tunnel.set("bob", initiate="never")  # alice dials, so that it is the client who moves
    tunnel.up()
    lab: Lab = tunnel.lab
    alice = lab["alice"]
    alice.sysctl("ipv4/conf/all/promote_secondaries", "1")
    opened = tunnel.daemons["alice"].status()["carriers"]["quic"]["opened"]
    load = measure.Load(lab, INNER4, MARKER, rate=500, linger=0.5)
    load.begin()
    time.sleep(1)
    alice.run(["ip", "address", "add", "192.0.2.50/24", "dev", "wan"])
    alice.run(["ip", "address", "del", "192.0.2.2/24", "dev", "wan"])
    alice.run(["ip", "route", "replace", "default", "via", "192.0.2.1"])
    bob = tunnel.daemons["bob"]
    wait_for("bob sees the new address", lambda: "192.0.2.50" in str(bob.peer()["endpoint"]), within=5)
    time.sleep(1)
    loss = load.finish()
    record_property("recovery_seconds", loss.longest_gap)
    print(f"migration: longest gap {loss.longest_gap:.3f} s, {loss.lost} of {loss.sent} packets lost")
    assert loss.longest_gap < 2 and loss.duplicates == 0, (loss, tunnel.drops())
    assert tunnel.daemons["alice"].status()["carriers"]["quic"]["opened"] == opened  # the same connection
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


@pytest.mark.parametrize("path", [1500, 1400, 1300, 1280] if LONG else [1280])
def test_every_size_passes_over_every_path_with_ipv6_inside(tunnel, path: int) -> None:
    """Below 1380 bytes of path an IPv6 packet of 1280 does not fit one frame any more, and travels in two."""
    configure(tunnel, "quic")
    lab: Lab = tunnel.lab
    for interface in ("to-alice", "to-bob"):
        lab["net"].run(["ip", "link", "set", interface, "mtu", str(path)])
    tunnel.up(within=40)
    mtu = {site: daemon.status()["mtu"] for site, daemon in tunnel.daemons.items()}
    assert all(1280 <= each <= 1328 for each in mtu.values())
    fitting = path - 28 - 30 - 42
    wait_for("the path is known", lambda: tunnel.daemons["alice"].peer()["path"]["found"] == "probe", within=30)
    for size in (600, fitting - 48, 1232, min(mtu.values()) - 48):
        if size > 1232 and fitting < size + 48:
            continue  # more than IPv6's least: its sender is told, and sends less
        load = measure.Load(lab, INNER6, MARKER, rate=100, size=max(size, 64), linger=0.4, name=f"sweep-{size}")
        load.begin()
        time.sleep(0.4)
        loss = load.finish()
        assert loss.lost == 0 and loss.sent > 20, (path, size, loss, tunnel.drops())
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=1_000_000).same_hash
    assert measure.transfer(lab, "alice", "bob", INNER6["bob"], MARKER, total=1_000_000).same_hash
