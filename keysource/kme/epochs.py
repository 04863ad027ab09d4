"""The keys that wrap stored keys: one per epoch, in a file of its own, wrapped under the site key.

::

    site key (0600 file or systemd credential) ── wraps ──▶ epoch keys (this file) ── wrap ──▶ rows of the store

What SQLite deletes lives on: in its write-ahead log, in free pages, in backups, in a flash disk's spare blocks.  All
of those hold ciphertext.  A new epoch begins every so often, the rows that are left are wrapped anew under it, and
the old epoch's key is overwritten here, in place, and synced: from then on no copy of an old row can be read, whoever
has the site key.  That is as good as the medium overwrites: on flash and on copy-on-write file systems the old bytes
of *this* file may survive for a while; let ``epoch_keys`` lie on a medium that forgets (a tmpfs forgets at reboot,
with the stock), and never back it up.

File: 32 bytes of name, then eight slots of 128 bytes: number (8), begun in seconds (8), nonce (12), AES-256-GCM of
the 32 bytes (48), zeros; a slot of zeros is free.
"""

from __future__ import annotations

import base64
import binascii
import errno
import fcntl
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.base import KEY_BYTES
from keysource.kme import crashpoints
from keysource.kme.pki import write_new
from keysource.kme.records import Damaged, StoreError
from keysource.private import read_secret, sync

_NAME = b"qvpn-kme epoch keys 1".ljust(32, b"\0")
_SLOTS, _SLOT, _NONCE = 8, 128, 12
_HEAD = struct.Struct(">QQ")
_CREDENTIAL = "credential:"


def new_site_key(path: Path) -> None:
    """Write 32 random bytes in base64, mode 0600; on the disk when this returns, before they wrap anything.

    Raises ``FileExistsError``."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
    part = path.with_name(f"{path.name}.{os.getpid()}.new")
    part.unlink(missing_ok=True)
    write_new(part, base64.b64encode(os.urandom(KEY_BYTES)) + b"\n", 0o600)
    try:
        sync(part)
        os.link(part, path)  # the whole file or none; never over one that is there
    finally:
        part.unlink()
    sync(path.parent)


def site_key_path(text: str, base: Path, key: str = "site_key") -> Path:
    """Where ``site_key`` (or another ``key``) of the configuration points: a file, or ``credential:NAME`` of the
    systemd service.

    Raises:
        StoreError: a credential is meant and there is no service manager.
    """
    if not text.startswith(_CREDENTIAL):
        return base / text
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise StoreError(f"{key} {text!r}: $CREDENTIALS_DIRECTORY is not set; systemd sets it for LoadCredential=")
    return Path(folder) / text.removeprefix(_CREDENTIAL)


def read_site_key(path: Path) -> bytes:
    """32 bytes, as they are or in base64.  Raises :class:`StoreError`."""
    try:
        raw = read_secret(path)
    except OSError as error:
        raise StoreError(f"{path}: the site key: {error.strerror}") from None
    except ValueError as error:
        raise StoreError(f"the site key: {error}") from None
    if len(raw) == KEY_BYTES:
        return raw
    try:
        key = base64.b64decode(raw.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise StoreError(f"{path}: a site key is {KEY_BYTES} bytes, as they are or in base64")
    return key


@dataclass(slots=True)
class Epoch:
    """One that is alive."""

    slot: int
    begun: float
    cipher: AESGCM = field(repr=False)


class Epochs(ABC):
    """The epochs that are alive; :attr:`current` wraps what is new.  Where their keys lie is for others to say."""

    def __init__(self, site_key: bytes, kme_id: str) -> None:
        info = b"qvpn-kme site key v1:" + kme_id.encode()
        self._root = HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(site_key)
        self._epochs: dict[int, Epoch] = {}

    @property
    def current(self) -> int:
        """0 where no epoch was begun yet."""
        return max(self._epochs, default=0)

    @property
    def begun(self) -> float:
        """When the current epoch began, in seconds of the wall clock."""
        return self._epochs[self.current].begun if self._epochs else 0.0

    @property
    def alive(self) -> list[int]:
        return sorted(self._epochs)

    @abstractmethod
    def destroy(self, number: int) -> None:
        """No row wrapped under it can be read again."""

    def seal(self, label: bytes, material: bytes | bytearray) -> bytes:
        """``material`` under the current epoch, bound to ``label``."""
        nonce = os.urandom(_NONCE)
        return nonce + self._epochs[self.current].cipher.encrypt(nonce, bytes(material), label)

    def unseal(self, epoch: int, label: bytes, blob: bytes) -> bytearray:
        """Raises :class:`Damaged`: the row was changed, moved, or wrapped under an epoch that is gone."""
        known = self._epochs.get(epoch)
        if known is None:
            raise Damaged(f"epoch {epoch}, which a stored key is wrapped under, was destroyed")
        try:
            return bytearray(known.cipher.decrypt(blob[:_NONCE], blob[_NONCE:], label))
        except (InvalidTag, ValueError):
            raise Damaged("a stored key is damaged") from None

    def wrapper(self, number: int) -> AESGCM:
        """What wraps the key of an epoch."""
        return AESGCM(self._root)

    def new_key(self, number: int, begun: int) -> tuple[bytes, AESGCM]:
        """A key for an epoch: as it lies somewhere, wrapped under the site key, and ready for use."""
        key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE)
        return nonce + self.wrapper(number).encrypt(nonce, key, _HEAD.pack(number, begun)), AESGCM(key)

    def read_key(self, number: int, begun: int, wrapped: bytes) -> AESGCM:
        """Raises ``InvalidTag``."""
        return AESGCM(self.wrapper(number).decrypt(wrapped[:_NONCE], wrapped[_NONCE:], _HEAD.pack(number, begun)))


class EpochKeys(Epochs):
    """The same in a file of this process alone."""

    def __init__(self, path: Path, site_key: bytes, kme_id: str) -> None:
        """Raises :class:`StoreError`: no such file can be had, or it is something else."""
        super().__init__(site_key, kme_id)
        self.path = path
        self._damaged: set[int] = set()
        try:
            self._file = self._open()
            self._read()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._file)
        self._epochs.clear()

    def settle(self, needed: Collection[int]) -> None:
        """At the start: every epoch that rows are wrapped under must be here; slots that mean nothing are freed.

        Raises:
            StoreError: another site key, or another file.
        """
        if lacking := sorted(set(needed) - set(self._epochs)):
            reason = "wrapped under another site key" if self._damaged else "not in this file"
            raise StoreError(
                f"{self.path}: the key of epoch {lacking[0]} is {reason}; without it no stored key can be read"
            )
        for slot in sorted(self._damaged):
            self._erase(slot)
        self._damaged.clear()

    def begin(self, number: int, now: float) -> None:
        """A new epoch becomes the current one; its key is on the disk before anything is wrapped under it."""
        if number <= self.current:
            raise ValueError("epochs only count up")
        used = {epoch.slot for epoch in self._epochs.values()} | self._damaged
        slot = next((slot for slot in range(_SLOTS) if slot not in used), None)
        if slot is None:
            raise StoreError(f"{self.path}: {_SLOTS} epochs are alive; rows of the old ones were not wrapped anew")
        wrapped, cipher = self.new_key(number, int(now))
        self._write(slot, _HEAD.pack(number, int(now)) + wrapped)
        self._epochs[number] = Epoch(slot, now, cipher)
        crashpoints.at("epoch.begun")

    def destroy(self, number: int) -> None:
        """Overwrite an epoch's key: no row wrapped under it can be read again, wherever a copy of it is."""
        if number == self.current:
            raise ValueError("the current epoch is in use")
        self._erase(self._epochs.pop(number).slot)
        crashpoints.at("epoch.destroyed")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            self._create()
            descriptor = os.open(self.path, flags)
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                raise StoreError(f"{self.path}: others may read it; it must have mode 0600")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the store's lock does not cover a file elsewhere
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(f"{self.path}: another KME process uses these epoch keys") from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _create(self) -> None:
        part = self.path.with_name(self.path.name + ".new")
        part.unlink(missing_ok=True)
        write_new(part, _NAME + bytes(_SLOTS * _SLOT), 0o600)
        sync(part)
        part.rename(self.path)
        sync(part.parent)

    def _read(self) -> None:
        raw = os.pread(self._file, len(_NAME) + _SLOTS * _SLOT + 1, 0)
        if not raw.startswith(_NAME) or len(raw) != len(_NAME) + _SLOTS * _SLOT:
            os.close(self._file)
            raise StoreError(f"{self.path}: this is not a file of epoch keys")
        for slot in range(_SLOTS):
            content = raw[len(_NAME) + slot * _SLOT :][:_SLOT]
            if any(content):
                self._read_slot(slot, content)

    def _read_slot(self, slot: int, content: bytes) -> None:
        number, begun = _HEAD.unpack(content[: _HEAD.size])
        wrapped = content[_HEAD.size :][: _NONCE + KEY_BYTES + 16]
        try:
            self._epochs[number] = Epoch(slot, float(begun), self.read_key(number, begun, wrapped))
        except InvalidTag:
            self._damaged.add(slot)  # torn by a crash, half destroyed, or of another site key: settle() will know

    def _erase(self, slot: int) -> None:
        self._write(slot, os.urandom(_SLOT))
        crashpoints.at("epoch.half-destroyed")
        self._write(slot, b"")

    def _write(self, slot: int, content: bytes) -> None:
        os.pwrite(self._file, content.ljust(_SLOT, b"\0"), len(_NAME) + slot * _SLOT)
        os.fsync(self._file)
