"""A link without a couriered pad: identities introduce the ends and sign the first block; from then on, key is used.

Whoever has not both private keys of an end gets nowhere: not with other keys, not with an end's own words, not with
old ones, not with those of another link."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qkd_bench import Bench, Side, small_terms
from qkd_lab import LinkLab, until
from typer.testing import CliRunner

from keysource.base import End
from keysource.qkd.cli import app
from keysource.qkd.config import EndConfig, load
from keysource.qkd.distill.mac import TICKET_BYTES, Authenticator, Transcript
from keysource.qkd.distill.signed import SignedTicket
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.introduce import Request, answer_untrusted
from keysource.qkd.errors import BadFrame, Disagreement, Forged, LinkError, LinkSettings, PadEmpty
from keysource.qkd.identity import (
    SIGNATURE_BYTES,
    Identity,
    Signers,
    generate,
    load_signers,
    parse_private,
    parse_public,
)
from keysource.qkd.pad import HEAD_BYTES, REFILL_BASE, SIGNED, LinkState, make_pad
from keysource.qkd.pair import PairPlan, write_pair
from keysource.settings import Address
from qvpn.config import identity as of_the_tunnel

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
TERMS = small_terms()
HEAD = bytes(range(HEAD_BYTES))
SESSION = bytes(32)
pytestmark = pytest.mark.timeout(180)


@cache
def identity(name: str) -> Identity:
    return generate()


def ends(link: str = "l", alice: str = "alice", bob: str = "bob") -> tuple[Signers, Signers]:
    a, b = identity(alice), identity(bob)
    return Signers(End.A, link, a, b.public), Signers(End.B, link, b, a.public)


# Introduction


def test_bob_gets_the_head_and_the_same_one_again() -> None:
    a, b = ends()
    for _ in range(2):
        request = Request(b)
        assert request.take_answer_untrusted(answer_untrusted(a, HEAD, request.frame())) == HEAD


@pytest.mark.parametrize("mistaken", [{"link": "m"}, {"alice": "eve"}, {"bob": "eve"}], ids=lambda d: next(iter(d)))
def test_another_link_or_identity_is_a_stranger_to_both_sides(mistaken: dict[str, str]) -> None:
    """Cross-link: both identities are right, the link's name is not."""
    (a, b), (other_a, other_b) = ends(), ends(**mistaken)
    with pytest.raises(BadFrame, match="not signed by this link's other end"):
        answer_untrusted(a, HEAD, Request(other_b).frame())
    request = Request(b)
    # an Alice who takes anybody's word, and signs as what she is
    answer = _answer_of(other_a, request)
    with pytest.raises(BadFrame, match="not signed"):
        request.take_answer_untrusted(answer)


def _answer_of(a: Signers, request: Request) -> Frame:
    class Trusting(Signers):
        __slots__ = ()

        def fits(self, purpose: bytes, data: bytes, signatures: bytes) -> bool:
            return True

    return answer_untrusted(Trusting(a.end, a.link, a.me, a.peer), HEAD, request.frame())


def test_what_is_replayed_or_reflected_opens_nothing() -> None:
    a, b = ends()
    old, new = Request(b), Request(b)
    recorded = answer_untrusted(a, HEAD, old.frame())
    with pytest.raises(BadFrame, match="not signed"):
        new.take_answer_untrusted(recorded)
    again = answer_untrusted(a, HEAD, old.frame())  # a replayed request: only its maker can read the answer
    with pytest.raises(BadFrame):
        new.take_answer_untrusted(again)
    assert HEAD not in again.payload and HEAD[:16] not in again.payload
    with pytest.raises(BadFrame):
        new.take_answer_untrusted(new.frame())  # his own request comes back as an answer
    with pytest.raises((BadFrame, Disagreement)):
        answer_untrusted(a, HEAD, recorded)  # her own answer comes back as a request
    with pytest.raises(BadFrame):
        answer_untrusted(b, HEAD, new.frame())  # Bob's own words sent back to him
    with pytest.raises(Disagreement, match="version 9"):
        answer_untrusted(a, HEAD, Frame(Kind.INTRODUCE, b"\x09" + new.frame().payload[1:]))


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(0, 10**6), st.sampled_from(["flip", "cut", "longer"]))
def test_no_bit_of_an_introduction_can_be_changed(of_bob: bool, where: int, deed: str) -> None:
    a, b = ends()
    request = Request(b)
    frame = request.frame() if of_bob else answer_untrusted(a, HEAD, request.frame())
    bit = where % (8 * len(frame.payload))
    changed = {
        "flip": flipped(frame.payload, bit),
        "cut": frame.payload[: bit // 8],
        "longer": frame.payload + b"\0",
    }[deed]
    with pytest.raises((BadFrame, Disagreement)):
        if of_bob:
            answer_untrusted(a, HEAD, Frame(Kind.INTRODUCE, changed))
        else:
            request.take_answer_untrusted(Frame(Kind.INTRODUCE, changed))


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


# Signatures


def test_both_signatures_must_fit_and_say_who_what_and_where() -> None:
    a, b = ends()
    good = a.sign(b"purpose", b"data")
    assert len(good) == SIGNATURE_BYTES and b.fits(b"purpose", b"data", good)
    assert not a.fits(b"purpose", b"data", good), "an end does not believe its own words"
    assert not b.fits(b"other", b"data", good) and not b.fits(b"purpose", b"date", good)
    assert not ends("m")[1].fits(b"purpose", b"data", good)
    for half in (slice(0, 64), slice(64, None)):
        spoiled = bytearray(good)
        spoiled[half] = bytes(len(spoiled[half]))
        assert not b.fits(b"purpose", b"data", bytes(spoiled)), "one of the two is not enough"
    assert not b.fits(b"purpose", b"data", b"") and not b.fits(b"purpose", b"data", good + b"\0")


def test_identities_are_the_files_of_the_tunnel(tmp_path: Path) -> None:
    made = of_the_tunnel.generate(3)
    mine = parse_private(made.pem(), "x")
    assert mine.public.fingerprint == made.public.fingerprint and mine.public.readable == made.public.readable
    assert parse_public(made.public.pem(), "x").fingerprint == made.public.fingerprint
    assert of_the_tunnel.parse_private(identity("alice").pem()).public.pem() == identity("alice").public.pem()
    for data, parse, words in (
        (of_the_tunnel.generate(5).pem(), parse_private, "ML-DSA-65"),
        (of_the_tunnel.generate(5).public.pem(), parse_public, "ML-DSA-65"),
        (made.pem(), parse_public, "never leaves its site"),
        (b"", parse_private, "two PEM blocks"),
        (made.pem().replace(b"M", b"!", 9), parse_private, "cannot be read"),
    ):
        with pytest.raises(LinkSettings, match=words):
            parse(data, "x")


def test_an_end_that_is_its_own_peer_or_whose_key_is_open_is_refused(tmp_path: Path) -> None:
    me = identity("alice")
    (tmp_path / "me").write_bytes(me.pem())
    (tmp_path / "peer").write_bytes(me.public.pem())
    with pytest.raises(LinkSettings, match="open to others"):
        load_signers(End.A, "l", tmp_path / "me", tmp_path / "peer")
    (tmp_path / "me").chmod(0o600)
    with pytest.raises(LinkSettings, match="own identity"):
        load_signers(End.A, "l", tmp_path / "me", tmp_path / "peer")
    with pytest.raises(LinkSettings, match="No such file"):
        load_signers(End.A, "l", tmp_path / "me", tmp_path / "nobody")
    assert "PRIVATE" not in repr(ends()) and me.pem().decode()[40:60] not in repr(ends())


# A block that is signed


def tickets(
    a: Signers, b: Signers, session_a: bytes = SESSION, session_b: bytes = SESSION
) -> Callable[[str], Authenticator]:
    chosen = {"A": (a, session_a), "B": (b, session_b)}
    return lambda name: SignedTicket(SIGNED, *chosen[name])


def passed(side: Side) -> bool:
    return side.outcome is not None and side.outcome.reason is None


def test_a_signed_block_gives_keys_and_the_first_tickets() -> None:
    bench = Bench(TERMS, refills=2, ticket=tickets(*ends()), nature=1)
    alice, bob = bench.run()
    assert passed(alice) and passed(bob), (alice.error, bob.error)
    assert alice.outcome.keys == bob.outcome.keys and alice.kept == bob.kept
    assert [len(each) for each in alice.kept] == [TICKET_BYTES] * 2 and len(set(alice.kept)) == 2
    assert alice.outcome.ledger == bob.outcome.ledger and alice.outcome.ledger.balance() == 0
    assert alice.outcome.ledger.authenticated == 2 * 8 * TICKET_BYTES
    tags = [body for _sender, body in bench.frames if body[0] in (Kind.AUTH, Kind.COMMIT)]
    assert [len(body) for body in tags] == [1 + SIGNATURE_BYTES] * 3


@pytest.mark.parametrize("wrong", ["link", "identity", "session"])
def test_an_end_of_another_link_identity_or_session_gets_no_key(wrong: str) -> None:
    a, b = ends()
    given = {
        "link": tickets(a, ends("m")[1]),
        "identity": tickets(a, Signers(End.B, "l", identity("eve"), identity("alice").public)),
        "session": tickets(a, b, SESSION, b"\1" + SESSION[1:]),
    }[wrong]
    alice, bob = Bench(TERMS, ticket=given, nature=1).run()
    assert not passed(alice) and not passed(bob) and alice.kept is None and bob.kept is None
    assert isinstance(alice.error, Forged)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(Kind)[5:]), st.integers(0, 10**9))
def test_any_flipped_bit_of_a_signed_block_aborts(kind: Kind, where: int) -> None:
    touched: list[str] = []

    def flip(_number: int, _sender: str, body: bytes) -> list[bytes]:
        if body[0] != kind or touched:
            return [body]
        bit = where % (8 * len(body))
        touched.append(kind.name)
        return [flipped(body, bit)]

    bench = Bench(TERMS, ticket=tickets(*ends()), tamper=flip)
    alice, bob = bench.run()
    assert not touched or not passed(alice)
    assert not passed(bob) or not touched or touched == ["COMMIT"]


def test_a_recorded_signed_block_and_reflected_tags_convince_nobody() -> None:
    first = Bench(TERMS, ticket=tickets(*ends()), nature=1)
    first.run()
    recorded = iter([body for sender, body in first.frames if sender == "A"])

    def replay(_number: int, sender: str, body: bytes) -> list[bytes]:
        return [next(recorded, b"")] if sender == "A" else [body]

    alice, bob = Bench(TERMS, ticket=tickets(*ends()), tamper=replay, nature=1).run()
    assert not passed(alice) and not passed(bob)
    last: list[bytes] = []

    def reflect(_number: int, sender: str, body: bytes) -> list[bytes]:
        if body[0] == Kind.AUTH and sender == "B":
            last.append(body)
        return [last[0]] if body[0] == Kind.AUTH and sender == "A" else [body]

    alice, bob = Bench(TERMS, ticket=tickets(*ends()), tamper=reflect, nature=1).run()
    assert last and isinstance(bob.error, Forged) and not passed(alice)


def test_an_end_signs_no_tag_of_the_other() -> None:
    a, _b = ends()
    ticket = SignedTicket(SIGNED, a, SESSION)
    with pytest.raises(LinkError, match="its own"):
        ticket.tag(0, Transcript())
    assert not ticket.fits(1, Transcript(), ticket.tag(1, Transcript())) and not ticket.fits(3, Transcript(), b"")
    assert repr(ticket) == "SignedTicket()"


# The pad


def state(folder: Path, end: str = "a", head: bytes = HEAD) -> LinkState:
    folder.mkdir(exist_ok=True)
    (folder / "head").write_bytes(head)
    (folder / "head").chmod(0o600)
    return LinkState(folder, folder / "head", "l", end, signed=True)


def test_blocks_are_signed_until_one_under_a_ticket_has_passed_and_never_again(tmp_path: Path) -> None:
    a = state(tmp_path / "a")
    for block in range(3):  # two that gave nothing
        assert a.next_ticket() == SIGNED and a.refills_wanted() == 4 and a.refills_wanted(1) == 1 and a.unproven
        with pytest.raises(BadFrame, match="out of step"):
            a.spend_signed(block + 1)
        with pytest.raises(BadFrame, match="out of step"):
            a.spend(SIGNED, block)
        a.spend_signed(block)
        a = state(tmp_path / "a")
        assert a.next_block == block + 1 == a.spent
    a.refill(2, [os.urandom(TICKET_BYTES) for _ in range(4)], signed=True)
    assert a.signed_blocks == 1 and a.unproven and a.next_ticket() == REFILL_BASE + 8
    a.spend(a.next_ticket(), 3)
    a.refill(3, [os.urandom(TICKET_BYTES) for _ in range(2)])
    a = state(tmp_path / "a")
    assert not a.unproven and a.tickets_left == 5
    for block in range(4, 9):
        a.spend(a.next_ticket(), block)
    for again in range(2):
        with pytest.raises(PadEmpty, match="qvpn-qkd reseed"):
            a.next_ticket()
        with pytest.raises(PadEmpty):
            a.spend_signed(9)
        a = state(tmp_path / "a") if again == 0 else a
    a.reseed()
    a = state(tmp_path / "a")
    assert a.unproven and a.next_ticket() == SIGNED and a.next_block == 9


def test_tickets_that_one_end_lost_with_the_commit_are_forgotten_and_a_block_is_signed_again(tmp_path: Path) -> None:
    """Bob keeps them before his last word, which never arrives."""
    a, b = state(tmp_path / "a"), state(tmp_path / "b", "b")
    for each in (a, b):
        each.spend_signed(0)
    b.refill(0, [os.urandom(TICKET_BYTES) for _ in range(4)], signed=True)
    of_a, of_b = a.claims(frozenset()), b.claims(frozenset())
    a.settle(of_b)
    b.settle(of_a)
    assert a.next_ticket() == b.next_ticket() == SIGNED and a.next_block == b.next_block == 1


def test_a_couriered_pad_and_a_head_are_not_taken_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(LinkSettings, match="signs its first block"):
        state(tmp_path / "a", head=make_pad(4096))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "head").write_bytes(HEAD)
    (tmp_path / "b" / "head").chmod(0o600)
    with pytest.raises(LinkSettings, match="no authentication pad"):
        LinkState(tmp_path / "b", tmp_path / "b" / "head", "l", "a")
    (tmp_path / "b" / "head").write_bytes(make_pad(4096))
    with pytest.raises(LinkSettings, match="couriered pad"):
        LinkState(tmp_path / "b", tmp_path / "b" / "head", "l", "a").reseed()


# Files and processes


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", "keysource.qkd", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=env, timeout=60)


def test_pair_writes_identities_and_no_pad(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pair", str(tmp_path), "--bootstrap", "signature"])
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.rglob("*.pad"))
    for site, other in (("alice", "bob"), ("bob", "alice")):
        config = load(tmp_path / site / "link.toml")
        assert isinstance(config, EndConfig) and config.identities is not None and config.name == "alice-bob"
        assert (tmp_path / site / "peer.pub").read_bytes() == (tmp_path / other / "identity.pub").read_bytes()
        assert config.auth_key == tmp_path / site / "link-state" / "head"
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "alice" / "link.toml")])
    theirs = parse_public((tmp_path / "bob" / "identity.pub").read_bytes(), "x")
    assert theirs.readable in checked.stdout and "computational" in checked.stdout
    apart = ["pair", str(tmp_path / "x"), "--bootstrap", "signature", "--fibre-host", "h"]
    for line in (apart, ["reseed", str(tmp_path / "alice" / "link.toml")]):
        assert isinstance(CliRunner().invoke(app, line).exception, LinkSettings)


@pytest.mark.parametrize(("old", "new", "key", "says"), [
    ('identity = "identity.pem"', "", "identity", "required"),
    ('peer_identity = "peer.pub"', "", "peer_identity", "required"),
    ('name = "alice-bob"', "", "name", "required"),
    ('owner =', 'auth_key = "auth.pad"\nowner =', "auth_key", "no place"),
    ('auth_bootstrap = "signature"', "", "auth_key", "required"),
    ('auth_bootstrap = "signature"', 'auth_bootstrap = "hope"', "auth_bootstrap", "psk"),
    ("spawn_fibre = true", "spawn_fibre = false", "spawn_fibre", "couriered pad"),
])  # fmt: skip
def test_each_mistake_of_a_signing_end_names_its_key(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    plan = PairPlan(Address("127.0.0.1", 1), Address("127.0.0.1", 2), bootstrap="signature")
    file, _ = write_pair(tmp_path, plan)
    text = file.read_text()
    if key == "spawn_fibre":
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("pace", "control"))) + "\n"
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(LinkSettings) as error:
        load(file)
    assert f'"{key}"' in str(error.value) and says in str(error.value)


async def test_a_link_without_pad_signs_its_first_block_then_uses_key_and_comes_back(tmp_path: Path) -> None:
    async with LinkLab(tmp_path, bootstrap="signature") as lab:
        assert not list(tmp_path.rglob("*.pad"))
        await lab.start()
        lab.attach()
        await lab.blocks(3, within=60)
        signed, *others = lab.proxy.tickets
        assert signed == SIGNED and others and all(REFILL_BASE <= number < SIGNED for number in others)
        assert len(set(others)) == len(others), "a ticket was used twice"
        a, b = await lab.both()
        for status in (a, b):
            assert status["auth_bootstrap"] == "signature" and status["signed_blocks"] == 1
            assert "computational" in status["authenticity"] and "SIGNATURES" not in status["authenticity"]
            assert status["ledger_balance"] == 0 and status["tickets_left"] >= 4
        assert a["ledger"] == b["ledger"]
        heads = [(tmp_path / site / "link-state" / "head").read_bytes() for site in ("alice", "bob")]
        assert heads[0] == heads[1] and len(heads[0]) == HEAD_BYTES
        await lab.kill("bob")
        await lab.start("bob")
        await lab.blocks(1)
        assert lab.proxy.tickets.count(SIGNED) == 1
        words = lab.words()
        assert "SIGNATURES: computational" in (tmp_path / "log").read_text() and heads[0].hex()[:16] not in words


async def test_a_signed_first_block_that_is_touched_or_lost_is_signed_again_and_a_stranger_gets_nothing(
    tmp_path: Path,
) -> None:
    """In the middle: a frame of the first block is flipped, then the last word of one is lost; the tickets that only
    Bob has are forgotten.  Before, a Bob with another identity asks in vain."""
    async with LinkLab(tmp_path, bootstrap="signature") as lab:
        deeds = ["flip", "lose"]

        def hands(_sender: str, body: bytes) -> bytes | None:
            if deeds and body[0] == (Kind.PARITY if deeds[0] == "flip" else Kind.COMMIT):
                return body[:-1] + bytes([body[-1] ^ 0x80]) if deeds.pop(0) == "flip" else None
            return body

        right = (tmp_path / "bob" / "identity.pem").read_bytes()
        (tmp_path / "bob" / "identity.pem").write_bytes(generate().pem())
        await lab.start()
        await until(lambda: "not signed by this link's other end" in lab.words(), 20, lab.words)
        assert not (tmp_path / "bob" / "link-state" / "head").exists() and not lab.proxy.tickets
        await lab.stop("bob")
        (tmp_path / "bob" / "identity.pem").write_bytes(right)
        lab.proxy.hands = hands
        await lab.start("bob")
        lab.attach()
        await lab.blocks(2, within=60)
        assert not deeds and lab.proxy.tickets[:3] == [SIGNED] * 3 and SIGNED not in lab.proxy.tickets[3:]
        for site in ("alice", "bob"):
            status = await lab.status(site)
            assert status["signed_blocks"] >= 1 and status["ledger_balance"] == 0
            assert "SIGN" not in status["authenticity"]


@pytest.mark.skipif(not LONG, reason="six processes are started: QVPN_TEST_LONG=1")
async def test_reseeding_one_end_stops_the_link_and_both_let_it_go_on(tmp_path: Path) -> None:
    async with LinkLab(tmp_path, bootstrap="signature") as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(2, within=60)
        busy = command("reseed", str(lab.file("alice")))
        assert busy.returncode == 2 and "another process" in busy.stderr
        await lab.stop("alice")
        assert "computational" in command("reseed", str(lab.file("alice"))).stdout
        await lab.start("alice")
        assert await lab.processes["bob"].wait() == 1, "only one operator has said so"
        assert "qvpn-qkd reseed FILE at each" in lab.words() and "Traceback" not in lab.words()
        assert command("reseed", str(lab.file("bob"))).returncode == 0
        before = lab.proxy.tickets.count(SIGNED)
        await lab.start("bob")
        await lab.blocks(2, within=60)
        assert lab.proxy.tickets.count(SIGNED) >= before
        assert (await lab.status("alice"))["signed_blocks"] == 2


def test_a_plan_is_of_one_kind() -> None:
    """What the other end is told of the tests in Bob's gates is in the plan's digest as well."""
    from keysource.qkd.presets import PRESETS

    preset = PRESETS["demo"]
    plain, tested = preset.plan(), preset.plan(tests=True)
    assert tested.n_z < 0.96 * plain.n_z and tested.length < plain.length
    digests = {plan.digest(preset.optics, preset.security) for plan in (plain, tested, replace(plain))}
    assert len(digests) == 2
    pairs = PRESETS["demo-bbm92"]
    assert pairs.plan(tests=True).n_z < 0.92 * pairs.plan().n_z, "both sites' gates are tests, each by itself"
