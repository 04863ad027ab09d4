"""A man in the middle at a link that runs: switched while it runs, seen by the tags, never handed a key."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from qkd_lab import LinkLab, until
from typer.testing import CliRunner

from keysource.qkd.cli import app
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.control import ask
from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.tapcli import DEEDS, Middle
from tests.ports import free_ports


def test_each_deed_does_what_it_says_so_many_times() -> None:
    frame, other = Frame(Kind.CHECK, b"ab"), Frame(Kind.SIFT, b"ab")
    left = {"flip": [b"ac"], "shorten": [b"a"], "repeat": [b"ab", b"ab"], "drop": [], "cut": None}
    assert set(left) == set(DEEDS)
    for deed, payloads in left.items():
        middle = Middle()
        assert middle.touch("A", frame) == [frame]
        assert middle.order({"frame": "CHECK", "deed": deed, "times": 2})["left"] == 2
        assert middle.touch("A", other) == [other]
        for _ in range(2):
            found = middle.touch("B", frame)
            assert (found if found is None else [each.payload for each in found]) == payloads
        assert middle.touch("B", frame) == [frame] and middle.order({}) == {
            "frame": "CHECK", "deed": deed, "left": 0, "touched": 2,
        }  # fmt: skip
    middle.order({"frame": "PARITY", "deed": "flip"})
    assert middle.touch("A", Frame(Kind.PARITY)) == [Frame(Kind.PARITY)], "nothing to flip"
    assert middle.order({"deed": None})["left"] == 0


@pytest.mark.parametrize("order", [
    {"deed": "flip"}, {"deed": "bless", "frame": "SIFT"}, {"deed": "flip", "frame": "HELLO"},
    {"deed": "flip", "frame": "SIFT", "times": 0}, {"deed": "flip", "frame": "SIFT", "times": True},
])  # fmt: skip
def test_an_order_that_makes_no_sense_is_refused(order: dict[str, object]) -> None:
    with pytest.raises(LinkError):
        Middle().order(order)


def test_an_address_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["tap", str(tmp_path / "s"), "--listen", "here", "--target", "127.0.0.1:1"])
    assert isinstance(ran.exception, LinkSettings) and "--listen" in str(ran.exception)


@pytest.mark.timeout(120)
async def test_a_tap_between_two_ends_is_caught_and_gone_when_it_is_switched_off(tmp_path: Path) -> None:
    async with LinkLab(tmp_path) as lab:
        (port,) = free_ports(1)
        bob = lab.file("bob")
        (peer,) = [line.split('"')[1] for line in bob.read_text().splitlines() if line.startswith("peer")]
        bob.write_text(bob.read_text().replace(peer, f"127.0.0.1:{port}"))
        socket, out = tmp_path / "tap.sock", (tmp_path / "tap.out").open("wb")
        line = [sys.executable, "-m", "keysource.qkd", "tap", str(socket)]
        line += ["--listen", f"127.0.0.1:{port}", "--target", peer]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        process = await asyncio.create_subprocess_exec(*line, stdin=-3, stdout=out, stderr=out, env=env)
        try:
            await lab.start()
            lab.attach()
            await lab.blocks(1, within=60)
            assert socket.stat().st_mode & 0o777 == 0o600
            said = await asyncio.to_thread(CliRunner().invoke, app, ["meddle", str(socket), "check", "--times", "1"])
            assert json.loads(said.output)["deed"] == "flip"
            logs = [
                client.alarm_log for client in lab.clients.values()
            ]  # whoever sees it first closes the connection
            await until(
                lambda: any(kind == "authentication" for log in logs for _on, kind, _text in log), 30, lab.words
            )
            await lab.blocks(1)
            assert (await ask(socket, {})) == {"frame": "CHECK", "deed": "flip", "left": 0, "touched": 1}
            await until(lambda: not any(client.alarms for client in lab.clients.values()))
        finally:
            process.terminate()
            await process.wait()
            out.close()
        assert b"Traceback" not in (tmp_path / "tap.out").read_bytes()
