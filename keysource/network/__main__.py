"""``python -m keysource.network``: the same as ``qvpn-kme``."""

from keysource.network.cli import main

if __name__ == "__main__":
    main()
