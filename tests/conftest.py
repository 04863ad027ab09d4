"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# How long one example takes says what else the machine does, not what is wrong; pytest's timeout ends what hangs.
settings.register_profile("qvpn", deadline=None)
settings.load_profile("qvpn")
