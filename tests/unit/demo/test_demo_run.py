"""What the demo says when it cannot even begin: one sentence, whatever the machine lacks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from qvpn.demo import run
from qvpn.demo.acts import Acts
from qvpn.demo.steps import StepFailed


def fails(error: Exception) -> Callable[[str, bool], int]:
    def inside(_transport: str, _as_json: bool) -> int:
        raise error

    return inside


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/sys/net/ipv6/conf/all/accept_dad"),
            "/proc/sys/net/ipv6/conf/all/accept_dad: No such file or directory",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (
            NetlinkError(errno.EOPNOTSUPP, "Operation not supported"),
            "the kernel refuses a link, an address or a route of the demo: Operation not supported",
        ),
    ],
)
def test_a_machine_that_lacks_something_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(run, "_inside", fails(error))
    monkeypatch.setattr(run.sys, "argv", ["run", "udp"])
    assert run._work() == 1
    assert capsys.readouterr() == ("", f"qvpn demo: {sentence}\n")


def test_a_mistake_of_ours_is_no_traceback_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_inside", fails(ZeroDivisionError("with a secret in it")))
    monkeypatch.setattr(run.sys, "argv", ["run", "udp"])
    assert run._work() == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qvpn demo: internal error: ZeroDivisionError in test_demo_run.py:")
    assert "secret" not in err and err.count("\n") == 1
    monkeypatch.setenv("QVPN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run._work()


def test_a_step_that_stands_on_one_that_failed_says_so() -> None:
    acts = Acts(scene=None)  # type: ignore[arg-type]
    for step in (acts.capture, acts.prefer_passes):
        with pytest.raises(StepFailed, match="failed"):
            step({})
