"""Requests and keys a second of our KME, beside a plain FastAPI server, in the same interleaved rounds.

    python -m tests.bench.kme_load [ROUNDS] [REQUESTS] [--seconds S] [--out FILE]

Kept-alive mutual TLS, :data:`CLIENTS` clients at once, one process of each server.  Ours is a pair: a key is on two
disks before it is issued (``synchronous=FULL``), so its second half works at the other KME, counted too.  What is
compared is processor time for a request, which says the same on a busy machine; requests a second of wall clock
stand beside it, as ratios of the same round too.  After ``--seconds`` no round begins, but there are three at least.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import math
import os
import platform
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from keysource import tls
from tests.kme.conftest import Lab
from tests.ports import free_port

CLIENTS = 8
BATCH = 32
PATIENCE = 60.0
LEAST = 3  # rounds, however little time there is


def processor_seconds(*pids: int) -> float:
    """What all threads of processes have used of processors so far."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@dataclass
class Side:
    """One server, or pair of servers: where masters and slaves ask, and whose time counts."""

    master: str
    slave: str
    pids: tuple[int, ...]
    contexts: tuple[Any, Any]
    sessions: list[aiohttp.ClientSession] = field(default_factory=list)

    async def open(self) -> None:
        for context in self.contexts:
            connector = aiohttp.TCPConnector(ssl=context, limit=CLIENTS, keepalive_timeout=600)
            self.sessions.append(aiohttp.ClientSession(connector=connector))

    async def aclose(self) -> None:
        for session in self.sessions:
            await session.close()

    async def status(self) -> int:
        async with self.sessions[0].get(f"{self.master}/sae-bob/status") as answer:
            assert answer.status == 200
            await answer.read()
            return 0

    async def draw_and_fetch(self, number: int) -> int:
        """Two requests; the keys must be equal."""
        drawn = await self._post(0, f"{self.master}/sae-bob/enc_keys", {"number": number, "size": 256})
        names = {"key_IDs": [{"key_ID": key["key_ID"]} for key in drawn]}
        fetched = await self._post(1, f"{self.slave}/sae-alice/dec_keys", names)
        as_dicts = [{key["key_ID"]: key["key"] for key in some} for some in (drawn, fetched)]
        assert as_dicts[0] == as_dicts[1]
        assert all(len(base64.b64decode(key)) == 32 for key in as_dicts[0].values())
        return len(as_dicts[0])

    async def _post(self, who: int, url: str, body: object) -> list[dict[str, str]]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            async with self.sessions[who].post(url, json=body) as answer:
                if answer.status == 503:  # too busy, or the next block is not there yet: nothing was consumed
                    await asyncio.sleep(0.02)
                    continue
                assert answer.status == 200, (url, answer.status, await answer.read())
                keys: list[dict[str, str]] = (await answer.json())["keys"]
                return keys
        raise AssertionError("only 503")


@dataclass
class Round:
    """``work`` once on one side."""

    requests_per_second: float
    keys_per_second: float
    processor_ms: float
    """Of the servers, for a request."""


async def one_round(side: Side, work: Callable[[Side], Awaitable[int]], calls: int, requests: int) -> Round:
    left = iter(range(calls))
    keys = 0

    async def client() -> None:
        nonlocal keys
        for _ in left:
            got = await work(side)
            keys += got

    used, begun = processor_seconds(*side.pids), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took = time.perf_counter() - begun
    spent = processor_seconds(*side.pids) - used
    return Round(calls * requests / took, keys / took, 1000 * spent / (calls * requests))


WORKS: dict[str, tuple[Callable[[Side], Awaitable[int]], int]] = {
    "status": (lambda side: side.status(), 1),
    "a key drawn, then fetched": (lambda side: side.draw_and_fetch(1), 2),
    f"{BATCH} keys drawn, then fetched": (lambda side: side.draw_and_fetch(BATCH), 2),
}


async def measure(rounds: int, calls: int, seconds: float = math.inf) -> dict[str, dict[str, list[Round]]]:
    """Work -> server -> its rounds."""
    with tempfile.TemporaryDirectory(prefix="kme-bench-") as folder:
        lab = Lab(Path(folder), limits="[limits]\nrequests_per_second = 0\nmax_key_count = 1000000\n")
        plain = None
        try:
            await lab.start(keys=0)
            await _stock(lab, needed(rounds, calls))
            plain, port = await _plain(lab)
            sides = {"qvpn-kme": _ours(lab), "FastAPI": _theirs(lab, plain, port)}
            for side in sides.values():
                await side.open()
            try:
                return await _rounds(sides, rounds, calls, seconds)
            finally:
                for side in sides.values():
                    await side.aclose()
        finally:
            if plain is not None:
                plain.terminate()
                plain.wait(10)
            await lab.aclose()


async def _rounds(
    sides: dict[str, Side], rounds: int, calls: int, seconds: float
) -> dict[str, dict[str, list[Round]]]:
    end = time.monotonic() + seconds
    found: dict[str, dict[str, list[Round]]] = {name: {side: [] for side in sides} for name in WORKS}
    for number in range(rounds + 1):
        if number > LEAST and time.monotonic() > end:
            break
        for name, (work, requests) in WORKS.items():
            for side in sorted(sides, reverse=bool(number % 2)):
                result = await one_round(sides[side], work, calls, requests)
                if number:  # the first only warms up
                    found[name][side].append(result)
    return found


def needed(rounds: int, calls: int) -> int:
    """Keys of a link for one side: every other one is issued at alice's end, and some are spare."""
    return math.ceil(2.1 * (rounds + 1) * calls * (BATCH + 1)) + 2 * CLIENTS * BATCH


async def _stock(lab: Lab, keys: int) -> None:
    for _ in range(-(-keys // 4096)):
        lab.publish(4096)
    await lab.until(lambda: min(map(lab.held, ("alice", "bob"))) >= keys, "the stock", seconds=120)


def _context(lab: Lab, sae: str) -> Any:
    own = lab.authority.sae(sae)
    return tls.client_context(lab.authority.certificate, own.certificate, own.private_key)


def _ours(lab: Lab) -> Side:
    places = [f"https://127.0.0.1:{lab.plans[site].port}/api/v1/keys" for site in ("alice", "bob")]
    pids = tuple(process.pid for process in lab.processes.values())
    return Side(places[0], places[1], pids, (_context(lab, "sae-alice"), _context(lab, "sae-bob")))


def _theirs(lab: Lab, plain: subprocess.Popen[bytes], port: int) -> Side:
    place = f"https://127.0.0.1:{port}/api/v1/keys"
    return Side(place, place, (plain.pid,), (_context(lab, "sae-alice"), _context(lab, "sae-bob")))


async def _plain(lab: Lab) -> tuple[subprocess.Popen[bytes], int]:
    port, pki = free_port(), lab.folder / "alice" / "pki"
    server = Path(__file__).with_name("plain_014_server.py")
    files = [str(pki / name) for name in ("ca.crt", "kme-alice.crt", "kme-alice.key")]
    process = subprocess.Popen([sys.executable, str(server), str(port), *files])
    for _ in range(600):
        try:
            _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert process.poll() is None, "the plain server ended"
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return process, port
    raise AssertionError("the plain server does not listen")


def table(found: dict[str, dict[str, list[Round]]]) -> str:
    """Medians of the rounds; each as a ratio to the plain server of the same round, with the least and the most."""
    lines = [
        "| work | server | requests/s | keys/s | rate to plain | processor ms a request | cost to plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in found.items():
        base = sides["FastAPI"]
        for side, rounds in sides.items():
            pairs = list(zip(rounds, base, strict=True))
            numbers = [
                f"{statistics.median(one.requests_per_second for one in rounds):.0f}",
                f"{statistics.median(one.keys_per_second for one in rounds):.0f}",
                _spread([one.requests_per_second / other.requests_per_second for one, other in pairs]),
                f"{statistics.median(one.processor_ms for one in rounds):.2f}",
                _spread([one.processor_ms / other.processor_ms for one, other in pairs]),
            ]
            lines.append("| " + " | ".join([name, side, *numbers]) + " |")
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    if max(ratios) == min(ratios) == 1.0:
        return "1"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def surroundings(found: dict[str, dict[str, list[Round]]], calls: int) -> str:
    """What the figures were measured on, and how."""
    rounds = len(next(iter(next(iter(found.values())).values())))
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.machine()
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"Measured {today} on {os.cpu_count()} cores of {processor}, Linux {platform.release()}, Python"
        f" {platform.python_version()}, {ssl.OPENSSL_VERSION}, SQLite {sqlite3.sqlite_version}: {rounds} interleaved"
        f" rounds of {calls} calls, {CLIENTS} clients on kept-alive mutual TLS. Medians; rates and processor time"
        " also as ratios to the plain server in the same round, in brackets the least and the most of them. Our KMEs"
        " are pairs: both halves are counted, with two disks, a commit at each before a key is issued, and an audit"
        " log; the plain server is one process that keeps its keys in memory."
    )


def main(measured: Callable[[int, int, float], Awaitable[dict[str, dict[str, list[Round]]]]], title: str) -> None:
    """The command line of both measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("requests", nargs="?", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    async def run() -> dict[str, dict[str, list[Round]]]:
        return await measured(given.rounds, given.requests, given.seconds)

    found = asyncio.run(run())
    text = f"# {title}\n\n{surroundings(found, given.requests)}\n\n{table(found)}\n"
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main(measure, "Load of the KME beside a plain FastAPI server")
