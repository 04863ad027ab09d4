"""``type = "device"``: keys of whatever serves a device socket on this host.

::

    socket = "/run/qkd/left.sock"   # what the hardware daemon opened (keysource/device/framing.py)
    end = "a"                       # optional: which end, owner and origin the device must say it has;
    owner = "alternate"             #   another answer is refused with a sentence
    origin = "qkd"
    user = "qkd"                    # optional: the device's daemon runs as this user; else as ours or root

Origin and hops come from the device and travel with every key.  The hop is ``local``: SO_PEERCRED tells who is at
the other end, and nothing leaves the host.  Keys wait in memory; what a restart loses, the peer learns by the claims
inside the handshake.
"""

from __future__ import annotations

import pwd
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from keysource.base import End, Origin, Owner, SourceContext
from keysource.device.messages import DeviceInfo
from keysource.device.source import DeviceSource
from keysource.errors import BadAnswer, BadSettings
from keysource.settings import parse_settings
from keysource.sockets import path_mistake


class HardwareSettings(BaseModel):
    """The table ``[key_source.NAME]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    socket: str = Field(min_length=1)
    end: End | None = None
    owner: Owner | None = None
    origin: Origin | None = None
    user: str | None = None


class HardwareSource(DeviceSource):
    """A :class:`~keysource.device.source.DeviceSource` with the operator's expectations."""

    def __init__(self, settings: Mapping[str, object], context: SourceContext) -> None:
        self._settings = parse_settings(HardwareSettings, settings)
        socket = context.path(self._settings.socket)
        if mistake := path_mistake(socket):
            raise BadSettings(mistake, key="socket")
        super().__init__(socket, check=self._expect, owner=_number_of(self._settings.user))

    def _expect(self, info: DeviceInfo) -> None:
        for what in ("end", "owner", "origin"):
            wanted, said = getattr(self._settings, what), getattr(info, what)
            if wanted is not None and wanted != said:
                raise BadAnswer(
                    f'{self.socket}: the device of link {info.link!r} has {what} "{said}", configured is "{wanted}"'
                )


def _number_of(user: str | None) -> int | None:
    try:
        return None if user is None else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise BadSettings(f"user: there is no user {user!r} on this host", key="user") from None
