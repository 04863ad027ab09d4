"""The demo's sandbox: nothing outlives it, however it ends, as root and as an ordinary user."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qvpn.demo.process import environment

_INNER = """
import os, subprocess, sys, time
from pathlib import Path
from qvpn.demo import lab, sandbox
def work():
    made = lab.two_sites(Path("/run/lab"))
    family = made["alice"].start("family", ["sh", "-c", "sleep 1000 & echo '{}'; sleep 1000; true"], site=True)
    family.until_output(5)
    Path("/run/left").write_text("x")
    os.open("/dev/net/tun", os.O_RDWR)
    print("up", flush=True)
    time.sleep(float(sys.argv[1]))
    return 7
sys.exit(sandbox.body(work))
"""
_OUTER = """
import sys
from qvpn.demo import sandbox
try:
    sys.exit(sandbox.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]))
except sandbox.SandboxError as error:
    sys.exit(f"qvpn demo: {error}")
"""
# An ordinary user in a mount namespace where the TUN device may be opened and the interpreter be reached: nothing
# of the machine itself is changed.
_AS_NOBODY = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir /run/hold
mknod -m 0666 /run/hold/tun c 10 200
mount --bind /run/hold/tun /dev/net/tun
case "$INTERPRETER" in
/root/*)
  mkdir /run/hold/root && mount --bind /root /run/hold/root
  mount -t tmpfs -o mode=0755 tmpfs /root
  mkdir -p "$INTERPRETER" && mount --bind "/run/hold$INTERPRETER" "$INTERPRETER" ;;
esac
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all "$@"
"""


def _command(*, nobody: bool, seconds: float) -> list[str]:
    command = [sys.executable, "-c", _OUTER, _INNER, str(seconds)]
    if nobody:
        return ["unshare", "--mount", "sh", "-c", _AS_NOBODY, "sh", *command]
    return command


@contextmanager
def _demo(*, nobody: bool, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A sandboxed program whose process has the pid of the outer part (each layer before it execs)."""
    process = subprocess.Popen(
        _command(nobody=nobody, seconds=seconds),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "INTERPRETER": str(Path(sys.base_prefix)), "HOME": "/"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line == "up\n", process.stderr.read()


def _family(pid: int) -> set[int]:
    """The process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _identity(pid: int | str, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def _namespaces(pids: set[int]) -> set[str]:
    """Network and process namespaces that these processes are in and we are not."""
    ours = {_identity("self", kind) for kind in ("net", "pid")}
    return {_identity(pid, kind) for pid in pids for kind in ("net", "pid")} - ours


def _left(pids: set[int], namespaces: set[str]) -> set[str]:
    """What of them is still there: processes, and namespaces with any process at all in them."""
    left = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            inside = {_identity(process.name, kind) for kind in ("net", "pid")}
        except OSError:
            continue
        if state != "Z" and (int(process.name) in pids or inside & namespaces):
            left.add(process.name)
    return left


def _expect_nothing_left(pids: set[int], namespaces: set[str]) -> None:
    deadline = time.monotonic() + 5
    while left := _left(pids, namespaces):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)
    assert not Path("/run/lab").exists()
    assert not Path("/run/left").exists()


users = pytest.mark.parametrize("nobody", [False, True], ids=["root", "ordinary-user"])


@users
def test_the_inner_exit_code_comes_out_and_nothing_is_left(nobody: bool) -> None:
    with _demo(nobody=nobody, seconds=0.1) as process:
        _ready(process)
        assert process.wait(10) == 7
        assert not Path("/run/lab").exists()


@users
def test_sigkill_of_the_outer_process_leaves_nothing(nobody: bool) -> None:
    with _demo(nobody=nobody, seconds=1000) as process:
        _ready(process)
        family = _family(process.pid)
        namespaces = _namespaces(family)
        assert len(family) >= 6  # outer, unshare, process 1, sh and two sleeps
        assert len(namespaces) >= 3  # the sandbox's two and the site's
        process.send_signal(signal.SIGKILL)
        process.wait(5)
        _expect_nothing_left(family, namespaces)


@users
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_one_line_and_its_exit_code(nobody: bool, signum: signal.Signals) -> None:
    with _demo(nobody=nobody, seconds=1000) as process:
        _ready(process)
        family = _family(process.pid)
        namespaces = _namespaces(family)
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 128 + signum
        assert (out, err) == ("", "qvpn demo: interrupted; nothing is left behind\n")
        _expect_nothing_left(family, namespaces)


def test_a_signal_before_the_inner_part_listens_ends_it_too() -> None:
    with _demo(nobody=False, seconds=1000) as process:
        deadline = time.monotonic() + 5
        while len(_family(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=10)
        assert process.returncode in (130, -signal.SIGINT)
        assert err in ("", "qvpn demo: interrupted; nothing is left behind\n") or process.returncode < 0


def test_outside_a_sandbox_the_inner_part_refuses() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from qvpn.demo import sandbox; sandbox.settle()"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert "started outside its sandbox" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        ("mount -t tmpfs -o mode=0755 tmpfs /dev/net", "/dev/net/tun does not exist"),
        ("echo 0 >/proc/sys/user/max_net_namespaces", "may not make network namespaces here"),
    ],
)
def test_what_is_forbidden_is_one_sentence(prepare: str, sentence: str) -> None:
    # In a user namespace of its own, whose limits are nobody else's.
    script = f'set -e; mount --make-rprivate /; {prepare}; exec "$@"'
    done = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            *_command(nobody=False, seconds=1),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.startswith("qvpn demo: ")
    assert done.stderr.count("\n") == 1
