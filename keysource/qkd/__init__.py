"""A QKD link: Alice, Bob and the fibre between them as three processes; decoy-state BB84 with a finite-key bound.

Reading order: ``optics.model`` (the link in closed form), ``optics.sampler`` and ``optics.eve`` (what the fibre
does), ``plan`` (what is fixed before a block), ``distill.wire`` (the frames of a block), ``distill.alice`` and
``distill.bob`` (both sides of it), ``pad`` (authentication key and its state), ``engine`` (processes), ``ledger``.

A simulated link gives no quantum security: whoever reads the fibre process has the key.
"""
