"""What the demo shows, act by act.  Every fact is asked of a process or measured on keys that an SAE drew, and an act
in which it is not so fails.

West has three ways out.  Where an act needs one of them in use, another is cut first: a block needs two.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from keysource.base import derive_key_id
from keysource.errors import KeySourceError
from keysource.kme.control import ControlError
from keysource.network.demo import measures
from keysource.network.demo.drawer import Drawer, Drawn
from keysource.network.demo.drawing import Picture
from keysource.network.demo.world import CONNECTION, NODES, REAL, DemoFailed, World

_LOOK = 0.2
_LAST_DRAW = 10.0
_CLEAN = 0.03
"""A quantum bit error ratio that this link stays below without Eve; while it is higher, the last asked is hers."""
_COMPARED = 8
"""Keys that were drawn, and of whose shares south had one."""
CUT, SPARE = "west-middle", "west-south"
Paths = list[list[str]]
Committed = dict[str, Any]
"""A line of west's log: ``block``, ``keys`` (how many), ``paths``."""


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


Body = Callable[[Act], Awaitable[None]]


class Acts:
    """See the module."""

    def __init__(self, world: World, tell: Callable[[Act], None]) -> None:
        self._world, self._tell = world, tell
        self.drawn = Drawn()
        self.done: list[Act] = []
        self.processes = 0
        """That were found running, by the search that must find none at the end."""

    def script(self) -> Iterator[tuple[Act, Body, float]]:
        """The acts, and how many seconds each may take."""
        yield Act("start", "five nodes, two KMEs and a simulated QKD link start"), self._start, 40.0
        yield Act("two_paths", "keys from west to east: two shares, over two paths"), self._two_paths, 20.0
        yield Act("cut", f"the link {CUT} is cut while blocks go over it: another way"), self._cut_link, 25.0
        eve = f"Eve in the fibre of {REAL}: the link is left alone until she goes, and used again"
        yield Act("eve", eve), self._eve, 35.0
        yield Act("copy", "south writes down all that it can read, and learns nothing"), self._copy, 20.0
        yield Act("alter", "south alters shares: caught at the end, nobody has such a key"), self._alter, 25.0

    async def all(self) -> bool:
        """Until the first that does not hold; whatever was drawn by then must be at both ends."""
        drawer = Drawer(self._world.sae("west"), self._world.sae("east"), self.drawn)
        drawing = asyncio.create_task(drawer.run())
        try:
            for act, body, patience in self.script():
                if not await self.run(act, body, patience):
                    return False
            drawer.enough()
            await asyncio.wait([drawing], timeout=_LAST_DRAW)
            return self.drawn.sound
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)

    async def run(self, act: Act, body: Body, patience: float) -> bool:
        """One act; did it hold?"""
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
        await self._until(self._link_makes_key)
        self.processes = len(self._world.found())
        act.facts |= {"processes": self.processes, "nodes": list(NODES)}
        act.facts[f"QBER {REAL}"] = self._percent(self._link("west", REAL)["qber"])
        if self.processes < len(self._world.processes):  # or none would be found at the end either
            raise DemoFailed(f"{len(self._world.processes)} processes were started, {self.processes} are found")
        act.reason = ""

    async def _two_paths(self, act: Act) -> None:
        block = await self._block(lambda _paths: True)
        await self._until(lambda: self.drawn.keys.keys() & _key_ids(block))
        paths, drawn = block["paths"], self.drawn
        inner = [node for path in paths for node in path[1:-1]]
        act.facts |= {
            "paths": _named(paths),
            "keys drawn at west and fetched at east (ETSI GS QKD 014), equal": drawn.equal,
            "different": drawn.different,
            "origin": sorted(drawn.origins),
            "hops": sorted(drawn.hops),
            "the KME at east says": self._kme_says(),
            "keys per second, end to end": self._connection()["keys_per_second"],
        }
        if drawn.different:
            raise DemoFailed("the two SAEs got different keys")
        if len(paths) != 2 or any(len(path) < 3 for path in paths) or len(set(inner)) != len(inner):
            raise DemoFailed("a block did not go over two paths with a node each and none in common")
        if drawn.origins != {"simulated"} or not drawn.hops <= {1, 2}:
            raise DemoFailed("keys claim another origin or other nodes than the map has")

    async def _cut_link(self, act: Act) -> None:
        await self._world.cut(SPARE)
        act.reason = f"{CUT} was never in use"
        before = await self._block(lambda paths: CUT in _links(paths))
        act.reason = ""
        await self._world.cut(CUT)
        began = time.monotonic()
        await self._world.mend(SPARE)
        after = await self._block(lambda paths: CUT not in _links(paths))
        act.facts |= {
            "paths before": _named(before["paths"]),
            "paths now": _named(after["paths"]),
            "seconds to the next block": round(time.monotonic() - began, 1),
            "keys per second, end to end": self._connection()["keys_per_second"],
        }

    async def _eve(self, act: Act) -> None:
        act.reason = f"{REAL} was never in use"
        before = await self._block(lambda paths: REAL in _links(paths))
        act.reason = ""
        await self._world.eve(present=True)
        began = time.monotonic()
        await self._until(lambda: self._link("west", REAL)["alarm"])
        act.facts |= {"paths before": _named(before["paths"]), "alarm": self._link("west", REAL)["alarm"]}
        act.facts["seconds to the alarm"] = round(time.monotonic() - began, 1)
        first = self._next_block()
        meanwhile = await self._block(lambda paths: REAL not in _links(paths))
        act.facts["paths while she is there"] = _named(meanwhile["paths"])
        await self._world.eve(present=False)
        await self._until(self._eve_is_gone)
        act.facts["QBER after she went"] = self._percent(self._link("west", REAL)["qber"])
        again = await self._block(lambda paths: REAL in _links(paths))
        act.facts["paths after she went"] = _named(again["paths"])
        alarmed = self._while_alarmed(first)
        over = [block["block"] for block in alarmed if REAL in _links(block["paths"])]
        act.facts["blocks begun and committed during the alarm"] = f"{len(alarmed)}, {len(over)} of them over {REAL}"
        if over or not alarmed:
            raise DemoFailed("a block went over the alarmed link" if over else "no block was made during the alarm")

    async def _copy(self, act: Act) -> None:
        await self._block(lambda paths: SPARE in _links(paths))
        await self._until(lambda: len(self._compared()) >= _COMPARED)
        pieces, keys = self._compared(), self.drawn.keys
        shares = [share for _facts, share in self._south_saw()]
        pairs = [(piece, keys[key_id]) for key_id, piece in pieces.items()]
        known = [key for _piece, key in pairs]
        leaked = measures.halves_among(shares, known)
        act.facts |= {
            "shares that it read": len(shares),
            "drawn keys of these same blocks, by key_ID": len(pairs),
            "halves of those keys in all that it read": leaked,
            "bits that agree, each key beside its place in the share": self._percent(measures.agreement(pairs)),
            "why": "its share is one of two random ones, and wrapped for east with ML-KEM-768",
        }
        if leaked or measures.says_something(pairs):
            raise DemoFailed("what south read tells something about the keys")
        if measures.halves_among([*shares, known[0]], known) != 2:
            raise DemoFailed("the search does not find a key that is there")

    async def _alter(self, act: Act) -> None:
        before = await self._block(lambda paths: any("south" in path for path in paths))
        known = len(self._world.logged("east", "altered"))
        self._world.order("south", "alter")
        await self._until(lambda: self._world.logged("east", "altered")[known:])
        caught = self._world.logged("east", "altered")[known]
        await self._world.mend(CUT)
        after = await self._block(lambda paths: not any("south" in path for path in paths))
        await self._until(lambda: self.drawn.keys.keys() & _key_ids(after))
        have = [name for name in ("west", "east") if caught["block"] in self._numbers(name)]
        act.facts |= {
            "paths before": _named(before["paths"]),
            "east says": f"block {caught['block']}: {caught['reason']}",
            "path": " > ".join(caught["path"]),
            "ends that have that block": have or "none",
            "paths now": _named(after["paths"]),
            "keys that differ at the two ends": self.drawn.different,
        }
        altered = {derive_key_id(CONNECTION, caught["block"], position) for position in range(64)}
        if have or altered & self.drawn.keys.keys() or "south" not in caught["path"] or self.drawn.different:
            raise DemoFailed("an altered share was not caught, or somebody has such a key")

    # What is asked

    async def _block(self, fits: Callable[[Paths], bool]) -> Committed:
        """The latest block, once one was begun after now over paths that fit and both ends have committed it."""
        first = self._next_block()
        while True:
            found = [block for block in self._world.logged("west", "committed") if block["block"] >= first]
            if found and fits(found[-1]["paths"]) and found[-1]["block"] in self._numbers("east"):
                return found[-1]
            await self._pause()

    def _numbers(self, end: str) -> set[int]:
        """Of the blocks that an end says it has."""
        return {line["block"] for line in self._world.logged(end, "committed")}

    def _while_alarmed(self, first: int) -> list[Committed]:
        """Blocks from that number on that west committed between an alarm of the QKD link and the end of it."""
        alarmed, found = False, []
        for line in self._world.logged("west", "alarm", "alarm cleared", "committed"):
            if line["event"] != "committed":
                alarmed = line["event"] == "alarm" if line["link"] == REAL else alarmed
            elif alarmed and line["block"] >= first:
                found.append(line)
        return found

    def _link_makes_key(self) -> bool:
        link = self._link("west", REAL)
        return bool(link["own_units"]) and link["qber"] is not None

    def _eve_is_gone(self) -> bool:
        link = self._link("west", REAL)
        return not link["alarm"] and (link["qber"] or 1.0) < _CLEAN

    def _south_saw(self) -> list[tuple[dict[str, Any], bytes]]:
        copies = self._world.copies("south")
        return [(line["header"], base64.b64decode(line["bytes"])) for line in copies if line["kind"] == "share"]

    def _compared(self) -> dict[str, bytes]:
        """key_ID of every drawn key of a block whose share south read -> what stands in its place there."""
        found = {}
        for header, share in self._south_saw():
            for position in range(header["count"]):
                key_id = derive_key_id(header["connection"], header["block"], position)
                if key_id in self.drawn.keys:
                    found[key_id] = share[32 * position : 32 * position + 32]
        return found

    def _connection(self) -> dict[str, Any]:
        found: dict[str, Any] = self._world.node("west")["connections"][0]
        return found

    def _next_block(self) -> int:
        return int(self._connection()["next_block"])

    def _link(self, node: str, name: str) -> dict[str, Any]:
        return next(link for link in self._world.node(node)["links"] if link["name"] == name)

    def _kme_says(self) -> str:
        link = self._world.kme("east")["links"][0]
        return f"last block over {link['hops']} trusted node(s): {'; '.join(_named(link['paths']))}"

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._pause()

    async def _pause(self) -> None:
        self._world.check()
        await asyncio.sleep(_LOOK)

    def _picture(self) -> Picture:
        said = {name: self._world.node(name) for name in NODES}
        links = [link for node in said.values() for link in node["links"]]
        alarms = {link["name"] for link in links if link["alarm"]}
        down = {link["name"] for link in links if not link["up"]}
        return Picture([list(path) for path in said["west"]["connections"][0]["paths"]], down, alarms)

    @staticmethod
    def _percent(value: float | None) -> str:
        return "unknown" if value is None else f"{100 * value:.2f} %"


def _key_ids(block: Committed) -> set[str]:
    return {derive_key_id(CONNECTION, block["block"], position) for position in range(block["keys"])}


def _links(paths: Paths) -> set[str]:
    """Names of the links that these paths use, in either direction."""
    pairs = [pair for path in paths for pair in itertools.pairwise(path)]
    return {f"{a}-{b}" for a, b in pairs} | {f"{b}-{a}" for a, b in pairs}


def _named(paths: Paths) -> list[str]:
    return [" > ".join(path) for path in paths]


__all__ = ["CONNECTION", "CUT", "SPARE", "Act", "Acts"]
