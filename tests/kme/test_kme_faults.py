"""``--fault NAME`` on a real KME, and what :class:`Etsi014Source` makes of each; then the KME behaves again."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from keysource.errors import BadAnswer, Exhausted, Unauthorized, Unavailable, UnknownKeyID
from keysource.kme.control import ControlError
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
    "expired-certificate": lambda error: unavailable(error, answered=False) and "expired" in str(error),
    "reset": lambda error: unavailable(error, answered=False),
    "torn": lambda error: unavailable(error, answered=False),
}
TELLS_STATUS = ("wrong-length", "reset", "torn")
CONSUMES = ("slow", "wrong-length", "reset", "torn")
SLAVE = MASTER | {"empty": lambda error: type(error) is UnknownKeyID}


@pytest.mark.parametrize("fault", MASTER)
async def test_at_the_master(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault("alice", fault)
    # Both at once, for "slow" takes all the time there is.
    error, status = await asyncio.gather(alice.get_key("sae-bob"), alice.status("sae-bob"), return_exceptions=True)
    assert MASTER[fault](error), error
    assert status.ready is (fault in TELLS_STATUS)
    await heals(lab, "alice", alice, bob)


@pytest.mark.parametrize("fault", SLAVE)
async def test_at_the_slave(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    key = await alice.get_key("sae-bob")
    lab.fault("bob", fault)
    fetch, status = bob.get_key_with_id("sae-alice", key.key_id), bob.status("sae-alice")
    error, status = await asyncio.gather(fetch, status, return_exceptions=True)
    assert SLAVE[fault](error), error
    assert status.ready is (fault in TELLS_STATUS)
    lab.fault("bob", "none")
    if fault in CONSUMES:  # the answer was lost or useless, the key is gone
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


async def test_out_of_step_gives_the_bytes_of_the_key_before(lab):
    """Every length and every ID is right; only that the two ends confirm their key can tell."""
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.fault("bob", "out-of-step")
    keys = [await alice.get_key("sae-bob") for _ in range(3)]
    copies = [await bob.get_key_with_id("sae-alice", key.key_id) for key in keys]
    assert [copy.key_id for copy in copies] == [key.key_id for key in keys]
    assert copies[0].material not in [key.material for key in keys]
    assert [copy.material for copy in copies[1:]] == [key.material for key in keys[:-1]]
    await heals(lab, "bob", alice, bob)


ERRORS = {
    "vendor-404": (404, "message"),
    "vendor-410": (410, "message"),
    "vendor-422": (422, "message"),
    "vendor-detail": (400, "detail"),
    "vendor-html": (400, None),
}


@pytest.mark.parametrize("fault", ERRORS)
async def test_other_kmes_words_for_an_error(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    for site in ("alice", "bob"):
        lab.fault(site, fault)
    status, field = ERRORS[fault]
    answer = await lab.dec(["00000000-0000-4000-8000-000000000000"])
    assert answer.status == status
    if field is None:
        assert answer.headers["Content-Type"].startswith("text/html") and b"<h1>" in answer.body
    else:
        assert answer.json[field] == "one or more keys specified are not found on KME"
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    with pytest.raises(UnknownKeyID):
        await bob.get_key_with_id("sae-alice", key.key_id)
    with pytest.raises(Exhausted):  # a 400 that says nothing about keys of this pair
        await alice.get_key("sae-nobody")
    lab.fault("bob", "none")
    await heals(lab, "alice", alice, bob)


@pytest.mark.parametrize("fault", ["vendor-null", "vendor-upper"])
async def test_other_kmes_words_for_keys(lab, fault):
    alice, bob = await lab.source("alice"), await lab.source("bob")
    for site in ("alice", "bob"):
        lab.fault(site, fault)
    raw = (await lab.enc()).json
    [entry] = raw["keys"]
    if fault == "vendor-upper":
        assert entry["key_ID"] == entry["key_ID"].upper() != entry["key_ID"].lower()
    else:
        assert raw["key_container_extension"] is None and entry["key_extension"] is None
        assert set(entry) - {"key", "key_ID", "key_extension", "key_ID_extension"}
    assert (await alice.status("sae-bob")).ready
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    lab.fault("bob", "none")
    await heals(lab, "alice", alice, bob)


async def test_an_expired_certificate_needs_a_file_and_says_so(lab):
    file = lab.folder / "alice" / "pki" / "kme-alice.expired.crt"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ControlError, match=r"expired\.crt: a certificate of the same private key"):
        lab.fault("alice", "expired-certificate")
    assert lab.status("alice")["fault"] == "none"
    file.write_bytes(content)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    await heals(lab, "alice", alice, bob)


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
        "none", "down", "slow", "503", "empty", "wrong-key", "repeated-key", "out-of-step", "wrong-length",
        "unauthorised", "expired-certificate", "reset", "torn", "vendor-404", "vendor-410", "vendor-422",
        "vendor-detail", "vendor-html", "vendor-null", "vendor-upper",
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


async def test_a_source_believes_only_the_kme_that_it_was_told(lab):
    """Both KMEs have certificates of the same authority, and here even the same host name."""
    right, wrong = await lab.source("alice", kme="kme-alice"), await lab.source("alice", kme="kme-bob")
    assert len((await right.get_key("sae-bob")).material) == 32
    issued = lab.link("alice")["issued"]
    with pytest.raises(Unavailable, match="does not name 'kme-bob'"):
        await wrong.get_key("sae-bob")
    status = await wrong.status("sae-bob")
    assert not status.ready and "does not name" in status.reason
    assert lab.link("alice")["issued"] == issued
