"""Counting of numbered packets, compared with a slow model, and one real exchange over loopback."""

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.demo import flow, payload

MARKER = bytes(range(16))


@given(st.lists(st.integers(0, 30), max_size=60))
def test_arrivals_agree_with_a_slow_model(order: list[int]) -> None:
    arrivals = flow.Arrivals()
    for number in order:
        arrivals.note(number)
    first_time = [number for index, number in enumerate(order) if number not in order[:index]]
    late = [
        number for index, number in enumerate(first_time) if any(number < before for before in first_time[:index])
    ]
    assert arrivals.distinct == len(set(order))
    assert arrivals.duplicates == len(order) - len(set(order))
    assert arrivals.reordered == len(late)
    assert arrivals.missing(31) == [number for number in range(31) if number not in order]


def _pair(rate: float) -> tuple[flow.Flow, flow.Flow]:
    ports = []
    for _ in range(2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    left, right = (("127.0.0.1", port) for port in ports)
    return (
        flow.Flow(flow.Settings(left, right, rate, 256, MARKER)),
        flow.Flow(flow.Settings(right, left, 0, 256, MARKER)),
    )


def _drive(end: flow.Flow, seconds: float) -> None:
    flow.drive(end, seconds=seconds, linger=0.2, report=0.0, emit=lambda _: None, stop=lambda: False)


def test_a_paced_flow_arrives_whole_and_at_its_rate() -> None:
    sender, receiver = _pair(2000)
    with sender, receiver:
        other = threading.Thread(target=_drive, args=(receiver, 0.5))
        other.start()
        _drive(sender, 0.5)
        other.join()
        result = receiver.result()
    assert 700 <= sender.sent <= 1000  # never faster than the rate; slower only where the machine is busy
    assert result["received"] == sender.sent
    assert result["duplicates"] == result["foreign"] == result["socket_drops"] == 0
    assert 0 < result["longest_gap"] < 0.5


def test_duplicates_foreign_runs_and_changed_bytes_are_told_apart() -> None:
    sender, receiver = _pair(0)
    with sender, receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        where = receiver.settings.local
        sender.send(3)
        good = (1).to_bytes(8, "big") + MARKER[:8] + payload.filled(256, MARKER)[16:]
        other.sendto(good, where)  # number 1 once more
        other.sendto(good[:-1] + bytes([good[-1] ^ 1]), where)
        other.sendto(good[:8] + b"another!" + good[16:], where)
        other.sendto(good[:100], where)
        receiver.receive(0.5)
        result = receiver.result()
    assert (result["received"], result["duplicates"], result["foreign"]) == (3, 1, 3)


def test_a_payload_too_small_for_the_pattern_is_refused() -> None:
    with pytest.raises(OSError, match="too small"):
        flow.Flow(flow.Settings(("127.0.0.1", 0), ("127.0.0.1", 9), 1, 20, MARKER))


def test_a_refused_packet_takes_no_number() -> None:
    # Port 0 is nobody's: the kernel refuses every packet to it.
    with flow.Flow(flow.Settings(("127.0.0.1", 0), ("127.0.0.1", 0), 1, 256, MARKER)) as end:
        end.send(5)
        assert (end.sent, end.refused) == (0, 5)
