"""What a TUN asks of kernels of any age, without one: ``ioctl`` is played."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from qvpn.netio import tun
from qvpn.netio.errors import TunError
from qvpn.netio.tun import TunDevice

CSUM, TSO4, TSO6, ECN, USO4, USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
TCP = CSUM | TSO4 | TSO6 | ECN


class Kernel:
    """Knows these offloads; refuses every other with ``code``."""

    def __init__(self, known: int, code: int = errno.EINVAL) -> None:
        self.known, self.code = known, code
        self.asked: list[int] = []

    def ioctl(self, descriptor: int, request: int, argument: object = 0) -> bytes:
        if request == tun._TUNGETIFF:
            return struct.pack("16sH22x", b"old0", tun._IFF_TUN | tun._IFF_VNET_HDR)
        if request == tun._TUNSETOFFLOAD:
            self.asked.append(int(str(argument)))
            if self.asked[-1] & ~self.known:
                raise OSError(self.code, "refused")
        return b""


@pytest.fixture
def descriptor() -> Iterator[int]:
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("known", "taken", "calls"),
    [
        (0xFF, TCP | USO4 | USO6, 1),
        (TCP, TCP, 2),
        (TCP | USO4, TCP, 2),
        (CSUM, CSUM, 3),
        (CSUM | TSO4, CSUM, 3),
        (0, 0, 4),
    ],
)
def test_the_best_that_the_kernel_has_is_taken(
    monkeypatch: pytest.MonkeyPatch, descriptor: int, known: int, taken: int, calls: int
) -> None:
    kernel = Kernel(known)
    monkeypatch.setattr(tun.fcntl, "ioctl", kernel.ioctl)
    device = TunDevice(descriptor)
    assert device.offloads == taken
    assert len(kernel.asked) == calls
    assert device.merges_udp is bool(taken & USO4)


def test_another_error_than_not_knowing_is_one_sentence(monkeypatch: pytest.MonkeyPatch, descriptor: int) -> None:
    monkeypatch.setattr(tun.fcntl, "ioctl", Kernel(0, errno.EPERM).ioctl)
    with pytest.raises(TunError, match="the TUN device cannot be set up: refused"):
        TunDevice(descriptor)
