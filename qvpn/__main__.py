"""``python -m qvpn``."""

from qvpn.cli.main import main

main()
