"""SeQUeNCe as a second simulator: its clicks in our records, through the same post-processing."""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from qkd_bench import OPTICS, Bench, small_terms

from keysource.qkd import sequencesim
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed
from keysource.qkd.presets import PRESETS
from keysource.qkd.records import detections_untrusted, settings_untrusted

MISSING = any(importlib.util.find_spec(name) is None for name in ("sequence", "gmpy2", "qutip_qip"))
needs_it = pytest.mark.skipif(MISSING, reason="SeQUeNCe is not installed (extra: sequence); CI installs it")
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@needs_it
@quiet
@pytest.mark.timeout(300)
def test_its_clicks_are_distilled_to_a_key_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole block of the workbench: Alice's settings and Bob's clicks come from records that SeQUeNCe made."""
    monkeypatch.setattr(os, "urandom", random.Random(1).randbytes)
    terms = small_terms()
    preset = replace(PRESETS["small10"], optics=OPTICS)
    settings, detections = sequencesim.record_block(preset, terms.plan.pulses)
    bench = Bench(terms, records=(settings, detections))
    alice, bob = bench.run()
    assert alice.outcome.reason is None, alice.outcome
    assert alice.outcome.keys == bob.outcome.keys and len(alice.outcome.keys) > 0
    assert alice.outcome.ledger == bob.outcome.ledger and alice.outcome.ledger.balance() == 0
    assert abs(alice.outcome.qber - 0.005) < 0.005


@needs_it
@quiet
def test_gains_and_errors_are_those_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", random.Random(2).randbytes)
    preset, pulses = PRESETS["small10"], 120_000
    records = sequencesim.record_block(preset, pulses)
    alice, seen = settings_untrusted(records[0], pulses), detections_untrusted(records[1], pulses)
    assert seen.bases is not None and seen.readings is not None
    hers, optics = alice.at(seen.positions), preset.optics
    for number, (mu, p) in enumerate(zip(optics.intensities, optics.probabilities, strict=True)):
        expected = pulses * p * optics.gain(mu)
        assert abs((hers.decoy == number).sum() - expected) < 5 * np.sqrt(expected)
    same = hers.check == seen.bases
    wrong = (hers.bit != seen.bits)[same]
    assert abs(wrong.sum() - len(wrong) * optics.mean_qber()) < 5 * np.sqrt(len(wrong) * optics.mean_qber()) + 5
    other = (hers.bit != seen.bits)[~same]
    assert abs(other.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(other))


def test_links_that_are_not_for_it_are_named() -> None:
    for name, words in (("demo-bbm92", "weak pulses only"), ("apd25", "rest one by one")):
        with pytest.raises(LinkSettings, match=words):
            sequencesim.record_block(PRESETS[name], 100)


@pytest.mark.skipif(not MISSING, reason="SeQUeNCe is installed")
def test_where_it_is_not_installed_one_sentence_says_so() -> None:
    settings = SourceSeed(bytes(32), 0.5, 0.5).at(np.arange(10, dtype=np.uint64))
    with pytest.raises(LinkSettings, match=r"pip install 'qvpn\[sequence\]'"):
        sequencesim.fly(OPTICS, settings, ReceiverSeed(bytes(32), 0.5), 1)
