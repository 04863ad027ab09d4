"""kill -9 of a process that draws from a key stream, at random moments: no index is given out twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

import pytest

from keysource import tls
from keysource.kme.pki import Authority
from tests.conformance.etsi004_servers import SERVERS, Link

KILLS = 50 if os.environ.get("QVPN_TEST_LONG") else 5
CHILD = """
import asyncio, json, os, sys
from pathlib import Path
from keysource.base import SourceContext
from keysource.errors import KeySourceError
from keysource.etsi004.source import Etsi004Source

async def main():
    folder = Path(sys.argv[1])
    source = Etsi004Source(json.loads(sys.argv[2]), SourceContext("stream", folder, folder, "left"))
    await source.start()

    async def draw():
        while True:
            try:
                key = await source.get_key("x")
            except KeySourceError:
                await asyncio.sleep(0.01)
                continue
            os.write(1, f"{key.key_id} {key.material.hex()}\\n".encode())

    await asyncio.gather(*(draw() for _ in range(4)))

asyncio.run(main())
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("profile", sorted(SERVERS))
async def test_no_index_twice_over_kill_9(profile: str, tmp_path: Path) -> None:
    authority = Authority("004 CA")
    authority.sae("app").write(tmp_path, "app")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    credential = authority.kme("server", ["127.0.0.1"])
    server = SERVERS[profile](Link())
    port = await server.start(
        tls.server_context(authority.certificate, credential.certificate, credential.private_key)
    )
    table = {
        "url": f"tls://127.0.0.1:{port}",
        "profile": profile,
        "source": "app://left",
        "destination": "app://right",
        "stream": "0f8b2f0e-9a3c-4c57-8f0e-2f6a1d3c4b5a",
        "end": "a",
        "ca": "ca.crt",
        "certificate": "app.crt",
        "private_key": "app.key",
    }
    chance, drawn = random.Random(4), list[tuple[str, str]]()
    for _ in range(KILLS):
        drawn += await draw_and_kill(tmp_path, table, chance)
    await server.aclose()
    assert len(drawn) > 3 * KILLS
    assert len({key_id for key_id, _ in drawn}) == len(drawn)
    assert len({key for _, key in drawn}) == len(drawn)


async def draw_and_kill(folder: Path, table: dict[str, str], chance: random.Random) -> list[tuple[str, str]]:
    """What the child gave out (whole lines) before it was killed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(folder), json.dumps(table), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    lines = [await child.stdout.readline() for _ in range(chance.randrange(4, 20))]
    await asyncio.sleep(chance.random() * 0.01)
    child.kill()
    lines += (await child.stdout.read()).splitlines(keepends=True)
    await child.wait()
    whole = [line.decode().split() for line in lines if line.endswith(b"\n")]
    return [(key_id, key) for key_id, key in whole]
