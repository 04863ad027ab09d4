"""``type = "failover"``: the first of several sources that has keys (table: ``members``).

A draw goes to the first member that is ready here and, by the peer's last claim, there too; one that fails is left
out for 1 s, doubling to 60 s.  The key_ID begins with the member's place, so the other end asks the same one.  Origin
and hops are those of the member that gave the key.

An alarm of the member that gave the last key is reported for ten seconds, so that the policy's ``on_alarm`` acts on
the epoch that rests on it; after that only while no other member is ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from keysource.base import Key, SourceContext, SourceStatus
from keysource.errors import KeySourceError, NotOwner, RolledBack, Unavailable, UnknownKeyID
from keysource.several.members import Member, Several, check_member_claim

FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds that a member which failed is left out."""
PATIENCE = 1.2
"""Seconds that a draw waits for a member while there is another: the whole must answer within 2 s."""
ALARM_SHOWN = 10.0


class FailoverSource(Several):
    """A :class:`~keysource.base.KeySource` and :class:`~keysource.base.Claiming`."""

    claim_version = 0xF1

    def __init__(self, settings: Mapping[str, object], context: SourceContext, **options: Any) -> None:
        super().__init__(settings, context, **options)
        self._rests: dict[str, tuple[float, float]] = {}
        """Member: until when it is left out, and for how long the next time."""
        self._peer_ready = (1 << len(self.members)) - 1
        self._last_used = 0
        self._alarm_since: float | None = None

    async def status(self, peer_sae: str) -> SourceStatus:
        """Ready when one member is; the numbers are those of the member that a draw would take."""
        if not self._open:
            return SourceStatus(False, f"{self._context.name}: not started")
        found = await self._ask_members(peer_sae)
        ready = [status for status in found if status.ready]
        alarm = self._alarm(found)
        if not ready:
            reasons = "; ".join(f"{m.name}: {s.reason}" for m, s in zip(self.members, found, strict=True) if s.reason)
            return replace(found[0], ready=False, reason=reasons, alarm=alarm)
        counts = [status.stored_keys for status in ready]
        stored = None if None in counts else sum(count or 0 for count in counts)
        return replace(
            ready[0],
            stored_keys=stored,
            alarm=alarm,
            survives_harvest=all(status.survives_harvest for status in found),
            restarts=sum(status.restarts for status in found),
        )

    async def get_key(self, peer_sae: str) -> Key:
        self._check_open()
        errors: list[KeySourceError] = []
        places = list(self._order())
        for turn, place in enumerate(places):
            member = self.members[place]
            try:
                async with asyncio.timeout(PATIENCE if turn + 1 < len(places) else None):
                    key = await member.source.get_key(member.peer(peer_sae))
            except TimeoutError:
                self._fail(member, errors, Unavailable(f"no key within {PATIENCE:g} s"))
            except KeySourceError as error:
                self._fail(member, errors, error)
            else:
                self._rests.pop(member.name, None)
                self._last_used = place
                return Key(f"{place}:{key.key_id}", key.material, key.origin, key.hops)
        raise self._all_failed(errors)

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self._check_open()
        place, _, inner = key_id.partition(":")
        if not inner or place not in map(str, range(len(self.members))):
            raise UnknownKeyID(f"{self._context.name}: the key_ID names none of its sources")
        member = self.members[int(place)]
        key = await member.source.get_key_with_id(member.peer(peer_sae), inner)
        self._last_used = int(place)
        return Key(key_id, key.material, key.origin, key.hops)

    def check_claim(self, claim: bytes) -> None:
        """A member whose claim does not fit is left out; ``RolledBack`` only where that is true of all."""
        ready, claims = self._split_claim(claim)
        self._peer_ready = ready
        refused: list[KeySourceError] = []
        for member, one in zip(self.members, claims, strict=True):
            try:
                check_member_claim(member.source, one)
            except KeySourceError as error:
                self._fail(member, refused, error)
        if len(refused) == len(self.members):
            raise next((error for error in refused if isinstance(error, RolledBack)), refused[0])

    def _order(self) -> Iterator[int]:
        """Places to try: ready at both ends and not resting first, the rest after them, each in the table's order."""
        now = self._clock()

        def worse(place: int) -> tuple[bool, bool, bool]:
            member = self.members[place]
            resting = self._rests.get(member.name, (0.0, 0.0))[0] > now
            return (not self._peer_ready >> place & 1, resting, not member.ready)

        return iter(sorted(range(len(self.members)), key=worse))

    def _fail(self, member: Member, errors: list[KeySourceError], error: KeySourceError) -> None:
        errors.append(error)
        if not isinstance(error, NotOwner):
            _until, rest = self._rests.get(member.name, (0.0, FIRST_REST))
            self._rests[member.name] = (self._clock() + rest, min(2 * rest, LONGEST_REST))

    def _all_failed(self, errors: list[KeySourceError]) -> KeySourceError:
        if all(isinstance(error, NotOwner) for error in errors):
            return errors[0]
        answered = all(isinstance(error, NotOwner) or getattr(error, "answered", False) for error in errors)
        return Unavailable("; ".join(map(str, errors)), answered=answered)

    def _alarm(self, found: list[SourceStatus]) -> str | None:
        alarm = found[self._last_used].alarm
        if alarm is None:
            self._alarm_since = None
            return None
        if self._alarm_since is None:
            self._alarm_since = self._clock()
        other = any(status.ready for status in found)
        return None if other and self._clock() - self._alarm_since >= ALARM_SHOWN else alarm
