"""A tunnel program that does not come up is told with its own last words, and never waited for without end."""

import sys
from pathlib import Path

import pytest

from qvpn.bench.errors import BenchError
from qvpn.bench.peers.base import Pair, wait_until
from qvpn.demo.process import Process


def test_a_program_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    script = "import sys; sys.exit('no such cipher')"
    process = Process("tunnel", [sys.executable, "-c", script], logs=tmp_path)
    try:
        with pytest.raises(BenchError, match="tunnel ended with code 1: no such cipher"):
            wait_until("it runs", lambda: False, process, within=20)
        with pytest.raises(BenchError, match="tunnel ended with code 1"):
            Pair([process]).check()
    finally:
        process.kill()


def test_waiting_has_an_end() -> None:
    with pytest.raises(BenchError, match=r"not within 0\.05 s: the moon"):
        wait_until("the moon", lambda: False, within=0.05)
