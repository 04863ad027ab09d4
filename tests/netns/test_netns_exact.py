"""Real TCP through real daemons, byte for byte: over bad links, few offloads, into a LAN, with ECN and zero windows.

::

    alice ══ qvpn0 ══ wan ── net ── wan ══ qvpn0 ══ bob ── lan ── host (10.77.0.2, fd77::2)

The LAN's ports have no offload at all: what bob forwards must leave with checksums that the kernel has finished.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload
from qvpn.demo.lab import SITES, Lab
from qvpn.demo.sites import INNER4, INNER6, PORT

MARKER = payload.new_marker()
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
TOTAL = 64_000_000 if LONG else 12_000_000
QUEUES = ("send_queue", "receive_queue", "queue_full")
HOST = {4: "10.77.0.2", 6: "fd77::2"}
NO_OFFLOAD = ("tx", "off", "rx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off")

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        shutil.which("nft") is None or shutil.which("ethtool") is None, reason="nft or ethtool missing"
    ),
]


def ethtool(lab: Lab, name: str, port: str, *features: str) -> None:
    lab[name].run(["ethtool", "-K", port, *features])


def counters(lab: Lab, name: str) -> dict[str, int]:
    """TCP and IP counters of a namespace, as in nstat."""
    found: dict[str, int] = {}
    for file in ("snmp", "netstat"):
        rows = lab[name].run(["cat", f"/proc/net/{file}"]).splitlines()
        for names, values in zip(rows[::2], rows[1::2], strict=True):
            kind, *words = names.split()
            found |= {f"{kind}{word}": int(value) for word, value in zip(words, values.split()[1:], strict=True)}
    return found


def rules(lab: Lab, *lines: str) -> None:
    """Replace the rules of the untrusted network; each is tried on every packet that it forwards."""
    lab["net"].run(["nft", "flush", "ruleset"])
    if lines:
        body = "\n ".join(lines)
        table = f"table inet t {{\n chain f {{\n type filter hook forward priority 0;\n {body}\n }}\n}}\n"
        lab["net"].run(["nft", "-f", "-"], text=table)


def counted(lab: Lab) -> int:
    """Packets that the rules with a counter met."""
    listed = json.loads(lab["net"].run(["nft", "-j", "list", "ruleset"]))["nftables"]
    expressions = [each for entry in listed if "rule" in entry for each in entry["rule"]["expr"]]
    return sum(each["counter"]["packets"] for each in expressions if "counter" in each)


def peer_drops(tunnel) -> dict[str, dict[str, int]]:
    """By site: drops charged to the other one, less those of cold handshakes and of full queues.

    TCP fills whatever queue it meets; that it loses a packet there is how it learns of the queue.
    """
    found = {}
    for site, daemon in tunnel.daemons.items():
        drops = daemon.peer()["drops"]
        found[site] = {name: count for name, count in drops.items() if not name.startswith(("handshake", *QUEUES))}
    return found


@pytest.fixture(scope="module")
def lan(lan_tunnel) -> Iterator[object]:
    """The tunnel, and datagrams that travel the untrusted network one by one."""
    lab = lan_tunnel.lab
    for site in SITES:
        ethtool(lab, site, "wan", "tx-udp-segmentation", "off")
    yield lan_tunnel
    rules(lab)


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lan" in request.fixturenames:
        rules(request.getfixturevalue("lan").lab)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("per_mille", [0, 1, 10])
def test_a_transfer_is_whole_whatever_is_lost(lan, per_mille: int, version: int) -> None:
    lab, inner = lan.lab, {4: INNER4, 6: INNER6}[version]
    if per_mille:
        rules(lab, f"udp dport {PORT} numgen random mod 1000 < {per_mille} counter drop")
    before = peer_drops(lan)
    done = measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=TOTAL, timeout=90)
    assert done.same_hash
    if per_mille:
        assert counted(lab) > TOTAL / 1500 * per_mille / 1000 / 3
    assert peer_drops(lan) == before


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("inward", [True, False], ids=["into the LAN", "out of the LAN"])
def test_checksums_are_finished_where_a_port_has_no_offload(lan, inward: bool, version: int) -> None:
    lab = lan.lab
    source, sink = ("alice", "host") if inward else ("host", "alice")
    address = HOST[version] if inward else {4: INNER4, 6: INNER6}[version]["alice"]
    before = counters(lab, sink)
    assert measure.transfer(lab, source, sink, address, MARKER, total=TOTAL, timeout=90).same_hash
    after = counters(lab, sink)
    assert after["Tcp:InSegs"] - before["Tcp:InSegs"] > (TOTAL // 1500 if inward else 100)
    assert after["Tcp:InCsumErrors"] == before["Tcp:InCsumErrors"]


def test_losses_into_a_port_without_offload(lan) -> None:
    """Runs are cut short everywhere: each partial superpacket's checksum is finished by the kernel."""
    lab = lan.lab
    rules(lab, f"udp dport {PORT} numgen random mod 1000 < 10 counter drop")
    before = counters(lab, "host")
    assert measure.transfer(lab, "alice", "host", HOST[4], MARKER, total=TOTAL, timeout=90).same_hash
    assert counted(lab) > 20
    after = counters(lab, "host")
    assert after["Tcp:InCsumErrors"] == before["Tcp:InCsumErrors"]
    assert after["TcpExt:TCPOFOQueue"] > before["TcpExt:TCPOFOQueue"]  # holes were seen and filled: SACK was at work


SLOW_SINK = """
import hashlib, socket, sys, time
host, pauses = sys.argv[1], int(sys.argv[2])
digest, family = hashlib.sha256(), socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.create_server((host, 7100), family=family) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    print("{}", flush=True)
    stream, _ = listener.accept()
    stream.settimeout(60)
    for _ in range(pauses):
        time.sleep(2.5)
        digest.update(stream.recv(200000))
    while data := stream.recv(1 << 18):
        digest.update(data)
    stream.close()
print('{"sha256": "%s"}' % digest.hexdigest())
"""

SOURCE = """
import hashlib, os, socket, sys
digest = hashlib.sha256()
with socket.create_connection((sys.argv[1], 7100), timeout=60) as stream:
    for _ in range(int(sys.argv[2])):
        data = os.urandom(1 << 16)
        digest.update(data)
        stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)
    stream.recv(1)
print(digest.hexdigest())
"""


@pytest.mark.parametrize("version", [4, 6])
def test_a_receiver_that_stops_reading_is_probed_and_goes_on(lan, version: int) -> None:
    lab, address = lan.lab, {4: INNER4, 6: INNER6}[version]["bob"]
    before = counters(lab, "alice"), counters(lab, "bob")
    sink = lab["bob"].start("slow-sink", [sys.executable, "-u", "-c", SLOW_SINK, address, "2" if LONG else "1"])
    sink.until_output(15)
    sent = lab["alice"].run([sys.executable, "-c", SOURCE, address, "200"], timeout=60)
    assert sink.result(30) == {"sha256": sent.strip()}
    after = counters(lab, "alice"), counters(lab, "bob")
    assert after[1]["TcpExt:TCPToZeroWindowAdv"] > before[1]["TcpExt:TCPToZeroWindowAdv"]
    assert after[0]["TcpExt:TCPWinProbe"] > before[0]["TcpExt:TCPWinProbe"]


LINKS = {
    "no checksum offload, GRO on": ("tx", "off", "gro", "on"),
    "no offload at all": NO_OFFLOAD,
    "the default": ("tx", "on", "sg", "on", "tso", "on", "gso", "on", "gro", "off", "tx-udp-segmentation", "on"),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_transfer_over_links_with_other_offloads(lan, link: str) -> None:
    lab = lan.lab
    for site in SITES:
        ethtool(lab, site, "wan", *LINKS[link])
    for version, inner in ((4, INNER4), (6, INNER6)):
        done = measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=TOTAL, timeout=90)
        assert done.same_hash, (link, version)
    for site in SITES:
        ethtool(lab, site, "wan", *LINKS["the default"])
        ethtool(lab, site, "wan", "tx-udp-segmentation", "off")


@pytest.fixture
def ecn(lan) -> Iterator[None]:
    for site in SITES:
        lan.lab[site].sysctl("ipv4/tcp_ecn", "1")
        lan.lab[site].sysctl("ipv4/tcp_congestion_control", "reno")  # every namespace may use it
    yield
    for site in SITES:
        lan.lab[site].sysctl("ipv4/tcp_ecn", "2")


def marked(lan) -> int:
    """Packets that the queues of both daemons marked so far."""
    queues = [daemon.status()["queues"] for daemon in lan.daemons.values()]
    return int(sum(each["marked"] + each["received_marked"] for each in queues))


@pytest.mark.parametrize("version", [4, 6])
def test_a_routers_mark_between_the_sites_is_heard_by_the_sender(lan, ecn, version: int) -> None:
    """CE on the outer header reaches the receiver's TCP, which answers ECE: the sender counts marked segments.

    Marks of our own queues are heard too; where there were none, nothing is without the router's.
    """
    lab, inner = lan.lab, {4: INNER4, 6: INNER6}[version]
    heard, own = [], []
    for marks in (False, True):
        match = f"udp dport {PORT} ip ecn ect0 numgen random mod 100 < 2"
        rules(lab, f"{match} counter ip ecn set ce" if marks else f"{match} counter")
        before, ours = counters(lab, "alice")["TcpExt:TCPDeliveredCE"], marked(lan)
        assert measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=TOTAL // 2, timeout=90).same_hash
        assert counted(lab) > 5  # the outer headers are ECT(0), as the inner ones
        heard.append(counters(lab, "alice")["TcpExt:TCPDeliveredCE"] - before)
        own.append(marked(lan) - ours)
    assert heard[1] > 0
    assert heard[0] == 0 or own[0] > 0, (heard, own)
    assert all("ecn_not_capable" not in drops for drops in peer_drops(lan).values())


def test_a_mark_on_what_is_not_capable_drops_it_and_says_why(lan) -> None:
    lab = lan.lab
    rules(lab, f"udp dport {PORT} counter ip ecn set ce")
    pinged = measure.ping(lab, "alice", INNER4["bob"], count=3, interval=0.05, timeout=0.5)
    assert pinged["received"] == 0
    rules(lab)
    assert lan.daemons["bob"].peer()["drops"]["ecn_not_capable"] >= 3
    assert measure.ping(lab, "alice", INNER4["bob"], count=3)["received"] == 3


def test_late_and_doubled_datagrams(tunnel) -> None:
    """A relay stands between the sites: 2 % overtaken by up to 40 others, 0.5 % doubled, 0.1 % lost."""
    lab: Lab = tunnel.lab
    tunnel.configure(outer={"alice": topology.ROUTER4["bob"], "bob": topology.ROUTER4["alice"]})
    ends = []
    for site in SITES:
        ends += [f"{topology.ROUTER4[site]}:{PORT}", f"{topology.WAN4[site]}:{PORT}"]
    command = [sys.executable, "-u", str(Path(__file__).with_name("bad_relay.py")), *ends]
    relay = lab["net"].start("relay", command)
    relay.until_output(15)
    tunnel.up(within=60)
    for inner in (INNER4, INNER6):
        assert measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=TOTAL, timeout=90).same_hash
    did = relay.finish()
    assert min(did["out"][each] for each in ("late", "twice", "lost")) > 5
    seen = peer_drops(tunnel)["bob"]
    assert did["out"]["twice"] // 2 < seen["replay"] <= did["out"]["twice"]
    assert set(seen) == {"replay"}


def test_jumbo_frames(tunnel) -> None:
    lab: Lab = tunnel.lab
    for site in SITES:
        lab[site].run(["ip", "link", "set", "wan", "mtu", "9000"])
        lab["net"].run(["ip", "link", "set", f"to-{site}", "mtu", "9000"])
    tunnel.configure()
    tunnel.up(within=60)
    assert tunnel.daemons["alice"].status()["mtu"] == 9000 - 28 - 42
    for inner in (INNER4, INNER6):
        assert measure.transfer(lab, "alice", "bob", inner["bob"], MARKER, total=TOTAL).same_hash
    assert measure.transfer(lab, "bob", "alice", INNER4["alice"], MARKER, total=TOTAL).same_hash
