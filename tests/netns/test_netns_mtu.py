"""Path MTU between real sites: a link behind the first one shrinks or is jumbo, and the router says nothing of it."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qvpn.demo import kernel, measure, payload
from qvpn.demo import lab as topology
from qvpn.demo.lab import Lab
from qvpn.demo.sites import INNER4, INNER6
from qvpn.demo.steps import wait_for
from qvpn.uapi import UapiError

MARKER = payload.new_marker()
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
SWEEP = str(Path(__file__).with_name("mtu_sweep.py"))
NO_ICMP = """table inet quiet {
 chain o {
  type filter hook output priority 0;
  icmp type destination-unreachable drop
  icmpv6 type packet-too-big drop
 }
}
"""
pytestmark = pytest.mark.timeout(1800 if LONG else 240)


def set_mtu(lab: Lab, site: str, interface: str, mtu: int) -> None:
    lab[site].run(["ip", "link", "set", interface, "mtu", str(mtu)])


def path(tunnel: Any, site: str) -> dict[str, Any]:
    return tunnel.daemons[site].peer()["path"]  # type: ignore[no-any-return]


def found(tunnel: Any, mtu: int, *, sites: tuple[str, ...] = topology.SITES, within: float = 20.0) -> None:
    def good() -> bool:
        return all((p := path(tunnel, site))["mtu"] == mtu and p["found"] == "probe" for site in sites)

    wait_for(f"a path MTU of {mtu}", good, within=within)


def test_a_path_that_shrinks_in_mid_transfer_heals_and_grows_back(tunnel, transport: str) -> None:
    tunnel.configure(transport=transport)
    whole = 1500 if transport == "udp" else 1428  # QUIC packets have 1400 bytes of UDP payload
    lab: Lab = tunnel.lab
    lab["net"].run(["nft", "-f", "-"], text=NO_ICMP)
    tunnel.up()
    found(tunnel, whole)
    results: list[measure.Transfer] = []
    mover = threading.Thread(
        target=lambda: results.append(
            measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=400_000_000, timeout=90)
        )
    )
    mover.start()
    wait_for("the transfer to move", lambda: tunnel.daemons["bob"].peer()["received_bytes"] > 3_000_000, within=20)
    set_mtu(lab, "net", "to-bob", 1300)
    shrunk = time.monotonic()
    found(tunnel, 1300, sites=("alice",))
    assert time.monotonic() - shrunk < 10
    mover.join(120)
    assert results and results[0].same_hash
    assert path(tunnel, "alice")["falls"] >= 1
    assert tunnel.daemons["alice"].status()["mtu"] == 1280  # IPv6 inside needs it, and gets it
    set_mtu(lab, "net", "to-bob", 1500)
    found(tunnel, whole, sites=("alice",), within=60)


@pytest.mark.parametrize(("link", "outer"), [(1300, 4), (1420, 4), (1300, 6)])
def test_no_packet_of_any_size_is_lost_without_a_word(tunnel, link: int, outer: int) -> None:
    tunnel.configure(outer=topology.WAN4 if outer == 4 else topology.WAN6)
    lab: Lab = tunnel.lab
    lab["net"].run(["nft", "-f", "-"], text=NO_ICMP)
    set_mtu(lab, "net", "to-bob", link)
    tunnel.up()
    found(tunnel, link, sites=("alice",))
    step = 1 if LONG else 61
    for inner in (INNER4, INNER6):
        echo = lab["bob"].start("echo", [sys.executable, SWEEP, "echo", inner["bob"]])
        echo.until_output(15)
        for mode in ("df", "cut"):
            command = [sys.executable, SWEEP, "sweep", inner["alice"], inner["bob"], mode, str(step)]
            outcome = lab["alice"].start("sweep", command).result(900 if LONG else 60)
            assert outcome["lost"] == [], (inner, mode, outcome)
            if mode == "cut":
                assert outcome["told"] == 0
            else:
                room = link - (28 if outer == 4 else 48) - 42
                assert outcome["largest"] <= (max(room, 1280) if inner is INNER6 else room)
        echo.stop()


def test_a_jumbo_path_is_found_by_itself(tunnel) -> None:
    tunnel.configure()
    lab: Lab = tunnel.lab
    for site in topology.SITES:
        set_mtu(lab, "net", f"to-{site}", 9000)
        set_mtu(lab, site, "wan", 9000)
    tunnel.up()
    found(tunnel, 9000)
    assert tunnel.daemons["alice"].status()["mtu"] == 9000 - 28 - 42
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=5_000_000, timeout=30).same_hash


def test_two_peers_of_one_daemon_have_paths_of_their_own(tunnel, third_site) -> None:
    """The device is as wide as the wider; what is too long for the narrower is cut, or its sender told."""
    tunnel.configure()
    lab: Lab = tunnel.lab
    lab["net"].run(["nft", "-f", "-"], text=NO_ICMP)
    third_site(tunnel)
    tunnel.start()
    alice = tunnel.daemons["alice"]

    def paths() -> dict[str, tuple[int, str]]:
        try:
            peers = alice.status()["peers"]
        except UapiError:
            return {}
        return {peer["name"]: (peer["path"]["mtu"], peer["path"]["found"]) for peer in peers}

    wait_for("both paths", lambda: paths() == {"bob": (1500, "probe"), "carol": (1300, "probe")}, within=30)
    assert alice.status()["mtu"] == 1430
    for name, address, largest in (("bob", INNER4["bob"], 1430), ("carol", "10.90.0.3", 1230)):
        echo = lab[name].start("echo", [sys.executable, SWEEP, "echo", address])
        echo.until_output(15)
        for mode in ("df", "cut"):
            command = [sys.executable, SWEEP, "sweep", INNER4["alice"], address, mode, "1" if LONG else "61"]
            outcome = lab["alice"].start("sweep", command).result(900 if LONG else 60)
            assert outcome["lost"] == [], (name, mode, outcome)
            if mode == "df":
                assert largest - 61 < outcome["largest"] <= largest, (name, outcome)
            else:
                assert outcome["told"] == 0
        assert measure.transfer(lab, "alice", name, address, MARKER, total=5_000_000, timeout=30).same_hash
    assert paths() == {"bob": (1500, "probe"), "carol": (1300, "probe")}
    drops = {peer["name"]: peer["drops"].get("too_big", 0) for peer in alice.status()["peers"]}
    assert drops["bob"] == 0 < drops["carol"]


def test_forged_icmp_changes_nothing(tunnel) -> None:
    tunnel.configure()
    tunnel.up()
    lab: Lab = tunnel.lab
    found(tunnel, 1500)
    addresses = [ipaddress.ip_address(topology.WAN4[site]).packed for site in topology.SITES]
    quoted = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 1500, 1, 0x4000, 60, 17, 0, *addresses)
    quoted += struct.pack(">HHHH", 51840, 51840, 1480, 0)
    body = struct.pack(">BBHHH", 3, 4, 0, 0, 576) + quoted
    total = sum(struct.unpack(f">{len(body) // 2}H", body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    message = body[:2] + struct.pack(">H", ~total & 0xFFFF) + body[4:]
    with kernel.inside(lab["net"].descriptor), socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as forger:
        for _ in range(200):
            forger.sendto(message, (topology.WAN4["alice"], 0))
    # The kernel of the site believes it ...
    wait_for(
        "the kernel to believe the forger",
        lambda: "mtu 576" in lab["alice"].run(["ip", "route", "get", topology.WAN4["bob"]]),
        within=5,
    )
    # ... but the tunnel does not.
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=20_000_000, timeout=30).same_hash
    time.sleep(2)
    alice = path(tunnel, "alice")
    assert (alice["mtu"], alice["falls"]) == (1500, 0)
    assert tunnel.daemons["alice"].status()["mtu"] == 1430
