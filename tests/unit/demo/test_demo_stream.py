"""A TCP transfer hashed at both ends."""

import hashlib
import threading
from typing import Any

import pytest

from qvpn.demo import payload, stream
from tests.ports import free_port

MARKER = bytes(range(16))


@pytest.mark.parametrize("total", [0, 1, 65536, 1_000_001])
def test_both_ends_count_and_hash_the_same_bytes(total: int) -> None:
    port, ready, results = free_port(), threading.Event(), list[dict[str, Any]]()

    def receive() -> None:
        results.append(stream.sink(("127.0.0.1", port), timeout=5, ready=ready.set))

    receiver = threading.Thread(target=receive)
    receiver.start()
    assert ready.wait(5)
    sent = stream.source(("127.0.0.1", port), total=total, marker=MARKER, timeout=5)
    receiver.join()
    assert results[0]["bytes"] == sent["bytes"] == total
    assert results[0]["sha256"] == sent["sha256"]
    if total == 65536:
        expected = bytes(8) + payload.filled(65536, MARKER)[8:]
        assert sent["sha256"] == hashlib.sha256(expected).hexdigest()


def test_a_sink_that_nobody_calls_gives_up() -> None:
    with pytest.raises(stream.StreamFailed, match="nothing came"):
        stream.sink(("127.0.0.1", free_port()), timeout=0.05, ready=lambda: None)
