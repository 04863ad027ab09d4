"""The data formats of ETSI GS QKD 014 V1.1.1 clause 6: golden JSON with every field under its exact name, a strict
server's reading of requests, a tolerant client's reading of answers.

The golden objects are written by hand from the tables of clause 6 (names, JSON types, what is optional), not taken
from an output of this code.
"""

from __future__ import annotations

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource.errors import BadAnswer
from keysource.etsi014 import messages
from keysource.etsi014.messages import (
    Error,
    KeyContainer,
    KeyEntry,
    Status,
    container_untrusted,
    error_details_untrusted,
    error_text_untrusted,
    key_ids_untrusted,
    normalise_key_id,
    request_untrusted,
    status_untrusted,
)
from keysource.kme import peering

KEY = bytes(range(32))
KEY_ID = "bc490419-7d60-487f-adc1-4ddcc177c139"

STATUS = {
    "source_KME_ID": "KME_A",
    "target_KME_ID": "KME_B",
    "master_SAE_ID": "SAE_A",
    "slave_SAE_ID": "SAE_B",
    "key_size": 256,
    "stored_key_count": 25000,
    "max_key_count": 100000,
    "max_key_per_request": 128,
    "max_key_size": 256,
    "min_key_size": 256,
    "max_SAE_ID_count": 0,
    "status_extension": {"qvpn_origin": "qkd"},
}
KEY_REQUEST = {
    "number": 20,
    "size": 512,
    "additional_slave_SAE_IDs": ["SAE_C", "SAE_D"],
    "extension_mandatory": [{"abc_route_type": "direct"}],
    "extension_optional": [{"abc_max_age": 30000}],
}
KEY_IDS = {
    "key_IDs": [
        {"key_ID": KEY_ID, "key_ID_extension": {"abc_x": 1}},
        {"key_ID": "0a782fb5-3434-48fe-aa4d-14f41d46cf92"},
    ],
    "key_IDs_extension": {"abc_y": None},
}
CONTAINER = {
    "keys": [
        {
            "key_ID": KEY_ID,
            "key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
            "key_ID_extension": {"abc_x": 1},
            "key_extension": {"qvpn_origin": "qkd", "qvpn_hops": 0},
        }
    ],
    "key_container_extension": {"abc_z": [1]},
}
ERROR = {
    "message": "not all extension_mandatory parameters are supported",
    "details": [{"extension_mandatory_unsupported": "abc_route_type is not supported"}],
}


@pytest.mark.parametrize(
    ("model", "golden"),
    [
        (Status, STATUS),
        (messages.KeyRequest, KEY_REQUEST),
        (messages.KeyIDs, KEY_IDS),
        (KeyContainer, CONTAINER),
        (Error, ERROR),
    ],
)
def test_golden_objects_go_through_unchanged(model, golden):
    assert json.loads(messages.to_json(model.model_validate(golden))) == golden


def test_the_verbatim_messages():
    """Clause 6.5 and tables 4, 6, 8; clients match on them."""
    assert messages.SIZE_NOT_MULTIPLE == "size shall be a multiple of 8"
    assert messages.MANDATORY_UNSUPPORTED == "not all extension_mandatory parameters are supported"
    assert messages.MANDATORY_UNMET == "not all extension_mandatory request options could be met"
    assert messages.OPTIONAL_UNHANDLED == "not all extension_optional request options handled"
    assert messages.KEYS_NOT_FOUND == "one or more keys specified are not found on KME"


def test_optional_fields_that_were_not_set_do_not_appear():
    assert json.loads(messages.to_json(Error(message="m"))) == {"message": "m"}
    entry = KeyEntry(key_ID=KEY_ID, key="AA==")
    assert json.loads(messages.to_json(KeyContainer(keys=[entry]))) == {"keys": [{"key_ID": KEY_ID, "key": "AA=="}]}


def test_an_absent_body_and_an_empty_object_are_a_key_request_for_one_key():
    for body in (b"", b"{}"):
        asked = request_untrusted(body)
        assert (asked.number, asked.size, asked.additional_slave_SAE_IDs) == (1, None, [])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"number": "3"}', "number"),
        ('{"number": 1.0}', "number"),
        ('{"number": true}', "number"),
        ('{"number": null}', "number"),
        ('{"size": "256"}', "size"),
        ('{"size": null}', "size"),
        ('{"additional_slave_SAE_IDs": "x"}', "additional_slave_SAE_IDs"),
        ('{"additional_slave_SAE_IDs": [1]}', "additional_slave_SAE_IDs"),
        ('{"extension_mandatory": {"a": 1}}', "extension_mandatory"),
        ('{"extension_optional": ["a"]}', "extension_optional"),
        ("[]", "object"),
        ("{", "JSON"),
        ("\xff", "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"number": 1' + "0" * 6000 + "}", "JSON"),
    ],
)
def test_a_server_refuses_wrong_types_by_name(body, field):
    with pytest.raises(ValueError, match=field):
        request_untrusted(body.encode("latin-1"))


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        '{"key_IDs": null}',
        '{"key_IDs": ["x"]}',
        '{"key_IDs": [{}]}',
        '{"key_IDs": [{"key_ID": 1}]}',
        "null",
        "",
    ],
)
def test_a_server_refuses_key_ids_of_wrong_form(body):
    with pytest.raises(ValueError, match=r"key_IDs|object|JSON"):
        key_ids_untrusted(body.encode())


def test_a_server_ignores_fields_that_vendors_add():
    asked = key_ids_untrusted(b'{"key_IDs": [{"key_ID": "x", "master_SAE_ID": "vendor"}], "extra": 1}')
    assert [entry.key_ID for entry in asked.key_IDs] == ["x"]


def test_a_client_forgives_null_extra_and_the_misspelling_of_table_11():
    entry = {"key_ID": KEY_ID.upper(), "key": base64.b64encode(KEY).decode(), "key_extension": None, "vendor": 1}
    for name in ("keys", "Keys"):
        body = json.dumps({name: [entry], "key_container_extension": None, "more": {}}).encode()
        [key] = container_untrusted(body, key_bytes=32)
        assert key.key_id == KEY_ID
        assert key.material == KEY
        assert key.extension == {}


@pytest.mark.parametrize(
    "keys",
    [
        [{"key_ID": KEY_ID, "key": base64.b64encode(KEY[:16]).decode()}],
        [{"key_ID": KEY_ID, "key": base64.b64encode(KEY + b"x").decode()}],
        [{"key_ID": KEY_ID, "key": "!" * 44}],
        [{"key_ID": KEY_ID, "key": "é" * 44}],
        [{"key_ID": KEY_ID, "key": None}],
        [{"key_ID": 7, "key": base64.b64encode(KEY).decode()}],
        [{"key_ID": "x" * 65, "key": base64.b64encode(KEY).decode()}],
        [{"key_ID": "", "key": base64.b64encode(KEY).decode()}],
        [{"key_ID": "a\nb", "key": base64.b64encode(KEY).decode()}],
        [{"key_ID": KEY_ID, "key": base64.b64encode(KEY).decode()}] * 2,
        ["x"],
        None,
        {},
    ],
)
def test_a_client_refuses_keys_of_wrong_form(keys):
    with pytest.raises(BadAnswer):
        container_untrusted(json.dumps({"keys": keys}).encode(), key_bytes=32)


def test_one_key_id_in_two_spellings_is_one_key_id():
    key = base64.b64encode(KEY).decode()
    body = json.dumps({"keys": [{"key_ID": KEY_ID, "key": key}, {"key_ID": KEY_ID.upper(), "key": key}]})
    with pytest.raises(BadAnswer, match="twice"):
        container_untrusted(body.encode(), key_bytes=32)


def test_no_key_stands_in_a_repr():
    key = base64.b64encode(KEY).decode()
    [delivered] = container_untrusted(json.dumps({"keys": [{"key_ID": KEY_ID, "key": key}]}).encode(), key_bytes=32)
    container = KeyContainer.model_validate(CONTAINER)
    assert KEY_ID in repr(delivered)
    for text in (repr(delivered), repr(container), repr(container.keys[0]), str(container.keys[0])):
        assert key not in text
        assert "\\x01\\x02" not in text


def test_a_status_with_nulls_and_strings_is_read_as_far_as_it_goes():
    answer = status_untrusted(b'{"stored_key_count": null, "key_size": "256", "status_extension": null}')
    assert (answer.stored_key_count, answer.key_size, answer.extension) == (None, None, {})
    assert status_untrusted(json.dumps(STATUS).encode()).stored_key_count == 25000
    with pytest.raises(BadAnswer):
        status_untrusted(b"[]")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"message": "no"}', "no"),
        (b'{"detail": "not here"}', "not here"),
        (b'{"detail": [{"loc": ["x"]}]}', '[{"loc": ["x"]}]'),
        (b'{"message": "a\\u001b[31mb"}', "a [31mb"),
        (b"<html><body>503</body></html>", ""),
        (b"", ""),
        (b'["x"]', ""),
        (json.dumps({"message": "x" * 5000}).encode(), "x" * 200),
    ],
)
def test_error_bodies_of_every_kind_become_a_short_printable_text(body, text):
    assert error_text_untrusted(body) == text


def test_details_are_merged_and_anything_else_is_ignored():
    assert error_details_untrusted(b'{"message": "m", "details": [{"a": 1}, 7, {"b": 2}]}') == {"a": 1, "b": 2}
    for body in (b"", b"[]", b'{"details": 3}', b"<html>"):
        assert error_details_untrusted(body) == {}


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_client_readers_raise_bad_answer_and_nothing_else(body):
    """Invariant: any bytes are read, or refused with BadAnswer; error readers never raise."""
    for read in (status_untrusted, lambda data: container_untrusted(data, key_bytes=32)):
        with contextlib.suppress(BadAnswer):
            read(body)
    assert len(error_text_untrusted(body)) <= 200
    error_details_untrusted(body)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@given(
    _json, st.sampled_from(["keys", "Keys", "message", "detail", "details", "status_extension", "key_IDs", "number"])
)
def test_json_of_any_shape_is_read_or_refused(value, name):
    body = json.dumps({name: value}).encode()
    for read, refusal in (
        (lambda data: container_untrusted(data, key_bytes=32), BadAnswer),
        (status_untrusted, BadAnswer),
        (request_untrusted, ValueError),
        (key_ids_untrusted, ValueError),
    ):
        with contextlib.suppress(refusal):
            read(body)
    error_text_untrusted(body)
    error_details_untrusted(body)


_reserve = {"link": _json, "keys": _json, "master_SAE_ID": _json, "slave_SAE_IDs": _json}
_key = {"key_ID": st.just("k") | _json, "block": _json, "token": st.just("t" * 20) | _json, "more": _json}
_deposit = {"pad": _json | st.just([["u", 1]]), "mac": _json | st.just(["v", 1]), "masked": _json, "tag": _json}
_whole = {"link": st.just("l"), "master_SAE_ID": st.just("m"), "slave_SAE_IDs": st.just(["s"]), "size": _json}
_whole |= {"origin": st.just("qkd") | _json, "hops": st.just(0) | _json, "tokens": _json}


@given(
    _json
    | st.fixed_dictionaries(_reserve)
    | st.fixed_dictionaries(_whole | {"keys": st.lists(st.fixed_dictionaries(_key | _deposit), max_size=2)})
)
def test_a_request_of_another_kme_of_any_shape_is_read_or_refused(value):
    body = json.dumps(value).encode()
    with contextlib.suppress(ValueError):
        peering.request_untrusted(peering.ReserveRequest, body).offers()
    with contextlib.suppress(ValueError):
        peering.request_untrusted(peering.DepositRequest, body).deposits()
    with contextlib.suppress(ValueError):
        peering.request_untrusted(peering.WithdrawRequest, body)


@given(st.text(max_size=80))
def test_a_normalised_key_id_stays_as_it_is(text):
    try:
        once = normalise_key_id(text)
    except BadAnswer:
        return
    assert normalise_key_id(once) == once
    assert 1 <= len(once) <= 64
