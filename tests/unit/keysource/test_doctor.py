"""The doctor at a real TLS server: what is right, and each thing that is wrong with what to do."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from keysource import doctor, tls
from keysource.alarm import with_alarm
from keysource.base import End, Origin, SourceContext, SourceStatus
from keysource.device.hardware import HardwareSource
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.doctor import Finding, examine
from keysource.file.format import write_pair
from keysource.file.source import FileSource
from keysource.kme.auth import certificate_of, common_name
from keysource.kme.pki import Authority
from keysource.skip.messages import Capabilities, SkipKey
from keysource.skip.server import Issued, skip_application
from keysource.skip.source import SkipSource

AUTHORITY = Authority("doctor CA")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysource.doctor.LIMIT", 1.0)


class Provider:
    """Counts what would consume."""

    draws = 0

    def capabilities(self, caller: str) -> Capabilities:
        return Capabilities(caller, ("right",))

    async def new_key(self, caller: str, remote_system: str) -> Issued:
        self.draws += 1
        return Issued(SkipKey("00", bytearray(os.urandom(32))), Origin.QKD)

    async def key(self, caller: str, remote_system: str, key_id: str) -> Issued:
        return await self.new_key(caller, remote_system)


@asynccontextmanager
async def serving(authority: Authority = AUTHORITY, date: str | None = None) -> AsyncIterator[tuple[Provider, str]]:
    provider = Provider()
    application = skip_application(provider, lambda request: common_name(certificate_of(request)))

    async def tell_time(request: web.Request, response: web.StreamResponse) -> None:
        if date is not None:
            response.headers["Date"] = date

    application.on_response_prepare.append(tell_time)
    credential = authority.kme("provider", ["127.0.0.1"])
    context = tls.server_context(AUTHORITY.certificate, credential.certificate, credential.private_key)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield provider, f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def look(folder: Path, url: str, authority: Authority = AUTHORITY, **more: object) -> dict[str, Finding]:
    authority.sae("left").write(folder, "left")
    (folder / "ca.crt").write_bytes(AUTHORITY.certificate)
    table = {
        "url": url,
        "sae": "left",
        "ca": "ca.crt",
        "certificate": "left.crt",
        "private_key": "left.key",
        **more,
    }
    context = SourceContext("skip", folder, folder, "left")
    found = await examine(table, context, SkipSource(table, context), ["right"])
    assert all((finding.state == "fine") == (not finding.todo) for finding in found)
    return {finding.what: finding for finding in found}


async def test_all_is_well_and_no_key_is_consumed(tmp_path: Path) -> None:
    async with serving() as (provider, url):
        found = await look(tmp_path, url)
    assert {finding.state for finding in found.values()} == {"fine"}
    assert set(found) == {"ca ca.crt", "certificate left.crt", "TLS", "clock", "keys for right", "hop"}
    assert "TLSv1.3" in found["TLS"].said
    assert provider.draws == 0


async def test_a_foreign_server_certificate(tmp_path: Path) -> None:
    async with serving(Authority("another CA")) as (_, url):
        found = await look(tmp_path, url)
    assert (found["TLS"].state, found["keys for right"].state) == ("wrong", "wrong")
    assert "authority" in found["TLS"].todo


async def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = await look(tmp_path, f"https://127.0.0.1:{probe.getsockname()[1]}")
    assert "refused" in found["TLS"].said
    assert found["keys for right"].state == "wrong"


async def test_another_clock(tmp_path: Path) -> None:
    async with serving(date="Mon, 01 Jan 2024 00:00:00 GMT") as (_, url):
        found = await look(tmp_path, url)
    assert found["clock"].state == "warning"
    assert "NTP" in found["clock"].todo


@pytest.mark.parametrize(
    ("days", "state", "said"), [(-1, "wrong", "clock"), (812, "warning", "valid until"), (826, "wrong", "expired")]
)
async def test_dates_of_certificates(
    days: int, state: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)

    async with serving() as (_, url):
        monkeypatch.setattr(doctor, "_now", lambda: now)
        found = await look(tmp_path, url)
    for what in ("ca ca.crt", "certificate left.crt", "TLS"):
        assert found[what].state == state
    assert said in found["ca ca.crt"].said + found["ca ca.crt"].todo


async def test_a_system_that_is_not_shared_with_and_a_harvestable_hop(tmp_path: Path) -> None:
    async with serving() as (_, url):
        found = await look(tmp_path, url, sae="lefty")
    assert found["keys for right"].state == "wrong"
    assert "called 'left' there" in found["keys for right"].said


async def test_a_missing_file(tmp_path: Path) -> None:
    async with serving() as (_, url):
        found = await look(tmp_path, url, certificate="nowhere.crt")
    assert found["certificate"].state == "wrong"
    assert "nowhere.crt" in found["certificate"].said


async def test_a_key_file_in_use_is_no_fault(tmp_path: Path) -> None:
    write_pair(tmp_path / "k", tmp_path / "l", 4)
    table, context = {"path": "k", "end": "a"}, SourceContext("k", tmp_path, tmp_path, "left")
    running = FileSource(table, context)
    await running.start()
    [found] = await examine(table, context, FileSource(table, context), ["right"])
    assert found.state == "warning"
    await running.aclose()
    ready, _hop = await examine(table, context, FileSource(table, context), ["right"])
    assert (ready.state, ready.said.endswith("2 keys stored")) == ("fine", True)


async def test_a_device_keeps_its_keys(tmp_path: Path) -> None:
    device = DeviceServer(tmp_path / "d.sock", DeviceInfo("box", "left-right", End.A, origin=Origin.QKD))
    await device.start()
    device.set_status("up", qber=0.02)
    device.publish(3, os.urandom(64))
    context = SourceContext("box", tmp_path, tmp_path, "left")
    table = {"socket": "d.sock", "origin": "qkd"}
    source = with_alarm(HardwareSource(table, context), "box", tmp_path)
    [ready, _hop] = await examine(table, context, source, ["right"])
    assert (ready.state, device.holds(3), device.subscriber) == ("fine", True, None)
    (tmp_path / "box.alarm").write_text("QBER at the box\n")
    [ready, _hop] = await examine(table, context, source, ["right"])
    assert (ready.state, "QBER at the box" in ready.said) == ("wrong", True)
    wrong = table | {"origin": "couriered"}
    [ready, _hop] = await examine(wrong, context, HardwareSource(wrong, context), ["right"])
    assert (ready.state, 'configured is "couriered"' in ready.said) == ("wrong", True)
    await device.aclose()


def test_keys_that_only_the_other_end_can_draw() -> None:
    said = doctor._said("keys for right", SourceStatus(ready=True, stored_keys=0), 0.01)
    assert [(one.what, one.state) for one in said] == [
        ("keys for right", "fine"), ("direction", "warning"), ("hop", "fine")
    ]  # fmt: skip
    assert 'initiate = "never"' in said[1].todo
    for status in (SourceStatus(ready=True, stored_keys=3), SourceStatus(ready=False, reason="x", stored_keys=0)):
        assert "direction" not in {one.what for one in doctor._said("keys for right", status, 0.01)}
