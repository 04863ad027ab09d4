"""Tests with real namespaces, TUN devices and processes: root and /dev/net/tun, or they are skipped and say so.

The lab is the demo's (qvpn/demo/lab.py).  Its namespaces have no names and its processes die with the test
process, so a killed test run leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qvpn.demo import lab as demo_lab

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    """Test folders are no packages: a helper module beside us is loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"netns_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


support = _load("support")
third = _load("third_site")


def _hindrance() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _hindrance()
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.netns)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[demo_lab.Lab]:
    """The two-site lab, empty of daemons."""
    with demo_lab.two_sites(tmp_path / "lab") as made:
        yield made


@pytest.fixture(params=["udp", pytest.param("quic", marks=support.long_only)])
def transport(request: pytest.FixtureRequest) -> str:
    """How the sites reach each other: QUIC in the long run only (``test_netns_quic`` has what every run shows)."""
    return str(request.param)


@pytest.fixture
def tunnel(lab: demo_lab.Lab) -> object:
    """``support.Tunnel`` in the lab: call ``configure`` and ``up``."""
    return support.Tunnel(lab)


@pytest.fixture(scope="module")
def standing_tunnel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A tunnel that is up and that several tests of a module use; none of them may break it."""
    with demo_lab.two_sites(tmp_path_factory.mktemp("standing") / "lab") as made:
        tunnel = support.Tunnel(made)
        tunnel.configure()
        tunnel.up()
        yield tunnel


@pytest.fixture(scope="module")
def lan_tunnel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A standing tunnel with a network behind bob (10.77.0.0/24, fd77::/64) whose ports have no offload."""
    with demo_lab.two_sites(tmp_path_factory.mktemp("lan") / "lab") as made:
        support.add_lan(made)
        tunnel = support.Tunnel(made)
        tunnel.configure("--right-net", "10.77.0.0/24", "--right-net", "fd77::/64")
        tunnel.up(within=60)
        yield tunnel


@pytest.fixture
def third_site() -> Callable[..., None]:
    """Call it with a configured tunnel: carol is a second peer of alice then (``third_site.py``)."""
    return third.add  # type: ignore[no-any-return]


@pytest.fixture
def full_count() -> Callable[[int], int]:
    """Of a full count what this run does: all of it with QVPN_TEST_LONG=1, else a tenth."""
    return support.count


@pytest.fixture
def drop_in_the_net(lab: demo_lab.Lab) -> Callable[[int], None]:
    """Let the untrusted network lose a percentage of all packets."""
    return lambda percent: support.drop_in_the_net(lab, percent)


@pytest.fixture
def second_tunnel_keys(lab: demo_lab.Lab) -> Callable[[str], None]:
    """Replace a site's identity by a new one that its peer does not know."""
    return lambda site: support.new_identity(lab, site)


@pytest.fixture
def confirmed_keys(lab: demo_lab.Lab) -> Callable[[str], list[str]]:
    """By site: the hashes of the key_IDs in all epochs that its daemons ever confirmed."""
    return lambda site: support.confirmed_keys(lab, site)


@pytest.fixture
def tracebacks(lab: demo_lab.Lab) -> Callable[[], list[str]]:
    """Names of the logs that have a traceback in them."""
    return lambda: support.tracebacks(lab)
