"""A run whose counters do not balance is no result."""

import pytest

from qvpn.bench import balance
from qvpn.bench.errors import Unbalanced

GOOD = {"opened": 900, "marked": 900, "source_checks": 40, "tun_writes": 38, "tun_refused": 2}


def status(*peers: dict[str, int]) -> dict[str, object]:
    return {"site": "alice", "peers": [dict(peer) for peer in peers]}


def test_balanced_counters_pass_and_peers_are_summed() -> None:
    found = balance.counts(status(GOOD, GOOD))
    assert found == {name: 2 * value for name, value in GOOD.items()}
    balance.check("alice", found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"marked": 899}, "899 counters marked in replay windows, but 900 datagrams opened"),
        ({"marked": 901}, "901 counters marked"),
        ({"tun_writes": 39}, "40 sources checked, but 39 packets"),
        ({"source_checks": 39}, "39 sources checked"),
        ({"tun_refused": 1}, "1 refused"),
        ({"opened": 0, "marked": 0}, "no datagram was opened"),
        ({"tun_writes": 0, "source_checks": 2}, "nothing was written"),
    ],
)
def test_every_imbalance_is_told_with_its_numbers(change: dict[str, int], reason: str) -> None:
    with pytest.raises(Unbalanced, match=reason):
        balance.check("alice", balance.counts(status({**GOOD, **change})))


@pytest.mark.parametrize("missing", balance.COUNTS)
def test_a_daemon_that_does_not_tell_a_count_is_no_result(missing: str) -> None:
    with pytest.raises(Unbalanced, match=f"does not tell '{missing}'"):
        balance.counts(status({name: value for name, value in GOOD.items() if name != missing}))


def test_the_status_of_the_daemon_has_every_count() -> None:
    from qvpn.status import PeerView

    assert set(balance.COUNTS) <= set(PeerView.__dataclass_fields__)
