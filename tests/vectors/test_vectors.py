"""The vectors: made again byte for byte, recomputed from the text alone, and read by the product's decoders."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from qvpn.crypto.suites import SUITES
from qvpn.tunnel.keys import Cipher
from qvpn.tunnel.records import Opener, split_header
from qvpn.wire import codec, datagram
from qvpn.wire.fragments import Reassembler
from tests.vectors import generate, recompute

FILES = {
    code: json.loads((generate.FOLDER / name).read_text()) for code, name in zip(SUITES, generate.FILES, strict=True)
}
CASES = [(code, hs) for code, file in FILES.items() for hs in file["handshakes"]]
IDS = [f"suite{code}-{hs['name']}" for code, hs in CASES]


@pytest.mark.parametrize("code", SUITES)
def test_the_files_are_what_the_generator_writes(code: int) -> None:
    assert generate.text(code) == (generate.FOLDER / generate.FILES[code - 1]).read_text()


@pytest.mark.parametrize("code", SUITES)
def test_every_value_follows_from_the_text(code: int) -> None:
    assert recompute.check(FILES[code]) > 100


@pytest.mark.parametrize("field", ["ctx", "cs1", "th1", "hk_i", "m1", "x25519_secret_r"])
def test_the_check_notices_one_wrong_bit(field: str) -> None:
    """Else the test above could be empty."""
    file = copy.deepcopy(FILES[1])
    value = bytearray.fromhex(file["handshakes"][1]["exchange"][field])
    value[7] ^= 0x10
    file["handshakes"][1]["exchange"][field] = value.hex()
    with pytest.raises((AssertionError, ValueError)):
        recompute.check(file)


@pytest.mark.parametrize(("code", "hs"), CASES, ids=IDS)
def test_the_decoders_read_them(code: int, hs: dict[str, Any]) -> None:
    suite = SUITES[code]
    m1 = codec.decode_m1_untrusted(suite, bytes.fromhex(hs["exchange"]["m1"]))
    assert codec.encode_m1(m1).hex() == hs["exchange"]["m1"]
    m2 = codec.decode_m2_untrusted(suite, bytes.fromhex(hs["m2"]["message"]), (m1.chain_new, m1.chain_old))
    assert (m2.index.hex(), m2.clear.hex(), m2.sealed.hex()) == (
        hs["exchange"]["index_r"],
        hs["exchange"]["m2c"],
        hs["m2"]["e2"],
    )
    p2 = codec.decode_p2_untrusted(suite, bytes.fromhex(hs["m2"]["p2"] + hs["m2"]["signatures"]))
    assert codec.encode_p2(p2.body) == p2.raw
    for shown in hs["rounds"]:
        p3 = codec.decode_p3_untrusted(suite, bytes.fromhex(shown["p3"] + shown["signatures"]))
        assert codec.encode_p3(p3.body) == p3.raw
        assert [key.key_id for key in p3.body.keys] == ([shown["key"]["key_id"]] if shown["key"] else [])
        p4 = codec.decode_p4_untrusted(suite, bytes.fromhex(shown["p4"]))
        assert (p4.outcome, codec.encode_p4(p4).hex()) == (shown["outcome"], shown["p4"])


@pytest.mark.parametrize(("code", "hs"), CASES, ids=IDS)
def test_the_reassembler_puts_them_together_from_the_last_to_the_first(code: int, hs: dict[str, Any]) -> None:
    wanted = [hs["exchange"]["m1"], hs["m2"]["message"]]
    for shown in hs["rounds"]:
        wanted += [shown["e3"], shown["e4"]]
    pool, got = Reassembler(4), []
    for entry in hs.get("datagrams", ()):
        for raw in reversed(entry["datagrams"]):
            cold = datagram.decode_untrusted(bytes.fromhex(raw))
            gate_key = bytes.fromhex(hs["gate"]["gk_i" if entry["sender"] == "I" else "gk_r"])
            assert cold.mac1_fits(gate_key)
            if entry["cookie"]:
                assert cold.mac2_fits(bytes.fromhex(hs["gate"]["cookie"]))
            if cold.type is not datagram.MessageType.RETRY:
                got.append(pool.add(cold.message_id, (), cold, 0.0))
    for entry in hs.get("payloads", ()):
        for raw in reversed(entry["payloads"]):
            inner = datagram.decode_inner_untrusted(bytes.fromhex(raw))
            got.append(pool.add(inner.message_id, (), inner, 0.0))
    complete = [message.hex() for message in got if message is not None]
    assert complete[-len(wanted) :] == wanted
    assert len(pool) == 0


@pytest.mark.parametrize(("code", "hs"), CASES, ids=IDS)
def test_the_packet_path_opens_the_records(code: int, hs: dict[str, Any]) -> None:
    cipher = Cipher.CHACHA20_POLY1305 if code == 2 else Cipher.AES_256_GCM
    for shown in hs["rounds"]:
        if "epoch" not in shown:
            continue
        epoch = shown["epoch"]
        openers = {
            "I": Opener(cipher, bytes.fromhex(epoch["record_key_i2r"])),
            "R": Opener(cipher, bytes.fromhex(epoch["record_key_r2i"])),
        }
        for entry in epoch["records"]:
            record, out = memoryview(bytes.fromhex(entry["record"])), bytearray(4096)
            index, counter = split_header(record)
            assert index.hex() == hs["exchange"]["index_r" if entry["sender"] == "I" else "index_i"]
            length = openers[entry["sender"]].open(counter, record, memoryview(out))
            assert out[:length].hex() == entry["plaintext"]
