"""Many SAEs at once at one pair of KMEs: every key_ID goes to one master and its slave, and the bytes are equal.

Nothing here depends on how quick the machine is.  All pairs are at it at the same time, each SAE over one connection
that it keeps; what is bounded is how many handshakes *begin* at once, since this process does the clients' half of
all of them on one processor.  A KME that has too much to do says 503, which consumes nothing and is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import tempfile
from pathlib import Path

import pytest

from keysource.errors import Unauthorized, Unavailable, UnknownKeyID

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
PAIRS = 200 if LONG else 20
ROUNDS, AT_A_TIME = 3, 2
HANDSHAKES = 16
PATIENCE = 600.0
"""Seconds after which a call is taken for lost: no machine is that slow."""


def let_them_in(lab):
    """Master m0 may share with slave s0, m1 with s1, and so on; nobody else with anybody."""
    masters, slaves = ([f"{kind}{i}" for i in range(PAIRS)] for kind in "ms")
    for site, mine, theirs in (("alice", masters, slaves), ("bob", slaves, masters)):
        file = lab.files[site]
        text = file.read_text().split("[[sae]]")[0]
        [line] = [line for line in text.splitlines() if line.startswith("saes =")]
        text = text.replace(line, "saes = [" + ", ".join(f'"{sae}"' for sae in theirs) + "]")
        # all of them have one address, and requests that come again count as well
        text += "[limits]\nunauthenticated_per_address = 1024\nhandshake_timeout = 60\nrequests_per_second = 0\n"
        for own, other in zip(mine, theirs, strict=True):
            text += f'[[sae]]\nid = "{own}"\nmay_share_with = ["{other}"]\n'
        file.write_text(text)


@contextlib.contextmanager
def descriptors(needed):
    """The usual soft limit of a process is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Sae:
    """One SAE with one connection, which it keeps; one call at a time."""

    def __init__(self, lab, name, at):
        self.name = name
        self._client = lab.client(name, at, timeout=PATIENCE, keep_alive=True)
        self._client._opened().connector._keepalive_timeout = PATIENCE  # or it would close it after 15 s of rest
        self._lock = asyncio.Lock()
        self._pause = random.Random(name)

    async def connect(self, door, other):
        async with door:
            await self("status", other)

    async def __call__(self, call, *arguments, **options):
        """The call; again after each 503, at times of which no two SAEs have the same."""
        longest = 0.05
        while True:
            try:
                async with self._lock:
                    return await getattr(self._client, call)(*arguments, **options)
            except Unavailable as error:
                assert error.answered, f"a call without an answer may have consumed keys: {error}"
                await asyncio.sleep(longest * self._pause.uniform(0.5, 1.0))
                longest = min(2 * longest, 2.0)


@pytest.mark.timeout(1800 if LONG else 300)
async def test_a_crowd_of_pairs_gets_its_own_keys_and_no_others(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder, descriptors(8 * PAIRS + 256):
        lab = lab_class(Path(folder))
        let_them_in(lab)
        try:
            await lab.start(keys=0)
            need = PAIRS * ROUNDS * AT_A_TIME * 2 + 512  # every other key is alice's to issue
            for _ in range(-(-need // 512)):
                lab.publish(512)
            await lab.until(lambda: min(lab.held("alice"), lab.held("bob")) >= need, "blocks", seconds=PATIENCE)
            masters = [Sae(lab, f"m{number}", "alice") for number in range(PAIRS)]
            slaves = [Sae(lab, f"s{number}", "bob") for number in range(PAIRS)]
            await everybody_connects(lab, masters, slaves)
            drawn = await asyncio.gather(*(one_pair(masters, slaves, number) for number in range(PAIRS)))
            everything = [item for some in drawn for item in some.items()]
            assert len(everything) == PAIRS * ROUNDS * AT_A_TIME
            assert (
                len({key_id for key_id, _key in everything})
                == len({key for _id, key in everything})
                == len(everything)
            )
            assert lab.link("alice")["issued"] == lab.link("bob")["fetched"] == len(everything)
        finally:
            await lab.aclose()


async def everybody_connects(lab, masters, slaves):
    """From here on all of them are there at the same time, and nobody has another connection than this one."""
    door = asyncio.Semaphore(HANDSHAKES)
    pairs = list(zip(masters, slaves, strict=True))
    await asyncio.gather(*(one.connect(door, other.name) for a, b in pairs for one, other in ((a, b), (b, a))))
    for site in ("alice", "bob"):
        listener = lab.status(site)["connections"][0]
        assert listener["open"] == PAIRS
        assert not any(listener[what] for what in ("slow", "pushed_out", "crowded", "no_descriptor"))


async def one_pair(masters, slaves, number):
    """Draw and fetch; in between the next slave tries to get there first."""
    master, slave, thief = masters[number], slaves[number], slaves[(number + 1) % PAIRS]
    got = {}
    for _ in range(ROUNDS):
        keys = await master("enc_keys", slave.name, number=AT_A_TIME)
        key_ids = [key.key_id for key in keys]
        with pytest.raises(Unauthorized):
            await thief("dec_keys", master.name, key_ids)
        copies = await slave("dec_keys", master.name, key_ids)
        assert {key.key_id: key.material for key in copies} == {key.key_id: key.material for key in keys}
        with pytest.raises(UnknownKeyID):
            await slave("dec_keys", master.name, key_ids[:1])
        got |= {key.key_id: bytes(key.material) for key in keys}
    return got
