"""The generator of small packets: numbering, counting, pacing, and the search for the highest clean rate."""

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.bench import udpgen, udprate
from qvpn.bench.udprate import Step, search


def pair() -> tuple[socket.socket, socket.socket]:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
    receiver.bind(("127.0.0.1", 0))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(receiver.getsockname())
    return sender, receiver


def test_packets_of_a_batch_are_single_datagrams_with_their_numbers() -> None:
    sender, receiver = pair()
    with sender, receiver:
        batch = udpgen.Batch(8, 64)
        batch.runs[:] = 5
        batch.numbers[:] = np.arange(100, 108)
        assert batch.send(sender.fileno(), 8) == 8
        got = [receiver.recv(2048) for _ in range(8)]
    assert {len(each) for each in got} == {64}
    assert [int.from_bytes(each[8:16], "little") for each in got] == list(range(100, 108))
    assert {int.from_bytes(each[:8], "little") for each in got} == {5}


def test_duplicates_other_runs_and_wild_numbers_do_not_count() -> None:
    sender, receiver = pair()
    with sender, receiver:
        counting = udpgen.Receiver(receiver.fileno(), 64)
        counting.expect(7, 10)

        def send(run: int, number: int) -> None:
            sender.send(run.to_bytes(8, "little") + number.to_bytes(8, "little") + bytes(48))

        for run, number in ((7, 0), (7, 0), (7, 9), (7, 10), (7, 1 << 63), (6, 3), (7, 4)):
            send(run, number)
        assert counting.report() == {"distinct": 3}
        counting.expect(8, 10)
        send(7, 5)
        assert counting.report() == {"distinct": 0}


def test_a_run_over_loopback_is_paced_numbered_and_complete() -> None:
    sender, receiver = pair()
    with sender, receiver:
        counting = udpgen.Receiver(receiver.fileno(), 64)
        counting.expect(1, 100_000)
        said = udpgen.Sender(sender.fileno(), 64).run(1, 5_000, 0.1)
        assert 0 < said["sent"] <= 5_000 * said["seconds"] + udpgen.BURST
        assert counting.report() == {"distinct": said["sent"]}


def model(limit: float, top: float = 1e9):
    """A tunnel that loses everything over ``limit``, behind a sender that reaches ``top``."""
    tries: list[float] = []

    def attempt(rate: float) -> Step:
        tries.append(rate)
        sent = min(rate, top)
        return Step(rate, sent, min(sent, limit))

    return attempt, tries


@given(st.floats(min_value=50_000, max_value=1_900_000))
def test_the_search_comes_within_some_percent_and_never_over(limit: float) -> None:
    attempt, tries = model(limit)
    found = search(attempt)
    assert limit * 0.95 <= found <= limit * (1 + udprate.ALLOWED_LOSS + 1e-9)
    assert len(tries) <= 16


def test_a_sender_that_is_the_limit_ends_the_search() -> None:
    attempt, tries = model(1e9, top=300_000)
    assert search(attempt) == 300_000
    assert max(tries) < 1_000_000


def test_a_sender_that_was_held_up_once_does_not_end_the_search() -> None:
    attempt, _ = model(500_000)

    def slow_at_first(rate: float) -> Step:
        return Step(rate, rate / 2, rate / 2) if rate < 50_000 else attempt(rate)

    assert search(slow_at_first) > 450_000


def test_one_hiccup_does_not_end_the_search() -> None:
    attempt, _ = model(500_000)
    calls = 0

    def with_hiccup(rate: float) -> Step:
        nonlocal calls
        calls += 1
        return Step(rate, rate, 0.0) if calls == 2 else attempt(rate)

    assert search(with_hiccup) > 450_000


def test_a_tunnel_that_carries_nothing_has_rate_zero() -> None:
    attempt, _ = model(0)
    assert search(attempt) == 0


@pytest.mark.parametrize(("received", "clean"), [(99_800, True), (99_799, False), (0, False)])
def test_clean_means_at_most_two_in_a_thousand(received: float, clean: bool) -> None:
    assert Step(100_000, 100_000, received).clean is clean
