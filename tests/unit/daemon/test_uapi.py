"""The control socket: who may ask, what is answered, and what a stranger's bytes do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qvpn import privileged, uapi


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "control.sock"
    served = uapi.ControlServer(privileged.control_socket(path), {"status": lambda: {"status": {"site": "alice"}}})
    await served.start()
    yield path
    await served.aclose()
    await served.aclose()


async def ask(path: Path, request: str) -> uapi.Answer:
    return await asyncio.to_thread(uapi.ask, path, request)


async def test_a_request_is_answered(server: Path) -> None:
    assert await ask(server, "status") == {"ok": True, "status": {"site": "alice"}}
    assert stat.S_IMODE(server.stat().st_mode) == 0o600


async def test_an_unknown_request_is_refused_with_the_known_ones(server: Path) -> None:
    with pytest.raises(uapi.UapiError, match="the daemon refused: unknown request; there are: status"):
        await ask(server, "reboot")


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"null\n", b'{"do": []}\n', b"\xff\n", b"[" * 50_000 + b"\n", b"{}\n"]
)
async def test_odd_lines_are_answered_and_the_server_lives(server: Path, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(server)
    writer.write(line)
    assert json.loads(await reader.readline())["ok"] is False
    writer.close()
    await writer.wait_closed()
    assert (await ask(server, "status"))["ok"] is True


async def test_hang_ups_and_floods_do_no_harm(server: Path) -> None:
    for data in (b"", b"half a line", b"x" * (2 * uapi.MAX_LINE)):
        _, writer = await asyncio.open_unix_connection(server)
        writer.write(data)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert (await ask(server, "status"))["ok"] is True


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(uapi.NotRunning, match="no daemon runs here: nobody listens at"):
        uapi.ask(path, "status")
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(path))
    left_over.close()
    with pytest.raises(uapi.NotRunning):
        uapi.ask(path, "status")


def test_a_left_over_socket_is_replaced_and_a_long_path_is_no_problem(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    for _ in range(2):
        listener = privileged.control_socket(folder / "control.sock")
        privileged.connect_control(folder / "control.sock", 1.0).close()
        listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_gets_no_answer() -> None:
    program = """
import os, socket, sys
os.setuid(65534)
asker = socket.socket(socket.AF_UNIX)
asker.connect(sys.argv[1])
try:
    asker.sendall(b'{"do": "status"}\\n')
    sys.exit(len(asker.recv(100)))
except OSError:
    sys.exit(0)
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "control.sock"
        served = uapi.ControlServer(privileged.control_socket(path), {"status": lambda: {"status": {}}})
        await served.start()
        path.chmod(0o666)  # past the first wall: now only SO_PEERCRED is left
        done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, path], check=False)
        await served.aclose()
    assert done.returncode == 0


def test_the_run_folder_lists_living_daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged, "run_folder", lambda: tmp_path / "run")
    assert privileged.listed_sockets() == []
    target = tmp_path / "control.sock"
    target.touch()
    entry = privileged.RunEntry("alice", target)
    entry.publish()
    entry.publish()
    assert privileged.listed_sockets() == [target]
    other = privileged.RunEntry("alice", tmp_path / "other.sock")
    other.remove()
    assert privileged.listed_sockets() == [target]
    target.unlink()
    assert privileged.listed_sockets() == []
    entry.remove()
    assert list((tmp_path / "run").iterdir()) == []
