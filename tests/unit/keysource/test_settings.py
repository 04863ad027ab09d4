"""``HOST:PORT``, and what pydantic finds as one sentence that does not repeat the value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from keysource.errors import BadSettings
from keysource.settings import Address, parse_settings


@given(st.from_regex(r"[a-z0-9.-]{1,20}|[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}", fullmatch=True), st.integers(1, 65535))
def test_what_is_shown_can_be_read_again(host: str, port: int) -> None:
    address = Address(host, port)
    assert Address.parse(str(address)) == address
    assert str(address).startswith("[") is (":" in host)


@pytest.mark.parametrize("text", ["a::b:80", "2001:db8::1:8443", "::1:80", "::80", "a:1:2"])
def test_an_ipv6_address_without_brackets_is_refused(text: str) -> None:
    """Nobody can tell where the host ends."""
    with pytest.raises(ValueError, match="stands in brackets"):
        Address.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":80", "[]:80", "h:0", "h:65536", "h:-1", "h:8²", "h:" + "9" * 5000, "h h:1", "[[h]:1"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"not HOST:PORT|brackets"):
        Address.parse(text)


def test_port_0_only_for_who_asks() -> None:
    assert Address.parse("[::1]:0", lowest_port=0) == Address("::1", 0)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int
    inner: list[int] = []


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        ({}, "number", "number: is required"),
        ({"number": 1, "x": "secret"}, "x", "x: no such key"),
        ({"number": "secret"}, "number", "number: Input should be a valid integer"),
        ({"number": 1, "inner": [1, "secret"]}, "inner.1", "inner.1: Input should be"),
    ],
)
def test_a_mistake_is_a_sentence_without_the_value(table: dict[str, object], key: str, words: str) -> None:
    with pytest.raises(BadSettings) as caught:
        parse_settings(_Table, table)
    assert caught.value.key == key
    assert str(caught.value).startswith(words)
    assert "secret" not in str(caught.value)
