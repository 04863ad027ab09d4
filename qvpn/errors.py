"""Errors of the tunnel that cross package borders.

::

    QvpnError
    └── BadPacket          the network sent bytes that do not parse; dropped and counted, never shown

What a configuration gets wrong is in ``config.errors``, what the host refuses in ``privileged``, what a key
source says in ``keysource.errors``.
"""

from __future__ import annotations


class QvpnError(Exception):
    """Base of everything qvpn raises on purpose."""


class BadPacket(QvpnError):
    """Untrusted bytes that are not what they claim; the only exception decoders raise."""
