"""Many rekeys under load without a lost packet, and daemons killed at any moment.

Full counts with QVPN_TEST_LONG=1, a tenth otherwise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process
from qvpn.demo.scene import STRICT, Scene
from qvpn.demo.sites import INNER4, Daemon
from qvpn.demo.steps import wait_for

MARKER = payload.new_marker()
RATE = {"udp": 2000.0, "quic": 500.0}
"""Packets a second each way, paced: by far fewer than two processors carry that are all the lab has."""


@pytest.mark.timeout(600)
def test_no_packet_is_lost_over_rekeys_under_load(tunnel, full_count, transport: str) -> None:
    wanted, rate = full_count(200), RATE[transport]
    tunnel.configure("--rekey", "1s", hard_end="5s", transport=transport)
    tunnel.up()
    load = measure.Load(tunnel.lab, INNER4, MARKER, rate=rate, size=512, linger=2)
    before, kernel = tunnel.rekeys(), tunnel.drops()
    load.begin()
    wait_for(f"{wanted} rekeys", lambda: tunnel.rekeys() >= before + wanted, within=3 * wanted + 20, every=0.5)
    loss = load.finish()
    assert loss.sent > rate * wanted / 2
    assert (loss.lost, loss.duplicates, loss.refused, loss.socket_drops) == (0, 0, 0, 0), (
        f"missing {loss.missing}; drop counters before {kernel} and after {tunnel.drops()}"
    )


def _comes_back(lab: Lab, daemons: dict[str, Daemon], what: str) -> None:
    """An echo goes through the tunnel and back."""

    def answered() -> bool:
        assert all(daemon.running() for daemon in daemons.values())
        return bool(measure.ping(lab, "alice", INNER4["bob"], count=1, timeout=0.5)["received"] == 1)

    wait_for(f"an answer through the tunnel after {what}", answered, within=25)


def _each_once(hashes: list[str]) -> bool:
    return len(hashes) == len(set(hashes)) > 0


@pytest.mark.timeout(900)
def test_traffic_comes_back_whichever_daemon_is_killed_whenever(
    tunnel, full_count, confirmed_keys, tracebacks, transport: str
) -> None:
    """Couriered keys: no position of the file is used twice, whatever was under way."""
    tunnel.configure("--rekey", "1s", hard_end="5s", transport=transport)
    tunnel.up()
    chance = random.Random(20)
    for turn in range(full_count(50)):
        time.sleep(chance.uniform(0, 1.5))  # any moment of a rekey interval of 1 s
        victims = chance.choice([["alice"], ["bob"], ["alice", "bob"]])
        for site in victims:
            tunnel.daemons[site].process.kill()
        for site in victims:
            tunnel.daemons[site].start()
        _comes_back(tunnel.lab, tunnel.daemons, f"kill {turn} of {victims}")
    tunnel.wait()
    assert tracebacks() == []
    assert all(_each_once(confirmed_keys(site)) for site in topology.SITES)


@pytest.mark.timeout(1800)
def test_traffic_comes_back_whatever_on_the_way_of_a_key_is_killed(
    lab: Lab, full_count, confirmed_keys, tracebacks
) -> None:
    """Daemons, KMEs, both ends of the link and the fibre; the tunnel rests on their keys only (require-qkd)."""
    scene = Scene(lab)
    scene.prepare()
    scene.start_keys()
    strict = scene.pairs[STRICT]
    for daemon in strict.values():
        daemon.start()
    for daemon in strict.values():
        daemon.wait_state("qkd", within=60)
    restart: dict[str, Callable[[], None]] = {
        **{f"kme {site}": lambda site=site: _restart(scene.kmes[site], scene.start_kme, site) for site in scene.kmes},
        **{f"link {end}": lambda end=end: _restart(scene.links[end], scene.start_link, end) for end in scene.links},
        **{f"daemon {site}": lambda site=site: _restart_daemon(strict[site]) for site in strict},
    }
    chance = random.Random(7)
    spent = dict.fromkeys(topology.SITES, 0)
    order = [chance.choice(sorted(restart)) for _ in range(full_count(50))]
    for victim in order if len(order) > len(restart) else sorted(restart):
        time.sleep(chance.uniform(0, 4))
        before = {_key(daemon) for daemon in strict.values()}
        restart[victim]()
        for daemon in strict.values():  # not the old epoch's last seconds: a new one, with another key
            what = f"a new epoch after kill -9 of {victim}"
            wait_for(what, lambda d=daemon, old=before: _key(d) not in {None, *old}, within=45, every=0.2)
        _comes_back(lab, strict, f"kill -9 of {victim}")
        for site in topology.SITES:
            wait_for(f"the link's end at {site}", lambda site=site: _answers(scene, site), within=20)
            now = scene.link(site)["tickets_spent"]
            assert now >= spent[site], f"after kill -9 of {victim} the pad at {site} stands behind"
            spent[site] = now
    assert tracebacks() == []
    assert all(_each_once(confirmed_keys(site)) for site in topology.SITES)


def _restart(process: Process, start: Callable[[str], None], where: str) -> None:
    process.kill()
    start(where)


def _restart_daemon(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.start()


def _key(daemon: Daemon) -> str | None:
    """Hash of the key_ID under its current epoch; None without an epoch that rests on a key, or without answer."""
    epoch = daemon.peer()["epoch"] if daemon.answers() else None
    return epoch["key_id_hash"] if epoch is not None and epoch["state"] == "qkd" else None


def _answers(scene: Scene, site: str) -> bool:
    try:
        return bool(scene.link(site))
    except OSError:
        return False
