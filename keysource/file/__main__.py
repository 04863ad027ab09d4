"""``python -m keysource.file LEFT RIGHT``: make new key material, one file for each site."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from keysource.base import Owner
from keysource.file.format import DEFAULT_KEYS, MAX_KEYS, write_pair


def main() -> int:
    """Exit code 0, 1 (with one sentence) or 2."""
    parser = argparse.ArgumentParser(prog="python -m keysource.file", description=__doc__)
    parser.add_argument("left", type=Path, help="new file for the left site (end a)")
    parser.add_argument("right", type=Path, help="new file for the right site (end b)")
    parser.add_argument("--keys", type=int, default=DEFAULT_KEYS, help=f"how many, default {DEFAULT_KEYS}")
    parser.add_argument("--owner", choices=[owner.value for owner in Owner], default=Owner.ALTERNATE.value)
    chosen = parser.parse_args()
    if not 1 <= chosen.keys <= MAX_KEYS:
        parser.error(f"--keys is 1 to {MAX_KEYS}")
    try:
        link = write_pair(chosen.left, chosen.right, chosen.keys, Owner(chosen.owner))
    except OSError as error:
        print(f"{error.filename or chosen.left}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
