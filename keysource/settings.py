"""From a configuration table to checked settings: pydantic's errors as one sentence that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from keysource.errors import BadSettings

_Model = TypeVar("_Model", bound=BaseModel)


def parse_settings(model: type[_Model], table: Mapping[str, object]) -> _Model:
    """The table as ``model`` (which should forbid extra keys).

    Raises:
        BadSettings: the first thing that is wrong; ``key`` names it.  The value is not repeated: it may be secret.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        text = "no such key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise BadSettings(f"{key}: {text}" if key else text, key=key) from None
