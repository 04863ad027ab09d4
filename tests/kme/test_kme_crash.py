"""kill -9 of real KMEs while blocks come in and a master draws: see ``crashes``.  And the points themselves: each
is in one of the files, and a store of an older release survives being killed while it is brought up to date.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import End, Origin, Owner
from keysource.kme import crashpoints
from keysource.kme.records import LinkRow, Offer, Terms
from keysource.kme.store import Store
from tests.kme import crashes
from tests.kme.test_kme_vault import TOKEN, material, old_store, unit


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network():
    async with crashes.a_network() as network:
        yield network


def test_every_point_belongs_to_an_exchange_of_one_file_and_stands_in_the_code():
    folder = Path(crashpoints.__file__).parent
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.stem != "crashpoints")
    code += ' "enc.answered" "dec.answered" '  # made of the path's last part
    assert {point.partition(".")[0] for point in crashpoints.POINTS} == {*crashes.EXCHANGES, "migrate"}
    assert all(f'"{point}"' in code for point in crashpoints.POINTS)
    spread = [*crashes.MASTERS, *crashes.SLAVES, *crashes.SEVERAL]
    assert sorted(spread) == sorted(crashes.EXCHANGES)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(crashes.TIMEOUT)
@pytest.mark.parametrize("point", crashes.points(*crashes.MASTERS))
async def test_killed_at(network, point):
    await crashes.killed_at(network, point, crashes.KILLS)


# A store of an older release, killed while it is brought up to date

_OPEN = """
import sys
from pathlib import Path
from keysource.kme import crashpoints
from keysource.kme.store import Store
crashpoints.arm_from_environment()
Store(Path(sys.argv[1]), "kme", max_keys=1000).close()
"""


@pytest.mark.parametrize("point", crashes.points("migrate"))
def test_killed_while_a_store_is_brought_up_to_date(tmp_path, point):
    for kill in range(crashes.KILLS):
        home = tmp_path / str(kill)
        home.mkdir(mode=0o700)
        old_store(home)
        environment = os.environ | {crashpoints.VARIABLE: point}
        command = [sys.executable, "-c", _OPEN, str(home / "kme.sqlite")]
        died = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert died.returncode == -9, died.stderr
        with contextlib.closing(Store(home / "kme.sqlite", "kme", max_keys=1000)) as store:
            store.bind_link(LinkRow("other", "link", End.B, Owner.A, Origin.QKD, 0))
            [key] = store.fetch("sae-a", "sae-b", [unit(3).key_id])
            assert bytes(key.material) == material(0, 3)
            offer = Offer(*unit(0), TOKEN)
            assert store.reserve("other", Terms("sae-a", ("sae-b",)), [offer], 1.0).missing == []
            assert bytes(store.fetch("sae-a", "sae-b", [offer.key_id])[0].material) == material(0, 0)
            files = {file.name: file.read_bytes() for file in home.iterdir()}
        assert not [name for name, content in files.items() if material(0, 1) in content]


# The hook itself


def test_an_unknown_point_is_refused_and_none_is_the_rule():
    for order in ("nonsense", "enc.asked:x", "enc.asked:0"):
        with pytest.raises(ValueError, match=r"no such crash point"):
            crashpoints.arm(order)
    crashpoints.arm("")
    for point in crashpoints.POINTS:
        crashpoints.at(point)  # and we live


def test_the_variable_is_taken_out_of_the_environment(monkeypatch):
    monkeypatch.setenv(crashpoints.VARIABLE, "enc.asked:1000000")
    assert crashpoints.arm_from_environment()
    assert crashpoints.VARIABLE not in os.environ
    crashpoints.arm("")
