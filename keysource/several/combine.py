"""``type = "combine"``: one key out of one key of each source (table: ``members``); who wants it must have all.

    key = HKDF-SHA256(salt "qvpn combine v1", k1 || k2 [|| k3], info)

with all keys of 32 bytes, in the order of the table (concatenation as in ETSI TS 103 744's CatKDF; HKDF is RFC 5869);
``info`` binds both names, initiator first, and each key's key_ID, origin and hops.  The key_ID packs all key_IDs
(``keyids``).

Origin, hops and hop are those of the weakest member (qkd, relayed, couriered, external, simulated), each by itself.
The key is no worse than its best part; but a label with the origin of one part and the hop of another would promise
what no part keeps, and a part that is simulated is never hidden behind one that is not.  The whole is ready when
every member is; it is as slow as the slowest.  A member's key that was drawn in vain, because another member had
none, is kept for the next draw, for a minute, and given to nobody; an alarm of that member burns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.base import KEY_BYTES, Hop, Key, Origin, SourceContext, SourceStatus, wipe
from keysource.errors import BadAnswer, KeySourceError, Unavailable, UnknownKeyID
from keysource.several.keyids import pack, unpack
from keysource.several.members import Member, Several, check_member_claim

SALT = b"qvpn combine v1"
KEPT = 60.0
"""Seconds that a key drawn in vain is kept."""
_STRENGTH = (Origin.QKD, Origin.RELAYED, Origin.COURIERED, Origin.EXTERNAL, Origin.SIMULATED)
_HOPS = (Hop.LOCAL, Hop.ZONE, Hop.PQ_TLS, Hop.CLASSICAL_TLS)


class CombineSource(Several):
    """A :class:`~keysource.base.KeySource` and :class:`~keysource.base.Claiming`."""

    claim_version = 0xC1

    def __init__(self, settings: Mapping[str, object], context: SourceContext, **options: Any) -> None:
        super().__init__(settings, context, **options)
        self._kept: dict[tuple[str, int], tuple[float, Key]] = {}

    async def aclose(self) -> None:
        await super().aclose()
        for _since, key in self._kept.values():
            key.wipe()
        self._kept.clear()

    async def status(self, peer_sae: str) -> SourceStatus:
        """Ready when all are; counts and rates are the smallest."""
        if not self._open:
            return SourceStatus(False, f"{self._context.name}: not started")
        found = await self._ask_members(peer_sae)
        named = list(zip((member.name for member in self.members), found, strict=True))
        origins = [status.origin for status in found if status.origin is not None]
        return SourceStatus(
            ready=all(status.ready for status in found),
            reason="; ".join(f"{name}: {status.reason}" for name, status in named if status.reason),
            origin=max(origins, key=_STRENGTH.index) if len(origins) == len(found) else None,
            hop=max((status.hop for status in found), key=_HOPS.index),
            stored_keys=min((s.stored_keys for s in found if s.stored_keys is not None), default=None),
            key_rate=min((s.key_rate for s in found if s.key_rate is not None), default=None),
            alarm="; ".join(f"{name}: {status.alarm}" for name, status in named if status.alarm) or None,
            qber=max((s.qber for s in found if s.qber is not None), default=None),
            survives_harvest=all(status.survives_harvest for status in found),
            restarts=sum(status.restarts for status in found),
        )

    async def get_key(self, peer_sae: str) -> Key:
        self._check_open()
        results = await self._of_all([self._part(peer_sae, place) for place in range(len(self.members))])
        errors = [result for result in results if not isinstance(result, Key)]
        if errors:
            for place, result in enumerate(results):
                if isinstance(result, Key):
                    self._keep(peer_sae, place, result)
            raise errors[0]
        keys = [result for result in results if isinstance(result, Key)]
        try:
            return self._combined(keys, self.settings.sae, peer_sae)
        finally:
            _wipe(keys)

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self._check_open()
        try:
            key_ids = unpack(key_id, len(self.members))
        except ValueError:
            raise UnknownKeyID(f"{self._context.name}: the key_ID is none of these sources") from None
        calls = [
            member.source.get_key_with_id(member.peer(peer_sae), one)
            for member, one in zip(self.members, key_ids, strict=True)
        ]
        results = await self._of_all(calls)
        keys = [result for result in results if isinstance(result, Key)]
        try:
            for result in results:
                if isinstance(result, UnknownKeyID | BadAnswer) or (isinstance(result, KeySourceError) and not keys):
                    raise result
                if isinstance(result, KeySourceError):  # other parts are gone: the same call must not come again
                    raise Unavailable(str(result))
            combined = self._combined(keys, peer_sae, self.settings.sae)
        finally:
            _wipe(keys)
        if combined.key_id != key_id:
            combined.wipe()
            raise BadAnswer(f"{self._context.name}: a source gave another key than was asked for")
        return combined

    def check_claim(self, claim: bytes) -> None:
        """Every member's claim must fit."""
        _ready, claims = self._split_claim(claim)
        for member, one in zip(self.members, claims, strict=True):
            check_member_claim(member.source, one)

    async def _part(self, peer_sae: str, place: int) -> Key:
        since, kept = self._kept.pop((peer_sae, place), (0.0, None))
        member = self.members[place]
        if kept is not None:
            if self._clock() - since <= KEPT and await self._is_calm(member, peer_sae):
                return kept
            kept.wipe()
        return await member.source.get_key(member.peer(peer_sae))

    async def _is_calm(self, member: Member, peer_sae: str) -> bool:
        """An alarm may have come since: then the key from before it must not be used."""
        try:
            return (await member.source.status(member.peer(peer_sae))).alarm is None
        except KeySourceError:
            return False

    def _keep(self, peer_sae: str, place: int, key: Key) -> None:
        if (peer_sae, place) in self._kept or not self._open:
            key.wipe()
        else:
            self._kept[peer_sae, place] = (self._clock(), key)

    async def _of_all(self, calls: Sequence[Any]) -> list[Key | KeySourceError]:
        """All at once.  Cancelled, or where one breaks otherwise, the keys that came are wiped."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            _wipe([t.result() for t in tasks if not t.cancelled() and t.exception() is None])
            raise
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, KeySourceError):
                _wipe([one for one in results if isinstance(one, Key)])
                raise result
        return [result for result in results if isinstance(result, Key | KeySourceError)]

    def _combined(self, keys: Sequence[Key], initiator: str, responder: str) -> Key:
        try:
            key_id = pack([key.key_id for key in keys])
        except ValueError as error:
            raise BadAnswer(f"{self._context.name}: {error}") from None
        origin = max((key.origin for key in keys), key=_STRENGTH.index)
        hops = max(key.hops for key in keys)
        material = bytearray()
        for key in keys:
            material += key.material
        try:
            derive = HKDF(SHA256(), KEY_BYTES, SALT, _info(keys, initiator, responder))
            return Key(key_id, bytearray(derive.derive(bytes(material))), origin, hops)
        finally:
            wipe(material)


def _info(keys: Sequence[Key], initiator: str, responder: str) -> bytes:
    texts = [initiator, responder]
    for key in keys:
        texts += [key.key_id, key.origin.value, str(key.hops)]
    return b"".join(len(raw).to_bytes(2, "big") + raw for raw in (text.encode() for text in texts))


def _wipe(keys: Sequence[Key]) -> None:
    for key in keys:
        key.wipe()
