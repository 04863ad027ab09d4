"""A QKD network: trusted nodes pass keys on, so that sites share keys whose link is longer than light can go.

Reading order: ``topology`` (the map), ``routes`` (disjoint paths), ``shares`` (what an end makes and puts together
again), ``onetime`` (pad and MAC of one hop), ``messages`` (the wire, after ETSI GS QKD 020), ``relay`` (one hop),
``initiator`` and ``target`` (the two ends), ``node`` (a node's logic, no I/O), ``store`` (its disk), ``process`` (the
program), ``demo``.
"""
