"""``qvpn-qkd attack`` as a program: its facts come from a run, and are the true ones, cells where nothing fires
included."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_qkd_simulate import folder, qvpn_qkd

from keysource.qkd.pictures import stage

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
pytestmark = pytest.mark.timeout(600)
assert folder  # a fixture


def staged(folder: Path, *arguments: str) -> dict:
    ran = qvpn_qkd("attack", *arguments, "--blocks", "1", "--json", folder=folder)
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.iterdir())
    return json.loads(ran.stdout)


def test_pulsed_blinding_passes_the_photocurrent_monitor_and_eve_has_every_delivered_bit(folder: Path) -> None:
    facts = staged(folder, "blinding", "--mode", "pulsed", "--monitor", "photocurrent")
    run = facts["runs"]["photocurrent"]
    (block,) = run["acts"]["Eve"]
    assert run["undetected"] and block["keys_at_alice"] == block["keys_at_bob"] > 0 and block["keys_equal"]
    assert block["eve"]["determined"] == block["eve"]["final_bits"] == 256 * block["keys_at_alice"]
    (quiet,) = run["acts"]["before"]
    assert "eve" not in quiet
    stage.course(facts)
    stage.truth_table({"pulsed": facts["runs"]})


def test_an_efficiency_monitor_ends_it_before_anything_is_announced(folder: Path) -> None:
    run = staged(folder, "blinding", "--mode", "pulsed", "--monitor", "efficiency")["runs"]["efficiency"]
    (block,) = run["acts"]["Eve"]
    assert run["fired"]["monitor"] == 1 and not run["undetected"] and block["keys_at_alice"] == 0
    assert "attenuated gates" in block["monitor"] and block["eve"]["sifted"] == 0
    # the processes' dice are real: an honest block of this link misses its test once in some 4,000
    assert run["acts"]["before"][0]["result"] in ("passed", "statistics"), "gates spent on tests leave enough"


@pytest.mark.skipif(not LONG, reason="minutes: QVPN_TEST_LONG=1")
@pytest.mark.parametrize(
    ("name", "fired"),
    [("intercept-resend", "errors"), ("photon-number-splitting", "decoys"), ("beam-splitting", None)],
)
def test_every_eve_shows_her_signature_and_no_other(folder: Path, name: str, fired: str | None) -> None:
    run = staged(folder, name)["runs"]["photocurrent"]
    assert [what for what, count in run["fired"].items() if count] == ([fired] if fired else [])
    (block,) = run["acts"]["Eve"]
    assert block["eve"]["held"] > 0.1 * block["eve"]["sifted"] > 0 and block["eve"]["determined"] == 0
    if fired is None:
        assert block["eve"]["final_bits"] > 0 and block["eve"]["cut_short"]["determined_at_least"] > 0


@pytest.mark.skipif(not LONG, reason="the process tests flip bits in every run: QVPN_TEST_LONG=1")
def test_a_man_in_the_middle_gets_no_key_delivered(folder: Path) -> None:
    deeds = staged(folder, "man-in-the-middle")["deeds"]
    assert len(deeds) == 6 and all(deed["keys_delivered"] == 0 for deed in deeds)
    assert all("authentication" in deed["alarms"] for deed in deeds)
    stage.deeds(deeds)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["magic"], "magic: none of intercept-resend"),
        (["blinding", "--fraction", "0.5"], "blinding takes all pulses"),
        (["beam-splitting", "--plot", "/no/where/a.png"], "no such folder"),
    ],
)
def test_wrong_usage_is_one_sentence(folder: Path, arguments: list[str], sentence: str) -> None:
    ran = qvpn_qkd("attack", *arguments, folder=folder)
    assert ran.returncode == 2 and sentence in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and not ran.stdout
