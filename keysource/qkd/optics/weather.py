"""A link has weather: its alignment, loss and background change with time, as series that nature draws.

Alignment and loss are Ornstein-Uhlenbeck walks: drift against a controller that pulls back; steps of any length have
the exact distribution.  Background light follows the sun.  Plans know nothing of it: a block that meets bad weather
misses its thresholds and gives nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from keysource.qkd.optics.entangled import AnyOptics
from keysource.qkd.optics.model import Stretch


@dataclass(frozen=True, slots=True)
class Weather:
    """Times in seconds."""

    drift: float = 0.0
    """Standard deviation of the polarisation's rotation, radians."""
    drift_time: float = 60.0
    """After this time the controller has forgotten."""
    loss_db: float = 0.0
    """Standard deviation of the loss around its mean; the link never gets better than planned by more than this."""
    loss_time: float = 600.0
    background: float = 0.0
    """Dark counts per gate and detector that the sun adds at noon."""
    day: float = 86400.0

    @property
    def calm(self) -> bool:
        return self.drift == self.loss_db == self.background == 0.0


WEATHERS = {
    "calm": Weather(),
    "drifting": Weather(drift=0.08, drift_time=20.0),
    "daylight": Weather(background=2e-5, day=240.0),  # a day of four minutes
    "storm": Weather(drift=0.25, drift_time=5.0, loss_db=2.0, loss_time=30.0),
}


class Sky:
    """The state of a link's weather.  It begins at midnight, aligned."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.time = 0.0
        self._turn = self._fade = 0.0

    def step(self, seconds: float, nature: np.random.Generator) -> None:
        weather = self.weather
        self.time += seconds
        self._turn = _walk(self._turn, weather.drift, seconds / weather.drift_time, nature)
        self._fade = _walk(self._fade, weather.loss_db, seconds / weather.loss_time, nature)

    def over(self, optics: AnyOptics) -> AnyOptics:
        """The optics right now."""
        if self.weather.calm:
            return optics
        e_d = optics.misalignment
        turned = e_d + (1.0 - 2.0 * e_d) * math.sin(self._turn) ** 2
        fade = max(-self.weather.loss_db, self._fade)
        if optics.line * 10.0 ** (-fade / 10.0) > 1.0:
            fade = 0.0
        sun = max(0.0, -math.cos(2.0 * math.pi * self.time / self.weather.day))
        changed = optics.changed(fade, self.weather.background * sun, turned)
        return changed if changed.detector <= 1.0 else optics.changed(0.0, self.weather.background * sun, turned)


def _walk(value: float, spread: float, times: float, nature: np.random.Generator) -> float:
    kept = math.exp(-times)
    return float(value * kept + spread * math.sqrt(1.0 - kept**2) * nature.standard_normal())


EARTH_KM, ORBIT_MU = 6371.0, 398600.4418
"""Radius of the Earth; its gravitational parameter in km^3/s^2."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A satellite in a circular orbit over a ground station (the Earth's rotation is left out)."""

    altitude_km: float = 500.0
    top_deg: float = 75.0
    """Highest elevation."""
    least_deg: float = 20.0
    """Below this elevation nothing is sent."""
    zenith_loss_db: float = 26.0
    """Everything between Alice and Bob's detectors at 90 degrees; diffraction grows with the distance squared."""
    air_db: float = 0.9
    """Absorption straight up; it grows with the path through the air, 1 / sin(elevation)."""
    background: float = 0.0

    def seconds(self) -> float:
        """Length of the pass above ``least_deg``."""
        nearest = self._angle(self.top_deg)
        return 2.0 * math.acos(math.cos(self._angle(self.least_deg)) / math.cos(nearest)) / self._speed()

    def elevation(self, time: float) -> float:
        """Degrees, ``time`` seconds after the middle of the pass."""
        nearest = self._angle(self.top_deg)
        angle = math.acos(math.cos(nearest) * math.cos(self._speed() * time))
        up = math.cos(angle) - EARTH_KM / (EARTH_KM + self.altitude_km)
        return math.degrees(math.atan2(up, math.sin(angle)))

    def distance_km(self, elevation: float) -> float:
        s = EARTH_KM * math.sin(math.radians(elevation))
        return math.sqrt(s**2 + 2.0 * EARTH_KM * self.altitude_km + self.altitude_km**2) - s

    def loss_db(self, elevation: float) -> float:
        diffraction = 20.0 * math.log10(self.distance_km(elevation) / self.altitude_km)
        return self.zenith_loss_db + diffraction + self.air_db * (1.0 / math.sin(math.radians(elevation)) - 1.0)

    def course(self, parts: int) -> tuple[Stretch, ...]:
        """The pass in equal times, one block long."""
        step = self.seconds() / parts
        times = [(i + 0.5) * step - self.seconds() / 2.0 for i in range(parts)]
        return tuple(Stretch(1.0 / parts, self.loss_db(self.elevation(t)), self.background) for t in times)

    def _angle(self, elevation: float) -> float:
        """Between station and satellite, seen from the Earth's centre, radians."""
        e = math.radians(elevation)
        return math.acos(EARTH_KM * math.cos(e) / (EARTH_KM + self.altitude_km)) - e

    def _speed(self) -> float:
        return math.sqrt(ORBIT_MU / (EARTH_KM + self.altitude_km) ** 3)
