"""Configuration and command line: each mistake is one sentence with file and key; secrets are private."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from keysource.base import End, Owner
from keysource.qkd.cli import main
from keysource.qkd.config import Address, EndConfig, FibreConfig, load
from keysource.qkd.errors import LinkSettings
from keysource.qkd.pad import HEAD_BYTES, link_key
from keysource.qkd.pair import PairPlan, write_pair
from keysource.simulated.link_file import link_toml

LEFT = """
version = 1
role = "left"
listen = "192.0.2.1:51850"
auth_key = "auth.pad"
state = "state"
socket = "device.sock"
"""


def cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "keysource.qkd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=60)


def write(folder: Path, text: str) -> Path:
    (folder / "link.toml").write_text(text)
    return folder / "link.toml"


def test_defaults_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, LEFT))
    assert isinstance(config, EndConfig)
    assert config.end is End.A and config.owner is Owner.ALTERNATE and config.preset == "demo"
    assert config.classical == Address("192.0.2.1", 51850) and config.fibre == Address("192.0.2.1", 51851)
    assert config.auth_key == tmp_path / "auth.pad" and config.control == tmp_path / "state" / "eve.sock"
    assert config.spawn_fibre and config.pace == "realtime"
    right = LEFT.replace("left", "right").replace("listen", "peer").replace("192.0.2.1", "[2001:db8::1]")
    config = load(write(tmp_path, right))
    assert isinstance(config, EndConfig)
    assert config.end is End.B and not config.spawn_fibre
    assert config.fibre == Address("2001:db8::1", 51851) and str(config.fibre) == "[2001:db8::1]:51851"


@pytest.mark.parametrize(("old", "new", "key", "says"), [
    ("version = 1", "version = 2", "version", "1"),
    ('role = "left"', 'role = "middle"', "role", "left"),
    ("listen =", "lisen =", "lisen", "no such key"),
    ('listen = "192.0.2.1:51850"', "", "listen", "needs it"),
    ("51850", "0", "listen", "HOST:PORT"),
    ("192.0.2.1", "2001:db8::1", "listen", "brackets"),
    ('auth_key = "auth.pad"', "", "auth_key", "required"),
    ('state = "state"', 'state = 5', "state", "string"),
    ("socket", 'preset = "moon"\nsocket', "preset", "demo"),
    ("socket", 'pace = "slow"\nsocket', "pace", "realtime"),
    ("socket", 'owner = "c"\nsocket', "owner", "alternate"),
    ("socket", 'name = "a b"\nsocket', "name", "pattern"),
    ('sock"', 'sock"\n[link]\nx = 1', "link", "no such key"),
])  # fmt: skip
def test_each_mistake_names_file_and_key(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    file = write(tmp_path, LEFT.replace(old, new, 1))
    with pytest.raises(LinkSettings) as error:
        load(file)
    text = str(error.value)
    assert str(file) in text and f'"{key}"' in text and says in text and "\n" not in text.replace("\n  ", "")


def test_what_is_no_toml_or_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LinkSettings, match="not TOML"):
        load(write(tmp_path, "version = = 1"))
    with pytest.raises(LinkSettings, match="No such file"):
        load(tmp_path / "nothing.toml")
    done = cli("run", str(tmp_path / "nothing.toml"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_the_file_that_the_simulated_source_writes_is_understood(tmp_path: Path) -> None:
    from keysource.base import SourceContext

    context = SourceContext("link", tmp_path, tmp_path / "state", "alice")
    settings = {
        "role": "right", "listen": None, "peer": "h:1", "fibre": None, "preset": "demo", "owner": None,
    }  # fmt: skip
    config = load(write(tmp_path, link_toml(settings, {"auth_key": tmp_path / "pad"}, tmp_path / "s.sock", context)))
    assert isinstance(config, EndConfig) and config.end is End.B and config.fibre.port == 2
    assert config.socket == tmp_path / "s.sock"


def test_pair_writes_two_ends_with_copies_of_one_pad_and_replaces_nothing(tmp_path: Path) -> None:
    done = cli("pair", str(tmp_path), "--left-host", "192.0.2.7", "--port", "4000", "--left", "l", "--right", "r")
    assert done.returncode == 0, done.stderr
    left, right = load(tmp_path / "l" / "link.toml"), load(tmp_path / "r" / "link.toml")
    assert isinstance(left, EndConfig) and isinstance(right, EndConfig)
    assert left.classical == right.classical == Address("192.0.2.7", 4000) and left.fibre == right.fibre
    assert left.auth_key.read_bytes() == right.auth_key.read_bytes() and left.auth_key != right.auth_key
    assert left.auth_key.stat().st_size == 1024 * 1024
    checked = cli("check", str(tmp_path / "l" / "link.toml")).stdout
    assert "pad of 8388608 bits is paid back after" in checked and "no mistake" in checked
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    again = cli("pair", str(tmp_path), "--left", "l", "--right", "r")
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr


def test_pair_with_a_fibre_of_its_own_gives_it_no_pad(tmp_path: Path) -> None:
    plan = PairPlan(Address("h", 1), Address("f", 2), separate_fibre=True, pad_bytes=4096)
    _, _, fibre_file = write_pair(tmp_path, plan)
    fibre = load(fibre_file)
    assert isinstance(fibre, FibreConfig) and fibre.listen == Address("f", 2)
    pad = (tmp_path / "alice" / "auth.pad").read_bytes()
    key = fibre.key.read_bytes()
    assert key == link_key(pad, b"fibre") and key not in pad
    assert key != link_key(pad[:HEAD_BYTES] + bytes(100), b"hello")
    alice = load(tmp_path / "alice" / "link.toml")
    assert isinstance(alice, EndConfig) and not alice.spawn_fibre and alice.fibre == Address("f", 2)


def test_check_presets_and_questions_to_nobody(tmp_path: Path) -> None:
    file = write(tmp_path, LEFT)
    done = cli("check", str(file))
    assert done.returncode == 0 and "no mistake" in done.stdout
    listing = cli("presets")
    assert listing.returncode == 0 and "demo" in listing.stdout and "metro50" in listing.stdout
    for arguments in (("status", str(file)), ("eve", str(file), "on")):
        done = cli(*arguments)
        assert done.returncode == 1 and "nobody answers" in done.stderr and "Traceback" not in done.stderr
    assert cli("eve", str(file), "perhaps").returncode == 2
    assert cli("nonsense").returncode == 2
    right = write(tmp_path, LEFT.replace("left", "right").replace("listen", "peer"))
    done = cli("eve", str(right), "on")
    assert done.returncode == 2 and "no fibre" in done.stderr


@pytest.mark.parametrize(("damage", "code", "says"), [
    (lambda folder: (folder / "auth.pad").unlink(), 2, "no authentication pad"),
    (lambda folder: (folder / "auth.pad").chmod(0o644), 2, "chmod 600"),
    (lambda folder: (folder / "auth.pad").write_bytes(b"short"), 2, "5 bytes"),
    (lambda folder: (folder / "link-state").write_text("a file"), 2, "link-state"),
    (lambda folder: (folder / "device.sock").write_text("a file"), 1, "is not a socket"),
])  # fmt: skip
def test_run_says_in_one_sentence_what_is_missing(tmp_path: Path, damage, code: int, says: str) -> None:
    write_pair(tmp_path, PairPlan(Address("127.0.0.1", 1), Address("127.0.0.1", 2), pad_bytes=4096))
    damage(tmp_path / "bob")
    done = cli("run", str(tmp_path / "bob" / "link.toml"))
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert says in last and "Traceback" not in done.stderr


async def test_status_and_ledger_on_the_command_line(tmp_path: Path) -> None:
    from qkd_lab import LinkLab

    async with LinkLab(tmp_path) as lab:
        await lab.start()
        lab.attach()
        await lab.blocks(1)
        done = cli("status", str(lab.file("alice")), "--json")
        answer = json.loads(done.stdout)
        assert done.returncode == 0 and answer["end"] == "a" and answer["ledger"]["delivered"] > 0
        plain = cli("status", str(lab.file("bob")))
        assert "SIMULATED: no quantum security" in plain.stdout and "delivered" in plain.stdout
        sockets = list(tmp_path.rglob("*.sock"))
        assert len(sockets) == 5  # two device sockets, two for status, one for Eve
        assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in sockets)
        keys = b"".join(lab.clients["alice"].blocks.values())
        pad = (tmp_path / "alice" / "auth.pad").read_bytes()
        words = lab.words() + done.stdout + plain.stdout
        for i in range(0, len(keys), 32):
            assert keys[i : i + 32].hex()[:16] not in words
        assert pad[:8].hex() not in words and pad[64:72].hex() not in words


def test_a_mistake_of_the_program_is_one_sentence_without_what_was_in_hand(monkeypatch, capsys) -> None:
    def broken(path: Path) -> None:
        raise KeyError("5ec2e7")

    monkeypatch.setattr("keysource.qkd.cli.load", broken)
    monkeypatch.setattr(sys, "argv", ["qvpn-qkd", "check", "link.toml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"qvpn-qkd: internal error KeyError at test_qkd_config\.py:\d+; please report it\n", said)


def test_a_pad_in_the_place_of_a_configuration_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "auth.pad").write_bytes(b"\xbe\xef")
    with pytest.raises(LinkSettings) as caught:
        load(tmp_path / "auth.pad")
    assert str(caught.value) == f"{tmp_path}/auth.pad: not UTF-8 text"
