"""How often an honest link raises an alarm: the arithmetic, and the chances that it rests on."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from keysource.qkd.distill.wire import Reason
from keysource.qkd.engine import doubt
from keysource.qkd.engine.doubt import CERTAIN, CHANCES, YEAR, Doubt, false_alarms
from keysource.qkd.plan import LEAK_MARGIN, SIZE_MARGIN, TEST_MARGIN, leak_budget
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates.entropy import binary_entropy

LINKS = sorted(name for name in PRESETS if name not in ("gys", "small50"))
"""``gys`` gives no key; ``small50`` is for tests: 50 blocks a second, and 1.7 alarms a year by check errors alone."""


@pytest.mark.parametrize("name", LINKS)
def test_an_honest_link_raises_less_than_one_false_alarm_a_year(name: str) -> None:
    assert false_alarms(PRESETS[name].block_seconds) < 1.0


def test_a_single_lost_block_as_an_alarm_would_be_several_a_day() -> None:
    """What the rule is for: 50 km at 1 GHz, five blocks a second."""
    blocks = YEAR / PRESETS["metro50"].block_seconds
    a_day = blocks / 365.25 * stats.norm.sf(LEAK_MARGIN)
    assert 13.0 < a_day < 14.0, "four standard deviations"
    assert blocks * stats.norm.sf(TEST_MARGIN) ** 2 > 8.0, "two in a row that miss the statistical test, a year"
    assert 12.0 < blocks * CHANCES[Reason.STATISTICS] ** 2 < 20.0


@pytest.mark.parametrize("name", LINKS)
def test_an_honest_block_is_lost_as_rarely_as_the_rule_assumes(name: str) -> None:
    """Exact tails of the plan's sizes and budgets.  Of the leak, at the efficiency that the budget is made for."""
    preset, plan = PRESETS[name], PRESETS[name].plan()
    q = plan.expected_qber
    assert stats.poisson.sf(plan.check_errors, plan.n_x * q) < CERTAIN
    efficiency = (plan.leak_budget - 64) / leak_entropy(plan.n_z, q)
    affordable = plan.leak_budget / efficiency / plan.n_z  # entropy per bit
    errors = next(k for k in range(plan.n_z) if binary_entropy(k / plan.n_z) > affordable)
    assert stats.binom.sf(errors - 1, plan.n_z, q) < CHANCES[Reason.LEAK]
    assert leak_budget(plan.n_z, q, preset.schedule) == plan.leak_budget
    sifted = [share * preset.pulses for share in preset.optics.sifted()]
    short = sum(stats.poisson.cdf(size - 1, mean) for size, mean in zip((plan.n_z, plan.n_x), sifted, strict=True))
    assert short < CHANCES[Reason.SHORT] and SIZE_MARGIN == 5.0


def leak_entropy(n_z: int, q: float) -> float:
    return n_z * binary_entropy(q + LEAK_MARGIN * math.sqrt(q * (1.0 - q) / n_z))


def test_the_sum_is_what_a_link_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that loses blocks far more often, for a million blocks: as many alarms as are added up, or a few less,
    since one alarm is counted where several ways lead to it."""
    chances = {Reason.STATISTICS: 0.01, Reason.LEAK: 0.004, Reason.SHORT: 0.0005, Reason.VERIFY: 0.02}
    blocks = 300_000
    monkeypatch.setattr(doubt, "CHANCES", chances)
    monkeypatch.setattr(doubt, "CERTAIN", 0.0)
    monkeypatch.setattr(doubt, "LIMIT", 5.0)
    watch, dice, alarms = Doubt(YEAR / blocks), random.Random(3), 0
    for _ in range(blocks):
        drawn, reason = dice.random(), None
        for each, chance in chances.items():
            if 0.0 <= drawn < chance:
                reason = each
            drawn -= chance
        if reason is None:
            watch.passed()
        elif watch.lost(reason):
            alarms += 1
            watch = Doubt(YEAR / blocks)
    most = false_alarms(YEAR / blocks)
    assert 0.7 * most < alarms < most + 4.0 * math.sqrt(most)


def test_what_chance_does_not_do_is_an_alarm_at_once() -> None:
    for reason in (Reason.QBER, Reason.MONITOR, Reason.CHSH):
        assert Doubt(1.0).lost(reason)


def test_slow_links_are_sure_sooner_than_fast_ones() -> None:
    def needed(block_seconds: float) -> int:
        watch = Doubt(block_seconds)
        return 1 + next(count for count in range(9) if watch.lost(Reason.STATISTICS))

    assert [needed(seconds) for seconds in (300.0, 2.0, 0.2)] == [2, 3, 3]
