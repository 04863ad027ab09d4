"""Two sites with couriered keys: what goes through the tunnel, and what never leaves it.

::

    alice (10.90.0.1, fd90::1) ══ qvpn0 ══ untrusted net ══ qvpn0 ══ (10.90.0.2, fd90::2) bob
"""

from __future__ import annotations

import signal
import time

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process
from qvpn.demo.sites import INNER4, INNER6, PORT

MARKER = payload.new_marker()
pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("outer", [topology.WAN4, topology.WAN6], ids=["outer-ipv4", "outer-ipv6"])
def test_both_families_pass_inside_both_families(tunnel, outer: dict[str, str], transport: str) -> None:
    tunnel.configure("--rekey", "5s", outer=outer, transport=transport)
    tunnel.up()
    lab: Lab = tunnel.lab
    for inner in (INNER4, INNER6):
        for here, there in (topology.SITES, topology.SITES[::-1]):
            pinged = measure.ping(lab, here, inner[there], count=3)
            assert pinged["received"] == 3, (pinged, tunnel.tails())
        assert measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=3_000_000).same_hash
        load = measure.Load(lab, inner, MARKER, rate=500, linger=0.5)
        load.begin()
        time.sleep(1)
        loss = load.finish()
        assert loss.sent >= 500
        assert (loss.lost, loss.duplicates, loss.refused) == (0, 0, 0), (loss, tunnel.drops())


def test_packets_of_every_size_up_to_the_mtu_pass(standing_tunnel) -> None:
    mtu = standing_tunnel.daemons["alice"].status()["mtu"]
    assert 1280 <= mtu < topology.MTU
    for size in (64, 1000, mtu - 28):  # UDP payload; the largest fills the tunnel's MTU exactly
        load = measure.Load(standing_tunnel.lab, INNER4, MARKER, rate=200, size=size, linger=0.3, name=f"load-{size}")
        load.begin()
        time.sleep(0.5)
        loss = load.finish()
        assert loss.lost == 0 and loss.sent > 50, (size, loss, standing_tunnel.drops())


def test_the_outer_link_shows_no_plaintext_and_the_tun_does(standing_tunnel) -> None:
    lab: Lab = standing_tunnel.lab
    inner = ("10.90.0.0/24", "fd90::/64")
    outside = {
        site: measure.start_capture(lab, site, "wan", MARKER, inner=inner, port=PORT) for site in topology.SITES
    }
    inside: Process = measure.start_capture(lab, "alice", "qvpn0", MARKER, inner=inner)
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=2_000_000).same_hash
    assert inside.finish()["frames_with_plaintext"] > 10
    for capture in outside.values():
        seen = capture.finish()
        assert seen["tunnel_records"] > 10
        assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == 0
        assert seen["truncated"] == seen["unseen"] == 0


def test_status_of_both_ends_agrees(standing_tunnel) -> None:
    views = [standing_tunnel.daemons[site].peer() for site in topology.SITES]
    epochs = [view["epoch"] for view in views]
    assert epochs[0]["key_id_hash"] == epochs[1]["key_id_hash"] is not None
    assert {epoch["origin"] for epoch in epochs} == {"couriered"}
    assert {epoch["role"] for epoch in epochs} == {"initiator", "responder"}
    assert all(view["simulated"] is None for view in views)


def test_a_site_with_another_key_gets_nothing_and_nothing_leaves_in_clear(
    tunnel, second_tunnel_keys, transport: str
) -> None:
    tunnel.configure(transport=transport)
    second_tunnel_keys("bob")
    lab: Lab = tunnel.lab
    capture = measure.start_capture(lab, "alice", "wan", MARKER, inner=("10.90.0.0/24",), port=PORT)
    tunnel.start()
    tunnel.wait("blocked", within=15)
    load = measure.Load(lab, INNER4, MARKER, rate=200, linger=0.3)
    load.begin()
    time.sleep(4)
    loss = load.finish()
    seen = capture.finish()
    assert loss.sent > 400
    assert loss.received == 0
    assert seen["frames"] > 0  # it does try
    assert seen["tunnel_records"] == seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == 0
    assert all(daemon.state() == "blocked" for daemon in tunnel.daemons.values())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_ends_in_order_and_takes_its_device_away(tunnel, signum: signal.Signals) -> None:
    tunnel.configure()
    tunnel.up()
    alice = tunnel.daemons["alice"]
    assert "qvpn0" in tunnel.lab["alice"].interfaces()
    alice.process.signal(signum)
    assert alice.process.wait(10) == 0
    assert "qvpn0" not in tunnel.lab["alice"].interfaces()
    assert not alice.control.exists()
    assert not any("Traceback" in line for line in alice.process.tail(100))


def test_a_tunnel_comes_up_and_carries_over_a_lossy_net(tunnel, drop_in_the_net, transport: str) -> None:
    tunnel.configure("--rekey", "2s", transport=transport)
    drop_in_the_net(10)
    tunnel.up(within=40)
    assert measure.transfer(tunnel.lab, "alice", "bob", INNER4["bob"], MARKER, total=100_000, timeout=60).same_hash
    drop_in_the_net(0)
    before = tunnel.rekeys()
    for daemon in tunnel.daemons.values():
        daemon.wait_epochs(before + 3, within=20)
    assert measure.ping(tunnel.lab, "alice", INNER4["bob"], count=5)["received"] == 5


def test_nothing_leaves_in_clear_while_a_killed_daemon_is_not_back(tunnel, transport: str) -> None:
    tunnel.configure(transport=transport)
    tunnel.up()
    lab: Lab = tunnel.lab
    capture = measure.start_capture(lab, "alice", "wan", MARKER, inner=("10.90.0.0/24", "fd90::/64"), port=PORT)
    tunnel.daemons["alice"].process.kill()
    load = measure.Load(lab, {"alice": "0.0.0.0", "bob": INNER4["bob"]}, MARKER, rate=200, linger=0.2)
    load.begin()
    time.sleep(0.5)
    load.finish()
    seen = capture.finish()
    assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == 0


def test_the_fence_around_the_peers_networks_goes_with_an_orderly_stop(tunnel) -> None:
    tunnel.configure()
    tunnel.up()
    show = ["ip", "-4", "route", "show", "type", "unreachable"]
    assert "10.90.0.2" in tunnel.lab["alice"].run(show)
    tunnel.daemons["alice"].process.stop()
    assert tunnel.lab["alice"].run(show) == ""
