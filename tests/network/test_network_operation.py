"""Nodes as an operator runs them: real processes with audit logs, limits, and certificates that change meanwhile."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from keysource import tls
from keysource.base import Origin, derive_key_id
from keysource.kme.pki import Authority, Credential
from tests.network.world import NODES, World

LIMITS = "\n[limits]\nrequests_per_second = 60\nburst = 60\n"
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="qn") as name:
        world = World(Path(name), LIMITS)
        await world.start()
        try:
            for node in NODES:
                world.boot(node)
            await world.settled()
            yield world
        finally:
            await world.aclose()


def hashes(connection: str, block: int, count: int) -> list[str]:
    return [hashlib.sha256(derive_key_id(connection, block, i).encode()).hexdigest() for i in range(count)]


def lines(world: World, node: str, event: str) -> list[dict[str, Any]]:
    return [line for line in world.audit(node) if line["event"] == event]


def client(world: World, node: str) -> ssl.SSLContext:
    """TLS as that node would call others."""
    pki = world.folder / node / "pki"
    return tls.client_context(*((pki / name).read_bytes() for name in ("ca.crt", f"{node}.crt", f"{node}.key")))


def presenting(context: ssl.SSLContext, own: Credential) -> ssl.SSLContext:
    """With another certificate."""
    with tempfile.NamedTemporaryFile() as both:
        both.write(own.certificate + own.private_key)
        both.flush()
        context.load_cert_chain(both.name)
    return context


def events(world: World, node: str) -> list[str]:
    """Of its log."""
    text = (world.folder / f"{node}.log").read_text()
    return [json.loads(line).get("event") for line in text.splitlines() if line.startswith("{")]


async def test_blocks_say_where_they_came_over(world: World) -> None:
    await world.settled()
    world.check()
    assert world.read and world.masked
    facts = [event.facts for event in world.received["a"].values()]
    assert all(fact and fact.origin is Origin.SIMULATED and fact.hops == 1 and len(fact.paths) == 2 for fact in facts)
    status = world.status("a")
    assert {link["name"] for link in status["links"]} == {"a-b", "a-d"}
    assert sorted(status["connections"][0]["paths"]) == [["a", "b", "c"], ["a", "d", "c"]]


async def test_the_audit_logs_tell_which_nodes_a_key_came_over(world: World) -> None:
    await world.settled()
    block = max(world.received["a"].keys() & world.received["c"].keys())
    event = world.received["a"][block]
    wanted = hashes("long", block, event.count)
    for node, path in (("b", ["a", "b", "c"]), ("d", ["a", "d", "c"])):
        [line] = [line for line in lines(world, node, "relayed") if line["block"] == block]
        assert (line["keys"], line["path"], line["sender"], line["kme"]) == (wanted, path, "a", node)
        assert line["link"] == f"a-{node}" and line["time"].startswith("2")
        assert not lines(world, node, "committed") and not lines(world, node, "handed out")
    for node, peer in (("a", "c"), ("c", "a")):
        [line] = [line for line in lines(world, node, "committed") if line["block"] == block]
        assert (line["keys"], line["peer"], line["origin"], line["hops"]) == (wanted, peer, "simulated", 1)
        [line] = [line for line in lines(world, node, "handed out") if line["block"] == block]
        assert (line["keys"], line["origin"], line["hops"]) == (wanted, "simulated", 1)
        assert sorted(line["paths"]) == [["a", "b", "c"], ["a", "d", "c"]]
    for node in NODES:
        path = world.folder / node / "state" / "audit.jsonl"
        text = path.read_text()
        assert path.stat().st_mode & 0o777 == 0o600
        for key in (bytes(event.keys[:32]), bytes(event.keys[32:64])):
            assert key.hex() not in text and base64.b64encode(key).decode() not in text
        assert not any(derive_key_id("long", block, i) in text for i in range(event.count))


async def test_without_an_audit_log_a_node_stands_still(world: World) -> None:
    """And goes on, with no line missing, as soon as it can write again."""
    await world.settled()
    path, last = world.folder / "b" / "state" / "audit.jsonl", max(world.received["c"])

    def stuck() -> bool:
        world.feed()
        return "the audit log" in world.status("b")["trouble"]

    path.rename(path.with_name("rotated"))
    path.mkdir()
    try:
        await world.until("b does not say so", stuck)
        await world.until("a block is at one end only", world.idle)
        before = len(world.received["c"])
        for _ in range(20):
            world.feed()
            await asyncio.sleep(0.05)
        assert len(world.received["c"]) == before, "a share passed that stands in no log"
    finally:
        path.rmdir()
    await world.settled()
    world.check()
    relayed = {line["block"] for line in lines(world, "b", "relayed")}
    assert {block for block in world.received["c"] if block > last + 1} <= relayed and relayed
    assert world.status("b")["trouble"] == ""


async def test_one_node_that_asks_too_much_is_slowed_down_and_nobody_else(world: World) -> None:
    url = f"https://127.0.0.1:{world.ports['c']}/kmapi/v1/qvpn"
    seen: list[int] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client(world, "b"))) as session:
        for _ in range(3000):
            async with session.post(url, data=b'{"op": "ask"}') as answer:
                seen.append(answer.status)
                if answer.status == 503:
                    assert int(answer.headers["Retry-After"]) >= 1
            if seen.count(503) == 20:
                break
    assert set(seen) == {202, 503} and seen[0] == 202
    said = world.status("c")["too_many_requests"]
    assert set(said) == {"b"} and said["b"] >= seen.count(503)
    refused = [line for line in lines(world, "c", "refused") if line["reason"] == "too many requests"]
    assert refused and {line["node"] for line in refused} == {"b"} and len(refused) <= said["b"]
    await world.settled()
    world.check()


async def test_a_stranger_and_a_wrong_message_are_refused_and_noted(world: World) -> None:
    url = f"https://127.0.0.1:{world.ports['c']}/kmapi/v1/qvpn"
    connector = aiohttp.TCPConnector(ssl=client(world, "d"))
    async with aiohttp.ClientSession(connector=connector) as session, session.post(url, data=b"{}") as answer:
        assert answer.status == 400
    [line] = [line for line in lines(world, "c", "refused") if line["reason"] == "no such message"]
    assert line["node"] == "d"
    unknown = presenting(client(world, "d"), world.authority.kme("nobody", ["127.0.0.1"]))
    connector = aiohttp.TCPConnector(ssl=unknown)
    async with aiohttp.ClientSession(connector=connector) as session, session.post(url, data=b"{}") as answer:
        assert answer.status == 401
    [line] = [line for line in lines(world, "c", "refused") if line["reason"] == "stranger"]
    assert line["node"] == "nobody"
    forged = presenting(client(world, "d"), Authority("another").kme("d", ["127.0.0.1"]))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=forged)) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.post(url, data=b"{}")


async def test_certificates_change_without_a_restart(world: World) -> None:
    """Another authority, by files alone: who only has a certificate of the old one is not let in any more."""
    pids, old = dict(world.pids), client(world, "d")
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE  # it is the node that has to refuse
    before = {node: world.status(node)["certificate_ends"] for node in NODES}
    authority = Authority("another test CA", days=99)
    for node in NODES:
        pki = world.folder / node / "pki"
        for file in pki.iterdir():
            file.unlink()
        (pki / "ca.crt").write_bytes(authority.certificate)
        authority.kme(node, ["127.0.0.1"]).write(pki, node)
    os.kill(pids["b"], signal.SIGHUP)

    def changed() -> bool:
        return all("reloaded" in events(world, node) for node in NODES)

    await world.until("not all have read them", changed)
    await world.settled()
    world.check()
    for node in NODES:
        assert world.ended(node) is None and world.pids[node] == pids[node] == world.status(node)["pid"]
        assert world.status(node)["certificate_ends"] < before[node]
    url = f"https://127.0.0.1:{world.ports['c']}/kmapi/versions"
    connector = aiohttp.TCPConnector(ssl=client(world, "d"))
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
        assert await answer.json() == {"versions": ["v1"]}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=old)) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(url)


async def test_half_a_change_of_certificates_is_no_change(world: World) -> None:
    """A key that does not belong to the certificate: all goes on as it was, and the log says why."""
    pki = world.folder / "b" / "pki"
    event = "nothing was reloaded, all goes on as it was"
    before = events(world, "b").count(event)
    (pki / "b.key").write_bytes(Authority("other").kme("b", ["127.0.0.1"]).private_key)
    await world.until("it says nothing", lambda: events(world, "b").count(event) > before)
    await world.settled()
    world.check()
