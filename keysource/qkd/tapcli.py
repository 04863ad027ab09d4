"""``qvpn-qkd tap`` and ``meddle``: a man in the middle on the classical channel of any link, switched while it runs.

Bob's ``peer`` is where the tap listens, the tap's target is Alice's ``listen``.  It has no key of the link: it reads
every frame, as everybody may, and does to them what it is told at its own socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.control import Control, ask
from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.lab import interrupted
from keysource.qkd.wiretap import Wiretap
from keysource.settings import Address

FRAMES = tuple(kind.name for kind in Kind if kind >= Kind.START)
Deed = Literal["flip", "shorten", "repeat", "drop", "cut"]
DEEDS = ("flip", "shorten", "repeat", "drop", "cut")
"""To the last bit of a frame, to its last byte, to the whole frame (twice), to it (never), to the connection."""


class Middle:
    """What she does: nothing, or one deed to each frame of a kind, so many times."""

    def __init__(self) -> None:
        self.frame: str | None = None
        self.deed: str | None = None
        self.left = self.touched = 0

    def order(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises :class:`LinkError` for what she cannot do."""
        if "deed" in request:
            frame, deed, times = request.get("frame"), request["deed"], request.get("times", 1)
            if deed is not None and (frame not in FRAMES or deed not in DEEDS):
                raise LinkError(f"a frame is one of {', '.join(FRAMES)}, a deed one of {', '.join(DEEDS)}")
            if isinstance(times, bool) or not isinstance(times, int) or times < 1:
                raise LinkError("times is a whole number from 1")
            self.frame, self.deed, self.left = frame, deed, 0 if deed is None else times
        return {"frame": self.frame, "deed": self.deed, "left": self.left, "touched": self.touched}

    def touch(self, _sender: str, frame: Frame) -> list[Frame] | None:
        """See :data:`~keysource.qkd.wiretap.Touch`."""
        if not self.left or frame.kind.name != self.frame or (self.deed in ("flip", "shorten") and not frame.payload):
            return [frame]
        self.left -= 1
        self.touched += 1
        match self.deed:
            case "flip":
                return [Frame(frame.kind, frame.payload[:-1] + bytes([frame.payload[-1] ^ 1]))]
            case "shorten":
                return [Frame(frame.kind, frame.payload[:-1])]
            case "repeat":
                return [frame, frame]
            case "drop":
                return []
        return None


Socket = Annotated[Path, typer.Argument(metavar="SOCKET", help="Where the tap is switched; mode 0600.")]


def tap(
    socket: Socket,
    listen: Annotated[str, typer.Option(help="HOST:PORT where Bob connects: his `peer`.")],
    target: Annotated[str, typer.Option(help="HOST:PORT of Alice's `listen`.")],
) -> None:
    """Sit on the classical channel of a link until Ctrl-C; touch nothing before `meddle` says so."""
    try:
        front, back = Address.parse(listen), Address.parse(target)
    except ValueError as error:
        raise LinkSettings(f"--listen, --target: {error}") from None
    interrupted(_sit(socket, front, back))


async def _sit(path: Path, front: Address, back: Address) -> None:
    middle, wire = Middle(), Wiretap(front, back)
    wire.touch = middle.touch
    control = Control(path, middle.order)
    await control.start()
    try:
        try:
            await wire.start()
        except OSError as error:
            raise LinkError(f"cannot listen at {front}: {error.strerror or error}") from None
        print(f"Bob at {front}, Alice at {back}; switch: qvpn-qkd meddle {path}", flush=True)
        await asyncio.Event().wait()
    finally:
        with contextlib.suppress(OSError):
            await wire.aclose()
        await control.aclose()


def meddle(
    socket: Socket,
    frame: Annotated[str | None, typer.Argument(metavar="[FRAME]", help=f"One of {', '.join(FRAMES)}.")] = None,
    deed: Annotated[Deed, typer.Option(help="What is done to it.")] = "flip",
    times: Annotated[int, typer.Option(min=1, help="How many such frames.")] = 1,
    off: Annotated[bool, typer.Option("--off", help="Touch nothing more.")] = False,
) -> None:
    """Tell a running tap what to do to the next frames of a kind; without FRAME: what she does and did."""
    request: dict[str, Any] = {}
    if off:
        request = {"deed": None}
    elif frame is not None:
        request = {"frame": frame.upper(), "deed": deed, "times": times}
    print(json.dumps(asyncio.run(ask(socket, request))))
