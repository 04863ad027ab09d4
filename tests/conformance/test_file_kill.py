"""kill -9 of a process that uses a key file, at random moments: no key twice, none lost but the one in flight.

A child draws (or fetches) and writes each key_ID after the call returned; the parent kills it somewhere.  Ordinary
runs kill 30 times, long ones 300.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keysource.base import derive_key_id
from keysource.file.format import write_pair

KILLS = 300 if os.environ.get("QVPN_TEST_LONG") else 30
KEYS = 120 * KILLS

CHILD = """
import asyncio, os, sys
from pathlib import Path
from keysource.base import SourceContext, derive_key_id
from keysource.errors import UnknownKeyID
from keysource.file.source import FileSource

async def main(folder, verb, link):
    source = FileSource({"path": "keys", "end": "a"}, SourceContext("keys", folder, folder, "left"))
    await source.start()
    os.write(1, b"started\\n")
    position = 1
    while True:
        try:
            if verb == "draw":
                key = await source.get_key("right")
            else:
                key = await source.get_key_with_id("right", derive_key_id(link, 0, position))
            os.write(1, f"{key.key_id} {key.material.hex()}\\n".encode())
        except UnknownKeyID:
            pass
        position += 2

asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


def run_and_kill(folder: Path, verb: str, link: str, chance: random.Random) -> list[tuple[str, str]]:
    """What the child delivered before it was killed: key_ID and, as hexadecimal, key."""
    command = [sys.executable, "-c", CHILD, str(folder), verb, link]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        wanted = chance.randrange(0, 40)
        lines = [child.stdout.readline() for _ in range(wanted)]
        time.sleep(chance.random() * 0.003)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    whole = [line.decode().split() for line in lines if line.endswith(b"\n")]
    return [(key_id, key) for key_id, key in whole]


@pytest.mark.timeout(900)  # the full count on a busy machine
def test_no_key_twice_and_none_lost_but_one_per_kill(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    link = write_pair(tmp_path / "keys", tmp_path / "copy", KEYS)
    original = (tmp_path / "copy").read_bytes()[64:]
    content = {derive_key_id(link, 0, p): original[32 * p : 32 * p + 32].hex() for p in range(KEYS)}
    delivered: dict[str, list[str]] = {"draw": [], "fetch": []}
    chance = random.Random(20240)
    for kill in range(KILLS):
        verb = ("draw", "fetch")[kill % 2]
        for key_id, key in run_and_kill(tmp_path, verb, link, chance):
            assert content[key_id] == key
            delivered[verb].append(key_id)
    everything = delivered["draw"] + delivered["fetch"]
    assert len(everything) > KILLS
    assert len(set(everything)) == len(everything)
    _lost_at_most_one_each(tmp_path, link, delivered)


def _lost_at_most_one_each(folder: Path, link: str, delivered: dict[str, list[str]]) -> None:
    state = json.loads((folder / f"keyfile-{link}-a.position").read_text())
    used = {
        "draw": [derive_key_id(link, 0, p) for p in range(0, state["next"], 2)],
        "fetch": [derive_key_id(link, 0, p) for p in range(1, state["seen"], 2) if p not in state["missing"]],
    }
    for verb, key_ids in used.items():
        assert set(delivered[verb]) <= set(key_ids)
        assert len(key_ids) - len(delivered[verb]) <= KILLS // 2
