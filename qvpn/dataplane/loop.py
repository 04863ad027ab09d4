"""An event loop that moves packets inside its wait.

Between the kernel saying that a packet waits and the callback of a reader, asyncio makes a list, a handle, a queue
entry and a context: twice what reading the packet costs.  Here packet readers are called at once from the selector's
wait, and the wait goes on; the loop itself is told of nothing until one of its own descriptors is ready, a timer is
due, or a packet made something to do for it (a handshake wakes a task).

Everything else is asyncio's: on any other loop the plane uses ``add_reader``, and only costs more.
"""

from __future__ import annotations

import asyncio
import contextvars
import select
import selectors
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVarTuple

T = TypeVarTuple("T")

PacketReader = Callable[[int], object]
"""Called with its descriptor."""

EVENTS = 64
"""Descriptors per system call."""

_FOREVER = -1.0


class PacketSelector(selectors.BaseSelector):
    """The selector of a :class:`PacketLoop`: asyncio's own, nested in one that also has the packet readers."""

    def __init__(self) -> None:
        self._inner = selectors.EpollSelector()
        self._outer = select.epoll()
        self._outer.register(self._inner.fileno(), select.EPOLLIN)
        self._readers: dict[int, PacketReader] = {}
        self._asks = (self._inner.fileno(), select.EPOLLIN)
        """The event that something of the loop's own is ready."""
        self._went_first = False
        """It had the last turn alone, so packets have theirs now whatever else is ready."""
        self.on_error: Callable[[Exception], None] | None = None
        """Told what a packet reader raised."""
        self.woken = False
        """There is something for the loop to do: do not wait any longer."""

    def add(self, descriptor: int, reader: PacketReader) -> None:
        """Call the reader while the descriptor is readable.  Raises ValueError if it has one."""
        if descriptor in self._readers:
            raise ValueError(f"descriptor {descriptor} has a packet reader")
        self._outer.register(descriptor, select.EPOLLIN)
        self._readers[descriptor] = reader

    def remove(self, descriptor: int) -> bool:
        """Forget it, before it is closed; False if there is none."""
        if self._readers.pop(descriptor, None) is None:
            return False
        self._outer.unregister(descriptor)
        return True

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As any selector, but packets are handled meanwhile."""
        readers, poll, asked = self._readers, self._outer.poll, False
        wait = _FOREVER if timeout is None else max(0.0, timeout)
        end = time.monotonic() + wait
        self.woken = False
        while True:
            events = poll(wait, EVENTS)
            if len(events) > 1 and not self._went_first and self._asks in events:
                # Both wait: a process that was stopped hears what became of its keys before it uses them again.
                self._went_first = True
                return self._inner.select(0)
            self._went_first = False
            for descriptor, _ in events:
                reader = readers.get(descriptor)
                if reader is None:
                    asked = True
                    continue
                try:
                    reader(descriptor)
                except Exception as error:
                    self._failed(error)
            if asked:
                return self._inner.select(0)
            if self.woken or not events or wait == 0:
                return []
            if timeout is not None:
                wait = max(0.0, end - time.monotonic())

    def _failed(self, error: Exception) -> None:
        """Inside the handler of this error."""
        if self.on_error is None:
            raise error
        self.on_error(error)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._readers.clear()
        self._outer.close()
        self._inner.close()


class PacketLoop(asyncio.SelectorEventLoop):
    """asyncio's loop with packet readers.  ``asyncio.Runner(loop_factory=PacketLoop)``."""

    def __init__(self) -> None:
        self._packets = PacketSelector()
        self._packets.on_error = self._failed
        super().__init__(self._packets)

    def add_packet_reader(self, descriptor: int, reader: PacketReader) -> None:
        """Call ``reader(descriptor)`` while the descriptor is readable, beside all that the loop runs."""
        self._packets.add(descriptor, reader)

    def remove_packet_reader(self, descriptor: int) -> bool:
        """Undo :meth:`add_packet_reader`; False if there is none."""
        return self._packets.remove(descriptor)

    def call_soon(
        self, callback: Callable[[*T], object], *args: *T, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self._packets.woken = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*T], object],
        *args: *T,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        self._packets.woken = True
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        self._packets.woken = True
        super().stop()

    def _failed(self, error: Exception) -> None:
        self.call_exception_handler({"message": "exception in a packet reader", "exception": error})


def add_reader(loop: asyncio.AbstractEventLoop, descriptor: int, reader: PacketReader) -> None:
    """Watch a descriptor in whatever way this loop does it cheapest."""
    if isinstance(loop, PacketLoop):
        loop.add_packet_reader(descriptor, reader)
    else:
        loop.add_reader(descriptor, reader, descriptor)


def remove_reader(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    """Undo :func:`add_reader`."""
    if isinstance(loop, PacketLoop):
        loop.remove_packet_reader(descriptor)
    else:
        loop.remove_reader(descriptor)
