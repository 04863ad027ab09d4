"""What README says of configuration is what the schema accepts; its example source is the one that is tested."""

import re
from pathlib import Path

import pytest
import typer

from keysource.device.hardware import HardwareSettings
from keysource.etsi004.settings import Etsi004Settings
from keysource.etsi014.settings import Etsi014Settings
from keysource.file.source import FileSettings
from keysource.kme import cli as kme_cli
from keysource.network import cli as network_cli
from keysource.qkd import cli as qkd_cli
from keysource.several.members import SeveralSettings
from keysource.simulated.source import SimulatedSettings
from keysource.skip.source import SkipSettings
from qvpn.cli.main import app
from qvpn.config.schema import Peer, Site, Tunnel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def table_after(heading: str) -> list[str]:
    """First cells of the Markdown table that follows ``heading``."""
    lines = README.split(heading, 1)[1].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append(line)
    return rows


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z_0-9]+)`", cell))


@pytest.mark.parametrize(
    ("heading", "model"),
    [("`[site]`", Site), ("`[tunnel]`", Tunnel), ("`[[peer]]`", Peer)],
    ids=lambda value: str(value),
)
def test_every_key_of_a_table_stands_in_the_readme_and_no_other(heading, model):
    named = set().union(*(words(row.split("|")[1]) for row in table_after(f"\n{heading}")))
    assert named == set(model.model_fields)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("combine", SeveralSettings),
        ("device", HardwareSettings),
        ("etsi004", Etsi004Settings),
        ("etsi014", Etsi014Settings),
        ("file", FileSettings),
        ("simulated", SimulatedSettings),
        ("skip", SkipSettings),
    ],
)
def test_every_key_of_a_source_stands_in_the_readme(kind, model):
    row = next(row for row in table_after("\n`[key_source.NAME]`") if row.startswith(f"| `{kind}`"))
    assert set(model.model_fields) <= words(row.split("|")[2])


def test_the_example_in_the_readme_is_the_one_that_the_suite_runs():
    example = (ROOT / "tests/conformance/example_source.py").read_text().strip()
    assert f"```python\n{example}\n```" in README
    assert len(example.splitlines()) <= 50


def commands(program, application):
    found = typer.main.get_command(application).commands
    return [f"{program} {name}" for name, command in sorted(found.items()) if not command.hidden]


ALL_COMMANDS = [
    *commands("qvpn", app),
    *commands("qvpn-kme", kme_cli.app),
    *commands("network", network_cli.app),
    *commands("qvpn-qkd", qkd_cli.app),
]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_is_mentioned(command):
    assert re.search(rf"\b{command}(?![\w-])", README)
