"""What can go wrong at the edges of the packet path while they are opened.  After that, errors are counted.

::

    NetioError
    ├── TunError     the TUN device cannot be made
    ├── BindError    the listen address cannot be used
    └── LinkError    addresses, MTU or routes cannot be set

Every message is one sentence for an operator.
"""

from __future__ import annotations


class NetioError(Exception):
    """Base of everything that ``qvpn.netio`` raises on purpose."""


class TunError(NetioError):
    """The TUN device cannot be opened or set up."""


class BindError(NetioError):
    """The listen address cannot be used."""


class LinkError(NetioError):
    """The kernel refused an address, the MTU or a route."""


def reason(error: OSError) -> str:
    """The system's words for an error, as the end of a sentence."""
    return (error.strerror or str(error) or type(error).__name__).lower()
