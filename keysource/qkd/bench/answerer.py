"""Alice's process of ``qvpn-qkd bench``: prints its port, answers one connection, and ends with it."""

from __future__ import annotations

import asyncio
import json
import time

from keysource.qkd.bench.correction import alices_key
from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import pack
from keysource.qkd.distill.cascade import Reference, block_sizes
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.channel import Channel
from keysource.qkd.errors import PeerLost


async def _serve() -> None:
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        try:
            while True:
                await _key(channel)
        except PeerLost:
            pass
        finally:
            await channel.aclose()
            done.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await done.wait()
    server.close()


async def _key(channel: Channel) -> None:
    schedule, bits, ratio, number = json.loads((await channel.receive()).payload)
    key, sizes = alices_key(bits, number), block_sizes(bits, ratio, schedule)
    await channel.send(Frame(Kind.HELLO))
    seed = (await channel.receive()).payload
    used = time.process_time()
    reference = Reference(key, seed, sizes)
    while (frame := await channel.receive()).kind is Kind.ASK:
        answers = reference.answer_untrusted(wire.ask_untrusted(frame.payload))
        await channel.send(Frame(Kind.PARITY, pack(answers)))
    await channel.send(Frame(Kind.HELLO, json.dumps(time.process_time() - used).encode()))


if __name__ == "__main__":
    asyncio.run(_serve())
