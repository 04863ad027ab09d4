"""``qvpn-qkd simulate`` as a program: what it prints comes from processes that run, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from keysource.qkd.presets import PRESETS
from keysource.qkd.simulate import _bell

pytestmark = pytest.mark.timeout(180)
PROGRAM = [sys.executable, "-m", "keysource.qkd"]


def qvpn_qkd(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Short: a unix socket's path has little room."""
    with tempfile.TemporaryDirectory(prefix="qs") as name:
        yield Path(name)


def test_two_blocks_of_a_small_link_balance_and_are_what_the_optics_say(folder: Path) -> None:
    ran = qvpn_qkd("simulate", "--preset", "small10", "--blocks", "2", "--json", folder=folder)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    facts = json.loads(ran.stdout)
    optics, plan = PRESETS["small10"].optics, PRESETS["small10"].plan()
    assert len(facts["blocks"]) == 2 and facts["warning"] == "SIMULATED: no quantum security"
    assert facts["keys_that_differ"] == 0 == facts["ledger_balance"]
    assert facts["ledger"]["raw"] == sum(block["ledger"]["raw"] for block in facts["blocks"]) > 0
    assert facts["ledger"]["delivered"] == 256 * facts["keys"]
    for block in facts["blocks"]:
        for gain, mu, share in zip(block["gains"], optics.intensities, optics.probabilities, strict=True):
            spread = (optics.gain(mu) / (plan.pulses * share)) ** 0.5
            assert abs(gain - optics.gain(mu)) < 6 * spread
        assert block["at_bob"] == block["result"]
    assert not list(folder.iterdir()), "the folder with the pads is gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_in_order_with_what_there_is(folder: Path, number: signal.Signals) -> None:
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*PROGRAM, "simulate", "--preset", "small10", "--blocks", "9", "--pace", "realtime", "--json"]
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, env=environment, start_new_session=True, preexec_fn=_heed_interrupts
    ) as program:
        deadline = time.monotonic() + 60
        while not list(folder.glob("*/bob/device.sock")):
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        program.send_signal(number)
        said, complained = program.communicate(timeout=60)
    facts = json.loads(said)
    assert program.returncode == 130 and facts["interrupted"] and facts["ledger_balance"] == 0
    assert not complained and not list(folder.iterdir())
    children = Path("/proc").glob("[0-9]*/cmdline")
    assert not [path for path in children if str(folder).encode() in _read(path)]


def _heed_interrupts() -> None:
    """A shell starts what runs in the background deaf to them, and whom that starts is deaf, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulate"], "a FILE or --preset"),
        (["simulate", "--preset", "moon"], "moon: none of demo"),
        (["simulate", "missing.toml"], "missing.toml: No such file"),
    ],
)
def test_wrong_usage_is_one_sentence(folder: Path, arguments: list[str], sentence: str) -> None:
    ran = qvpn_qkd(*arguments, folder=folder)
    assert ran.returncode == 2 and sentence in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and not ran.stdout


def test_what_a_bell_test_is_worth_is_said() -> None:
    """V = 0.95: S 2.687, 2.5 % errors, 0.539 bit a pair that nobody claims."""
    said = _bell([{"qber": None, "chsh": None}, {"qber": 0.025, "chsh": [2.687006, 0.03]}])
    assert said is not None and "2.687 ± 0.030" in said and "0.539" in said and "not claimed" in said
    assert _bell([{"qber": 0.01, "chsh": None}]) is None
