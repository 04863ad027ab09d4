"""From the bytes of a TOML file to a checked :class:`~qvpn.config.schema.Config`.

Every complaint is a :class:`~qvpn.config.errors.ConfigError`: file, table, key, what is wrong.  Nothing is opened
here; ``qvpn.privileged`` reads the file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qvpn.config.checks import check
from qvpn.config.errors import ConfigError
from qvpn.config.schema import Config, Peer, Site, Tunnel

_TABLES: dict[str, type[BaseModel]] = {"site": Site, "tunnel": Tunnel, "peer": Peer}
_KINDS = {
    "missing": "is missing",
    "string_type": "write text in quotes",
    "string_too_short": "must not be empty",
    "bool_type": "write true or false",
    "int_type": "write a whole number",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "write a list in brackets",
}


def parse_config(data: bytes, file: Path) -> Config:
    """Check the bytes of ``file``.

    Raises:
        ConfigError: what is wrong first, in one line.
    """
    table = _toml(data, file)
    _check_version(table, file)
    try:
        config = Config.model_validate(table).at(file)
    except ValidationError as error:
        raise _explain(error, table, file) from None
    try:
        check(config)
    except ConfigError as error:
        raise error.within(file) from None
    return config


def _toml(data: bytes, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", file=file) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not TOML: {error}", file=file) from None


def _check_version(table: dict[str, Any], file: Path) -> None:
    """The version is looked at first: a later format would only give misleading errors."""
    version = table.get("version")
    if version is None:
        raise ConfigError("is missing; this program reads version = 1", file=file, key="version")
    if version != 1 or isinstance(version, bool):
        raise ConfigError(f"this program reads version 1, not {version!r}", file=file, key="version")


def _explain(error: ValidationError, table: dict[str, Any], file: Path) -> ConfigError:
    # An unknown key is the likeliest slip, and often the cause of the others.
    found = error.errors(include_url=False, include_input=False)
    first = min(found, key=lambda entry: entry["type"] != "extra_forbidden")
    location = tuple(first["loc"])
    message = _KINDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "literal_error":
        message = "this version speaks only " + first["ctx"]["expected"].replace("'", '"')
    if location == ("peer",):
        message = "each peer is a table of its own: write [[peer]]"
    name, rest = _place(location, table)
    if first["type"] == "extra_forbidden":
        return _unknown(name, rest, location, file)
    if not rest and (match := re.match(r"([a-z_]+): ", message)):
        # A check over several keys of a table names the key itself.
        rest, message = match[1], message[match.end() :]
    if name and not rest and first["type"] == "missing":
        message = "this table is missing"
    return ConfigError(message, file=file, table=name, key=rest)


def _unknown(name: str, key: str, location: Sequence[int | str], file: Path) -> ConfigError:
    model = _TABLES.get(str(location[0])) if len(location) > 1 else Config
    close = difflib.get_close_matches(key, model.model_fields if model else (), n=1)
    kind = "key" if len(location) > 1 else "table or key"
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return ConfigError(f"unknown {kind}{hint}", file=file, table=name, key=key)


def _place(location: tuple[int | str, ...], table: dict[str, Any]) -> tuple[str, str]:
    """The table as it stands in the file, and the key in it."""
    if not location:
        return "", ""
    head, rest = str(location[0]), location[1:]
    if head == "peer" and rest:
        return _peer_table(table, int(rest[0])), _key(rest[1:])
    if head in ("key_source", "carrier") and rest:
        return f"[{head}.{rest[0]}]", _key(rest[1:])
    if head in _TABLES:
        return (f"[[{head}]]" if head == "peer" else f"[{head}]"), _key(rest)
    return "", _key(location)


def _peer_table(table: dict[str, Any], index: int) -> str:
    name = table["peer"][index].get("name") if isinstance(table["peer"][index], dict) else None
    named = isinstance(name, str) and name.isprintable()
    return f'[[peer]] "{name}"' if named else f"[[peer]] number {index + 1}"


def _key(location: Sequence[int | str]) -> str:
    """``allowed_ips[2]``: the third entry is number 2 for programmers, entry 3 for people."""
    named = [str(part) for part in location if isinstance(part, str) and part.isidentifier()]
    numbers = [part + 1 for part in location if isinstance(part, int)]
    key = ".".join(named[:1]) if named else ".".join(str(part) for part in location)
    return f"{key} (entry {numbers[0]})" if named and numbers else key
