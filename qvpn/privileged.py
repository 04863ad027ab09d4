"""The one place that opens files, sockets, network devices; and that gives privileges up.

Everything here raises :class:`PrivilegedError` with one sentence for the operator.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

from qvpn.config.units import HostPort, IPNetwork
from qvpn.netio import netlink
from qvpn.netio.base import Address
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import UdpBind
from qvpn.netio.vmclock import VmClock
from qvpn.netio.vmgenid import VmGenId

CAP_NET_BIND_SERVICE, CAP_NET_ADMIN = 10, 12
_MAX_FILE = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 4, 38, 24
_THREAD_END = 5.0
"""Seconds that threads which were joined may take to be gone."""
_CAPABILITY_VERSION_3 = 0x20080522
_CLOCK_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class PrivilegedError(Exception):
    """Something could not be opened; the message is one sentence that names it."""


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME: goes on while the machine sleeps, so that it wakes with dead keys."""
    return time.clock_gettime(_CLOCK_BOOTTIME)


def open_generations() -> list[VmClock | VmGenId]:
    """Whatever tells here that this virtual machine was copied; to be closed.  Empty where nothing does."""
    return [reader for reader in (VmClock.open(), VmGenId.open()) if reader is not None]


# files


def read_public(path: Path) -> bytes:
    """A file that anybody may read: configuration, public key, certificate.

    Raises:
        PrivilegedError: missing, unreadable, not a regular file, or larger than 1 MiB.
    """
    with _opened(path, os.O_RDONLY) as (descriptor, _info):
        return _read(descriptor, path)


def read_secret(path: Path) -> bytes:
    """A file that only its owner may read.

    Raises:
        PrivilegedError: as :func:`read_public`; or it is a symbolic link, belongs to another user, or group or
            others have any right to it.
    """
    with _opened(path, os.O_RDONLY | os.O_NOFOLLOW) as (descriptor, info):
        if info.st_uid != os.geteuid():
            raise PrivilegedError(
                f"{path}: belongs to user {info.st_uid}, not to user {os.geteuid()} who runs this; "
                f"a secret must be ours alone, so run: chown {os.geteuid()} {path}"
            )
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise PrivilegedError(
                f"{path}: others than its owner have rights to it (mode {stat.S_IMODE(info.st_mode):04o}); "
                f"run: chmod 600 {path}"
            )
        return _read(descriptor, path)


def write_secret(path: Path, data: bytes) -> None:
    """Make a new file with mode 0600, on disk when this returns.

    Raises:
        PrivilegedError: it exists (nothing is overwritten), or cannot be written.
    """
    _write_new(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Make a new file with mode 0644.  Raises as :func:`write_secret`."""
    _write_new(path, data, 0o644)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[tuple[int, os.stat_result]]:
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not hang the start.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PrivilegedError(f"{path}: is a symbolic link; name the secret file itself") from None
        raise PrivilegedError(f"{path}: {_reason(error)}") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise PrivilegedError(f"{path}: is not a regular file")
        yield descriptor, info
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path) -> bytes:
    data = b""
    try:
        while chunk := os.read(descriptor, _MAX_FILE + 1 - len(data)):
            data += chunk
    except OSError as error:
        raise PrivilegedError(f"{path}: {_reason(error)}") from None
    if len(data) > _MAX_FILE:
        raise PrivilegedError(f"{path}: is larger than {_MAX_FILE} bytes, so it is not what it should be")
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PrivilegedError(f"{path}: exists already, and nothing is overwritten") from None
    except OSError as error:
        raise PrivilegedError(f"{path}: {_reason(error)}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()  # half a file would stand in the way of the next try
        raise PrivilegedError(f"{path}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower().replace("no such file or directory", "does not exist")


class StateFolder:
    """A site's state folder: 0700, and locked as long as this object is open."""

    def __init__(self, path: Path) -> None:
        """Make the folder where it is missing, and lock it.

        Raises:
            PrivilegedError: another daemon has it, it is not ours alone, or it cannot be used.
        """
        self.path = path
        self._descriptor = -1
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            info = os.fstat(self._descriptor)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PrivilegedError(
                f"{path}: another qvpn daemon runs with this state folder; stop it with: qvpn down"
            ) from None
        except OSError as error:
            self.close()
            raise PrivilegedError(f"{path}: the state folder cannot be used: {_reason(error)}") from None
        if info.st_uid != os.geteuid():
            self.close()
            raise PrivilegedError(
                f"{path}: the state folder belongs to user {info.st_uid}, not to user {os.geteuid()} who runs this; "
                f"run: chown -R {os.geteuid()} {path}"
            )
        if stat.S_IMODE(info.st_mode) & 0o077:
            self.close()
            raise PrivilegedError(f"{path}: the state folder must be ours alone; run: chmod 700 {path}")

    def close(self) -> None:
        """Give the lock up.  May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def run_folder() -> Path:
    """Where running daemons list themselves by site name: /run/qvpn for root, else $XDG_RUNTIME_DIR/qvpn."""
    if os.geteuid() == 0:
        return Path("/run/qvpn")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "qvpn" if base else Path(f"/tmp/qvpn-{os.geteuid()}")  # noqa: S108 - checked by owner


class RunEntry:
    """This daemon's line in the run folder: ``NAME.sock``, a link to the control socket."""

    def __init__(self, site: str, target: Path) -> None:
        self._site = site
        self._link = run_folder() / f"{site}.sock"
        self._target = target

    def publish(self) -> None:
        """Best effort: without it ``qvpn status FILE`` still works.  Raises OSError."""
        self._link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._taken():
            self._link = self._link.with_name(f"{self._site}.{os.getpid()}.sock")
        new = self._link.with_suffix(f".{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(self._target.resolve())
        new.rename(self._link)

    def _taken(self) -> bool:
        """Another living daemon has a site of this name (another network namespace, say)."""
        try:
            other = self._link.readlink()
            if other == self._target.resolve():
                return False
            connect_control(other, 1.0).close()
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Take the line away if it is still ours."""
        with contextlib.suppress(OSError):
            if self._link.readlink() == self._target.resolve():
                self._link.unlink()


def listed_sockets() -> list[Path]:
    """Control sockets of the daemons in the run folder, by site name; dead lines are left out."""
    try:
        if run_folder().stat().st_uid != os.geteuid():
            return []
        links = sorted(run_folder().glob("*.sock"))
    except OSError:
        return []
    return [link.readlink() for link in links if link.is_symlink() and link.exists()]


# sockets


def control_socket(path: Path) -> socket.socket:
    """A listening Unix socket, mode 0600.  The state folder is locked, so one that is there is left over.

    Raises:
        PrivilegedError: it cannot be made; a path beyond 107 bytes is the usual reason.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        with _short_path(path) as name:
            old = os.umask(0o177)
            try:
                listener.bind(name)
            finally:
                os.umask(old)
        listener.listen(8)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise PrivilegedError(f"{path}: the control socket cannot be made: {_reason(error)}") from None
    return listener


def remove_socket(listener: socket.socket, path: Path) -> None:
    """Close a control socket and take its name away: ``qvpn down`` waits for that."""
    listener.close()
    with contextlib.suppress(OSError):
        path.unlink()


def connect_control(path: Path, timeout: float) -> socket.socket:
    """Connect to a daemon's control socket.  Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout)
        with _short_path(path) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A Unix socket's name has at most 107 bytes; go through the folder's descriptor where it is longer."""
    if len(os.fsencode(path)) <= 100:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def peer_user(connection: socket.socket) -> int:
    """The user id of the process at the other end of a Unix socket (SO_PEERCRED)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], sys.byteorder)


# devices and privileges


def require_net_admin() -> None:
    """Raises PrivilegedError where this process may not make a network device."""
    if not effective_capabilities() >> CAP_NET_ADMIN & 1:
        raise PrivilegedError(
            "a tunnel needs the right to make network devices: run this as root (or with CAP_NET_ADMIN)"
        )
    if not Path("/dev/net/tun").exists():
        raise PrivilegedError("/dev/net/tun does not exist: this system offers no TUN devices (try: modprobe tun)")


def effective_capabilities() -> int:
    """The bit set of all that any thread of this process may do."""
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            lines = (thread / "status").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        found |= next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return found


def no_core() -> None:
    """No core dump, no ptrace by the same user, no /proc/PID/mem: keys live in this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process as soon as the one with this id, which started it, is gone.

    Raises:
        PrivilegedError: the kernel refused, or it is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise PrivilegedError("the process that this one belongs to is gone")


def drop_privileges(*, low_port: bool) -> None:
    """Keep CAP_NET_ADMIN (and CAP_NET_BIND_SERVICE where a port below 1024 is listened on), for ever.

    Raises:
        PrivilegedError: the kernel refused, or another thread keeps its rights; the daemon must not go on.
    """
    keep = 1 << CAP_NET_ADMIN | (1 << CAP_NET_BIND_SERVICE if low_port else 0)
    _keep_only(keep & effective_capabilities())


def drop_everything() -> None:
    """Keep no right at all, for ever: for a process that was handed all it needs.  Raises PrivilegedError."""
    _keep_only(0)


def _keep_only(keep: int) -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        if not keep >> capability & 1:
            # Needs CAP_SETPCAP; without it no_new_privs already forbids what the bounding set would.
            _prctl(_PR_CAPBSET_DROP, capability, may_fail=True)
    _capset(keep)
    # A thread that Python has joined may take a moment to be gone from the kernel.
    deadline = time.monotonic() + _THREAD_END
    while effective_capabilities() != keep:
        if time.monotonic() > deadline:
            raise PrivilegedError("privileges could not be dropped in every thread")
        time.sleep(0.005)


def _prctl(option: int, argument: int, *, may_fail: bool = False) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0 and not may_fail:
        raise PrivilegedError(f"prctl {option} failed: {os.strerror(ctypes.get_errno())}")


def _capset(mask: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # effective, permitted, inheritable; first the low words, then the high ones (capset(2))
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, data) != 0:
        raise PrivilegedError(f"privileges could not be dropped: {os.strerror(ctypes.get_errno())}")


# the tunnel's own devices


def open_tun(name: str, *, queues: bool = False) -> TunDevice:
    """Make the inner network device.  Raises PrivilegedError or NetioError, each with one sentence.

    ``queues``: it may have several; each further call with its name opens one more.
    """
    device = Path("/sys/class/net") / name
    if device.exists() and not (device / "tun_flags").exists():
        raise PrivilegedError(f"interface {name} exists already and is no TUN device; choose another name")
    return TunDevice.open(name, queues=queues)


def configure_tun(
    name: str, addresses: Sequence[IPv4Interface | IPv6Interface], mtu: int, routes: Sequence[IPNetwork]
) -> None:
    """Set addresses, MTU and routes of the inner device.  Raises NetioError."""
    netlink.configure(name, addresses=addresses, mtu=mtu, routes=routes)


def fence(routes: Sequence[IPNetwork]) -> None:
    """What belongs into the tunnel goes nowhere else, also if the daemon is killed.  Raises NetioError."""
    netlink.fence(routes)


def unfence(routes: Sequence[IPNetwork]) -> None:
    """After an orderly stop.  Raises NetioError."""
    netlink.unfence(routes)


def set_mtu(name: str, mtu: int) -> None:
    """Change the MTU of the inner device.  Raises NetioError."""
    netlink.set_mtu(name, mtu)


def open_bind(listen: HostPort) -> UdpBind:
    """Listen for datagrams.  Raises NetioError: the port is taken or not allowed, the address not ours."""
    if listen.ip is None:
        raise PrivilegedError(f"{listen}: listen needs an address")
    return UdpBind(Address(listen.ip, listen.port))


def open_lane(tun: str, local: Address) -> tuple[TunDevice, socket.socket]:
    """What one more lane needs: a queue of the device, which gets no packets yet, and a listening UDP socket.

    Raises NetioError: the port is taken or not allowed, the device allows no more queues.
    """
    queue = TunDevice.open(tun, queues=True)
    try:
        queue.detach()
        return queue, UdpBind(local).release()
    except BaseException:
        queue.close()
        raise
