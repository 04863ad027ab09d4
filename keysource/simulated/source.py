"""``type = "simulated"``: keys of a simulated QKD link whose end runs as our child.  No quantum security.

Two ways to write the table::

    role = "left"                       # end a, which is Alice; "right" is end b, Bob
    listen = "192.0.2.1:51850"          # left, and only left: where Bob connects
    peer = "192.0.2.1:51850"            # right, and only right: Alice's `listen`
    auth_key = "link.pad"               # pad file of the link's authenticated channel; its own copy at each end
    auth_bootstrap = "psk"              # or "signature": no pad to carry; then instead of auth_key:
    name = "left-right"                 #   the link's name, the same at both ends
    identity = "identity.pem"           #   this end's key file (qvpn genkey)
    peer_identity = "peer.pub"          #   the other end's public keys (qvpn pubkey)
    preset = "demo"                     # optional: optics; the same at both ends
    fibre = "192.0.2.1:51851"           # optional: where the fibre process listens
    owner = "a"                         # optional: who issues keys (alternate | a | b); the same at both ends

    socket = "run/left.sock"            # or: a link that runs already; nothing is started.  `role` and `owner`
                                        # may stand beside it: what the device must say of itself

In the first case ``qvpn-qkd run`` is started with a generated file in the state folder, as a program: in its own
session, dead when we are, started again with back-off.  Keys in stock outlive it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from keysource.base import End, Origin, Owner, SourceContext, SourceStatus
from keysource.device.source import DeviceSource, expect
from keysource.errors import BadSettings
from keysource.private import write_private
from keysource.settings import AddressText, parse_settings
from keysource.simulated.child import Child
from keysource.simulated.link_file import link_toml
from keysource.sockets import path_mistake

_OF_SIGNATURES = ("name", "identity", "peer_identity")
_OF_A_CHILD = ("listen", "peer", "auth_key", "preset", "fibre", *_OF_SIGNATURES)


class SimulatedSettings(BaseModel):
    """The table ``[key_source.NAME]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    role: Literal["left", "right"] | None = None
    listen: AddressText | None = None
    peer: AddressText | None = None
    auth_bootstrap: Literal["psk", "signature"] = "psk"
    auth_key: str | None = None
    name: str | None = None
    identity: str | None = None
    peer_identity: str | None = None
    preset: str | None = None
    fibre: AddressText | None = None
    owner: Owner | None = None
    socket: str | None = None

    @model_validator(mode="after")
    def _one_of_two_ways(self) -> SimulatedSettings:
        if self.socket is not None:
            if given := [name for name in _OF_A_CHILD if getattr(self, name) is not None]:
                raise ValueError(f'"socket" means a link that runs already; "{given[0]}" has no place beside it')
            return self
        address, other = ("peer", "listen") if self.role == "right" else ("listen", "peer")
        wanted: tuple[str, ...] = ("auth_key",)
        unwanted: tuple[str, ...] = ("identity", "peer_identity")
        if self.auth_bootstrap == "signature":
            wanted, unwanted = _OF_SIGNATURES, wanted
        if missing := [name for name in ("role", address, *wanted) if getattr(self, name) is None]:
            raise ValueError(f'"{missing[0]}" is missing ("socket" alone would do, for a link that runs already)')
        if getattr(self, other) is not None:
            raise ValueError(f'"{other}" has no place at role "{self.role}": the right end connects to the left')
        if given := [name for name in unwanted if getattr(self, name) is not None]:
            raise ValueError(f'"{given[0]}" has no place beside auth_bootstrap = "{self.auth_bootstrap}"')
        return self

    @property
    def end(self) -> End | None:
        return None if self.role is None else End.A if self.role == "left" else End.B


class SimulatedSource(DeviceSource):
    """A :class:`~keysource.device.source.DeviceSource` that starts its device."""

    module = "keysource.qkd"
    """Run as ``python -m MODULE run FILE``."""

    def __init__(self, settings: Mapping[str, object], context: SourceContext) -> None:
        self._settings = parse_settings(SimulatedSettings, settings)
        self._context = context
        self._child: Child | None = None
        given = self._settings.socket
        socket = context.state / f"{context.name}.device.sock" if given is None else context.path(given)
        if mistake := path_mistake(socket):
            raise BadSettings(mistake, key="socket" if given else "")
        super().__init__(socket, check=expect(self._settings.end, self._settings.owner, Origin.SIMULATED))

    @property
    def child_pid(self) -> int | None:
        """Process id of the link's end while it runs."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start the child, if it is ours, and follow its device socket.

        Raises:
            BadSettings: ``auth_key`` or ``identity`` cannot be read, or the state folder cannot be written.
        """
        if self._settings.socket is None:
            self._start_child()
        await super().start()

    async def aclose(self) -> None:
        await super().aclose()
        if self._child is not None:
            await self._child.aclose()

    async def status(self, peer_sae: str) -> SourceStatus:
        """As the device says; what ended the child, where that is why no key comes."""
        status = replace(await super().status(peer_sae), origin=Origin.SIMULATED)
        child = self._child
        if child is None:
            return status
        status = replace(status, restarts=child.restarts)
        words = "" if child.pid is not None else child.last_words
        if words and not status.ready and status.alarm is None:
            return replace(status, reason=f"the process of the link {words}")
        return status

    def check_files(self) -> None:
        """See :class:`keysource.base.Checkable`."""
        if self._settings.socket is None:
            self._key_files()

    def _key_files(self) -> dict[str, Path]:
        """Settings of the child that are files: the pad, or identities.  The secret one of them must be readable, and
        by nobody else."""
        names = ("identity", "peer_identity") if self._settings.auth_bootstrap == "signature" else ("auth_key",)
        files = {name: self._context.path(getattr(self._settings, name) or "") for name in names}
        secret = files[names[0]]
        try:
            self._context.read_secret(secret)
        except OSError as error:
            raise BadSettings(f"{secret}: {error.strerror or error}", key=names[0]) from None
        except ValueError as error:
            raise BadSettings(str(error), key=names[0]) from None
        return files

    def _start_child(self) -> None:
        settings, context = self._settings, self._context
        files = self._key_files()
        file = context.state / f"{context.name}.link.toml"
        try:
            write_private(file, link_toml(settings.model_dump(), files, self.socket, context).encode())
        except OSError as error:
            raise BadSettings(f"{file}: {error.strerror or error}") from None
        self._child = Child(self.module, ["run", str(file)])
        self._child.start()
