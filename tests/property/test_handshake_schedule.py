"""One bit of any input changes every key that comes out; and the schedule is what the text says, by other code."""

from __future__ import annotations

from dataclasses import astuple

from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.handshake import schedule
from qvpn.wire.codec import encode_key
from qvpn.wire.messages import KeyName, Outcome, WireOrigin
from tests.vectors import recompute

HASH = st.binary(min_size=48, max_size=48)
KEY = st.binary(min_size=32, max_size=32)


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, object]:
    return {
        "suite": draw(st.integers(1, 3)),
        "fpr_i": draw(HASH),
        "fpr_r": draw(HASH),
        "psk": draw(st.none() | KEY),
        "chain": draw(st.none() | HASH),
        "epoch": draw(st.integers(0, 2**32 - 1)),
        "secret": draw(st.binary(min_size=64, max_size=64)),
        "m1": draw(st.binary(min_size=1, max_size=60)),
        "m2c": draw(st.binary(min_size=1, max_size=60)),
        "p2": draw(st.binary(min_size=1, max_size=30)),
        "e2": draw(st.binary(min_size=16, max_size=60)),
        "p3": draw(st.binary(min_size=1, max_size=30)),
        "e3": draw(st.binary(min_size=16, max_size=60)),
        "name": KeyName(
            draw(st.sampled_from(["kme", "box"])),
            draw(st.sampled_from(["key-1", "018f3a52-91d2-8c44-9f10-2b5a0d6c7e81"])),
            draw(st.sampled_from(WireOrigin)),
            draw(st.integers(0, 3)),
        ),
        "sae_i": draw(st.sampled_from(["sae-a", "sae-b"])),
        "sae_r": draw(st.sampled_from(["sae-c", "sae-d"])),
        "k_qkd": draw(KEY),
    }


def outputs(v: dict) -> tuple[bytes, ...]:  # type: ignore[type-arg]
    ctx = schedule.context(v["suite"], v["fpr_i"], v["fpr_r"], v["psk"], v["epoch"])
    kex = schedule.key_exchange(ctx, v["chain"], v["psk"], v["secret"], v["m1"], v["m2c"])
    th3 = schedule.th3(schedule.th2(kex.th1, v["p2"]), v["e2"], v["p3"])
    th4 = schedule.th4(th3, v["e3"])
    keys = schedule.keys_info([v["name"]], v["sae_i"], v["sae_r"])
    return astuple(schedule.qkd_round(kex, v["k_qkd"], v["e3"], Outcome.OK, keys, th4))


def by_the_text(v: dict) -> tuple[bytes, ...]:  # type: ignore[type-arg]
    h, lp, expand = recompute.h, recompute.lp, recompute.expand
    ctx = h(
        b"qvpn1",
        bytes([v["suite"]]),
        v["fpr_i"],
        v["fpr_r"],
        bytes([v["psk"] is not None]),
        v["epoch"].to_bytes(4, "big"),
    )
    cs0 = recompute.hmac384(v["chain"] or bytes(48), v["psk"] or bytes(32))
    cs1, _ = recompute.cas_kdf(cs0, v["secret"], v["m1"], v["m2c"], b"qvpn1 kex", ctx)
    th4 = h(h(h(h(ctx, v["m1"], v["m2c"]), v["p2"]), v["e2"], v["p3"]), v["e3"])
    keys = lp(encode_key(v["name"])) + lp(v["sae_i"].encode()) + lp(v["sae_r"].encode())
    cs2, km = recompute.cas_kdf(cs1, v["k_qkd"], v["e3"], b"\0", b"qvpn1 qkd", h(ctx, keys, th4))
    confirm = recompute.hmac384(expand(km[:48], b"R confirm" + th4, 32), th4)[:32]
    traffic = [expand(km[:48], b"traffic " + way + th4, 48) for way in (b"I2R", b"R2I")]
    return (confirm, *traffic, expand(cs2, b"next chain" + th4, 48))


@given(inputs())
def test_the_schedule_is_the_text(values: dict[str, object]) -> None:
    assert outputs(values) == by_the_text(values)


@settings(max_examples=60)
@given(values=inputs(), bit=st.integers(0))
def test_one_bit_of_any_input_changes_every_output(values: dict[str, object], bit: int) -> None:
    before = outputs(values)
    for name, value in values.items():
        changed: object
        if isinstance(value, bytes):
            broken = bytearray(value)
            broken[bit // 8 % len(broken)] ^= 1 << bit % 8
            changed = bytes(broken)
        elif value is None:
            changed = bytes([1]) * (32 if name == "psk" else 48)
        elif isinstance(value, KeyName):
            changed = KeyName(value.label, value.key_id, value.origin, value.hops + 1)
        elif isinstance(value, str):
            changed = value + "x"
        else:
            assert isinstance(value, int)
            changed = value ^ 1
        after = outputs({**values, name: changed})
        assert not set(before) & set(after), name


@given(inputs())
def test_the_psk_of_zeros_is_not_the_absence_of_one(values: dict[str, object]) -> None:
    """Both feed the same 32 bytes in; ctx tells them apart."""
    with_psk, without = outputs({**values, "psk": bytes(32)}), outputs({**values, "psk": None})
    assert not set(with_psk) & set(without)


@given(values=inputs(), lane=st.integers(1, 15))
def test_directions_and_lanes_have_keys_of_their_own(values: dict[str, object], lane: int) -> None:
    final = schedule.Final(*outputs(values))
    keys = [final.record_key(way, number) for way in (True, False) for number in (0, lane)]
    assert len(set(keys)) == 4 and {len(key) for key in keys} == {32}
    assert schedule.chain_id(final.chain) not in final.chain
