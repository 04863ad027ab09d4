"""The nodes' messages: whatever comes in, ``decode_untrusted`` gives a message or raises ``BadMessage``."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.network import messages, shares
from keysource.network.messages import ACK, EXT_KEYS, OURS, VOID, BadMessage, decode_untrusted, encode

URL = "https://kme-a:1"
TRANSFER = "0b0e7f5e-0000-4000-8000-00000000000a"
UNITS = tuple(f"0b0e7f5e-0000-4000-8000-{number:012x}" for number in range(7))


def share() -> messages.Share:
    header = messages.Header(
        transfer=TRANSFER,
        connection="long",
        block=5,
        count=2,
        path=("a", "b", "c"),
        index=0,
        hop=1,
        attempt=2,
        kem=random.Random(1).randbytes(shares.CT_BYTES),
        link="b-c",
        pad=UNITS[:5],
        mac=UNITS[5],
    )
    return messages.Share(header=header, masked=random.Random(2).randbytes(shares.wrapped_bytes(2)), tag=bytes(16))


ALL = [
    share(),
    messages.Ack(transfer=TRANSFER, index=0, attempt=1, status="key not present", first_block=3, next_block=9),
    messages.Ack(transfer=TRANSFER, index=0, attempt=1, status="failed", message="no", at=("a", "b")),
    messages.Void(transfer=TRANSFER),
    messages.Open(transfer=TRANSFER, connection="long", block=0, count=1, paths=(("a", "c"),), origin="relayed"),
    messages.Ready(transfer=TRANSFER, ek=bytes(shares.EK_BYTES)),
    messages.Proof(transfer=TRANSFER, tag=bytes(32)),
    messages.Commit(transfer=TRANSFER, connection="long", tag=bytes(32)),
    messages.Verdict(transfer=TRANSFER, committed=False, message="gone", index=1, altered=True),
    messages.Ask(),
    messages.Stock(links=(messages.LinkStock(link="a-b", units=7, up=True, alarm=False),)),
]
bodies = [encode(message, "a", URL) for message in ALL]
paths = st.sampled_from([EXT_KEYS, ACK, VOID, OURS, "/kmapi/v1/other"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def decoded(path: str, body: bytes) -> messages.Message | None:
    try:
        return decode_untrusted(path, body, URL + ACK)
    except BadMessage as error:
        assert len(str(error)) < 400
        return None


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_round_trip(message: messages.Message) -> None:
    path, body = encode(message, "a", URL)
    assert decode_untrusted(path, body, URL + ACK) == message
    assert repr(message) == type(message).__name__


def test_the_shape_is_that_of_020() -> None:
    _path, body = encode(share(), "b", URL)
    read = json.loads(body)
    assert set(read) == {
        "keys",
        "initiator_sae_id",
        "target_sae_ids",
        "ack_callback_url",
        "extension_mandatory",
    }
    assert read["keys"][0]["key_ID"] == TRANSFER and base64.b64decode(read["keys"][0]["key"])
    assert (read["initiator_sae_id"], read["target_sae_ids"]) == ("a", ["c"])


@given(paths, st.binary(max_size=300))
def test_any_bytes(path: str, body: bytes) -> None:
    decoded(path, body)


@given(paths, values)
def test_any_json(path: str, value: Any) -> None:
    decoded(path, json.dumps(value).encode())


@settings(max_examples=300)
@given(st.sampled_from(bodies), st.data())
def test_a_message_with_a_bent_field(original: tuple[str, bytes], data: st.DataObject) -> None:
    path, body = original
    root = json.loads(body)
    spots: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            spots.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(root)
    holder, key = data.draw(st.sampled_from(spots))
    if data.draw(st.booleans()):
        holder[key] = data.draw(values)
    elif isinstance(holder, dict):
        holder["more"] = holder.pop(key)
    read = decoded(path, json.dumps(root).encode())
    if read is not None:  # still a message: then it says what it was told to say, and no more
        assert decode_untrusted(*encode(read, "a", URL), URL + ACK) == read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ack_callback_url": "https://elsewhere:1/kmapi/v1/ack"}, "ack_callback_url"),
        ({"initiator_sae_id": "b"}, "ends"),
        ({"target_sae_ids": ["b"]}, "ends"),
        ({"extension_mandatory": [{"abc_route_type": 1}]}, "extension_mandatory"),
        ({"keys": [{"key_ID": TRANSFER, "key": "AAAA"}]}, "length"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    path, body = encode(share(), "b", URL)
    with pytest.raises(BadMessage, match=said):
        decode_untrusted(path, json.dumps(json.loads(body) | change).encode(), URL + ACK)


def test_a_unit_twice_is_refused() -> None:
    bad = share()
    bad = bad.model_copy(update={"header": bad.header.model_copy(update={"mac": UNITS[0]})})
    with pytest.raises(BadMessage, match="twice"):
        decode_untrusted(*encode(bad, "b", URL), URL + ACK)


def test_too_long_or_too_deep() -> None:
    with pytest.raises(BadMessage, match="too long"):
        decode_untrusted(OURS, b" " * (messages.MAX_BODY + 1), URL)
    with pytest.raises(BadMessage):
        decode_untrusted(OURS, b"[" * 100_000, URL)
