"""The operator's alarm: no key while it stands, none that was on its way, and a restart does not clear it."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from keysource.alarm import Alarmed, AlarmedClaiming, with_alarm
from keysource.base import Claiming, Key, Origin, SaePair, SourceStatus
from keysource.errors import Unavailable


class Plain:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.last: Key | None = None

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair("a", peer_sae)

    async def status(self, peer_sae: str) -> SourceStatus:
        return SourceStatus(True, alarm=None)

    async def get_key(self, peer_sae: str) -> Key:
        await self.gate.wait()
        self.last = Key("k", bytearray(os.urandom(32)), Origin.QKD)
        return self.last

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        return await self.get_key(peer_sae)


class WithClaims(Plain):
    def claim(self) -> bytes:
        return b"claim"

    def check_claim(self, claim: bytes) -> None:
        assert claim == b"theirs"


async def test_no_key_while_it_stands_and_status_says_why(tmp_path: Path) -> None:
    source = with_alarm(Plain(), "kme", tmp_path)
    await source.get_key("b")
    source.raise_alarm("QBER 12 % at the box")
    for call in (source.get_key("b"), source.get_key_with_id("b", "k")):
        with pytest.raises(Unavailable, match="raised by the operator: QBER 12 % at the box") as error:
            await call
        assert error.value.answered
    status = await source.status("b")
    assert (status.ready, status.alarm) == (False, "raised by the operator: QBER 12 % at the box")
    source.clear_alarm()
    assert (await source.status("b")).ready
    await source.get_key("b")


async def test_a_key_on_its_way_is_burnt(tmp_path: Path) -> None:
    inner = Plain()
    inner.gate.clear()
    source = with_alarm(inner, "kme", tmp_path)
    drawing = asyncio.create_task(source.get_key("b"))
    await asyncio.sleep(0)
    source.raise_alarm("now")
    inner.gate.set()
    with pytest.raises(Unavailable) as error:
        await drawing
    assert not error.value.answered
    assert inner.last is not None
    assert not any(inner.last.material)


async def test_it_outlives_a_restart_until_it_is_cleared(tmp_path: Path) -> None:
    with_alarm(Plain(), "kme", tmp_path).raise_alarm("monitor")
    assert stat.S_IMODE((tmp_path / "kme.alarm").stat().st_mode) == 0o600
    other, again = with_alarm(Plain(), "other", tmp_path), with_alarm(Plain(), "kme", tmp_path)
    await other.start()
    await again.start()
    assert (other.operator_alarm, again.operator_alarm) == (None, "monitor")
    again.clear_alarm()
    again.clear_alarm()
    last = with_alarm(Plain(), "kme", tmp_path)
    await last.start()
    assert last.operator_alarm is None


@pytest.mark.parametrize("reason", ["", "x" * 201, "a\nb", "\x1b[31m"])
def test_a_reason_is_a_line_of_text(reason: str, tmp_path: Path) -> None:
    source = with_alarm(Plain(), "kme", tmp_path)
    with pytest.raises(ValueError, match="printable"):
        source.raise_alarm(reason)
    assert source.operator_alarm is None


def test_claims_pass_through_and_only_where_there_are_some(tmp_path: Path) -> None:
    plain, claiming = with_alarm(Plain(), "a", tmp_path), with_alarm(WithClaims(), "b", tmp_path)
    assert type(plain) is Alarmed
    assert not isinstance(plain, Claiming)
    assert isinstance(claiming, AlarmedClaiming)
    assert isinstance(claiming, Claiming)
    assert claiming.claim() == b"claim"
    claiming.check_claim(b"theirs")
