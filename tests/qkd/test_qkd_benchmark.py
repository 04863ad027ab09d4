"""``qvpn-qkd bench``: its figures come from what ran, its processes are processes, and its targets can be missed."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from keysource.qkd.bench import chain, command, light
from keysource.qkd.bench.chain import Chain, Slowness
from keysource.qkd.bench.correction import (
    Corrected,
    Talked,
    alices_key,
    bobs_key,
    in_two_processes,
    measured,
    ours,
    wrong_frames,
)
from keysource.qkd.bench.light import Speed
from keysource.qkd.bench.targets import of_chain, of_correction, of_speeds
from keysource.qkd.cli import app

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def test_a_cascade_that_fails_is_counted_as_failed() -> None:
    found = measured("qvpn", ours("original"), 4096, 0.02, 2)
    assert found.failed == 0 and found.f is not None and 1.0 < found.f < 1.4 and found.mbits > 0
    lazy = measured("lazy", lambda _alice, bob, _ratio: (bob, None, None), 4096, 0.02, 2)
    assert lazy.failed == 2 and lazy.f is None
    lanes = measured("lazy", lambda _alice, bob, _ratio: (bob, None, None), 4096, 0.02, 2, lanes=8)
    assert (lanes.failed, lanes.frames, lanes.bits) == (16, 16, 512)


def test_frames_lie_side_by_side() -> None:
    alice = np.zeros(640, dtype=np.uint8)
    bob = alice.copy()
    bob[[3, 67, 64]] = 1
    assert wrong_frames(alice, bob, 64) == 2 and wrong_frames(alice, alice, 64) == 0


def test_both_processes_find_the_same_keys_without_being_told_them() -> None:
    assert (alices_key(1000, 3) == alices_key(1000, 3)).all() and (alices_key(1000, 3) != alices_key(1000, 4)).any()
    errors = alices_key(100_000, 1) ^ bobs_key(100_000, 0.03, 1)
    assert 0.025 < errors.mean() < 0.035


def test_two_processes_correct_a_key_and_both_have_worked() -> None:
    original, optimised = in_two_processes(quick=True, ratios=(0.02,))
    assert (original.schedule, optimised.schedule) == ("original", "optimised")
    for each in (original, optimised):
        assert each.failed == 0 and 1.0 < each.f < 1.2 and each.mbits > 0 and each.messages > 10
        assert each.alice_seconds > 0 and each.bob_seconds > 0


@pytest.mark.skipif(not LONG, reason="three processes for seconds: QVPN_TEST_LONG=1")
@pytest.mark.timeout(120)
def test_the_chain_is_a_link_in_processes_that_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "PRESET", "small10")
    found = chain.chain(1.0)
    assert found.blocks > 0 and found.failed == 0 and 0.9 < found.seconds < 30
    assert found.detected > found.sifted > found.secret > 0
    assert 0 < found.alice_load <= 2 and 0 < found.bob_load <= 2


def test_the_simulated_link_says_how_slow_it_is() -> None:
    found = chain.slowness("small10", 1)
    assert found.blocks == 1 and found.seconds > 0 and found.sifted > 0


# Targets


FAST = Talked("original", 1 << 20, 0.02, 1, 1.1, 0, 60.0, 12.0, 0.1, 0.1)
GOOD = Corrected("qvpn, optimised", 1 << 14, 0.02, 16, 1.04, 0, 300.0, 1.0)


def test_targets_are_met_by_the_worst_and_not_by_the_best() -> None:
    bad = replace(GOOD, ratio=0.05, f=1.06, failed=1)
    assert all(goal.met for goal in of_correction([GOOD], [FAST]))
    assert not any(goal.met for goal in of_correction([GOOD, bad], [FAST, replace(FAST, mbits=9.0)]))
    lanes = replace(GOOD, bits=1 << 13, side=16, f=1.031)
    goals = {goal.what: goal for goal in of_correction([GOOD, lanes], [])}
    (large,) = [goal for what, goal in goals.items() if "2^17" in what]
    assert not large.met and large.measured == 1.031


def test_speeds_and_chains_have_their_targets() -> None:
    slow = [
        Speed("amplification by numpy, 1e+06 bits to half", "bit in", 14.9, 99.0),
        Speed("sparse sampler, 50 km", "effective pulses", 701.0, 1.0),
        Speed("sparse sampler, 50 km", "detections", 1.0, 5.0),
        Speed("sparse, dead time, after-pulses", "detections", 8.5, 1.0),
        Speed("amplification by FFTW, 2 threads, 1e+06 bits to half", "bit in", 30.0, 41.0),
    ]
    assert [goal.met for goal in of_speeds(slow)] == [False, True, True, True]
    whole = Chain(60.0, 100, 0, 5.0, 3.1, 1.0, 0.5, 0.5)
    assert [goal.met for goal in of_chain(whole, Slowness("metro50", 8, 2.5, 1.0))] == [True, False]
    assert of_chain(None, None) == []


def test_the_command_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "in_one_process", lambda _quick: [GOOD])
    monkeypatch.setattr(command, "peers", lambda _quick: [replace(GOOD, who="peer", f=None, messages=None)])
    monkeypatch.setattr(command, "in_two_processes", lambda _quick: [FAST])
    monkeypatch.setattr(command, "samplers", lambda _quick: [])
    monkeypatch.setattr(command, "chain", lambda seconds: Chain(seconds, 9, 0, 5.0, 2.9, 1.0, 0.5, 0.5))
    monkeypatch.setattr(command, "slowness", lambda preset, blocks: Slowness(preset, blocks, 2.5, 1.0))
    speed = Speed("amplification by numpy, 1e+06 bits to half", "bit in", 16.0, 16.0)
    monkeypatch.setattr(command, "amplification", lambda _quick: [speed])
    ran = CliRunner().invoke(app, ["bench", "--json", "--chain", "60"])
    facts = json.loads(ran.stdout)
    assert ran.exit_code == 0 and facts["chain"]["sifted"] == 2.9
    met = {goal["what"]: goal["met"] for goal in facts["targets"]}
    missed = [what for what, each in met.items() if not each]
    assert len(met) == 6 and missed[0].startswith("whole post-processing")
    text = CliRunner().invoke(app, ["bench", "--chain", "60"]).stdout
    assert "NO" in text and "570 Mbit/s" in text and "12" in text


def test_amplification_is_timed_by_hashes_that_were_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    honest = light.toeplitz_hash
    monkeypatch.setattr(light, "toeplitz_hash", lambda *args, **how: counted.append(args[2]) or honest(*args, **how))
    found = light.amplification(quick=True)
    assert counted.count(50_000) >= 2 and all(speed.per_second > 0 for speed in found)


def test_the_answering_process_dies_with_its_connection() -> None:
    async def talk() -> int:
        from keysource.qkd.bench.correction import _answerer

        async with _answerer() as channel:
            assert not channel.closed
        return len([task for task in asyncio.all_tasks() if not task.done()])

    assert asyncio.run(talk()) == 1
