"""What ``qvpn bench floor`` says is arithmetic on what it measured; its datagrams are those of the packet path."""

from __future__ import annotations

import pytest

from qvpn.bench import floor, memory
from qvpn.tunnel.keys import Cipher


def test_the_floor_is_the_sum_of_its_parts_and_a_gigabyte_is_so_many_units() -> None:
    costs = [
        floor.Cost("AEAD calls alone", "AES-256-GCM", 100.0),
        floor.Cost("AEAD calls alone", "ChaCha20-Poly1305", 160.0),
        floor.Cost("system calls alone", "none", 65.536),
        floor.Cost("packet path", "AES-256-GCM", 300.0),
    ]
    assert [(cost.cipher, cost.microseconds) for cost in floor.sums(costs)] == [
        ("AES-256-GCM", pytest.approx(165.536)),
        ("ChaCha20-Poly1305", pytest.approx(225.536)),
    ]
    assert costs[2].seconds_per_gb == pytest.approx(1.0)
    rows = floor.table(costs)
    assert rows[3] == ["system calls alone", "none", "66", "1.00", "8.00"]
    assert len({len(row) for row in rows}) == 1


def test_the_bare_relay_sends_as_many_bytes_as_the_packet_path() -> None:
    bench = memory.Bench(1, 1)
    (packet,) = memory.superpacket(0)
    bench.tuns[0].inject([packet])
    sent = bench.binds[0].sent
    wire, record = floor.on_the_wire(memoryview(packet), len(packet))
    assert wire == sum(len(data) for data, _ in sent)
    assert {record} == {segment for _, segment in sent}
    (small,) = memory.lone_packet(0)
    assert floor.on_the_wire(memoryview(small), len(small)) == (len(small) + 32, len(small) + 32)


@pytest.mark.parametrize("cipher", list(floor.NAMES))
def test_aead_calls_are_timed(cipher: Cipher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "PARTS", 2)
    assert floor.aead(cipher) > 0
