"""Has this key been delivered before?  A key manager that repeats itself must be noticed by whoever uses its keys."""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict

from keysource.errors import RepeatedKey

REMEMBERED_KEYS = 4096


class SeenKeys:
    """Refuses a key whose bytes or key_ID were delivered before; remembers tags under a key of this process."""

    def __init__(self) -> None:
        self._tag_key = secrets.token_bytes(32)
        self._tags: OrderedDict[bytes, None] = OrderedDict()

    def check(self, key_id: str, material: bytes | bytearray) -> None:
        """Raises :class:`~keysource.errors.RepeatedKey`."""
        of_bytes = hmac.digest(self._tag_key, b"key" + material, "sha256")
        of_id = hmac.digest(self._tag_key, b"id" + key_id.encode(), "sha256")
        if of_bytes in self._tags:
            raise RepeatedKey("bytes were delivered that had been delivered before under another key_ID")
        if of_id in self._tags:
            raise RepeatedKey("a key_ID was delivered that had been delivered before")
        for tag in (of_bytes, of_id):
            self._tags[tag] = None
        while len(self._tags) > 2 * REMEMBERED_KEYS:
            self._tags.popitem(last=False)
