"""Connections without a certificate, or too many of one name, keep nobody else out.  Real processes and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from keysource import tls
from keysource.kme.config import load
from keysource.kme.door import Door, source_of

loop = pytest.mark.asyncio(loop_scope="module")
WAITING, PER_ADDRESS, PER_SAE = 60, 24, 4
DESCRIPTORS = 160
"""What the KME under flood may have open: fewer than come."""
LIMITS = f"""[limits]
unauthenticated_connections = {WAITING}
unauthenticated_per_address = {PER_ADDRESS}
handshake_timeout = 2.0
connections_per_sae = {PER_SAE}
"""
STATUS = "/api/v1/keys/sae-bob/status"


# The book-keeping


class SlowDoor:
    """The same as a list that is searched anew each time."""

    def __init__(self):
        self.waiting = []

    def enter(self, visitor, source, most, most_of_a_source):
        self.waiting.append((visitor, source))
        sources = list(dict.fromkeys(its for _visitor, its in self.waiting))
        if self.count(source) > most_of_a_source:
            return self.first(source)
        if len(self.waiting) > most:
            return self.first(max(sources, key=self.count))
        return None

    def count(self, source):
        return sum(its == source for _visitor, its in self.waiting)

    def first(self, source):
        gone = next(item for item in self.waiting if item[1] == source)
        self.waiting.remove(gone)
        return gone[0]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_the_door_keeps_its_bounds_and_pushes_out_who_crowds_it(steps, most, most_of_a_source):
    door, slow, sizes = Door(), SlowDoor(), []
    for number, (comes, which) in enumerate(steps):
        if comes:
            source = "abcdef"[which]
            gone = door.enter(number, source, most, most_of_a_source)
            expected = slow.enter(number, source, most, most_of_a_source)
            if expected is not None and gone != expected:  # of two sources with as many, either may lose one
                [lost] = [its for visitor, its in [*slow.waiting, (expected, None)] if visitor == gone]
                assert sizes and slow.count(lost) == max(map(slow.count, "abcdef"))
                return
            assert gone == expected
        elif slow.waiting:
            visitor, _source = slow.waiting.pop(which % len(slow.waiting))
            door.leave(visitor)
        sizes.append(len(door))
        assert len(door) == len(slow.waiting) <= most
        assert max((slow.count(source) for source in "abcdef"), default=0) <= most_of_a_source


def test_half_of_those_who_wait_longest_make_room():
    door = Door()
    for number in range(7):
        door.enter(number, "abc"[number % 3], 100, 100)
    assert door.shed() == [0, 1, 2, 3]
    assert len(door) == 3
    door.leave(0)  # twice is no mistake: its task ends later
    assert door.enter(9, "x", 3, 3) in (4, 5, 6)


def test_a_source_is_an_address_or_a_network_of_ipv6():
    assert source_of("192.0.2.1") == "192.0.2.1"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1:2:3") != source_of("2001:db8:0:1::1")
    assert source_of("fe80::1%eth0") == source_of("fe80::2%eth1") == "fe80::/64"


# Real ones


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder), limits=LIMITS)
        try:
            await lab.start(keys=64)
            limit = (DESCRIPTORS, DESCRIPTORS)
            resource.prlimit(lab.processes["alice"].pid, resource.RLIMIT_NOFILE, limit)
            yield lab
        finally:
            await lab.aclose()


def door_of(lab, site="alice"):
    return lab.status(site)["connections"][0]


def open_descriptors(lab, site="alice"):
    return sum(1 for _ in Path(f"/proc/{lab.processes[site].pid}/fd").iterdir())


def knock(lab, source, say=b""):
    """A connection that does not finish TLS."""
    stranger = socket.socket()
    stranger.bind((source, 0))
    stranger.settimeout(10)
    stranger.connect(("127.0.0.1", lab.plans["alice"].port))
    if say:
        stranger.sendall(say)
    return stranger


def context_of(lab, sae):
    credential = lab.authority.sae(sae)
    return tls.client_context(lab.authority.certificate, credential.certificate, credential.private_key)


@loop
@pytest.mark.parametrize("say", [b"", b"\x16\x03\x01\x02\x00"], ids=["silent", "half a hello"])
async def test_a_flood_of_idle_connections_keeps_no_sae_out(lab, say):
    """600 from seven addresses, the SAE's own among them, at a KME with 160 descriptors."""
    before = door_of(lab)
    flood = []
    try:
        for number in range(600):
            source = f"127.0.0.{1 + number % 7}"
            try:
                flood.append(await asyncio.to_thread(knock, lab, source, say))
            except ConnectionError:
                continue  # pushed out before it had said anything
            if number % 60 == 59:
                keys = (await lab.enc()).keys()  # over a connection that is new
                assert (await lab.dec(list(keys))).keys() == keys
                assert open_descriptors(lab) < DESCRIPTORS
                assert door_of(lab)["without_certificate"] <= WAITING
    finally:
        for stranger in flood:
            stranger.close()
    after = door_of(lab)
    assert after["accepted"] - before["accepted"] >= 600
    assert sum(after[what] - before[what] for what in ("pushed_out", "slow", "failed")) >= 600 - WAITING
    assert after["pushed_out"] > before["pushed_out"]
    assert after["no_descriptor"] == 0
    told = [line for line in lab.log("alice") if line["event"] == "connections are turned away"]
    assert told
    assert told[-1]["level"] == "warning"
    assert len(told) < 20  # of hundreds


@loop
async def test_one_address_has_its_share_only(lab):
    before = door_of(lab)["pushed_out"]
    flood = [await asyncio.to_thread(knock, lab, "127.0.0.9") for _ in range(PER_ADDRESS + 5)]
    await lab.until(lambda: door_of(lab)["pushed_out"] == before + 5, "five are pushed out")
    for stranger in flood[:5]:
        assert stranger.recv(1) == b""
    for stranger in flood:
        stranger.close()


@loop
async def test_a_handshake_has_its_time(lab):
    before = door_of(lab)["slow"]
    with knock(lab, "127.0.0.10", b"\x16\x03\x01") as stranger:
        assert await asyncio.to_thread(stranger.recv, 1) == b""  # within the ten seconds of the socket
    assert door_of(lab)["slow"] == before + 1


@loop
async def test_where_the_system_has_no_descriptor_left_room_is_made(lab):
    """A bound of the operating system below our own: descriptors taken by something else."""
    pid = lab.processes["alice"].pid
    tight = open_descriptors(lab) + 10
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (tight, DESCRIPTORS))
    try:
        flood = [await asyncio.to_thread(knock, lab, f"127.0.0.{11 + number}") for number in range(40)]
        await lab.until(lambda: door_of(lab)["no_descriptor"] > 0, "it notices", seconds=10)
        keys = (await lab.enc()).keys()
        assert (await lab.dec(list(keys))).keys() == keys
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    for stranger in flood:
        stranger.close()


async def http(reader, writer, path=STATUS):
    """A request over a connection that is kept."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            await reader.readexactly(int(line.split(b":")[1]))
    return head


@loop
async def test_an_sae_has_its_share_and_its_oldest_idle_connection_goes(lab):
    port, context = lab.plans["alice"].port, context_of(lab, "sae-alice")
    there = []
    for _ in range(PER_SAE + 3):
        there.append(await asyncio.open_connection("127.0.0.1", port, ssl=context))
        assert b" 200 " in await http(*there[-1])
    for reader, _writer in there[:3]:
        assert await asyncio.wait_for(reader.read(), 10) == b""
    for reader, writer in there[3:]:
        assert b" 200 " in await http(reader, writer)
    assert door_of(lab)["open"] <= PER_SAE
    assert door_of(lab)["crowded"] >= 3
    for _reader, writer in there:
        writer.transport.abort()


@loop
async def test_where_all_are_at_requests_one_more_is_told_to_come_later_and_others_are_served(lab):
    port, context = lab.plans["alice"].port, context_of(lab, "sae-alice")
    there = [await asyncio.open_connection("127.0.0.1", port, ssl=context) for _ in range(PER_SAE)]
    lab.fault("alice", "slow")
    try:
        slow = [asyncio.create_task(http(*connection)) for connection in there]
        await asyncio.sleep(0.5)  # they are at their requests, for five seconds
        more = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        lab.fault("alice", "none")
        head = await http(*more)
        assert b" 503 " in head
        assert b"Retry-After" in head
        stranger = await asyncio.open_connection("127.0.0.1", port, ssl=context_of(lab, "sae-nobody"))
        assert b" 401 " in await http(*stranger)  # its own name's share
        assert all(b" 200 " in head for head in await asyncio.gather(*slow))
    finally:
        lab.fault("alice", "none")
    for _reader, writer in [*there, more, stranger]:
        writer.transport.abort()


@loop
async def test_who_connects_without_a_certificate_is_counted_and_gone(lab):
    before = door_of(lab)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for _ in range(5):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", lab.plans["alice"].port, ssl=context)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
    await lab.until(lambda: door_of(lab)["failed"] == before["failed"] + 5, "five failures")
    assert door_of(lab)["without_certificate"] == 0


def test_the_bounds_are_in_the_configuration(tmp_path, lab_class):
    config = load(lab_class(tmp_path, limits=LIMITS).files["alice"])
    assert config.limits.unauthenticated_connections == WAITING
    # two listeners, and on each the names that there are, and strangers
    assert config.descriptors == 128 + 2 * WAITING + (1 + 1 + 1 + 1) * PER_SAE
