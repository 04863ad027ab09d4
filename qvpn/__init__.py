"""qvpn: a site-to-site VPN with hybrid post-quantum and QKD session keys.

Reading order for newcomers: ``handshake/PROTOCOL.md``, ``handshake/state.py``, ``dataplane/outbound.py``,
``dataplane/inbound.py``, ``daemon.py``.
"""

__version__ = "0.1.0"
