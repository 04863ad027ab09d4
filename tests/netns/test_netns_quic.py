"""The tunnel over QUIC in namespaces: what passes, what a change of address costs, what falls back."""

from __future__ import annotations

import pytest

from qvpn.demo import measure, payload
from qvpn.demo.lab import Lab
from qvpn.demo.sites import INNER4, INNER6

MARKER = payload.new_marker()
pytestmark = pytest.mark.timeout(120)


def configure(tunnel, transport: object, **peer: object) -> None:
    """Alice knows where bob is and dials; bob only answers."""
    tunnel.configure("--rekey", "4s", transport=transport, **peer)


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
        daemon.wait_epochs(before + 3, within=20)
    loss = load.finish()
    assert (loss.lost, loss.duplicates, loss.refused) == (0, 0, 0), (loss, tunnel.drops())
    seen = outside.finish()
    assert seen["frames"] > 2000
    assert seen["frames_with_plaintext"] == seen["frames_with_inner_address"] == seen["tunnel_records"] == 0
    for daemon in tunnel.daemons.values():
        status, peer = daemon.status(), daemon.peer()
        assert peer["carrier"] == "quic" and peer["transports"] == ["quic"]
        assert status["mtu"] == 1328 and status["carriers"]["quic"]["up"] >= 1
