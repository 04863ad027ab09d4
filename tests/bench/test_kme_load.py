"""The load measurement works, on both servers, with right keys.  Its figures are for people; see ``kme_load``."""

from __future__ import annotations

import pytest

from tests.bench import kme_load


@pytest.mark.timeout(300)
async def test_both_servers_are_measured_in_the_same_rounds():
    found = await kme_load.measure(1, 8)
    assert set(found) == set(kme_load.WORKS)
    for name, sides in found.items():
        assert set(sides) == {"qvpn-kme", "FastAPI"}
        for rounds in sides.values():
            [one] = rounds
            assert one.requests_per_second > 0
            keys_a_call = {"status": 0, "a key drawn, then fetched": 1}.get(name, kme_load.BATCH)
            requests = kme_load.WORKS[name][1]
            assert one.keys_per_second == pytest.approx(one.requests_per_second / requests * keys_a_call)
    lines = kme_load.table(found).splitlines()
    assert len(lines) == 2 + 2 * len(kme_load.WORKS)
