"""``qvpn up`` as a process, as root in a network namespace of its own: refusals, rights, signals, its end.

::

    netns qvpnt-PID:  lo (up)          one site whose peer, 127.0.0.2, is not there
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qvpn.cli.main import execute

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and a TUN"),
]
CAP_NET_ADMIN = 1 << 12
HOLD_PORT = """
import socket, time
holder = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
holder.bind(("::", 51840))
print("bound", flush=True)
time.sleep(60)
"""
QVPN = [sys.executable, "-m", "qvpn"]


class Namespace:
    """A namespace and the daemons started in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.processes: list[subprocess.Popen[str]] = []

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, check=False, timeout=60
        )

    def up(self, file: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *QVPN, "up", file], stderr=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        return process

    def started(self, file: Path) -> subprocess.Popen[str]:
        process = self.up(file)
        wait_for(lambda: (file.parent / "state/control.sock").exists() and status(file) is not None, process)
        return process


def status(file: Path) -> dict[str, object] | None:
    done = subprocess.run([*QVPN, "status", "--json", file], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace(f"qvpnt-{os.getpid()}")
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        subprocess.run(["ip", "-n", made.name, "link", "set", "lo", "up"], check=True)
        yield made
    finally:
        for process in made.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        subprocess.run(["ip", "netns", "del", made.name], check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "sites"
    assert execute(["init", str(place), "--left", "alice@127.0.0.1:51840", "--right", "bob@127.0.0.2:51840"]) == 0
    return place


@pytest.fixture
def file(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made / "alice", tmp_path / "alice")) / "qvpn.toml"


def refused(namespace: Namespace, file: Path) -> str:
    done = namespace.run(*QVPN, "up", file)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def test_rights_are_given_up_and_nothing_is_left_behind(namespace: Namespace, file: Path) -> None:
    process = namespace.started(file)
    facts = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":\t" in line
    )
    for threads in (Path(f"/proc/{process.pid}/task")).iterdir():
        rights = [line for line in (threads / "status").read_text().splitlines() if line.startswith("Cap")]
        assert {line.split()[0][:-1]: int(line.split()[1], 16) for line in rights} == {
            "CapInh": 0,
            "CapPrm": CAP_NET_ADMIN,
            "CapEff": CAP_NET_ADMIN,
            "CapBnd": CAP_NET_ADMIN,
            "CapAmb": 0,
        }
    assert facts["NoNewPrivs"] == "1"
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if line.startswith("Max core")).split()[4:6] == ["0", "0"]
    assert (file.parent / "state").stat().st_mode & 0o777 == 0o700
    assert (file.parent / "state/control.sock").stat().st_mode & 0o777 == 0o600
    shown = status(file)
    assert shown is not None
    assert (shown["site"], shown["pid"], shown["interface"], shown["schema"]) == ("alice", process.pid, "qvpn0", 1)
    assert shown["mtu"] == 65507 - 42  # the path over loopback
    assert "10.90.0.1/24" in namespace.run("ip", "addr", "show", "qvpn0").stdout
    down = subprocess.run([*QVPN, "down", file], capture_output=True, text=True, check=False)
    assert (down.returncode, down.stdout, down.stderr) == (0, "", "")
    assert process.wait(10) == 0
    assert not (file.parent / "state/control.sock").exists()
    assert namespace.run("ip", "link", "show", "qvpn0").returncode != 0
    assert "Traceback" not in (process.stderr.read() if process.stderr else "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(namespace: Namespace, file: Path, number: signal.Signals) -> None:
    process = namespace.started(file)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 0
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"
    assert all(json.loads(line) for line in err.splitlines())


def test_kill_9_leaves_nothing_that_hinders_the_next_start(namespace: Namespace, file: Path) -> None:
    process = namespace.started(file)
    process.kill()
    process.wait()
    done = subprocess.run([*QVPN, "status", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no daemon runs here" in done.stderr
    namespace.started(file).terminate()


def test_a_second_instance_is_refused(namespace: Namespace, file: Path) -> None:
    namespace.started(file)
    folder = file.parent / "state"
    assert refused(namespace, file) == (
        f"qvpn: {folder}: another qvpn daemon runs with this state folder; stop it with: qvpn down"
    )


def test_a_taken_port_is_named(namespace: Namespace, file: Path) -> None:
    holder = subprocess.Popen(
        ["ip", "netns", "exec", namespace.name, sys.executable, "-c", HOLD_PORT],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        said = refused(namespace, file)
    finally:
        holder.kill()
        holder.communicate()
    assert said.startswith("qvpn: ")
    assert "51840" in said
    assert "address already in use" in said


def test_a_foreign_interface_is_not_touched(namespace: Namespace, file: Path) -> None:
    namespace.run("ip", "link", "add", "qvpn0", "type", "veth", "peer", "name", "other")
    assert refused(namespace, file) == (
        "qvpn: interface qvpn0 exists already and is no TUN device; choose another name"
    )
    assert namespace.run("ip", "link", "show", "qvpn0").returncode == 0


def test_an_interface_in_use_is_named(namespace: Namespace, file: Path, made: Path, tmp_path: Path) -> None:
    namespace.started(file)
    other = Path(shutil.copytree(made / "bob", tmp_path / "bob")) / "qvpn.toml"
    other.write_text(other.read_text().replace('"[::]:51840"', '"[::]:51841"'))
    said = refused(namespace, other)
    assert "qvpn0" in said
    assert "another process has it open" in said or "busy" in said


def test_missing_keys_and_key_files_are_named(namespace: Namespace, file: Path) -> None:
    (file.parent / "courier.keys").rename(file.parent / "elsewhere")
    said = refused(namespace, file)
    assert said.startswith(f"{file}: [key_source.courier] path: ")
    assert "courier.keys" in said
    (file.parent / "elsewhere").rename(file.parent / "courier.keys")
    (file.parent / "alice.key").unlink()
    assert refused(namespace, file) == f"{file}: [site] identity: {file.parent}/alice.key: does not exist"


def test_a_low_port_keeps_one_right_more(namespace: Namespace, file: Path) -> None:
    file.write_text(file.read_text().replace('"[::]:51840"', '"[::]:443"'))
    process = namespace.started(file)
    text = Path(f"/proc/{process.pid}/status").read_text()
    assert f"CapEff:\t{CAP_NET_ADMIN | 1 << 10:016x}" in text


def test_a_deleted_interface_is_the_end(namespace: Namespace, file: Path) -> None:
    process = namespace.started(file)
    assert namespace.run("ip", "link", "del", "qvpn0").returncode == 0
    _, err = process.communicate(timeout=15)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "qvpn: interface qvpn0 was deleted by somebody, so no packet can pass any more"
    assert "Traceback" not in err
    assert not (file.parent / "state/control.sock").exists()
