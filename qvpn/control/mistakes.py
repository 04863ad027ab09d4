"""What may be said of a mistake in the program itself."""

from __future__ import annotations

import os
import traceback
from pathlib import Path


def describe(error: BaseException) -> dict[str, object]:
    """What a log may say of a mistake in the program: kind and place; the text may quote data, so it is left out.

    With QVPN_DEBUG=1 the whole traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
    facts: dict[str, object] = {"error": type(error).__name__, "place": place}
    if os.environ.get("QVPN_DEBUG") == "1":
        facts["exc_info"] = error
    return facts
