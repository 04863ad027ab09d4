"""Many rekeys under load without a lost packet, and daemons killed at any moment.

Full counts with QVPN_TEST_LONG=1, a tenth otherwise.
"""

from __future__ import annotations

import random
import time

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload
from qvpn.demo.sites import INNER4
from qvpn.demo.steps import wait_for

MARKER = payload.new_marker()
RATE = 2000.0
"""Packets a second each way: paced, 4,000 in all."""


@pytest.mark.timeout(600)
def test_no_packet_is_lost_over_rekeys_under_load(tunnel, full_count) -> None:
    wanted = full_count(200)
    tunnel.configure("--rekey", "1s", hard_end="5s")
    tunnel.up()
    load = measure.Load(tunnel.lab, INNER4, MARKER, rate=RATE, size=512, linger=2)
    before, kernel = tunnel.rekeys(), tunnel.drops()
    load.begin()
    wait_for(f"{wanted} rekeys", lambda: tunnel.rekeys() >= before + wanted, within=3 * wanted + 20, every=0.5)
    loss = load.finish()
    assert loss.sent > RATE * wanted / 2
    assert (loss.lost, loss.duplicates, loss.refused, loss.socket_drops) == (0, 0, 0, 0), (
        f"missing {loss.missing}; drop counters before {kernel} and after {tunnel.drops()}"
    )


@pytest.mark.timeout(900)
def test_traffic_comes_back_whichever_daemon_is_killed_whenever(tunnel, full_count) -> None:
    tunnel.configure("--rekey", "1s", hard_end="5s")
    tunnel.up()
    chance = random.Random(20)
    for turn in range(full_count(50)):
        time.sleep(chance.uniform(0, 1.5))  # any moment of a rekey interval of 1 s
        victims = chance.choice([["alice"], ["bob"], ["alice", "bob"]])
        for site in victims:
            tunnel.daemons[site].process.kill()
        for site in victims:
            tunnel.daemons[site].start()
        came_back = wait_for(
            f"an answer through the tunnel after kill {turn} of {victims}",
            lambda: measure.ping(tunnel.lab, "alice", INNER4["bob"], count=1, timeout=0.5)["received"] == 1,
            within=20,
        )
        assert came_back < 20
    for site in topology.SITES:
        assert not any("Traceback" in line for line in tunnel.daemons[site].process.tail(200))
    used = [(tunnel.daemons[site].peer()["epoch"] or {}).get("key_id_hash") for site in topology.SITES]
    assert None not in used
