"""An eavesdropper in the fibre.  She acts on pulses; nobody downstream knows of her.

Intercept-resend with all that nature allows: Eve counts the photons of a pulse without disturbing them, measures
their polarisation in a random basis and sends on as many photons in the state she found.  Photon statistics stay as
they were, so decoys and gains do not show her; what shows her is that a photon measured in the wrong basis has
forgotten Alice's bit.  Bob's error ratio rises by a quarter of her fraction by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keysource.qkd.optics.settings import Bits


@dataclass(frozen=True, slots=True)
class Light:
    """The polarisation of pulses on the fibre: ``check`` 1 for the X basis, ``bit``."""

    check: Bits
    bit: Bits


@dataclass(slots=True)
class InterceptResend:
    """``fraction`` of the pulses, 0..1, is intercepted."""

    fraction: float = 0.0

    def __call__(self, light: Light, nature: np.random.Generator) -> Light:
        if self.fraction <= 0.0:
            return light
        count = len(light.bit)
        caught = nature.random(count) < self.fraction
        basis = nature.integers(0, 2, count, dtype=np.uint8)
        # in the wrong basis the photons split at random; one port or both, her bit is a coin
        seen = np.where(basis == light.check, light.bit, nature.integers(0, 2, count, dtype=np.uint8))
        return Light(
            np.where(caught, basis, light.check).astype(np.uint8), np.where(caught, seen, light.bit).astype(np.uint8)
        )
