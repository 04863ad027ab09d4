"""Nature, detectors and Eve.  Only the fibre process imports :mod:`sampler`; the sites know :mod:`settings`."""
