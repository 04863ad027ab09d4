"""The same post-processing behind recorded files and a live device: keys come out, and no photon is used twice."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from qkd_lab import LinkLab, until
from typer.testing import CliRunner

from keysource.base import End
from keysource.qkd.cli import app
from keysource.qkd.config import EndConfig, load
from keysource.qkd.engine import frontends
from keysource.qkd.engine.end import LinkEnd
from keysource.qkd.engine.frontends import Live, Recorded
from keysource.qkd.errors import LinkError, LinkSettings, PeerLost
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.presets import PRESETS
from keysource.qkd.recorder import record_block, record_blocks
from keysource.qkd.records import ASSUMPTIONS, RecordedSettings

PRESET = PRESETS["demo"]
PULSES = PRESET.plan().pulses


def behind(lab: LinkLab, front_end: str, where: dict[str, Path]) -> None:
    """Change both ends' files from the simulated fibre to something else."""
    for site in ("alice", "bob"):
        file = lab.file(site)
        lines = [line for line in file.read_text().splitlines() if not line.startswith(("fibre", "spawn", "control"))]
        file.write_text("\n".join([*lines, f'front_end = "{front_end}"', f'records = "{where[site]}"']))


async def test_recorded_blocks_give_keys_and_when_they_end_the_link_waits_and_burns_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result = CliRunner().invoke(app, ["record", str(runs), "--blocks", "2"])
    assert result.exit_code == 0 and len(result.stdout.split()) == 4
    async with LinkLab(tmp_path) as lab:
        behind(lab, "recorded", {site: runs / site for site in ("alice", "bob")})
        await lab.start()
        lab.attach()
        await until(
            lambda: not list(runs.glob("*/*.settings")) and not list(runs.glob("*/*.detections")), 60, lab.words
        )

        async with asyncio.timeout(60):
            status = await lab.status("alice")
            while "no record" not in status["reason"] or status["blocks_passed"] + status["blocks_failed"] < 2:
                await asyncio.sleep(0.1)
                status = await lab.status("alice")
        assert status["blocks_passed"] >= 1 and len(lab.common()) == status["blocks_passed"]
        assert status["ledger_balance"] == 0
        assert status["tickets_spent"] == 2 and status["pace"] == "recorded"
        assert all(sentence[:30] in (tmp_path / "log").read_text() for sentence in ASSUMPTIONS)
        assert len(list(runs.glob("*/*.used"))) == 4


async def test_a_live_device_at_a_socket_gives_keys(tmp_path: Path) -> None:
    """A device of two halves: each block's light is sent and measured when both ends have asked."""
    blocks: dict[int, tuple[bytes, bytes]] = {}

    def device(half: int):  # type: ignore[no-untyped-def]
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            question = await reader.readexactly(20)
            block, pulses = int.from_bytes(question[4:12], "big"), int.from_bytes(question[12:], "big")
            assert question[:4] == b"QDL1" and pulses == PULSES
            if block not in blocks:
                blocks[block] = record_block(PRESET)
            record = blocks[block][half]
            writer.write(len(record).to_bytes(4, "big") + record)
            await writer.drain()
            writer.close()

        return serve

    where = {site: tmp_path / f"{site}.sock" for site in ("alice", "bob")}
    servers = [await asyncio.start_unix_server(device(half), path) for half, path in enumerate(where.values())]
    async with LinkLab(tmp_path) as lab:
        behind(lab, "live", where)
        await lab.start()
        lab.attach()
        await lab.blocks(2, within=60)
        assert (await lab.status("bob"))["pace"] == "live"
    for server in servers:
        server.close()


async def test_a_record_is_used_once_and_a_bad_one_is_named(tmp_path: Path) -> None:
    list(record_blocks(tmp_path, PRESET, [4]))
    bob, alice = Recorded(End.B, tmp_path / "bob"), Recorded(End.A, tmp_path / "alice")
    assert bob.ready and alice.ready and not Recorded(End.A, tmp_path / "bob").ready
    seen, chosen = await bob.fly(4, PULSES, b"", 1), await alice.fly(4, PULSES, b"", 1)
    assert isinstance(seen, Detections) and seen.bases is not None and isinstance(chosen, RecordedSettings)
    same = seen.bases == chosen.at(seen.positions).check
    assert 0.0 < (seen.bits != chosen.at(seen.positions).bit)[same].mean() < 0.02
    assert not bob.ready and "no record" in bob.trouble
    with pytest.raises(LinkError, match="used before"):
        await bob.fly(4, PULSES, b"", 1)
    with pytest.raises(LinkError, match="No such file"):
        await alice.fly(5, PULSES, b"", 1)
    bad = tmp_path / "bob" / "6.detections"
    bad.write_bytes(os.urandom(100))
    bad.chmod(0o644)
    with pytest.raises(LinkError, match="is open to others"):
        await bob.fly(6, PULSES, b"", 1)
    (tmp_path / "bob" / "6.detections.used").rename(bad)
    bad.chmod(0o600)
    with pytest.raises(LinkError, match=r"6\.detections: not a detection record"):
        await bob.fly(6, PULSES, b"", 1)
    with pytest.raises(LinkSettings, match="exists already"):
        list(record_blocks(tmp_path, PRESET, [7, 7]))


async def test_a_device_that_is_silent_or_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    assert not Live(End.B, path).ready
    with pytest.raises(PeerLost, match="went away"):
        await Live(End.B, path).fly(0, PULSES, b"", 1)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(silent, path)
    assert Live(End.B, path).ready
    with pytest.raises(PeerLost, match="did not finish"):
        await Live(End.B, path).fly(0, PULSES, b"", 0.05)
    server.close()


async def test_a_device_of_another_user_or_one_that_says_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(20)
        writer.write(b"\xff" * 4)
        writer.close()

    server = await asyncio.start_unix_server(endless, tmp_path / "d.sock")
    with pytest.raises(LinkError, match="a record of 4294967295 bytes"):
        await Live(End.B, tmp_path / "d.sock").fly(0, PULSES, b"", 5)
    monkeypatch.setattr(frontends, "peer_is_trusted", lambda connection: False)
    with pytest.raises(LinkError, match="another user"):
        await Live(End.B, tmp_path / "d.sock").fly(0, PULSES, b"", 5)
    server.close()


@pytest.mark.parametrize(("monitor", "fires"), [("none", False), ("photocurrent", True), ("efficiency", True)])
async def test_a_monitor_without_readings_is_an_alarm(tmp_path: Path, monitor: str, fires: bool) -> None:
    """A device that leaves its readings out must not switch the guard off."""
    list(record_blocks(tmp_path, PRESET, [0]))
    seen = await Recorded(End.B, tmp_path / "bob").fly(0, PULSES, b"", 1)
    assert isinstance(seen, Detections) and seen.readings is not None
    link = SimpleNamespace(config=SimpleNamespace(monitor=monitor), preset=PRESET)
    assert (LinkEnd.guard(link, None) is not None) == fires  # type: ignore[arg-type]


def test_the_configuration_of_a_front_end(tmp_path: Path) -> None:
    base = 'version = 1\nrole = "left"\nlisten = "127.0.0.1:1"\nauth_key = "p"\nstate = "s"\nsocket = "d"\n'
    file = tmp_path / "link.toml"
    file.write_text(base + 'front_end = "recorded"\nrecords = "runs"\n')
    config = load(file)
    assert isinstance(config, EndConfig) and config.records == tmp_path / "runs" and not config.spawn_fibre
    for wrong in ('front_end = "live"\n', 'records = "runs"\n', 'front_end = "psychic"\n'):
        file.write_text(base + wrong)
        with pytest.raises(LinkSettings):
            load(file)


def test_the_assumptions_can_be_read() -> None:
    assert all(sentence in CliRunner().invoke(app, ["assumptions"]).stdout for sentence in ASSUMPTIONS)
