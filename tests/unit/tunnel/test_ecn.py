"""ECN through the tunnel, against figure 4 of RFC 6040 written out as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.tunnel import ecn
from tests.unit.dataplane.segments import checksum
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, ip_packet

BITS = {"Not-ECT": 0b00, "ECT(1)": 0b01, "ECT(0)": 0b10, "CE": 0b11}
COLUMNS = ("Not-ECT", "ECT(0)", "ECT(1)", "CE")
FIGURE_4 = {
    "Not-ECT": ("Not-ECT", "Not-ECT", "Not-ECT", None),
    "ECT(0)": ("ECT(0)", "ECT(0)", "ECT(1)", "CE"),
    "ECT(1)": ("ECT(1)", "ECT(1)", "ECT(1)", "CE"),
    "CE": ("CE", "CE", "CE", "CE"),
}
"""Rows: the inner header on arrival; columns: the outer one.  None: drop."""

CELLS = [(inner, outer, FIGURE_4[inner][column]) for inner in FIGURE_4 for column, outer in enumerate(COLUMNS)]


def packet(version: int, traffic_class: int) -> bytearray:
    data = bytearray(ip_packet(FROM_ALICE[version], FROM_BOB[version], b"payload", 17))
    if version == 4:
        data[1] = traffic_class
        data[10:12] = checksum(bytes(data[:20])).to_bytes(2, "big")
    else:
        data[0:2] = (0x6000 | traffic_class << 4 | 0xB).to_bytes(2, "big")  # 0xb: of the flow label
    return data


@pytest.mark.parametrize(("inner", "outer", "result"), CELLS)
def test_each_cell_of_figure_4(inner: str, outer: str, result: str | None) -> None:
    assert ecn.combine(BITS[inner], BITS[outer]) == (None if result is None else BITS[result])


def test_all_cells_are_there() -> None:
    assert len({(inner, outer) for inner, outer, _ in CELLS}) == 16


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("inner", "outer", "result"), CELLS)
def test_a_header_gets_the_combined_bits_and_nothing_else(
    inner: str, outer: str, result: str | None, version: int
) -> None:
    for dscp in (0, 46, 63):
        before = packet(version, dscp << 2 | BITS[inner])
        data = bytearray(3) + before
        passed = ecn.apply(memoryview(data), 3, BITS[outer])
        assert passed is (result is not None)
        expected = packet(version, dscp << 2 | BITS[result]) if result else before
        assert data == bytes(3) + expected
        assert ecn.field(memoryview(data), 3) == BITS[result or inner]


@pytest.mark.parametrize("outer", BITS)
def test_skipped_bits_never_change_a_header(outer: str) -> None:
    if ecn.changes(BITS[outer]) == 0:
        assert all(ecn.combine(inner, BITS[outer]) == inner for inner in range(4))
    else:
        assert ecn.changes(BITS[outer]) == BITS[outer]


@given(st.binary(min_size=8, max_size=8), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.booleans())
def test_the_ipv4_checksum_stays_right_or_stays_wrong(part: bytes, inner: int, outer: int, right: bool) -> None:
    data = packet(4, inner)
    data[2:10] = part
    data[10:12] = bytes(2)
    good = checksum(bytes(data[:20]))
    data[10:12] = (good if right else good ^ 0x0101).to_bytes(2, "big")
    assert ecn.apply(memoryview(data), 0, outer)
    assert (checksum(bytes(data[:20])) == 0) is right
