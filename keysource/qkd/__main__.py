"""``python -m keysource.qkd``."""

from keysource.qkd.cli import main

main()
