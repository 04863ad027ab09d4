"""``qvpn-kme demo``: five nodes, eight links, a cut, an eavesdropper and a corrupt node, as processes here."""
