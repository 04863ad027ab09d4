"""A laboratory of two sites: two real ``qvpn-kme`` processes with mutual TLS, each fed by a test device of its own.

::

    sae-alice ── TLS ── kme-alice ── TLS ── kme-bob ── TLS ── sae-bob
                            │                  │
                       test device a      test device b        (identical blocks, by hand of the test)
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from keysource import tls
from keysource.base import End, Origin, Owner, SourceContext
from keysource.device.messages import ALARM_KINDS, DeviceInfo
from keysource.device.server import DeviceServer
from keysource.etsi014.client import Etsi014Client
from keysource.etsi014.source import Etsi014Source
from keysource.kme.config import KmeConfig, load
from keysource.kme.control import ControlError, ask
from keysource.kme.pki import Authority
from keysource.kme.scaffold import SitePlan, write_pair
from tests.kme import pgcluster
from tests.kme.pgcluster import Cluster
from tests.kme.places import PostgresPlace, SqlitePlace
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SITES = ("alice", "bob")
OTHER = {"alice": "bob", "bob": "alice"}


@dataclass
class Answer:
    """What came over HTTP."""

    status: int
    body: bytes
    headers: Any

    @property
    def json(self) -> Any:
        assert self.headers["Content-Type"].startswith("application/json")
        return json.loads(self.body)

    @property
    def message(self) -> str:
        error = self.json
        assert set(error) <= {"message", "details"}
        return str(error["message"])

    def keys(self) -> dict[str, bytes]:
        """Of a key container with exactly the fields there may be: key_ID -> key."""
        assert self.status == 200, self.body
        assert set(self.json) == {"keys"}
        found = {}
        for entry in self.json["keys"]:
            assert set(entry) == {"key_ID", "key", "key_extension"}
            assert str(uuid.UUID(entry["key_ID"])) == entry["key_ID"]
            found[entry["key_ID"]] = base64.b64decode(entry["key"], validate=True)
            assert len(found[entry["key_ID"]]) == 32
        assert len(found) == len(self.json["keys"])
        return found


class Lab:
    """Two sites; every public method says what an operator or the quantum link would do."""

    def __init__(self, folder: Path, *, owner: Owner = Owner.ALTERNATE, limits: str = "") -> None:
        self.folder = folder
        self.owner = owner
        self.authority = Authority("lab CA")
        self.plans = {site: SitePlan(site, "127.0.0.1", free_port(), free_port()) for site in SITES}
        self.files = dict(zip(SITES, write_pair(folder, *self.plans.values(), self.authority), strict=True))
        for file in self.files.values():
            file.write_text(file.read_text() + limits)
        self.devices: dict[str, DeviceServer] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._controls: dict[str, Path] = {}
        self.clients: list[Etsi014Client | Etsi014Source] = []
        self.next_block = 0
        self._before: dict[str, dict[str, Any]] = {}

    def config(self, site: str) -> KmeConfig:
        return load(self.files[site])

    async def start(self, keys: int = 64) -> None:
        for site in SITES:
            await self.start_device(site)
            self.start_kme(site)
        await asyncio.gather(*(self.ready(site) for site in SITES))
        if keys:
            self.publish(keys)
            await self.stored(keys)

    async def settle(self, keys: int) -> None:
        """As good as new for the next test: both ends healthy, ``keys`` fresh keys, counts begin at zero."""
        await self._close_clients()
        for site in SITES:
            if site not in self.devices:
                await self.start_device(site, self.next_block)
            if site not in self.processes:
                self.start_kme(site)
        await asyncio.gather(*(self.ready(site) for site in SITES))
        for device in self.devices.values():
            for kind in ALARM_KINDS:
                device.alarm(False, kind, "")
            device.void(self.next_block)
        await self.until(lambda: all(map(self._empty_and_well, SITES)), "health")
        self._before = {site: self._link(site) for site in SITES}
        if keys:
            self.publish(keys)
            await self.stored(keys)

    def _empty_and_well(self, site: str) -> bool:
        link = self._link(site)
        return not link["alarm"] and link["own_free"] == link["peer_free"] == 0

    async def _close_clients(self) -> None:
        clients, self.clients = self.clients, []
        for client in clients:
            await client.aclose()

    async def aclose(self) -> None:
        await self._close_clients()
        for site in SITES:
            self.stop_kme(site)
            if device := self.devices.get(site):
                await device.aclose()

    # Devices

    async def start_device(self, site: str, next_block: int = 0) -> DeviceServer:
        home = self.folder / site / "link"
        home.mkdir(mode=0o700, exist_ok=True)
        end = End.A if site == "alice" else End.B
        info = DeviceInfo("test device", "lab-link", end, self.owner, Origin.SIMULATED)
        device = DeviceServer(home / "device.sock", info)
        await device.start()
        device.set_status("up", qber=0.021, key_rate=12.5)
        if next_block:
            device._next_block = next_block
        self.devices[site] = device
        return device

    async def stop_device(self, site: str) -> None:
        await self.devices.pop(site).aclose()

    def publish(self, count: int, *, only: tuple[str, ...] = SITES) -> int:
        """A block of random keys, identical at the sites that get it.  Returns its number."""
        keys = secrets.token_bytes(32 * count)
        block = self.next_block
        self.next_block += 1
        for site in only:
            self.devices[site].publish(block, bytearray(keys))
        return block

    async def stored(self, count: int, *sites: str) -> None:
        """Wait until that many keys are in the stores."""
        for site in sites or SITES:
            await self.until(lambda site=site: self.held(site) == count, f"{count} keys at {site}")

    def held(self, site: str) -> int:
        link = self.link(site)
        return int(link["own_free"] + link["peer_free"] + link["reserved"])

    def link(self, site: str) -> dict[str, Any]:
        """What the KME tells of its link; keys reserved, issued and fetched are counted since :meth:`settle`."""
        link = self._link(site)
        for count in ("reserved", "issued", "fetched") if self._before else ():
            link[count] -= self._before[site][count]
        return link

    def _link(self, site: str) -> dict[str, Any]:
        link: dict[str, Any] = self.status(site)["links"][0]
        return link

    # KMEs

    def start_kme(self, site: str, *options: str) -> None:
        log = (self.folder / f"{site}.log").open("ab")
        command = [sys.executable, "-m", "keysource.kme.cli", "serve", str(self.files[site]), *options]
        with log:
            self.processes[site] = subprocess.Popen(command, stderr=log, stdout=log, cwd=ROOT)

    async def ready(self, site: str) -> None:
        await self.until(lambda: self.status(site)["links"][0]["device_connected"], f"KME of {site}")

    def stop_kme(self, site: str) -> int:
        process = self.processes.pop(site, None)
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill_kme(self, site: str) -> None:
        process = self.processes.pop(site)
        process.kill()
        process.wait()

    def status(self, site: str) -> dict[str, Any]:
        return ask(self._control(site), {"op": "status"})

    def fault(self, site: str, name: str) -> None:
        ask(self._control(site), {"op": "fault", "name": name})

    def _control(self, site: str) -> Path:
        """Where the control socket is, as the configuration says: read once, asked for all the time."""
        if site not in self._controls:
            self._controls[site] = self.config(site).control_path
        return self._controls[site]

    def log(self, site: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{site}.log").read_text().splitlines()]

    async def until(self, true: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if true():
                    return
            except ControlError:
                pass
            dead = [site for site, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join((self.folder / f"{site}.log").read_text()[-2000:] for site in self.processes)
                raise AssertionError(f"{what}: not within {seconds} s (dead: {dead})\n{logs}")
            await asyncio.sleep(0.02)

    # SAEs

    def client(self, sae: str, at: str, **options: Any) -> Etsi014Client:
        """A client with a certificate of its own (any name) at the KME of a site."""
        credential = self.authority.sae(sae)
        context = tls.client_context(self.authority.certificate, credential.certificate, credential.private_key)
        client = Etsi014Client(self.plans[at].url, context, **options)
        self.clients.append(client)
        return client

    async def http(
        self, sae: str, site: str, method: str, path: str, body: object = None, *, port: int = 0
    ) -> Answer:
        """One request with a certificate of the lab for any name.  ``path`` is sent as it stands."""
        if sae not in self._contexts:
            credential = self.authority.sae(sae)
            self._contexts[sae] = tls.client_context(
                self.authority.certificate, credential.certificate, credential.private_key
            )
        url = URL(f"https://127.0.0.1:{port or self.plans[site].port}{path}", encoded=True)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._contexts[sae])) as session,
            session.request(method, url, data=data) as response,
        ):
            return Answer(response.status, await response.read(), response.headers)

    async def enc(
        self, body: object = None, *, sae: str = "sae-alice", site: str = "alice", slave: str = "sae-bob"
    ) -> Answer:
        return await self.http(sae, site, "POST", f"/api/v1/keys/{slave}/enc_keys", body)

    async def dec(
        self, key_ids: list[str], *, sae: str = "sae-bob", site: str = "bob", master: str = "sae-alice"
    ) -> Answer:
        body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
        return await self.http(sae, site, "POST", f"/api/v1/keys/{master}/dec_keys", body)

    async def source(self, site: str, **settings: Any) -> Etsi014Source:
        plan = self.plans[site]
        table: dict[str, object] = {
            "url": plan.url,
            "sae": plan.sae_id,
            "ca": "pki/ca.crt",
            "certificate": f"pki/{plan.sae_id}.crt",
            "private_key": f"pki/{plan.sae_id}.key",
            **settings,
        }
        home = self.folder / site
        source = Etsi014Source(table, SourceContext("kme", home, home, site))
        await source.start()
        self.clients.append(source)
        return source


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared_lab() -> AsyncIterator[Lab]:
    """One laboratory for a module whose tests leave each other alone."""
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = Lab(Path(folder))
        try:
            await lab.start(keys=512)
            yield lab
        finally:
            await lab.aclose()


@pytest_asyncio.fixture
async def make_lab() -> AsyncIterator[Callable[..., Lab]]:
    """Laboratories for one test; start them."""
    labs: list[Lab] = []
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:

        def make(**options: Any) -> Lab:
            home = Path(folder) / str(len(labs))
            home.mkdir()
            labs.append(Lab(home, **options))
            return labs[-1]

        try:
            yield make
        finally:
            for lab in labs:
                await lab.aclose()


@pytest.fixture
def counts() -> Callable[[int], int]:
    """``counts(full)``: a tenth of a large count, unless QVPN_TEST_LONG asks for all of it."""
    return lambda full: full if os.environ.get("QVPN_TEST_LONG") == "1" else max(1, full // 10)


@pytest.fixture(scope="session")
def lab_class() -> type[Lab]:
    """For fixtures of a module that need a laboratory of their own."""
    return Lab


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL without a standby, for what is inside one database.  No fsync: nobody pulls a plug here."""
    if pgcluster.binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    cluster = Cluster(fsync="off")
    try:
        cluster.primary.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> SqlitePlace | PostgresPlace:
    """Where a store of either kind can be opened."""
    if request.param == "sqlite":
        return SqlitePlace(tmp_path)
    return PostgresPlace(request.getfixturevalue("postgres"))
