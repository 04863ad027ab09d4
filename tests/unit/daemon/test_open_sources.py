"""Sources that are made of others, as the daemon makes them from one file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from keysource.alarm import AlarmedClaiming
from keysource.several.combine import CombineSource
from qvpn.config.errors import ConfigError
from qvpn.config.load import parse_config
from qvpn.launch import open_sources

SITE = """\
version = 1
[site]
name = "alice"
identity = "alice.key"
listen = "[::]:51840"
[tunnel]
addresses = ["10.90.0.1/24"]
[[peer]]
name = "bob"
public_key = "bob.pub"
allowed_ips = ["10.90.0.2/32"]
key_source = "both"
sae = "bob"
[key_source.both]
type = "combine"
sources = ["stick", "device"]
sae = "alice"
[key_source.stick]
type = "file"
path = "k"
end = "a"
[key_source.device]
type = "device"
socket = "d.sock"
"""


def opened(text: str) -> dict[str, object]:
    return dict(open_sources(SimpleNamespace(config=parse_config(text.encode(), Path("site/qvpn.toml")))))  # type: ignore[arg-type]


def test_the_parts_are_the_sources_of_their_own_tables_each_made_once() -> None:
    made = opened(SITE)
    assert isinstance(made["both"], AlarmedClaiming)
    both = made["both"].source
    assert isinstance(both, CombineSource)
    assert [member.source for member in both.members] == [made["stick"], made["device"]]
    assert set(made) == {"both", "stick", "device"}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"device"]', '"nobody"]', "[key_source.both] sources: there is no table [key_source.nobody]"),
        ('"device"]', '"both"]', "[key_source.both] sources: 'both' cannot be a part of itself"),
        ('path = "k"', "", "[key_source.stick] path: is required"),
    ],
)
def test_a_mistake_names_file_table_and_key(old: str, new: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(SITE.replace(old, new))
    assert str(caught.value) == f"site/qvpn.toml: {sentence}"


def test_a_ring_is_refused() -> None:
    ring = SITE.replace(
        'type = "file"\npath = "k"\nend = "a"', 'type = "failover"\nsources = ["both", "device"]\nsae = "a"'
    )
    with pytest.raises(ConfigError, match="cannot be a part of itself"):
        opened(ring)
