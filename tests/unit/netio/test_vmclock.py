"""The VMClock device's page, built by hand from ``linux/vmclock-abi.h``."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qvpn.netio.vmclock import Generation, VmClock, parse

GENERATION_PRESENT = 1 << 8


def page(
    *,
    magic: bytes = b"VCLK",
    size: int = 4096,
    version: int = 1,
    sequence: int = 6,
    disruption: int = 77,
    flags: int = GENERATION_PRESENT,
    generation: int = 99,
) -> bytes:
    made = bytearray(4096)
    made[0:4] = struct.unpack("<4s", magic)[0]
    struct.pack_into("<I", made, 4, size)
    struct.pack_into("<H", made, 8, version)
    made[10:12] = b"\xff\x00"
    struct.pack_into("<I", made, 12, sequence)
    struct.pack_into("<Q", made, 16, disruption)
    struct.pack_into("<Q", made, 24, flags)
    # 8 bytes of state, then counter, period, two rates, seconds, fraction, two errors
    struct.pack_into("<Q", made, 24 + 8 + 8 + 8 * 8, generation)
    return bytes(made)


def test_both_marks_are_read() -> None:
    assert parse(page()) == Generation(copied=99, moved=77)


@pytest.mark.parametrize(("flags", "size"), [(1 << 7, 4096), (GENERATION_PRESENT, 104)])
def test_without_a_generation_counter_every_disruption_is_a_copy(flags: int, size: int) -> None:
    assert parse(page(flags=flags, size=size)) == Generation(copied=77, moved=77)


@pytest.mark.parametrize(
    "bad", [b"", page()[:31], page(magic=b"KLCV"), page(version=2), page(sequence=7)], ids=lambda bad: str(len(bad))
)
def test_what_is_no_clock_or_half_written_says_nothing(bad: bytes) -> None:
    assert parse(bad) is None


def test_no_device_is_none(tmp_path: Path) -> None:
    assert VmClock.open(str(tmp_path / "vmclock0")) is None


def test_a_device_is_read_anew_each_time_and_closes_twice(tmp_path: Path) -> None:
    file = tmp_path / "vmclock0"
    file.write_bytes(page())
    clock = VmClock.open(str(file))
    assert clock is not None
    assert clock.generation() == Generation(99, 77)
    with file.open("r+b") as written:
        written.write(page(generation=100))
    assert clock.generation() == Generation(100, 77)
    clock.close()
    clock.close()
    assert clock.generation() is None
