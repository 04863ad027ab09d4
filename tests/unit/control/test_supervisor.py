"""Key sources that do not start, start late, break, hang: kept going, and said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from keysource.errors import BadSettings, RolledBack, Unavailable
from qvpn.control import supervisor
from qvpn.control.supervisor import SourceKeeper, SourceRefused, close_all, start_all


class Source:
    """``start`` raises one of the errors after the other, then works."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.closed = 0

    async def start(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def aclose(self) -> None:
        self.closed += 1


def keeper(source: Any, name: str = "kme") -> SourceKeeper:
    return SourceKeeper(name, "etsi014", source, structlog.wrap_logger(None, processors=[_drop]))


def _drop(_logger: object, _method: str, _event: object) -> Any:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
    yield pauses


async def test_a_source_that_starts_late_is_tried_again_with_longer_pauses(no_pause: list[float]) -> None:
    source = Source(*[Unavailable("no device")] * 4, ZeroDivisionError("a third party's mistake"))
    kept = keeper(source)
    await kept.start()
    assert kept.problem == "no device"
    assert kept._task is not None
    await kept._task
    assert (kept.problem, kept.restarts) == (None, 5)
    for number, pause in enumerate(no_pause):
        assert 0.75 * 2**number <= pause <= 1.25 * 2**number
    await kept.aclose()
    assert source.closed == 1


@pytest.mark.parametrize("error", [BadSettings("no such file", key="path"), RolledBack("a backup")])
async def test_what_no_waiting_mends_ends_the_start_and_closes_the_others(error: Exception) -> None:
    good, bad = Source(), Source(error)
    keepers = {"good": keeper(good, "good"), "bad": keeper(bad, "bad")}
    with pytest.raises(SourceRefused) as caught:
        await start_all(keepers)
    assert (caught.value.name, caught.value.error) == ("bad", error)
    assert (good.closed, bad.closed) == (1, 1)


async def test_a_refusal_in_the_background_stays_visible() -> None:
    kept = keeper(Source(Unavailable("not yet"), RolledBack("a backup was restored")))
    await kept.start()
    assert kept._task is not None
    await kept._task
    assert kept.problem == "a backup was restored"


async def test_a_source_that_hangs_or_breaks_at_its_end_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "CLOSE_LIMIT", 0.01)

    class Hanging(Source):
        async def aclose(self) -> None:
            await asyncio.Event().wait()

    class Broken(Source):
        async def aclose(self) -> None:
            raise ValueError

    good = Source()
    await close_all({"h": keeper(Hanging()), "b": keeper(Broken()), "g": keeper(good)})
    assert good.closed == 1
