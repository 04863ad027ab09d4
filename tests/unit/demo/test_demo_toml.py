"""What is written back reads as the same tables."""

import tomllib
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qvpn.demo import toml

_SCALARS = st.text(max_size=8) | st.integers(-(2**60), 2**60) | st.booleans()
_NAMES = st.text(min_size=1, max_size=6)
_TABLES = st.recursive(
    st.dictionaries(_NAMES, _SCALARS | st.lists(_SCALARS, max_size=3), max_size=4),
    lambda inner: st.dictionaries(_NAMES, inner | st.lists(inner, min_size=1, max_size=2) | _SCALARS, max_size=3),
    max_leaves=6,
)


@given(_TABLES)
def test_any_table_comes_back(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dump(table)) == table


def test_a_change_keeps_the_rest_and_the_mode(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('a = 1\n[site]\nname = "alice" # who\n[[peer]]\nname = "bob"\nallowed_ips = ["10.0.0.0/8"]\n')
    file.chmod(0o600)
    toml.change(file, lambda table: table["peer"][0].update(hard_end="12s"))
    assert tomllib.loads(file.read_text()) == {
        "a": 1,
        "site": {"name": "alice"},
        "peer": [{"name": "bob", "allowed_ips": ["10.0.0.0/8"], "hard_end": "12s"}],
    }
    assert file.stat().st_mode & 0o777 == 0o600
