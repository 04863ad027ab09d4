"""From what an operator wrote to checked settings: pydantic's errors as sentences, and ``HOST:PORT``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from keysource.errors import BadSettings

_Model = TypeVar("_Model", bound=BaseModel)
Place = tuple[int | str, ...]
"""Where a mistake is: names of keys, numbers in lists."""


def mistakes(error: ValidationError) -> list[tuple[Place, str]]:
    """What pydantic found, for people.  Values are not repeated: they may be secret."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return [(item["loc"], _words(item["type"], item["msg"])) for item in found]


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """The first one: its key with dots, empty where the whole is meant, and what is wrong."""
    place, text = mistakes(error)[0]
    return ".".join(str(part) for part in place), text


def sentence(error: ValidationError) -> str:
    """The first mistake in one line."""
    key, text = first_mistake(error)
    return f"{key}: {text}" if key else text


def _words(kind: str, text: str) -> str:
    return {"extra_forbidden": "no such key", "missing": "is required"}.get(kind, text.removeprefix("Value error, "))


def parse_settings(model: type[_Model], table: Mapping[str, object]) -> _Model:
    """The table as ``model`` (which should forbid extra keys).

    Raises:
        BadSettings: the first thing that is wrong; ``key`` names it.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        raise BadSettings(sentence(error), key=first_mistake(error)[0]) from None


@dataclass(frozen=True, slots=True)
class Address:
    """Host (name, IPv4, or IPv6 without brackets) and TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, lowest_port: int = 1) -> Address:
        """``HOST:PORT`` or ``[IPV6]:PORT``.  Port 0 only where ``lowest_port`` says so.  Raises ``ValueError``."""
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r}: an IPv6 address stands in brackets")
        if not host or not host.isprintable() or any(c in host for c in "[] /"):
            raise ValueError(f"{text!r} is not HOST:PORT")
        if not port.isascii() or not port.isdigit() or not lowest_port <= int(port[:6]) < 65536:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host, int(port))

    def next_port(self) -> Address:
        return Address(self.host, self.port + 1)


def _address(text: str) -> str:
    Address.parse(text)
    return text


AddressText = Annotated[str, AfterValidator(_address)]
"""A field that stays text, and can be parsed."""
