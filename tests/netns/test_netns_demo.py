"""``qvpn demo`` as a user runs it: the whole, its JSON, its interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qvpn.demo.process import environment, program

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
STEPS = [
    "keys_arrive",
    "handshake",
    "traffic",
    "rekey_under_load",
    "capture",
    "wrong_key",
    "kme_off",
    "prefer_passes",
    "kme_back",
    "eve_on",
    "eve_off",
]


@contextmanager
def _demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*program("qvpn"), "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _names(value: Any) -> list[str]:
    """Every key of every object, as often as it stands there."""
    if isinstance(value, dict):
        return [*value, *(name for entry in value.values() for name in _names(entry))]
    if isinstance(value, list):
        return [name for entry in value for name in _names(entry)]
    return []


def _descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _wait_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 8
    while True:
        left = {pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and _cmdline(pid)}
        if not left:
            return
        assert time.monotonic() < deadline, f"still there: {[_cmdline(pid) for pid in left]}"
        time.sleep(0.05)


def _cmdline(pid: int) -> str:
    """Empty for a zombie and for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


long_only = pytest.mark.skipif(not LONG, reason="a minute and a half: QVPN_TEST_LONG=1 runs it")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("transport", ["udp", pytest.param("quic", marks=long_only)])
def test_the_whole_demo_holds_and_says_so_in_one_json_object(transport: str) -> None:
    start = time.monotonic()
    with _demo("--json", "--transport", transport) as process:
        out, err = process.communicate(timeout=180)
    took = time.monotonic() - start
    told = json.loads(out)
    failed = {step["name"]: step.get("reason") for step in told["steps"] if step["outcome"] != "held"}
    assert not failed, err[-4000:]
    assert process.returncode == 0
    assert took < 120
    assert [step["name"] for step in told["steps"]] == STEPS
    for name in ("rekeys", "packets_sent", "packets_lost", "bits_per_second", "keys_used"):
        assert type(told[name]) is int, name
    assert told["origin"] == "simulated"
    assert told["packets_lost"] == 0
    assert told["packets_sent"] >= 2 * 1000 * 4 * (told["rekeys"] - 1)
    assert told["rekeys"] >= 3
    assert told["keys_used"] > told["rekeys"]
    assert _names(told).count("packets_lost") == 1
    facts = {step["name"]: step["facts"] for step in told["steps"]}
    assert facts["kme_off"]["packets_blocked"] > 0
    assert facts["handshake"]["label"] == "SIMULATED: no quantum security"
    carried, other = ("quic_packets", "tunnel_records") if transport == "quic" else ("tunnel_records", "quic_packets")
    assert facts["capture"][f"{carried}_alice"] > 1000 and f"{other}_alice" not in facts["capture"]
    assert facts["capture"]["with_plaintext_alice"] == facts["capture"]["with_inner_address_bob"] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle_it_leaves_nothing(signum: signal.Signals) -> None:
    with _demo() as process:
        assert process.stdout is not None and process.stderr is not None
        deadline = time.monotonic() + 30
        while len(family := _descendants(process.pid)) < 8 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        assert len(family) >= 8  # outer and inner process, fibre, link, KMEs
        process.send_signal(signum)
        _, err = process.communicate(timeout=15)
        _wait_gone(family)
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert err == "qvpn demo: interrupted; nothing is left behind\n"
    assert not Path("/run/qvpn-demo").exists()


def test_a_reader_that_goes_away_ends_the_demo_without_a_traceback() -> None:
    with _demo() as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(30) == 1
        assert err == ""


def test_another_transport_is_refused_in_one_sentence() -> None:
    done = subprocess.run(
        [*program("qvpn"), "demo", "--transport", "pigeon"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
