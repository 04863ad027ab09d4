"""A network of more than two KMEs, and a book of every key that anybody was ever given.

::

    sae-alice ── kme-alice ──┬── kme-bob ──── sae-bob, sae-bert
                             └── kme-carol ── sae-carol

Each KME is a process of its own with a store of its own; each link has a test device at each end, with identical
blocks by hand of the test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from keysource import tls
from keysource.base import End, Origin, Owner
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.kme.config import load
from keysource.kme.control import ControlError, ask
from keysource.kme.pki import Authority, write_new
from tests.kme.conftest import ROOT
from tests.kme.pgcluster import DATABASE_PASSWORD
from tests.ports import free_port

SITES = ("alice", "bob", "carol")
LINKS = {"alice": ("bob", "carol"), "bob": ("alice",), "carol": ("alice",)}
SAES = {"alice": ("sae-alice",), "bob": ("sae-bob", "sae-bert"), "carol": ("sae-carol",)}


@dataclass
class Book:
    """Who was given what.  Every entry is checked against all before."""

    keys: dict[str, bytes] = field(default_factory=dict)
    masters: set[str] = field(default_factory=set)
    slaves: set[tuple[str, str]] = field(default_factory=set)

    def issued(self, keys: dict[str, bytes]) -> None:
        for key_id, key in keys.items():
            assert key_id not in self.masters, "a key was given to two masters, or twice"
            self.masters.add(key_id)
            self._same(key_id, key)

    def fetched(self, slave: str, keys: dict[str, bytes]) -> None:
        for key_id, key in keys.items():
            assert (key_id, slave) not in self.slaves, "a slave was given a key twice"
            self.slaves.add((key_id, slave))
            self._same(key_id, key)

    def _same(self, key_id: str, key: bytes) -> None:
        assert self.keys.setdefault(key_id, key) == key, "two keys under one ID"
        assert len(set(self.keys.values())) == len(self.keys), "one key under two IDs"


class Network:
    """Start it, use it, close it."""

    def __init__(
        self,
        folder: Path,
        *,
        limits: str = "",
        origins: dict[str, Origin] | None = None,
        databases: dict[str, str] | None = None,
    ) -> None:
        """``databases``: of the sites that are on a PostgreSQL, its conninfo."""
        self.folder = folder
        self._databases = databases or {}
        self.authority = Authority("network CA")
        self.ports = {site: (free_port(), free_port()) for site in SITES}
        self.files = {site: self._write(site, limits) for site in SITES}
        self.book = Book()
        self.spent = {"bob": 0, "carol": 0}
        """For accounts of a test: units of each link that masters have got, less those that were delivered."""
        self.owed = {"bob": 0, "carol": 0}
        """The same: units of each link that crashes may have cost and that were not missed yet."""
        self.devices: dict[tuple[str, str], DeviceServer] = {}
        self.pids: dict[str, int] = {}
        self._controls: dict[str, Path] = {}
        self.ends: dict[str, int] = {}
        self._origins = origins or {}
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._blocks = 0
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.kme.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def _write(self, site: str, limits: str) -> Path:
        home = self.folder / site
        (home / "pki").mkdir(parents=True)
        write_new(home / "pki/ca.crt", self.authority.certificate, 0o644)
        self.authority.kme(f"kme-{site}", ["127.0.0.1"]).write(home / "pki", "kme")
        others = [sae for other in LINKS[site] for sae in SAES[other]]
        text = f"""version = 1
[kme]
id = "kme-{site}"
listen = "127.0.0.1:{self.ports[site][0]}"
peer_listen = "127.0.0.1:{self.ports[site][1]}"
certificate = "pki/kme.crt"
private_key = "pki/kme.key"
ca = "pki/ca.crt"
{self._store(site)}
{limits}
"""
        for other in LINKS[site]:
            url = f"https://127.0.0.1:{self.ports[other][1]}"
            text += f'[[peer_kme]]\nid = "kme-{other}"\nurl = "{url}"\nsaes = {json.dumps(SAES[other])}\n'
            text += f'[[link]]\ndevice = "to-{other}.sock"\npeer_kme = "kme-{other}"\n'
        for sae in SAES[site]:
            text += f'[[sae]]\nid = "{sae}"\nmay_share_with = {json.dumps(others)}\n'
        file = home / "kme.toml"
        file.write_text(text)
        return file

    def _store(self, site: str) -> str:
        if site not in self._databases:
            return 'store = "state/kme.sqlite"'
        home = self.folder / site
        write_new(home / "site.key", secrets.token_bytes(32), 0o600)
        write_new(home / "password", DATABASE_PASSWORD.encode(), 0o600)
        table = f'[store]\nkind = "postgresql"\nconninfo = "{self._databases[site]}"\npassword = "password"'
        return f'site_key = "site.key"\nepoch_keys = "slots"\n{table}\nconnections = 3\n'

    async def start(self, keys: int) -> None:
        for site, others in LINKS.items():
            for other in others:
                await self._start_device(site, other)
            self.serve(site)
        for site in SITES:
            await self.ready(site)
        if keys:
            await self.publish(keys)

    async def _start_device(self, site: str, other: str) -> None:
        name = "-".join(sorted((site, other)))
        end = End.A if site == "alice" else End.B
        info = DeviceInfo("test device", name, end, Owner.A, self._origins.get(name, Origin.QKD))
        (self.folder / site).chmod(0o700)
        device = DeviceServer(self.folder / site / f"to-{other}.sock", info)
        await device.start()
        device.set_status("up")
        self.devices[site, other] = device

    async def aclose(self) -> None:
        for device in self.devices.values():
            await device.aclose()
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(10)
        assert self._nursery.stdout is not None
        self._nursery.stdout.close()

    # Devices

    def deliver(self, count: int) -> None:
        """A block of ``count`` keys on each link, all of them alice's to issue."""
        for other in LINKS["alice"]:
            keys = secrets.token_bytes(32 * count)
            self.devices["alice", other].publish(self._blocks, bytearray(keys))
            self.devices[other, "alice"].publish(self._blocks, bytearray(keys))
        self._blocks += 1

    async def publish(self, count: int) -> None:
        """The same, and wait until it is in every store."""
        self.deliver(count)
        await self.stored()

    async def stored(self) -> None:
        """Wait until every store has every block."""
        for site in SITES:
            await self.until(
                lambda site=site: all(link["next_block"] == self._blocks for link in self.status(site)["links"]),
                f"blocks at {site}",
            )

    # KMEs

    def serve(self, site: str, crash_at: str = "") -> None:
        environment = {"QVPN_KME_CRASH_AT": crash_at} if crash_at else {}
        order = {
            "serve": str(self.files[site]),
            "log": str(self.folder / f"{site}.log"),
            "environment": environment,
        }
        self.pids[site] = self._order(order)["pid"]

    def ended(self, site: str) -> int | None:
        """The signal that ended a KME, 0 where none did, None while it runs."""
        if site not in self.pids:
            return self.ends[site]
        answer = self._order({"ended": self.pids[site]})["signal"]
        if answer is not None:
            del self.pids[site]
            self.ends[site] = answer
        return answer

    async def until_ended(self, site: str, seconds: float) -> bool:
        """Wait that long for the end of a KME."""
        end = time.monotonic() + seconds
        while self.ended(site) is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self.ended(site) is not None

    async def stop(self, site: str, number: int = signal.SIGTERM) -> None:
        os.kill(self.pids[site], number)
        assert await self.until_ended(site, 20.0), f"{site} does not end"

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._nursery.stdout.readline())

    async def ready(self, site: str) -> None:
        await self.until(lambda: all(link["device_connected"] for link in self.status(site)["links"]), site)

    def status(self, site: str) -> dict[str, Any]:
        if site not in self._controls:  # asked for all the time
            self._controls[site] = load(self.files[site]).control_path
        return ask(self._controls[site], {"op": "status"})

    def link(self, site: str, other: str) -> dict[str, Any]:
        return next(link for link in self.status(site)["links"] if link["peer_kme"] == f"kme-{other}")

    def audit(self, site: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / site / "state/audit.jsonl").read_text().splitlines()]

    async def until(self, true: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ControlError):
                if true():
                    return
            if time.monotonic() > end:
                logs = "\n".join((self.folder / f"{site}.log").read_text()[-1500:] for site in SITES)
                raise AssertionError(f"{what}: not within {seconds} s\n{logs}")
            await asyncio.sleep(0.01)

    # SAEs

    async def http(self, sae: str, site: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON; (0, error) where the connection broke."""
        if sae not in self._contexts:
            own = self.authority.sae(sae)
            self._contexts[sae] = tls.client_context(self.authority.certificate, own.certificate, own.private_key)
        url = URL(f"https://127.0.0.1:{self.ports[site][0]}/api/v1/keys/{path}", encoded=True)
        connector = aiohttp.TCPConnector(ssl=self._contexts[sae])
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                request = session.get(url) if body is None else session.post(url, json=body)
                async with request as response:
                    read = await response.read()
                    return response.status, json.loads(read) if read else None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            return 0, error

    async def draw_by_all_means(self, slaves: tuple[str, ...], **fields: Any) -> dict[str, bytes]:
        """The same where there must be keys: on a slow machine a KME may say 503 a few times."""
        for _ in range(40):
            status, keys = await self.draw(slaves, **fields)
            if status == 200:
                return keys
            assert status == 503
            await asyncio.sleep(0.1)
        raise AssertionError("only 503")

    async def draw(self, slaves: tuple[str, ...] = ("sae-bob",), **fields: Any) -> tuple[int, dict[str, bytes]]:
        """sae-alice asks for keys; what it gets goes into the book."""
        first, *more = slaves
        body = fields | ({"additional_slave_SAE_IDs": more} if more else {})
        status, answer = await self.http("sae-alice", "alice", f"{first}/enc_keys", body)
        keys = _keys(status, answer)
        self.book.issued(keys)
        return status, keys

    async def fetch(self, slave: str, key_ids: list[str]) -> tuple[int, dict[str, bytes]]:
        [site] = [site for site, saes in SAES.items() if slave in saes]
        body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
        status, answer = await self.http(slave, site, "sae-alice/dec_keys", body)
        keys = _keys(status, answer)
        self.book.fetched(slave, keys)
        return status, keys


def _keys(status: int, answer: Any) -> dict[str, bytes]:
    return {k["key_ID"]: base64.b64decode(k["key"]) for k in answer["keys"]} if status == 200 else {}
