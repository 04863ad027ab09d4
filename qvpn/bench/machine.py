"""Where a figure was measured: date, processor, kernel, commit, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import cryptography
import numpy
from cryptography.hazmat.backends.openssl import backend

from qvpn import __version__


def facts() -> dict[str, str]:
    """Names and values in the order in which they are shown."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "commit": commit(),
        "qvpn": __version__,
        "python": platform.python_version(),
        "cryptography": f"{cryptography.__version__} ({backend.openssl_version_text()})",
        "numpy": numpy.__version__,
        "load": " ".join(f"{each:.2f}" for each in os.getloadavg()),
    }


def cpu_model(cpuinfo: str) -> str:
    """The processor's name of a ``/proc/cpuinfo``, with family and model where there are any."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def commit() -> str:
    """The commit of this source tree, with ``+`` where files differ from it; ``unknown`` outside a repository."""
    tree = Path(__file__).resolve().parents[2]
    git = ["git", "-c", f"safe.directory={tree}", "-C", str(tree)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
