"""The numbers that PROTOCOL.md names are those of the code: whoever changes one changes the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qvpn.handshake
from qvpn.config.schema import Peer, default_hard_end, least_hard_end
from qvpn.handshake import cookie, gate, keyring, port, timers
from qvpn.lanes import paths
from qvpn.tunnel import pathmtu, replay
from qvpn.tunnel.records import Limits
from qvpn.wire import datagram, fragments
from qvpn.wire.messages import MessageType

TEXT = (Path(qvpn.handshake.__path__[0]) / "PROTOCOL.md").read_text()
FLAT = " ".join(TEXT.split())
TIMERS = {
    cells[0]: cells[1]
    for line in TEXT.split("## 9 Timers and limits")[1].split("## 10")[0].splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 2
}
REKEYS = (1.0, 3.0, 4.0, 7.0, 12.0, 60.0, 3600.0)


def short_of(text: str, rekey: float) -> float:
    """``min(10 s, rekey)`` and ``min(30 s, 2 × rekey)`` as numbers."""
    match = re.search(r"min\((\d+) s, (?:(\d) × )?rekey\)", text)
    assert match is not None, text
    return min(float(match[1]), float(match[2] or 1) * rekey)


@pytest.mark.parametrize("rekey", REKEYS)
def test_times_that_follow_from_the_rekey_interval(rekey: float) -> None:
    assert short_of(TIMERS["overlap"], rekey) == timers.overlap(rekey)
    assert short_of(TIMERS["retransmit"], rekey) == timers.resend_cap(rekey)
    assert short_of(TIMERS["back-off after a failed attempt"], rekey) == timers.backoff_cap(rekey)
    keepalive, dead = TIMERS["keepalive / dead peer"].split(" / ")
    assert short_of(keepalive, rekey) == timers.keepalive(rekey)
    assert short_of(dead, rekey) == timers.dead_peer(rekey)
    assert default_hard_end(rekey) == max(3 * rekey, 2 * rekey + 3) >= least_hard_end(rekey) == 2 * rekey + 3
    assert "up to (hard_end − 3 s) / 2" in TIMERS["rekey started by the preferred peer / the other"]
    assert least_hard_end(timers.longest_rekey(rekey, 10 * rekey + 3)) == 10 * rekey + 3
    assert timers.longest_rekey(rekey, least_hard_end(rekey)) == rekey
    assert timers.rekey_after(rekey, True, 0) == rekey
    assert timers.rekey_after(rekey, False, 0) == pytest.approx(rekey * 7 / 6)
    assert timers.rekey_after(rekey, True, 1) == pytest.approx(0.9 * rekey)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("retransmit", f"{timers.RESEND_FIRST:g} s, doubled"),
        ("handshake deadline", f"{timers.DEADLINE:g} s; one call to a key source at most {timers.SOURCE_CALL:g} s"),
        ("half-open entry", f"{timers.HALF_OPEN:g} s"),
        ("M4 cache and unconfirmed epoch", f"{timers.ANSWER_LIFE:g} s"),
        ("back-off after a failed attempt", f"{timers.BACKOFF_FIRST:g} s, doubled"),
        ("EPOCH_OK", f"after {timers.EPOCH_OK_FIRST:g} s, doubled up to {timers.EPOCH_OK_CAP:g} s"),
        ("held key", f"{timers.HELD_KEY:g} s"),
        (
            "mac1 trials from unknown addresses",
            f"{gate.TRIALS_PER_SOURCE} a second per source (/32 or /64), {gate.TRIALS_TOTAL} a second in all",
        ),
        (
            "half-open entries (until M3 verifies)",
            f"{port.HALF_OPEN_PER_SOURCE} per source (/32 or /64); "
            f"{port.HALF_OPEN_TOTAL - port.HALF_OPEN_RESERVED} in all and, in a second, "
            f"{port.ANSWERS_PER_SOURCE:g} new ones per source and {port.ANSWERS_TOTAL:g} in all",
        ),
    ],
)
def test_rows_of_chapter_9(row: str, said: str) -> None:
    assert said in TIMERS[row]


def test_limits_of_a_key() -> None:
    limits = Limits()
    powers = [int(power) for power in re.findall(r"2\^(\d+)", TIMERS["AEAD calls per record key"])]
    assert [1 << power for power in powers] == [limits.rekey, limits.stop] == [1 << 26, 1 << 28]
    powers = [int(power) for power in re.findall(r"2\^(\d+)", TIMERS["failed opens per record key, counted apart"])]
    assert [1 << power for power in powers] == [limits.failed_rekey, limits.failed_stop]


@pytest.mark.parametrize(
    "said",
    [
        f"holds a window of {replay.WINDOW_BLOCKS} blocks",
        f"counter (bits 0-62) = block × {1 << replay.INDEX_BITS} + place",
        f"A datagram is at most {datagram.DEFAULT_LIMIT} bytes of UDP payload",
        f"a fragment carries at most {datagram.DEFAULT_LIMIT - datagram.OVERHEAD}.",
        f"count (1-{datagram.MAX_FRAGMENTS})",
        f"fragments of at most {datagram.INNER_FRAGMENT} bytes",
        f"lives {fragments.LIFETIME:g} s and has at most {datagram.MAX_MESSAGE} bytes",
        f"**RETRY** ({datagram.RETRY_BYTES} bytes",
        f"at most {timers.RETRIES} a second",
        f"renewed each {cookie.RENEW:g} s",
        f"the {timers.BAD_M3}th M3 that decrypts and does not verify",
        f"at most once per {timers.ANSWER_SPACING:g} s and {timers.ANSWER_REPEATS} times each",
        f"an authenticated reply in the last {timers.MOVES:g} s",
        f"hashes of the last {keyring.REMEMBERED} key_IDs",
        f"burst {timers.BUCKET_BURST}, one token per half `rekey`",
        f"An answer counts within {pathmtu.LATE:g} s",
        f"between {pathmtu.BASE} (if that fails too: {pathmtu.FLOOR})",
        f"repeated after {paths.FIRST_AGAIN:g} s, doubled up to {paths.LAST_AGAIN:g} s",
        f"With nothing back for {paths.LOST:g} s the address is no longer proved",
    ],
)
def test_numbers_in_sentences(said: str) -> None:
    assert said in FLAT


def test_message_types_are_those_of_the_table() -> None:
    named = re.search(r"type: ((?:\d \w+(?:, )?)+)", FLAT)
    assert named is not None
    pairs = dict(pair.split()[::-1] for pair in named[1].rstrip(", ").split(", "))
    assert pairs == {kind.name: str(kind.value) for kind in MessageType}


def test_the_default_interval() -> None:
    assert f"default {Peer.model_fields['rekey'].default:g} s;" in FLAT
