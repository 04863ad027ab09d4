"""The file of couriered key material: random keys made in one place, one copy carried to each site.

::

    0   8   magic "QVPNKEYS"
    8   1   version = 1
    9   1   owner: 0 alternate, 1 end a, 2 end b
    10  2   bytes per key = 32, big-endian
    12  4   number of keys N, big-endian
    16  16  link id, random: the name of the link is its 32 hexadecimal digits
    32  32  SHA-256 of bytes 0..31
    64  32 x N   keys

Both sites have the same file; which end a site is, its configuration says.  Key ``i`` has the key_ID
``derive_key_id(link, 0, i)`` and belongs to ``owner.of(i)``.  A used key is overwritten with zeros where the file
can be written, so the two copies differ in time.  A file system may keep the old bytes (journal, SSD): whoever must
be sure keeps the file on a medium that is destroyed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from keysource.base import KEY_BYTES, Owner, wipe
from keysource.errors import BadSettings

MAGIC = b"QVPNKEYS"
VERSION = 1
MAX_KEYS = 1_000_000
DEFAULT_KEYS = 10_000
_FIELDS = struct.Struct(">8sBBHI16s")
HEADER_BYTES = _FIELDS.size + hashlib.sha256().digest_size
_OWNERS = (Owner.ALTERNATE, Owner.A, Owner.B)


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the keys."""

    link_id: bytes
    count: int
    owner: Owner = Owner.ALTERNATE

    @property
    def link(self) -> str:
        return self.link_id.hex()

    def encode(self) -> bytes:
        owner = _OWNERS.index(self.owner)
        fields = _FIELDS.pack(MAGIC, VERSION, owner, KEY_BYTES, self.count, self.link_id)
        return fields + hashlib.sha256(fields).digest()


def decode_untrusted(data: bytes) -> Header:
    """The header in the first :data:`HEADER_BYTES` bytes.  Raises :class:`BadSettings` with a sentence."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise BadSettings("is not a file of key material")
    magic_to_link, digest = data[: _FIELDS.size], data[_FIELDS.size : HEADER_BYTES]
    _magic, version, owner, key_bytes, count, link_id = _FIELDS.unpack(magic_to_link)
    if version != VERSION:
        raise BadSettings(f"has version {version} of the format; this program reads version {VERSION}")
    if hashlib.sha256(magic_to_link).digest() != digest:  # a checksum in clear against damage: nothing secret to time
        raise BadSettings("has a damaged header")
    if owner >= len(_OWNERS) or key_bytes != KEY_BYTES or not 1 <= count <= MAX_KEYS:
        raise BadSettings("has a header with impossible values")
    return Header(link_id, count, _OWNERS[owner])


def offset(position: int) -> int:
    """Where key ``position`` begins."""
    return HEADER_BYTES + position * KEY_BYTES


def write_pair(path_a: Path, path_b: Path, count: int = DEFAULT_KEYS, owner: Owner = Owner.ALTERNATE) -> str:
    """Make new key material and write it to both paths (mode 0600, synced); gives the name of the link.

    Raises:
        FileExistsError: one of them exists; nothing is overwritten.
        OSError: another reason; neither file is left behind.
        ValueError: ``count`` is not 1..:data:`MAX_KEYS`.
    """
    if not 1 <= count <= MAX_KEYS:
        raise ValueError(f"a key file holds 1 to {MAX_KEYS} keys, not {count}")
    header = Header(os.urandom(16), count, owner)
    content = bytearray(header.encode())
    content += os.urandom(count * KEY_BYTES)
    try:
        _write_new(path_a, content)
        try:
            _write_new(path_b, content)
        except BaseException:
            path_a.unlink()
            raise
    finally:
        wipe(content)
    return header.link


def _write_new(path: Path, content: bytearray) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
