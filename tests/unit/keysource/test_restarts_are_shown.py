"""A link whose process keeps dying is seen by whoever runs ``qvpn status``."""

from __future__ import annotations

import dataclasses

import structlog

from keysource.base import SourceStatus
from qvpn.cli.show import _show_source
from qvpn.control.supervisor import SourceKeeper
from qvpn.siteview import source_view


def shown(status: SourceStatus, opened_again: int = 0) -> str:
    keeper = SourceKeeper("link", "simulated", None, structlog.get_logger())  # type: ignore[arg-type]
    keeper.last, keeper.restarts = status, opened_again
    return "\n".join(_show_source(dataclasses.asdict(source_view(keeper))))


def test_restarts_of_the_process_and_of_the_source_are_one_count() -> None:
    assert "restarts 7" in shown(SourceStatus(True, restarts=7))
    assert "restarts 9" in shown(SourceStatus(True, restarts=7), opened_again=2)


def test_no_restart_no_word() -> None:
    assert "restarts" not in shown(SourceStatus(True))
