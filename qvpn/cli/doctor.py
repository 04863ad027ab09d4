"""``qvpn doctor FILE``: what is wrong with each key source, and what to do."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The site's qvpn.toml.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object: source name to findings.")] = False,
) -> None:
    """Look at every key source from outside: TLS, certificates, clocks, readiness, harvesting.  Consumes no key."""
    from qvpn.launch import doctor as examine

    found = examine(file)
    if json:
        print(json_text.dumps(found, indent=2))
    else:
        for name, findings in found.items():
            print(f"key source {name}")
            for one in findings:
                print(
                    f"  {one['state']:<8}{one['what']}: {one['said']}"
                    + (f"  -> {one['todo']}" if one["todo"] else "")
                )
    if any(one["state"] == "wrong" for findings in found.values() for one in findings):
        raise typer.Exit(1)
