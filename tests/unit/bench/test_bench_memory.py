"""Crypto and the packet path in memory: what is timed is the real thing, in the numbers that are said."""

import json

import pytest
from typer.testing import CliRunner

from qvpn.bench import crypto, memory
from qvpn.cli.main import app, execute
from qvpn.crypto.suites import SUITES


def silent(line: str) -> None:
    """Progress goes nowhere."""


@pytest.mark.parametrize(("peers", "prefixes"), [(1, 1), (3, 1), (1, 200)])
def test_every_packet_is_sealed_opened_and_written(peers: int, prefixes: int) -> None:
    bench = memory.Bench(peers, prefixes)
    sealed, opened = bench.cost(memory.superpacket, 1)
    assert sealed > 0 < opened
    there = [bench.planes[0].stats(str(number)) for number in range(peers)]
    here = [bench.planes[1].stats(str(number)) for number in range(peers)]
    assert sum(each.sent_records for each in there) == memory._TIMES * memory.SUPERPACKET
    assert sum(each.opened for each in here) == memory._TIMES * memory.SUPERPACKET
    assert sum(each.marked for each in here) == memory._TIMES * memory.SUPERPACKET
    assert sum(each.tun_writes for each in here) == memory._TIMES == bench.tuns[1].written
    assert all(each.opened for each in here), "traffic reaches every peer"


def test_small_packets_all_come_out() -> None:
    bench = memory.Bench(2, 1)
    bench.cost(memory.small_packets, memory.BATCH)
    received = sum(bench.planes[1].stats(str(number)).received_packets for number in range(2))
    assert received == memory._TIMES * memory.BATCH
    assert not any(bench.planes[side].stats(str(number)).drops for side in range(2) for number in range(2))


def test_a_run_has_every_combination_once() -> None:
    said: list[str] = []
    costs = memory.run(1, said.append)
    grid = {(cost.traffic, cost.peers, cost.prefixes) for cost in costs}
    assert len(grid) == len(costs) == len(memory.TRAFFIC) * (len(memory.PEERS) + len(memory.PREFIXES) - 1)
    assert said == ["memory: round 1/1"]
    assert len({len(row) for row in memory.table(costs)}) == 1


def test_handshakes_of_every_suite_end_in_keys() -> None:
    costs = crypto.handshakes(1, silent)
    assert [cost.suite for cost in costs] == list(SUITES)
    for cost in costs:
        assert cost.initiator_ms > 0 < cost.responder_ms
    by_suite = {cost.suite: cost.bytes for cost in costs}
    assert by_suite[3] > by_suite[1] == by_suite[2] > 2 * (1184 + 3309)


def test_aead_of_every_size_and_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "_TIMES", 50)
    costs = crypto.aead(1, silent)
    assert {(cost.cipher, cost.size) for cost in costs} == {
        (cipher, size) for cipher in ("AES-256-GCM", "ChaCha20-Poly1305") for size in crypto.SIZES
    }
    assert all(cost.seal_ns > 0 < cost.open_ns for cost in costs)


def test_the_commands_print_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "_TIMES", 50)
    said = CliRunner().invoke(app, ["bench", "crypto", "--rounds", "1", "--json"])
    found = json.loads(said.stdout)
    assert {"machine", "aead", "handshake"} <= set(found)
    assert len(found["handshake"]) == 3
    text = CliRunner().invoke(app, ["bench", "memory", "--rounds", "1"]).stdout
    assert "10,000" in text
    assert "superpacket of 47 segments" in text


@pytest.mark.parametrize("options", [["--peers", "x"], ["--links", "y"], ["--measures", "z"], ["--rounds", "0"]])
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    assert execute(["bench", "net", *options]) == 2
