"""The file of ``qvpn-qkd run``: what would have no effect at this end is refused, not passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from keysource.qkd.config import Address, EndConfig, load
from keysource.qkd.errors import LinkSettings
from keysource.qkd.pair import PairPlan, write_pair

COMMON = 'version = 1\nauth_key = "auth.pad"\nstate = "state"\nsocket = "device.sock"\n'
LEFT = COMMON + 'role = "left"\nlisten = "192.0.2.1:1"\n'
RIGHT = COMMON + 'role = "right"\npeer = "192.0.2.1:1"\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (LEFT + 'peer = "192.0.2.1:1"', "peer"),
        (LEFT.replace("left", "alice") + 'peer = "192.0.2.1:1"', "peer"),
        (LEFT + 'spawn_fibre = false\npace = "fast"', "pace"),
        (LEFT + 'spawn_fibre = false\ncontrol = "eve.sock"', "control"),
        (RIGHT + 'listen = "192.0.2.1:1"', "listen"),
        (RIGHT + "spawn_fibre = true", "spawn_fibre"),
        (RIGHT.replace("right", "bob") + "spawn_fibre = true", "spawn_fibre"),
        (RIGHT + 'pace = "fast"', "pace"),
        (RIGHT + 'control = "eve.sock"', "control"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "link.toml"
    file.write_text(text)
    with pytest.raises(LinkSettings) as caught:
        load(file)
    assert str(caught.value).startswith(f'{file}: top level, key "{key}": ') and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [LEFT + 'pace = "fast"\ncontrol = "eve.sock"', LEFT + "spawn_fibre = false", RIGHT])
def test_the_same_settings_where_they_belong(tmp_path: Path, text: str) -> None:
    file = tmp_path / "link.toml"
    file.write_text(text)
    assert isinstance(load(file), EndConfig)


@pytest.mark.parametrize("separate", [False, True])
def test_what_pair_writes_is_not_refused(tmp_path: Path, separate: bool) -> None:
    plan = PairPlan(Address("h", 1), Address("f", 2), pace="fast", separate_fibre=separate, pad_bytes=4096)
    for file in write_pair(tmp_path, plan):
        load(file)
