"""Changing a configuration that ``qvpn init`` wrote: read it, change tables, write it back without comments."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Table = dict[str, Any]


def change(file: Path, edit: Callable[[Table], None]) -> None:
    """Apply ``edit`` to the file's top table in place; mode and owner stay."""
    table = tomllib.loads(file.read_text())
    edit(table)
    file.write_text(dump(table))


def dump(table: Table) -> str:
    """TOML for what :mod:`tomllib` reads of our files: strings, numbers, booleans, lists of them, tables."""
    return "".join(_lines(table, ()))


def _lines(table: Table, path: tuple[str, ...]) -> list[str]:
    lines = [f"{_name(key)} = {_value(value)}\n" for key, value in table.items() if not _is_tables(value)]
    for key, value in table.items():
        inner = (*path, key)
        if isinstance(value, dict):
            lines += [f"\n[{_dotted(inner)}]\n", *_lines(value, inner)]
        elif _is_tables(value):
            for entry in value:
                lines += [f"\n[[{_dotted(inner)}]]\n", *_lines(entry, inner)]
    return lines


def _is_tables(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(_name(part) for part in path)


def _name(key: str) -> str:
    bare = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
    return key if bare else _value(key)


def _value(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    # JSON's strings, numbers and booleans are also TOML's, but for DEL and for pairs of surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
