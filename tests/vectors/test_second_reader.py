"""Somebody who has PROTOCOL.md and not the code decodes the vectors; a byte that is not as it says stops them."""

import ast
import copy
import importlib.util
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, x25519

HERE = Path(__file__).parent
SOURCE = HERE / "second_reader.py"
FILES = {
    name: json.loads((HERE / name).read_text("ascii")) for name in ("suite01.json", "suite02.json", "suite03.json")
}
CASES = [(name, place) for name, file in FILES.items() for place in range(len(file["handshakes"]))]
IDS = [f"{name[:-5]}-{FILES[name]['handshakes'][place]['name']}" for name, place in CASES]
REJECTED = (AssertionError, ValueError, IndexError, InvalidTag, InvalidSignature)
# R's secrets, and texts about the vector: nobody who reads as the initiator does needs them.
NOT_READ = {"name", "about", "mlkem_encapsulation_randomness", "x25519_secret_r"}


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("second_reader", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READER = _load().Reader
LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON tree that is neither null nor empty."""
    if isinstance(tree, dict | list):
        for name, below in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(below, (*path, name))
    elif tree is not None and tree != "":
        yield path


def _changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    section = tree
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return tree


def _value(tree: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _flipped(text: str, byte: int, bit: int = 0) -> str:
    raw = bytearray(bytes.fromhex(text))
    raw[byte] ^= 1 << bit
    return raw.hex()


def _wire(handshake: Any) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
    """Every datagram, inner payload and record: its path, and the bytes that a reader can find wrong."""
    for path in _leaves(handshake):
        if path[-1] == "record" or (path[0] in ("datagrams", "payloads") and len(path) == 4):
            places = range(len(_value(handshake, path)) // 2)
            # An inner message in one piece: its random id is compared with nothing, the tag of the record covers it.
            alone = path[0] == "payloads" and len(_value(handshake, path[:-1])) == 1
            yield path, [place for place in places if not (alone and 4 <= place < 8)]


def test_the_reader_is_short_and_knows_nothing_of_qvpn() -> None:
    source = SOURCE.read_text("utf-8")
    assert len(source.splitlines()) <= 150
    assert max(map(len, source.splitlines())) <= 118
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"hashlib", "hmac", "io", "struct", "typing", "uuid", "cryptography"}


@pytest.mark.parametrize(("name", "place"), CASES, ids=IDS)
def test_reads_every_handshake_and_record(name: str, place: int) -> None:
    READER(FILES[name], FILES[name]["handshakes"][place])


@pytest.mark.parametrize(("name", "place"), CASES, ids=IDS)
def test_fragments_may_come_in_any_order(name: str, place: int) -> None:
    handshake = copy.deepcopy(FILES[name]["handshakes"][place])
    for group in handshake.get("payloads", []) + handshake.get("datagrams", [])[2:]:
        group["payloads" if "payloads" in handshake else "datagrams"].reverse()
    READER(FILES[name], handshake)


@pytest.mark.parametrize(("name", "place"), CASES, ids=IDS)
def test_a_flipped_byte_on_the_wire_is_rejected(name: str, place: int) -> None:
    """Headers, macs and tags byte by byte (a dozen of them without QVPN_TEST_LONG), and a few bytes between."""
    handshake, chance = FILES[name]["handshakes"][place], random.Random(place)
    for path, places in _wire(handshake):
        ends = places[:16] + places[-32:]
        chosen = {*(ends if LONG else chance.sample(ends, min(12, len(ends)))), *chance.choices(places, k=4)}
        for byte in chosen:
            with pytest.raises(REJECTED):
                READER(
                    FILES[name],
                    _changed(handshake, path, _flipped(_value(handshake, path), byte, chance.randrange(8))),
                )


@pytest.mark.parametrize(("name", "place"), CASES, ids=IDS)
def test_every_value_of_a_vector_is_compared_or_used(name: str, place: int) -> None:
    handshake = FILES[name]["handshakes"][place]
    unread = []
    for path in _leaves(handshake):
        value = _value(handshake, path)
        if path[-1] in NOT_READ or path[0] == "carrier" or (path[:2] == ("datagrams", 1) and len(path) == 3):
            continue
        if isinstance(value, bool):
            other: Any = not value
        elif isinstance(value, int):
            other = value + 1
        else:
            other = "0" + value[1:] if value[0] != "0" else "1" + value[1:]
        try:
            READER(FILES[name], _changed(handshake, path, other))
        except REJECTED:
            continue
        unread.append(path)
    assert unread == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_read_fits(name: str) -> None:
    """What an initiator does not use: seeds of the identities, R's X25519 secret, and labels."""
    file = FILES[name]
    signer = mldsa.MLDSA87PrivateKey if file["suite"] == 3 else mldsa.MLDSA65PrivateKey
    for site in (file["I"], file["R"]):
        ed = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(site["ed25519_seed"])).public_key()
        ml = signer.from_seed_bytes(bytes.fromhex(site["mldsa_seed"])).public_key()
        assert ed.public_bytes_raw().hex() == site["ed25519_public"]
        assert ml.public_bytes_raw().hex() == site["mldsa_public"]
    for handshake in file["handshakes"]:
        exchange = handshake["exchange"]
        secret = x25519.X25519PrivateKey.from_private_bytes(bytes.fromhex(exchange["x25519_secret_r"]))
        assert bytes.fromhex(exchange["m2c"])[-33:-1] == secret.public_key().public_bytes_raw()
        if handshake["carrier"] == "cold":
            retry = handshake["datagrams"][1]
            assert (retry["sender"], retry["type"], retry["cookie"]) == ("R", 5, False)
            assert handshake["gate"]["address_i"] == "00" * 10 + "ffff" + "c0000201" + f"{51840:04x}"
