"""Keys left by another program as files of 32 bytes: ``PATH/issue/KEY_ID`` (ours to issue), ``PATH/fetch/KEY_ID``.
Found by ``[project.entry-points."qvpn.key_sources"] spool = "your_package:SpoolSource"``; then ``type = "spool"``."""

import uuid

from keysource.base import Key, Origin, SaePair, SourceStatus
from keysource.errors import BadSettings, Exhausted, Unavailable, UnknownKeyID


class SpoolSource:
    def __init__(self, settings, context):
        if set(settings) != {"path"}:
            raise BadSettings("path: is needed, and nothing else", key="path")
        self._site, self._path, self._open = context.site, context.path(str(settings["path"])), False

    async def start(self):
        self._open = True

    async def aclose(self):
        self._open = False

    def sae_pair(self, peer_sae):
        return SaePair(self._site, peer_sae)

    async def status(self, peer_sae):
        stored = len(list((self._path / "issue").glob("*-*")))
        reason = "closed" if not self._open else "no key files" if not stored else ""
        return SourceStatus(not reason, reason, Origin.COURIERED, stored_keys=stored)

    async def get_key(self, peer_sae):
        for file in sorted((self._path / "issue").glob("*-*")):
            return self._take(file)
        raise Exhausted(f"{self._path}: no key files")

    async def get_key_with_id(self, peer_sae, key_id):
        try:
            return self._take(self._path / "fetch" / str(uuid.UUID(key_id)))
        except (ValueError, FileNotFoundError):
            raise UnknownKeyID(f"{self._path}: no such key file") from None

    def _take(self, file):
        if not self._open:
            raise Unavailable(f"{self._path}: closed", answered=True)
        used = file.rename(
            self._path / "used"
        )  # first out of reach, then read: a crash loses it, never gives it twice
        key = Key(file.name, bytearray(used.read_bytes()), Origin.COURIERED)
        used.unlink()
        return key
