"""Many SAEs at once at one pair of KMEs: every key_ID goes to one master and its slave, and the bytes are equal."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from keysource.errors import Unauthorized, Unavailable, UnknownKeyID

PAIRS = 200 if os.environ.get("QVPN_TEST_LONG") == "1" else 20
ROUNDS, AT_A_TIME = 3, 2


def let_them_in(lab):
    """Master m0 may share with slave s0, m1 with s1, and so on; nobody else with anybody."""
    masters, slaves = ([f"{kind}{i}" for i in range(PAIRS)] for kind in "ms")
    for site, mine, theirs in (("alice", masters, slaves), ("bob", slaves, masters)):
        file = lab.files[site]
        text = file.read_text().split("[[sae]]")[0]
        [line] = [line for line in text.splitlines() if line.startswith("saes =")]
        text = text.replace(line, "saes = [" + ", ".join(f'"{sae}"' for sae in theirs) + "]")
        # all of them have one address, and one processor for their half of four hundred handshakes
        text += "[limits]\nunauthenticated_per_address = 1024\nhandshake_timeout = 60\n"
        for own, other in zip(mine, theirs, strict=True):
            text += f'[[sae]]\nid = "{own}"\nmay_share_with = ["{other}"]\n'
        file.write_text(text)


async def patiently(call, *arguments, **options):
    """A KME may say 503 when everybody comes at once; that consumes nothing, and is asked again."""
    while True:
        try:
            return await call(*arguments, **options)
        except Unavailable as error:
            assert error.answered, f"a call without an answer may have consumed keys: {error}"
            await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_a_crowd_of_pairs_gets_its_own_keys_and_no_others(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder))
        let_them_in(lab)
        try:
            await lab.start(keys=0)
            need = PAIRS * ROUNDS * AT_A_TIME * 2 + 512  # every other key is alice's to issue
            for _ in range(-(-need // 512)):
                lab.publish(512)
            await lab.until(lambda: min(lab.held("alice"), lab.held("bob")) >= need, "blocks", seconds=60)
            drawn = await asyncio.gather(*(one_pair(lab, number) for number in range(PAIRS)))
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


async def one_pair(lab, number):
    """Draw and fetch; in between the next slave tries to get there first."""
    master = lab.client(f"m{number}", "alice", timeout=20.0, keep_alive=True)
    slave = lab.client(f"s{number}", "bob", timeout=20.0, keep_alive=True)
    thief = lab.client(f"s{(number + 1) % PAIRS}", "bob", timeout=20.0)
    got = {}
    for _ in range(ROUNDS):
        keys = await patiently(master.enc_keys, f"s{number}", number=AT_A_TIME)
        key_ids = [key.key_id for key in keys]
        with pytest.raises(Unauthorized):
            await patiently(thief.dec_keys, f"m{number}", key_ids)
        copies = await patiently(slave.dec_keys, f"m{number}", key_ids)
        assert {key.key_id: key.material for key in copies} == {key.key_id: key.material for key in keys}
        with pytest.raises(UnknownKeyID):
            await patiently(slave.dec_keys, f"m{number}", key_ids[:1])
        got |= {key.key_id: bytes(key.material) for key in keys}
    return got
