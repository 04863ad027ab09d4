"""What the demo shows, act by act.  Every fact is asked of a process or measured on keys that an SAE drew."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from keysource.base import wipe
from keysource.errors import KeySourceError
from keysource.kme.control import ControlError
from keysource.network.demo.drawing import Picture
from keysource.network.demo.world import CONNECTION, NODES, REAL, DemoFailed, World

_LOOK = 0.2
_DRAW = 0.4
_ALARMING = 0.11
"""A quantum bit error ratio from which no BB84 link has a key: the last one that was asked is still Eve's."""
Paths = list[list[str]]


@dataclass(slots=True)
class Act:
    """One step and what came of it."""

    name: str
    title: str
    held: bool = False
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    picture: Picture | None = None


@dataclass(slots=True)
class Drawn:
    """What both SAEs got, all along."""

    equal: int = 0
    different: int = 0
    half: int = 0
    """Drawn at west, and not (yet) fetched at east."""
    hops: set[int] = field(default_factory=set)
    origins: set[str] = field(default_factory=set)
    keys: list[bytes] = field(default_factory=list, repr=False)


class Acts:
    """See the module."""

    def __init__(self, world: World, tell: Callable[[Act], None]) -> None:
        self._world, self._tell = world, tell
        self.drawn = Drawn()
        self.done: list[Act] = []
        self._cut: set[str] = set()

    async def all(self) -> bool:
        """Until the first that does not hold."""
        drawing = asyncio.create_task(self._draw())
        try:
            for name, title, body, patience in (
                ("start", "five nodes, two KMEs and a simulated QKD link start", self._start, 40.0),
                (
                    "two_paths",
                    "keys from west to east: two shares, over two paths",
                    self._two_paths,
                    20.0,
                ),
                ("cut", "the link west-middle is cut: another way", self._cut_link, 20.0),
                ("eve", "Eve in the fibre of west-north: the link is left alone until she goes", self._eve, 30.0),
                ("copy", "south writes down all that it can read, and learns nothing", self._copy, 20.0),
                ("alter", "south alters shares: caught at the end, nobody has such a key", self._alter, 25.0),
            ):
                if not await self._run(Act(name, title), body, patience):
                    return False
            drawn = self.drawn
            return drawn.different == 0 and drawn.half <= 1 and drawn.equal > 0  # one may be on its way
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)

    async def _run(self, act: Act, body: Callable[[Act], Awaitable[None]], patience: float) -> bool:
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await body(act)
            act.held = True
        except TimeoutError:
            act.reason = act.reason or f"it did not happen within {patience:g} s"
        except (DemoFailed, ControlError, KeySourceError) as error:
            act.reason = str(error)
        act.seconds = time.monotonic() - began
        with contextlib.suppress(DemoFailed, ControlError):
            act.picture = self._picture()
        self.done.append(act)
        self._tell(act)
        return act.held

    # The acts

    async def _start(self, act: Act) -> None:
        act.reason = "a node never answered"
        up: dict[str, dict[str, Any]] = {}
        while len(up) < len(NODES):
            self._world.check()
            for name in NODES:
                with contextlib.suppress(DemoFailed):
                    up[name] = self._world.node(name)
            await asyncio.sleep(_LOOK)
        act.reason = "the simulated QKD link made no key"
        while not (link := self._link("west", REAL))["own_units"] or link["qber"] is None:
            await self._pause()
        act.facts |= {"processes": len(self._world.processes), "nodes": list(NODES)}
        act.facts["QBER west-north"] = self._percent(link["qber"])
        act.reason = ""

    async def _two_paths(self, act: Act) -> None:
        before = self.drawn.equal
        while self.drawn.equal < before + 2:
            await self._pause()
        west = self._connection()
        act.facts |= {
            "paths": self._named(west["paths"]),
            "keys drawn at west and fetched at east (ETSI GS QKD 014), equal": self.drawn.equal,
            "different": self.drawn.different,
            "origin": sorted(self.drawn.origins),
            "hops": sorted(self.drawn.hops),
            "the KME at east says": self._kme_says(),
            "keys per second, end to end": west["keys_per_second"],
        }
        if self.drawn.different or any(len(path) < 3 for path in west["paths"]):
            raise DemoFailed("the two SAEs got different keys, or no node lies between")

    async def _cut_link(self, act: Act) -> None:
        await self._world.cut("west-middle")
        self._cut.add("west-middle")
        began = time.monotonic()
        paths = await self._new_block_over(lambda path: "west-middle" not in _links(path))
        act.facts |= {
            "paths now": self._named(paths),
            "seconds to the next block": round(time.monotonic() - began, 1),
            "keys per second, end to end": self._connection()["keys_per_second"],
        }

    async def _eve(self, act: Act) -> None:
        await self._world.mend("west-middle")
        self._cut.discard("west-middle")
        await self._world.eve(present=True)
        began = time.monotonic()
        while not (alarm := self._link("west", REAL)["alarm"]):
            await self._pause()
        act.facts |= {"seconds to the alarm": round(time.monotonic() - began, 1), "alarm": alarm}
        act.facts["paths while she is there"] = self._named(await self._new_block_over(_avoids_north))
        await self._world.eve(present=False)
        while (link := self._link("west", REAL))["alarm"] or (link["qber"] or 1.0) >= _ALARMING:
            await self._pause()
        act.facts["QBER after she went"] = self._percent(link["qber"])

    async def _copy(self, act: Act) -> None:
        await self._through_south()
        while not (seen := self._south_saw()) or self.drawn.equal < 4:
            await self._pause()
        keys = list(self.drawn.keys)
        windows = {share[i : i + 16] for share in seen for i in range(len(share) - 15)}
        leaked = sum(key[i : i + 16] in windows for key in keys for i in (0, 16))
        act.facts |= {
            "shares that it read": len(seen),
            "bytes of a share": sorted({len(share) for share in seen}),
            "halves of drawn keys among them": leaked,
            "bits that agree with a drawn key": self._percent(_agreement(seen, keys)),
            "why": "its share is one of two random ones, and wrapped for east with ML-KEM-768",
        }
        if leaked:
            raise DemoFailed("a key passed in clear")

    async def _alter(self, act: Act) -> None:
        known = len(self._world.logged("east", "altered"))
        self._world.order("south", "alter")
        while not (caught := self._world.logged("east", "altered")[known:]):
            await self._through_south()
            await self._pause()
        paths = await self._new_block_over(lambda path: "south" not in path)
        before = self.drawn.equal
        while self.drawn.equal <= before:
            await self._pause()
        act.facts |= {
            "east says": caught[0]["reason"],
            "path": " > ".join(caught[0]["path"]),
            "paths now": self._named(paths),
            "keys that differ at the two ends": self.drawn.different,
        }

    async def _through_south(self) -> None:
        """South is on the way: the two other ways out of west cannot both be free."""
        while not any("south" in path for path in self._connection()["paths"]):
            if "west-middle" not in self._cut and self._connection()["state"] != "committing":
                await self._world.cut("west-middle")
                self._cut.add("west-middle")
            await self._pause()
        if "west-middle" in self._cut:
            await self._world.mend("west-middle")
            self._cut.discard("west-middle")

    # What is asked

    async def _new_block_over(self, fits: Callable[[list[str]], bool]) -> Paths:
        """The paths of the next block whose every path fits and that both ends have."""
        while True:
            before = self._connection()
            if all(fits(path) for path in before["paths"]):
                block = before["next_block"]
                while True:
                    now = self._connection()
                    if not all(fits(path) for path in now["paths"]):
                        break
                    done = self._world.logged("west", "committed")
                    if done and done[-1]["block"] >= block and all(fits(path) for path in done[-1]["paths"]):
                        paths: Paths = done[-1]["paths"]
                        return paths
                    await self._pause()
            await self._pause()

    def _connection(self) -> dict[str, Any]:
        found: dict[str, Any] = self._world.node("west")["connections"][0]
        return found

    def _link(self, node: str, name: str) -> dict[str, Any]:
        return next(link for link in self._world.node(node)["links"] if link["name"] == name)

    def _kme_says(self) -> str:
        link = self._world.kme("east")["links"][0]
        return f"last block over {link['hops']} trusted node(s): {'; '.join(self._named(link['paths']))}"

    def _south_saw(self) -> list[bytes]:
        return [base64.b64decode(line["bytes"]) for line in self._world.copies("south") if line["kind"] == "share"]

    async def _pause(self) -> None:
        self._world.check()
        await asyncio.sleep(_LOOK)

    async def _draw(self) -> None:
        """Two SAEs, all along: one draws, the other fetches what it is told of."""
        west, east = self._world.sae("west"), self._world.sae("east")
        try:
            while True:
                with contextlib.suppress(KeySourceError):
                    for key in await west.enc_keys("sae-east"):
                        self.drawn.half += 1  # until the other end has it
                        (other,) = await east.dec_keys("sae-west", [key.key_id])
                        self._note(bytes(key.material), bytes(other.material), key.extension)
                        wipe(key.material)
                        wipe(other.material)
                await asyncio.sleep(_DRAW)
        finally:
            await west.aclose()
            await east.aclose()

    def _note(self, left: bytes, right: bytes, extension: dict[str, Any]) -> None:
        if left != right:
            self.drawn.different += 1
            return
        self.drawn.equal, self.drawn.half = self.drawn.equal + 1, self.drawn.half - 1
        self.drawn.keys.append(left)
        self.drawn.hops.add(int(extension.get("qvpn_hops", -1)))
        self.drawn.origins.add(str(extension.get("qvpn_origin")))

    def _picture(self) -> Picture:
        said = {name: self._world.node(name) for name in NODES}
        links = [link for node in said.values() for link in node["links"]]
        alarms = {link["name"] for link in links if link["alarm"]}
        down = {link["name"] for link in links if not link["up"]}
        return Picture([list(path) for path in said["west"]["connections"][0]["paths"]], down, alarms)

    @staticmethod
    def _named(paths: Paths) -> list[str]:
        return [" > ".join(path) for path in paths]

    @staticmethod
    def _percent(value: float | None) -> str:
        return "unknown" if value is None else f"{100 * value:.2f} %"


def _links(path: list[str]) -> set[str]:
    return {f"{a}-{b}" for a, b in itertools.pairwise(path)}


def _avoids_north(path: list[str]) -> bool:
    return REAL not in _links(path)


def _agreement(shares: list[bytes], keys: list[bytes]) -> float:
    """Of all bits of keys, how many equal those at the same place of a share: a half where they say nothing."""
    agree = total = 0
    for share in shares[:20]:
        for start in range(0, len(share) - 31, 32):
            for key in keys[:20]:
                differs = int.from_bytes(share[start : start + 32], "big") ^ int.from_bytes(key, "big")
                agree += 256 - differs.bit_count()
                total += 256
    return agree / total if total else 0.5


__all__ = ["CONNECTION", "Act", "Acts"]
