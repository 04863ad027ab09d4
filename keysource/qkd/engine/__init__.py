"""The processes of a link: ``end`` (Alice or Bob), ``fibre``; what they say to each other: ``channel``, ``seal``."""
