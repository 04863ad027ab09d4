"""Where a site's choices come from: the system; mixed with a generator that is watched; or, in tests, repeatable, and
then nothing is delivered."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from qkd_lab import LinkLab, until
from scipy import stats

from keysource.qkd import randomness
from keysource.qkd.config import EndConfig, load
from keysource.qkd.distill.bits import random_bits
from keysource.qkd.engine.qrng import Qrng
from keysource.qkd.errors import BadRandomness, LinkSettings
from keysource.qkd.health import FALSE_ALARM, START_UP, WINDOW, HealthTests, proportion_cutoff, repetition_cutoff
from keysource.qkd.optics.settings import fresh_seed
from keysource.qkd.randomness import Mixed, Repeatable

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


@pytest.fixture(autouse=True)
def afterwards_the_system() -> None:
    yield
    randomness.use(randomness.system)


# Health tests


def test_the_limits_are_those_of_the_standard() -> None:
    """SP 800-90B: 11 repetitions at H = 2 and 2^-20 (4.4.1); proportions at 2^-20, windows 512, 1024 (4.4.2)."""
    assert repetition_cutoff(2.0, 2.0**-20) == 11
    for entropy, window in ((0.5, 512), (1.0, 512), (2.0, 512), (4.0, 512), (8.0, 512), (1.0, 1024), (0.4, 1024)):
        expected = 1 + int(stats.binom.ppf(1.0 - 2.0**-20, window, 2.0**-entropy))
        assert proportion_cutoff(entropy, 2.0**-20, window) == expected
    assert [proportion_cutoff(h, 2.0**-20) for h in (1.0, 2.0, 4.0, 8.0)] == [311, 177, 62, 13]
    assert proportion_cutoff(0.001) == WINDOW and repetition_cutoff(8.0) == 1 + 4


def test_a_source_that_is_stuck_or_prefers_a_value_fails_and_stays_failed() -> None:
    nature = np.random.default_rng(1)
    tests = HealthTests(4.0)
    tests.look(nature.bytes(100_000))
    stuck = bytes([7]) * (repetition_cutoff(4.0) - 1)
    tests.look(stuck)
    with pytest.raises(BadRandomness, match="equal samples in a row"):
        tests.look(b"\x07")
    with pytest.raises(BadRandomness):
        tests.look(nature.bytes(1000))
    loaded = nature.choice(256, 20_000, p=[0.3, *[0.7 / 255] * 255]).astype(np.uint8).tobytes()
    with pytest.raises(BadRandomness, match="one value"):
        HealthTests(4.0).look(loaded)
    HealthTests(1.0).look(loaded)  # its maker claims less: that is what it has
    for entropy in (0.0, -1.0, 8.1):
        with pytest.raises(ValueError, match="min-entropy"):
            HealthTests(entropy)


def test_a_sound_source_of_the_claimed_entropy_hardly_ever_fails() -> None:
    """16 values of 8 bits: 4 bits of min-entropy, exactly what is claimed."""
    samples = np.random.default_rng(2).integers(0, 16, 2_000_000, dtype=np.uint8).tobytes()
    HealthTests(4.0).look(samples)
    assert len(samples) / WINDOW * FALSE_ALARM < 1e-4


# Mixing


def test_both_sources_count_and_the_samples_used_are_enough() -> None:
    asked: list[int] = []

    def raw(size: int) -> bytes:
        asked.append(size)
        return np.random.default_rng(len(asked)).bytes(size)

    mixed = Mixed(raw, 2.0)
    assert asked == [START_UP], "looked at and thrown away"
    first = mixed(32)
    assert asked[1:] == [(256 + 64) // 2]
    seen = {first}
    for size in (1, 32, 33, 1024, 5000, 100_000):
        assert len(mixed(size)) == size
    asked.clear()
    seen |= {Mixed(raw, 2.0)(32) for _ in range(3)}
    assert len(seen) == 4, "the system's share differs every time"


def test_a_generator_that_fails_at_the_start_or_later_chooses_nothing() -> None:
    with pytest.raises(BadRandomness, match="health test"):
        Mixed(bytes, 4.0)
    broken = False

    def raw(size: int) -> bytes:
        return bytes(size) if broken else os.urandom(size)

    randomness.use(Mixed(raw, 6.0))
    assert len(random_bits(100)) == 100 and len(fresh_seed()) == 32
    broken = True
    for draw in (fresh_seed, lambda: random_bits(10_000)):
        with pytest.raises(BadRandomness):
            draw()


def test_repeatable_choices_repeat_and_those_of_two_ends_differ() -> None:
    one, two, other = Repeatable("a x"), Repeatable("a x"), Repeatable("b x")
    drawn = [one(32), one(32)]
    assert drawn == [two(32), two(32)] and drawn[0] != drawn[1] != other(32)


# The generator's device


def test_a_generator_is_a_socket_a_fifo_or_a_device_and_no_file(tmp_path: Path) -> None:
    assert len(Qrng(Path("/dev/urandom"))(5000)) == 5000
    (tmp_path / "file").write_bytes(bytes(100_000))
    for path, words in ((tmp_path / "file", "character device"), (tmp_path / "nothing", "No such file")):
        with pytest.raises(LinkSettings, match=words):
            Qrng(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.fspath(tmp_path / "s"))
    server.listen()

    def serve() -> None:
        connection, _ = server.accept()
        connection.sendall(b"abc" * 100)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    read = Qrng(tmp_path / "s")
    thread.join()
    assert read(299) == (b"abc" * 100)[:299]
    with pytest.raises(BadRandomness, match="has ended"):
        read(2)
    server.close()
    read.close()


@pytest.mark.parametrize(("lines", "key"), [
    ('qrng = "/dev/x"\n', "qrng_entropy"), ("qrng_entropy = 4.0\n", "qrng_entropy"),
    ('qrng = "/dev/x"\nqrng_entropy = 9.0\n', "qrng_entropy"), ('test_seed = ""\n', "test_seed"),
    ('test_seed = "x"\nqrng = "/dev/x"\nqrng_entropy = 4.0\n', "test_seed"),
])  # fmt: skip
def test_the_configuration_names_its_mistakes(tmp_path: Path, lines: str, key: str) -> None:
    base = 'version = 1\nrole = "left"\nlisten = "127.0.0.1:1"\nauth_key = "p"\nstate = "s"\nsocket = "d"\n'
    file = tmp_path / "link.toml"
    file.write_text(base + lines)
    with pytest.raises(LinkSettings, match=f'"{key}"'):
        load(file)
    file.write_text(base + 'qrng = "/dev/x"\nqrng_entropy = 4.0\n')
    config = load(file)
    assert isinstance(config, EndConfig) and config.qrng == (Path("/dev/x"), 4.0)


# A link


async def test_the_deterministic_mode_distils_and_delivers_nothing_and_a_generator_is_used(tmp_path: Path) -> None:
    """In a long run, too, that one repeatable end is refused, and a link whose Alice has a generator."""
    async with LinkLab(tmp_path) as lab:
        files = [lab.file(site) for site in ("alice", "bob")]
        plain = [file.read_text() for file in files]
        for file, text in zip(files, plain, strict=True):
            file.write_text(f'{text}test_seed = "same again"\n')
        await lab.start()
        lab.attach()
        async with asyncio.timeout(60):
            await until(lambda: (tmp_path / "alice" / "link-state" / "status.sock").exists())
            while (status := await lab.status("alice"))["blocks_passed"] < 2:
                await asyncio.sleep(0.1)
        assert status["ledger_balance"] == 0 and status["ledger"]["delivered"] == 0 < status["ledger"]["lost"]
        assert "REPEATABLE" in status["randomness"] and "no key" in lab.words()
        assert not lab.clients["alice"].blocks and not lab.clients["bob"].blocks
        if not LONG:
            return
        await lab.stop("alice")
        files[0].write_text(f'{plain[0]}qrng = "/dev/urandom"\nqrng_entropy = 6.0\n')
        await lab.start("alice")
        async with asyncio.timeout(30):
            while "repeatable" not in lab.words():  # only one end is: they do not agree
                await asyncio.sleep(0.1)
        await lab.stop("bob")
        files[1].write_text(plain[1])
        await lab.start("bob")
        await lab.blocks(1, within=60)
        assert "mixed with /dev/urandom" in (await lab.status("alice"))["randomness"]
        assert (await lab.status("bob"))["randomness"] == "operating system"
