"""What ``failover`` and ``combine`` share: their table, their members, and the claims of those that have some.

::

    [key_source.both]
    type = "combine"                    # or "failover"
    sources = ["kme", "stick"]          # 2 or 3 other tables, in the same order at both sites
    sae = "alice"                       # what this site is called in these keys; the peer's `sae` is the other name
    [key_source.both.peer_sae]          # optional: what the peer is called at a member, where that differs
    kme = "sae-bob"

The members are key sources of their own and stand in the same file; they are started and closed there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from keysource.base import Claiming, KeySource, SaePair, SourceContext, SourceStatus
from keysource.errors import BadAnswer, BadSettings, KeySourceError, Unavailable
from keysource.settings import parse_settings


class SeveralSettings(BaseModel):
    """The table ``[key_source.NAME]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    sources: tuple[str, ...] = Field(min_length=2, max_length=3)
    sae: str = Field(min_length=1, max_length=200)
    peer_sae: dict[str, str] = Field(default_factory=dict)

    @field_validator("sources")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each source stands there once")
        return value


@dataclass(slots=True)
class Member:
    """One source, and how it was when last asked."""

    name: str
    source: KeySource
    peer_sae: str | None
    """The peer's name there, where it is not the one of the whole."""
    ready: bool = True
    """By its last status."""
    last: SourceStatus | None = None

    def peer(self, peer_sae: str) -> str:
        return self.peer_sae or peer_sae


class Several:
    """The part of a :class:`~keysource.base.KeySource` that both kinds have."""

    claim_version = 0

    def __init__(
        self,
        settings: Mapping[str, object],
        context: SourceContext,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = parse_settings(SeveralSettings, settings)
        self._context, self._clock = context, clock
        self._open = False
        self.members = [
            Member(name, _member(context, name), self.settings.peer_sae.get(name)) for name in self.settings.sources
        ]
        if strange := set(self.settings.peer_sae) - set(self.settings.sources):
            raise BadSettings(f"peer_sae: {min(strange)!r} is none of the sources", key="peer_sae")
        if sum(isinstance(member.source, Claiming) for member in self.members) > 2:
            raise BadSettings(
                "sources: at most two of them may be of a kind with a position of its own", key="sources"
            )

    async def start(self) -> None:
        """The members are started by whoever made them."""
        self._open = True

    async def aclose(self) -> None:
        self._open = False

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair(self.settings.sae, peer_sae)

    def parts(self) -> dict[str, SourceStatus]:
        return {member.name: member.last for member in self.members if member.last is not None}

    def claim(self) -> bytes:
        """Version, which members are ready here (bit 0 the first), then each member's claim with its length."""
        ready = sum(1 << place for place, member in enumerate(self.members) if member.ready)
        claims = [_claim(member.source) for member in self.members]
        return bytes([self.claim_version, ready]) + b"".join(bytes([len(one)]) + one for one in claims)

    def _split_claim(self, claim: bytes) -> tuple[int, list[bytes]]:
        """Raises :class:`BadAnswer`."""
        wrong = BadAnswer(f"{self._context.name}: the peer's claim has another form")
        if len(claim) < 2 or claim[0] != self.claim_version or claim[1] >> len(self.members):
            raise wrong
        parts, rest = [], claim[2:]
        for _ in self.members:
            if not rest or len(rest) <= rest[0] - 1 or len(rest) < 1 + rest[0]:
                raise wrong
            parts.append(rest[1 : 1 + rest[0]])
            rest = rest[1 + rest[0] :]
        if rest:
            raise wrong
        return claim[1], parts

    async def _ask_members(self, peer_sae: str) -> list[SourceStatus]:
        """How each is; one that fails is not ready.  Bounded by the caller."""
        found = []
        for member in self.members:
            try:
                status = await member.source.status(member.peer(peer_sae))
            except KeySourceError as error:
                status = SourceStatus(False, str(error))
            member.ready, member.last = status.ready, status
            found.append(status)
        return found

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable(f"key source {self._context.name!r} is not started", answered=True)


def _member(context: SourceContext, name: str) -> KeySource:
    if name == context.name:
        raise BadSettings(f"sources: {name!r} cannot be a part of itself", key="sources")
    try:
        return context.other(name)
    except BadSettings as error:
        raise BadSettings(f"sources: {error}", key="sources") from None


def _claim(source: KeySource) -> bytes:
    if not isinstance(source, Claiming):
        return b""
    try:
        return source.claim()
    except KeySourceError:
        return b""  # not open yet


def check_member_claim(source: KeySource, claim: bytes) -> None:
    """An empty claim says nothing.  Raises what the source raises."""
    if claim and isinstance(source, Claiming):
        source.check_claim(claim)
