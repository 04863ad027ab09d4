"""The pattern must be found in any piece that a segment cut can leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.demo import payload


@given(st.binary(min_size=16, max_size=16), st.integers(0, 4000), st.integers(0, 4000))
def test_every_48_bytes_of_a_payload_hold_the_marker(marker: bytes, start: int, length: int) -> None:
    data = payload.filled(8192, marker)
    assert marker in data[start : start + 48 + length]


@given(st.binary(min_size=16, max_size=16), st.integers(0, 300))
def test_a_payload_has_the_asked_size_and_depends_on_the_marker_only(marker: bytes, size: int) -> None:
    assert len(payload.filled(size, marker)) == size
    assert payload.filled(size, marker) == payload.filled(size, marker)


def test_two_runs_have_different_markers() -> None:
    assert payload.new_marker() != payload.new_marker()


def test_a_short_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        payload.filled(100, b"abc")
