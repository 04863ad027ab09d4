"""Everything the demo makes lives in namespaces that end with it, however it ends.

The outer process starts itself again under util-linux ``unshare`` with network, mount and process namespaces of
its own, and a user namespace where it is not root.  The inner process is process 1 in there: when it ends, the
kernel ends everything it started and gives the links, mounts and the tmpfs back.  ``--kill-child`` and the
parent-death signal do the same when the outer one is killed, so even SIGKILL leaves nothing behind.

Outside: :func:`run`.  Inside: :func:`body`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from qvpn.demo import kernel
from qvpn.demo.process import environment

_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_ROOT_INSIDE = ("--user", "--map-root-user")
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TUN = "/dev/net/tun"
_GRACE = 6.0
"""Seconds that the inner process has to end after a signal before it is killed."""


class SandboxError(Exception):
    """This system does not allow what the sandbox needs; the message is one sentence for the user."""


class Interrupted(BaseException):
    """Raised inside by a signal; like KeyboardInterrupt no ``except Exception`` may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


def run(command: Sequence[str], *, name: str = "qvpn demo") -> int:
    """Run ``command`` in a sandbox and return its exit code (128 + signal number after a signal).

    Raises SandboxError before anything is started where namespaces or the TUN device are not to be had.
    """
    _require_tun()
    prefix = _unshare_command()
    parent = os.getpid()
    received: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in _ENDING_SIGNALS}
    try:
        # A process group of its own: Ctrl-C reaches this process only, which passes it on in order.
        inner = subprocess.Popen(
            [*prefix, "--", *command],
            stdin=subprocess.DEVNULL,
            process_group=0,
            env=environment(),
            preexec_fn=lambda: kernel.die_with_parent(parent),  # single thread here
        )
        code = _wait(inner, received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        print(f"{name}: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _wait(inner: subprocess.Popen[bytes], received: list[int]) -> int:
    """Wait for the end; pass signals on, again and again since process 1 ignores them until it has a handler."""
    waited = 0.0
    while True:
        try:
            return inner.wait(0.2)
        except subprocess.TimeoutExpired:
            if not received:
                continue
        waited += 0.2
        if waited >= _GRACE or len(received) > 1:
            inner.kill()
        else:
            os.killpg(inner.pid, signal.SIGTERM)


def body(work: Callable[[], int]) -> int:
    """Inside: settle, do the work, and return its exit code, or that of the signal that interrupted it."""
    try:
        settle()
        return work()
    except Interrupted as stop:
        return 128 + stop.signum


def settle() -> None:
    """Before anything else inside: signals raise Interrupted, /run is empty memory, loopback is up.

    Refuses (SandboxError) outside a sandbox, since it would hide the machine's own ``/run``.
    """
    if os.getpid() != 1:
        raise SandboxError("the inner part of the demo was started outside its sandbox")
    for signum in _ENDING_SIGNALS:
        signal.signal(signum, _interrupt)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount_tmpfs("/run")
    bring_loopback_up()


def bring_loopback_up() -> None:
    """Set ``lo`` of the calling thread's network namespace up."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    for ending in _ENDING_SIGNALS:
        signal.signal(ending, signal.SIG_IGN)
    raise Interrupted(signum)


def _require_tun() -> None:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise SandboxError(f"{_TUN} does not exist: load the kernel module 'tun' (modprobe tun)") from None
    except PermissionError:
        raise SandboxError(f"user {_user()} may not open {_TUN}: run as root, or chmod 0666 {_TUN}") from None
    except OSError as error:
        raise SandboxError(f"{_TUN} cannot be opened: {error.strerror}") from None


def _unshare_command() -> list[str]:
    """The ``unshare`` call that works here: plain for root, with a user namespace for others and in containers."""
    program = shutil.which("unshare")
    if program is None:
        raise SandboxError("the program 'unshare' (package util-linux) is not installed")
    candidates = [_AS_ROOT_INSIDE] if os.geteuid() else [(), _AS_ROOT_INSIDE]
    reason = ""
    for extra in candidates:
        command = [program, *_NAMESPACES, *extra]
        probe = subprocess.run([*command, "--", "true"], capture_output=True, text=True, check=False)
        if probe.returncode == 0:
            return command
        reason = probe.stderr.strip().splitlines()[0] if probe.stderr.strip() else f"exit code {probe.returncode}"
    raise SandboxError(
        f"user {_user()} may not make network namespaces here ({reason}): run as root, or allow user namespaces "
        "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)"
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
