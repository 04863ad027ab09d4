"""The conformance suite of transports over memory, UDP and QUIC, and over a third party's; and that it can fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from qvpn.transports.base import Layer
from qvpn.transports.conformance import CHECKS, Arena, Check, NotConforming, run_all
from tests.conformance.transport_arenas import TRANSPORTS, VirtualArena, arena, same
from tests.conformance.transport_table import README, put, table


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conforms(transport: str, check: Check) -> None:
    with arena(transport) as made:
        check(made)


def test_the_table_in_the_readme_says_what_is_tested_here() -> None:
    """Each "passed" in it is a case of the test above; whoever adds a check or a transport writes the table anew."""
    text = README.read_text()
    assert put(text, table({name: dict.fromkeys(CHECKS) for name in TRANSPORTS})) == text


class Hoarding(Layer):
    """Wrong in one way: keeps the last datagram of each batch for the next one."""

    kept: bytes = b""

    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        whole = [memoryview(self.kept), *datagrams] if self.kept else list(datagrams)
        self.kept = bytes(whole.pop())
        self.lower.send_batch(whole, address)
        return len(datagrams)


class Forgetful(Layer):
    """Wrong in another: takes too long datagrams and says nothing."""

    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        most = self.max_payload(address)
        self.lower.send_batch([datagram for datagram in datagrams if len(datagram) <= most], address)
        return len(datagrams)


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [(Hoarding, {"order_and_content", "sizes", "close"}), (Forgetful, {"oversize_blocks_nothing"})],
)
def test_a_wrong_bind_is_caught(wrong: type[Layer], caught: set[str]) -> None:
    @contextlib.contextmanager
    def make() -> Iterator[Arena]:
        made = VirtualArena(lambda lower, _: wrong(lower), same)
        yield made

    failed = {name for name, problem in run_all(make).items() if problem is not None}
    assert caught <= failed


def test_an_exception_of_the_suite_is_one_sentence() -> None:
    with pytest.raises(NotConforming, match="the first datagram arrives"):
        made = VirtualArena(lambda lower, _: Mute(lower), same)
        CHECKS["both_ways"](made)


class Mute(Layer):
    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        return len(datagrams)
