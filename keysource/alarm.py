"""An operator's alarm over a key source: while it stands, the source gives no key, whatever it says itself.

ETSI GS QKD 014 carries no QBER and no alarm: whoever runs the QKD device must be able to tell the tunnel.  The alarm
is kept in ``NAME.alarm`` in the site's state folder, so that a restart does not clear it.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from keysource.base import Checkable, Claiming, Composed, Key, KeySource, Looking, SaePair, SourceStatus
from keysource.errors import BadAnswer, KeySourceError, Unavailable
from keysource.private import write_private

MOST_REASON = 200


class Alarmed:
    """A :class:`~keysource.base.KeySource` around another one, with an alarm that an operator raises and clears."""

    def __init__(self, source: KeySource, name: str, state: Path) -> None:
        self.source = source
        self._name = name
        self._file = state / f"{name}.alarm"
        self.operator_alarm: str | None = None

    async def start(self) -> None:
        """Raises :class:`KeySourceError` also where an alarm of before cannot be read."""
        self._load()
        await self.source.start()

    async def aclose(self) -> None:
        await self.source.aclose()

    def sae_pair(self, peer_sae: str) -> SaePair:
        return self.source.sae_pair(peer_sae)

    async def status(self, peer_sae: str) -> SourceStatus:
        return self._alarmed(await self.source.status(peer_sae))

    async def look(self) -> SourceStatus | None:
        """See :class:`~keysource.base.Looking`."""
        status = await self.source.look() if isinstance(self.source, Looking) else None
        if status is not None:
            self._load()
        return None if status is None else self._alarmed(status)

    def _alarmed(self, status: SourceStatus) -> SourceStatus:
        if self.operator_alarm is None:
            return status
        said = self._said()
        both = f"{said}; {status.alarm}" if status.alarm else said
        return replace(status, ready=False, reason=f"alarm: {both}", alarm=both)

    async def get_key(self, peer_sae: str) -> Key:
        self._check()
        return self._unless_alarmed(await self.source.get_key(peer_sae))

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self._check()
        return self._unless_alarmed(await self.source.get_key_with_id(peer_sae, key_id))

    def parts(self) -> dict[str, SourceStatus]:
        """Those of a source made of several; see :class:`~keysource.base.Composed`."""
        return self.source.parts() if isinstance(self.source, Composed) else {}

    def check_files(self) -> None:
        """Those that the source's table names, where it can; see :class:`~keysource.base.Checkable`."""
        if isinstance(self.source, Checkable):
            self.source.check_files()

    def raise_alarm(self, reason: str) -> None:
        """From now on no key.  Raises ``ValueError`` (the reason is none) or ``OSError`` (not on the disk, but it
        stands until the end of this process)."""
        if not 1 <= len(reason) <= MOST_REASON or not reason.isprintable():
            raise ValueError(f"a reason has 1 to {MOST_REASON} printable characters")
        self.operator_alarm = reason
        write_private(self._file, f"{reason}\n".encode())

    def clear_alarm(self) -> None:
        """Raises ``OSError``: the alarm stands."""
        self._file.unlink(missing_ok=True)
        self.operator_alarm = None

    def _load(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                self.operator_alarm = (
                    self._file.read_text(errors="replace").strip()[:MOST_REASON] or "no reason given"
                )
            except FileNotFoundError:
                raise
            except OSError as error:
                raise KeySourceError(f"{self._file}: {error.strerror}") from None

    def _said(self) -> str:
        return f"raised by the operator: {self.operator_alarm}"

    def _check(self) -> None:
        if self.operator_alarm is not None:
            raise Unavailable(f"{self._name}: alarm {self._said()}", answered=True)

    def _unless_alarmed(self, key: Key) -> Key:
        """The alarm may have come while the key was on its way; then it is burnt."""
        if self.operator_alarm is not None:
            key.wipe()
            raise Unavailable(f"{self._name}: alarm {self._said()}")
        return key


class AlarmedClaiming(Alarmed):
    """The same around a source that is :class:`~keysource.base.Claiming`."""

    def claim(self) -> bytes:
        return self._inner().claim()

    def check_claim(self, claim: bytes) -> None:
        self._inner().check_claim(claim)

    def _inner(self) -> Claiming:
        if not isinstance(self.source, Claiming):
            raise BadAnswer(f"{self._name}: the source has no claims")
        return self.source


def with_alarm(source: KeySource, name: str, state: Path) -> Alarmed:
    """The source under an alarm switch; Claiming where it was."""
    return (AlarmedClaiming if isinstance(source, Claiming) else Alarmed)(source, name, state)
