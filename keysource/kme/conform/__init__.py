"""A clause-by-clause examination of anybody's KME against ETSI GS QKD 014 V1.1.1, and of anybody's SAE.

``qvpn-kme conform URL`` plays two SAEs (:mod:`~keysource.kme.conform.kit`); ``qvpn-kme conform --sae`` is a strict
KME that writes down what an SAE does wrong (:mod:`~keysource.kme.conform.strict`).
"""
