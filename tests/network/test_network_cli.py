"""The commands of a node as an operator meets them: files in, one sentence per mistake, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from keysource.kme import logs
from keysource.kme.cli import app
from keysource.network import cli, crashes
from keysource.network.drawing import status_tables
from keysource.network.topology import EXAMPLE

assert cli.app  # its import adds the commands
run = CliRunner()


@pytest.fixture(autouse=True)
def logs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``serve`` does to its process it shall not do to ours."""
    monkeypatch.setattr(logs, "set_up", lambda *, json_lines: None)
    monkeypatch.setattr(cli.resource, "setrlimit", lambda *_: None)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    (tmp_path / "network.toml").write_text(EXAMPLE)
    result = run.invoke(app, ["network", "write", str(tmp_path / "network.toml"), str(tmp_path / "nodes")])
    assert result.exit_code == 0 and result.output.count("qvpn-kme network serve") == 3
    return tmp_path / "nodes"


def test_from_a_map_to_checked_nodes(nodes: Path) -> None:
    for node in ("kme-paris", "kme-dijon", "kme-lyon"):
        result = run.invoke(app, ["network", "check", str(nodes / node / "node.toml")])
        assert result.exit_code == 0 and f"node {node}" in result.output
        key = nodes / node / "pki" / f"{node}.key"
        assert key.stat().st_mode & 0o777 == 0o600
    example = run.invoke(app, ["network", "example"])
    assert example.exit_code == 0 and EXAMPLE in example.output


def test_nothing_is_written_over(nodes: Path) -> None:
    result = run.invoke(app, ["network", "write", str(nodes.parent / "network.toml"), str(nodes)])
    assert result.exit_code == 2 and "File exists" in result.stderr


@pytest.mark.parametrize("command", ["check", "serve", "status"])
def test_a_wrong_file_is_one_sentence(command: str, nodes: Path) -> None:
    missing = run.invoke(app, ["network", command, str(nodes / "none.toml")])
    assert missing.exit_code == 2 and "No such file" in missing.stderr and len(missing.stderr.splitlines()) == 1
    file = nodes / "kme-paris" / "node.toml"
    file.write_text(file.read_text().replace('id = "kme-paris"', 'id = "kme-lyon"'))
    wrong = run.invoke(app, ["network", command, str(file)])
    assert wrong.exit_code == 2 and "[[link]]" in wrong.stderr and "Traceback" not in wrong.stderr


def test_status_of_a_node_that_does_not_run(nodes: Path) -> None:
    result = run.invoke(app, ["network", "status", str(nodes / "kme-paris" / "node.toml")])
    assert result.exit_code == 1 and "no KME answers there" in result.stderr


def test_an_open_key_or_an_unknown_crash_point_stops_a_node(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = nodes / "kme-paris" / "node.toml"
    (nodes / "kme-paris" / "pki" / "kme-paris.key").chmod(0o644)
    result = run.invoke(app, ["network", "serve", str(file)])
    assert result.exit_code == 2 and "0600" in result.stderr
    monkeypatch.setenv(crashes.VARIABLE, "nowhere")
    result = run.invoke(app, ["network", "serve", str(file)])
    assert result.exit_code == 2 and "no such crash point" in result.stderr


def test_a_status_is_drawn() -> None:
    link = {"name": "a-b", "to": "b", "up": False, "trouble": "away", "alarm": None, "qber": 0.02, "behind": False}
    connection = {"name": "long", "to": "c", "state": "idle", "paths": [["a", "b", "c"]], "keys_per_second": 1.5}
    said = {
        "node": "a",
        "links": [link | {"own_units": 3, "peer_units": 4}],
        "connections": [connection | {"next_block": 7, "trouble": "no path"}],
    }
    console = Console(width=120)
    with console.capture() as capture:
        for table in status_tables(said):
            console.print(table)
    text = capture.get()
    assert all(part in text for part in ("down: away", "2.00 %", "a > b > c", "1.50", "no path"))


def test_the_script_has_both_the_kme_s_commands_and_the_network_s() -> None:
    command = [sys.executable, "-m", "keysource.network", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(word in said for word in ("serve", "network", "demo", "check"))
