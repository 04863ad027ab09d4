"""Two SAEs, one at each end: what one draws the other fetches, by ETSI GS QKD 014, for as long as the demo lasts."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from keysource.base import wipe
from keysource.errors import KeySourceError
from keysource.etsi014.client import Etsi014Client
from keysource.etsi014.messages import DeliveredKey

_EVERY = 0.4
_AT_ONCE = 64


@dataclass(slots=True)
class Drawn:
    """What both SAEs got, all along."""

    drawn: int = 0
    equal: int = 0
    different: int = 0
    hops: set[int] = field(default_factory=set)
    origins: set[str] = field(default_factory=set)
    keys: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Of those that are equal at both ends, by key_ID."""

    @property
    def half(self) -> int:
        """Drawn at west, and not (yet) fetched at east."""
        return self.drawn - self.equal - self.different

    @property
    def sound(self) -> bool:
        return self.equal > 0 and self.different == 0 and self.half == 0

    def note(self, left: DeliveredKey, right: DeliveredKey) -> None:
        """One key as the two SAEs got it."""
        if left.material != right.material or left.key_id != right.key_id:
            self.different += 1
            return
        self.equal += 1
        self.keys[left.key_id] = bytes(left.material)
        said: dict[str, Any] = left.extension
        self.hops.add(int(said.get("qvpn_hops", -1)))
        self.origins.add(str(said.get("qvpn_origin")))


class Drawer:
    """Draws until :meth:`enough`, and whatever was drawn is fetched."""

    def __init__(self, west: Etsi014Client, east: Etsi014Client, drawn: Drawn) -> None:
        self._west, self._east, self._drawn = west, east, drawn
        self._enough = asyncio.Event()

    def enough(self) -> None:
        self._enough.set()

    async def run(self) -> None:
        try:
            while not self._enough.is_set():
                with contextlib.suppress(KeySourceError):
                    await self._round()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EVERY):
                        await self._enough.wait()
        finally:
            await self._west.aclose()
            await self._east.aclose()

    async def _round(self) -> None:
        """All that there is, so that what is drawn is never much older than what was relayed."""
        stock = (await self._west.status("sae-east")).stored_key_count or 0
        if not stock:
            return
        keys = await self._west.enc_keys("sae-east", number=min(stock, _AT_ONCE))
        self._drawn.drawn += len(keys)
        others = await self._east.dec_keys("sae-west", [key.key_id for key in keys])
        for key, other in zip(keys, others, strict=True):
            self._drawn.note(key, other)
            wipe(key.material)
            wipe(other.material)
