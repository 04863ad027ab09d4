"""``--fault NAME`` on a real KME, and what :class:`Etsi014Source` makes of each; then the KME behaves again."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from keysource.errors import BadAnswer, Exhausted, Unauthorized, Unavailable, UnknownKeyID
from keysource.kme.faults import Fault, FaultSwitch, fault_named

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def lab(shared_lab):
    """Every test leaves it healthy, and checks that."""
    return shared_lab


def unavailable(error, *, answered):
    assert type(error) is Unavailable
    assert error.answered is answered
    return True


MASTER = {
    "down": lambda error: unavailable(error, answered=False),
    "slow": lambda error: unavailable(error, answered=False),
    "503": lambda error: unavailable(error, answered=True),
    "empty": lambda error: type(error) is Exhausted,
    "wrong-length": lambda error: type(error) is BadAnswer,
    "unauthorised": lambda error: type(error) is Unauthorized,
}
SLAVE = MASTER | {"empty": lambda error: type(error) is UnknownKeyID}


@pytest.mark.parametrize("fault", MASTER)
async def test_at_the_master(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault("alice", fault)
    # Both at once, for "slow" takes all the time there is.
    error, status = await asyncio.gather(alice.get_key("sae-bob"), alice.status("sae-bob"), return_exceptions=True)
    assert MASTER[fault](error), error
    assert status.ready is (fault == "wrong-length")
    await heals(lab, "alice", alice, bob)


@pytest.mark.parametrize("fault", SLAVE)
async def test_at_the_slave(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    key = await alice.get_key("sae-bob")
    lab.fault("bob", fault)
    fetch, status = bob.get_key_with_id("sae-alice", key.key_id), bob.status("sae-alice")
    error, status = await asyncio.gather(fetch, status, return_exceptions=True)
    assert SLAVE[fault](error), error
    assert status.ready is (fault == "wrong-length")
    lab.fault("bob", "none")
    if fault in ("slow", "wrong-length"):  # the answer was lost or useless, the key is gone
        with pytest.raises(UnknownKeyID):
            await bob.get_key_with_id("sae-alice", key.key_id)
    else:  # nothing was consumed
        assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    await heals(lab, "bob", alice, bob)


async def heals(lab, site, alice, bob):
    lab.fault(site, "none")
    assert lab.status(site)["fault"] == "none"
    for master, slave_sae, slave, master_sae in (
        (alice, "sae-bob", bob, "sae-alice"),
        (bob, "sae-alice", alice, "sae-bob"),
    ):
        key = await master.get_key(slave_sae)
        assert (await slave.get_key_with_id(master_sae, key.key_id)).material == key.material


@pytest.mark.parametrize("site", ["alice", "bob"])
async def test_wrong_key_flips_one_byte_at_that_kme(lab, site):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault(site, "wrong-key")
    key = await alice.get_key("sae-bob")
    copy = await bob.get_key_with_id("sae-alice", key.key_id)
    assert sum(a != b for a, b in zip(key.material, copy.material, strict=True)) == 1
    with pytest.raises(UnknownKeyID):  # wrong, but consumed
        await bob.get_key_with_id("sae-alice", key.key_id)
    await heals(lab, site, alice, bob)


@pytest.mark.parametrize("site", ["alice", "bob"])
async def test_repeated_key_is_noticed_at_the_second(lab, site):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault(site, "repeated-key")
    if site == "alice":
        first = await alice.get_key("sae-bob")
        with pytest.raises(BadAnswer, match="delivered before"):
            await alice.get_key("sae-bob")
        assert (await bob.get_key_with_id("sae-alice", first.key_id)).material == first.material
    else:
        keys = [await alice.get_key("sae-bob") for _ in range(2)]
        assert (await bob.get_key_with_id("sae-alice", keys[0].key_id)).material == keys[0].material
        with pytest.raises(BadAnswer, match="delivered before"):
            await bob.get_key_with_id("sae-alice", keys[1].key_id)
    await heals(lab, site, alice, bob)


async def test_down_closes_both_listeners(lab):
    """While alice's KME is down, bob's cannot issue either."""
    bob = await lab.source("bob")
    lab.fault("alice", "down")
    issued = lab.link("bob")["issued"]
    with pytest.raises(Unavailable) as caught:
        await bob.get_key("sae-alice")
    assert caught.value.answered
    assert lab.link("bob")["issued"] == issued
    alice = await lab.source("alice")
    await heals(lab, "alice", alice, bob)


async def test_the_command_line_switches(lab):
    def run(*arguments):
        command = [sys.executable, "-m", "keysource.kme.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    assert run("fault", str(lab.files["alice"]), "empty").returncode == 0
    assert lab.status("alice")["fault"] == "empty"
    unknown = run("fault", str(lab.files["alice"]), "nonsense")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "unknown fault 'nonsense'; there are: none, down, slow, 503" in unknown.stderr
    shown = run("status", str(lab.files["alice"]))
    assert shown.returncode == 0
    assert "fault: empty" in shown.stdout
    lab.fault("alice", "none")


async def test_the_names():
    assert {fault.value for fault in Fault} == {
        "none", "down", "slow", "503", "empty", "wrong-key", "repeated-key", "wrong-length", "unauthorised",
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown fault"):
        fault_named("x")


async def test_spoiling_is_off_by_default_and_forgets_when_switched():
    switch = FaultSwitch()
    assert switch.spoil(bytearray(b"ab")) == b"ab"
    switch.set(Fault.REPEATED_KEY)
    assert [bytes(switch.spoil(bytearray(key))) for key in (b"ab", b"cd")] == [b"ab", b"ab"]
    switch.set(Fault.REPEATED_KEY)
    assert switch.spoil(bytearray(b"cd")) == b"cd"


async def test_a_client_that_leaves_before_its_answer_is_a_line_in_the_log(lab):
    """It gave up on a slow KME: the key is gone, as said, and the log is no place for a traceback."""
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault("alice", "slow")
    with pytest.raises(Unavailable):
        await alice.get_key("sae-bob")
    await lab.until(lambda: LEFT in (lab.folder / "alice.log").read_text(), "a line about it")
    assert "Traceback" not in (lab.folder / "alice.log").read_text()
    await heals(lab, "alice", alice, bob)


LEFT = "a client left before its answer"
