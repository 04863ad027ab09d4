"""Rounds: interleaved, each begun elsewhere; a failure is noted and told, an imbalance ends everything."""

from pathlib import Path

import pytest

from qvpn.bench import rounds, stats
from qvpn.bench.cases import Case
from qvpn.bench.errors import BenchError, Unbalanced
from qvpn.bench.results import Results
from qvpn.bench.run import Settings


class Order:
    """Stands for :func:`qvpn.bench.measure.take`."""

    def __init__(self, faults: dict[tuple[str, int], Exception] | None = None) -> None:
        self.taken: list[str] = []
        self.faults = faults or {}

    def __call__(self, case: Case, folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, int]]:
        number = int(folder.name.split("-")[0])
        self.taken.append(case.tunnel.name)
        if (fault := self.faults.get((case.tunnel.name, number))) is not None:
            raise fault
        return {"tcp1_gbits": float(number + 1)}, {"opened": 1}


def go(monkeypatch: pytest.MonkeyPatch, order: Order, **settings: object) -> tuple[Results, list[str]]:
    monkeypatch.setattr(rounds, "take", order)
    found, said = Results({}, 3, 1), []
    rounds.go(Settings(rounds=3, seconds=1, extras=False, **settings), found, Path("/nowhere"), said.append)
    return found, said


def test_rounds_are_interleaved_and_begin_at_different_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    found, said = go(monkeypatch, order)
    assert order.taken == ["no tunnel", "qvpn", "qvpn", "no tunnel", "no tunnel", "qvpn"]
    assert found.row("qvpn", "default").figures["tcp1_gbits"] == [1.0, 2.0, 3.0]
    assert len(said) == 6
    assert "0 s left" in said[-1]


def test_a_failed_case_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = go(monkeypatch, Order({("qvpn", 1): BenchError("it ended")}))
    assert found.failures == ["qvpn@default, round 2: it ended"]
    assert found.row("qvpn", "default").figures["tcp1_gbits"] == [1.0, None, 3.0]
    assert found.row("no tunnel", "default").figures["tcp1_gbits"] == [1.0, 2.0, 3.0]
    assert any("FAILED: it ended" in line for line in said)


def test_an_imbalance_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order({("qvpn", 0): Unbalanced("899 marked, 900 opened")})
    with pytest.raises(Unbalanced, match="899"):
        go(monkeypatch, order)
    assert order.taken == ["no tunnel", "qvpn"]


@pytest.mark.parametrize("settings", [{"links": ("tx-off",), "measures": ("udp",)}, {"links": ()}])
def test_nothing_to_measure_is_said(monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]) -> None:
    with pytest.raises(BenchError, match="nothing to measure"):
        go(monkeypatch, Order(), **settings)


def test_who_is_not_there_is_named_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvpn.bench.peers.nebula.find", lambda program: None)
    order = Order()
    found, said = go(monkeypatch, order, peers=("nebula",))
    assert "nebula" not in order.taken
    assert found.absent == {"nebula": "nebula and nebula-cert not installed"}
    assert said[0] == "nebula: absent, nebula and nebula-cert not installed"


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentiles(share: float, value: float) -> None:
    assert stats.percentile([float(each) for each in range(100, 0, -1)], share) == value
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], share)
