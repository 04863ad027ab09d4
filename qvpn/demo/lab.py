"""Two sites and the networks between them, in namespaces without names, on one machine.

::

      alice ──wan── to-alice  net  to-bob ──wan── bob        the untrusted network: a router
        │                                          │
        └─fibre── to-alice  fibre  to-bob ──fibre──┘         the QKD link's own line

The namespaces are held by descriptors and every process dies with its starter, so a lab ends with the process
that made it.  The demo makes its lab inside :mod:`qvpn.demo.sandbox`; tests that run as root make one directly.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pyroute2 import IPRoute

from qvpn.demo import kernel
from qvpn.demo.process import Process, environment, launcher

SITES = ("alice", "bob")
MTU = 1500
_NO_DUPLICATE_DETECTION = 0x02
"""IFA_F_NODAD: an IPv6 address is usable at once."""

WAN4 = {"alice": "192.0.2.2", "bob": "198.51.100.2"}
WAN6 = {"alice": "2001:db8:1::2", "bob": "2001:db8:2::2"}
ROUTER4 = {"alice": "192.0.2.1", "bob": "198.51.100.1"}
ROUTER6 = {"alice": "2001:db8:1::1", "bob": "2001:db8:2::1"}
FIBRE4 = {"alice": "203.0.113.2", "bob": "203.0.113.10"}
FIBRE_END4 = {"alice": "203.0.113.1", "bob": "203.0.113.9"}


class Namespace:
    """A network namespace of the lab, and what can be done in it."""

    def __init__(self, name: str, lab: Lab) -> None:
        self.name = name
        self.lab = lab
        self.descriptor = kernel.new_network_namespace()
        with kernel.inside(self.descriptor):
            # The kernel's IPv6 duplicate detection would hold every new link back for a second or two.
            Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
            Path("/proc/sys/net/ipv6/conf/all/accept_dad").write_text("0")
            with IPRoute() as route:
                route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")

    def sysctl(self, name: str, value: str) -> None:
        """Set ``net.NAME`` (written with slashes below /proc/sys/net)."""
        with kernel.inside(self.descriptor):
            Path("/proc/sys/net", name).write_text(value)

    def address(self, interface: str, *addresses: str) -> None:
        """Give an interface addresses (``192.0.2.1/24``, ``2001:db8::1/64``), the lab's MTU, and set it up."""
        with kernel.inside(self.descriptor), IPRoute() as route:
            index = route.link_lookup(ifname=interface)[0]
            route.link("set", index=index, mtu=MTU, state="up")
            for entry in addresses:
                ip, length = entry.split("/")
                flags = {"flags": _NO_DUPLICATE_DETECTION} if ":" in ip else {}
                route.addr("add", index=index, address=ip, prefixlen=int(length), **flags)

    def default_route(self, gateway: str) -> None:
        destination = "::/0" if ":" in gateway else "0.0.0.0/0"
        with kernel.inside(self.descriptor), IPRoute() as route:
            route.route("add", dst=destination, gateway=gateway)

    def set_link(self, interface: str, *, up: bool) -> None:
        with kernel.inside(self.descriptor), IPRoute() as route:
            route.link("set", index=route.link_lookup(ifname=interface)[0], state="up" if up else "down")

    def interfaces(self) -> dict[str, dict[str, int]]:
        """Kernel counters by interface: rx and tx packets, bytes, errors and drops (proc_net_dev(5))."""
        with kernel.inside(self.descriptor):
            rows = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        names = ("bytes", "packets", "errors", "dropped")
        found = {}
        for row in rows:
            interface, numbers = row.split(":")
            values = [int(number) for number in numbers.split()]
            found[interface.strip()] = {
                **{f"rx_{name}": value for name, value in zip(names, values[:4], strict=True)},
                **{f"tx_{name}": value for name, value in zip(names, values[8:12], strict=True)},
            }
        return found

    def start(self, name: str, command: Sequence[str], *, site: bool = False) -> Process:
        """Start a program here; with ``site`` it sees of the lab only this namespace's folder, as ``/run/site``."""
        folder = self.lab.site_folder(self.name) if site else None
        hide = [self.lab.folder] if site and not self.lab.folder.is_relative_to("/run") else []
        return self.lab.adopt(
            Process(
                self.lab.unused(f"{self.name}-{name}"),
                command,
                logs=self.lab.logs,
                net=self.descriptor,
                folder=folder,
                hide=hide,
            )
        )

    def run(self, command: Sequence[str], *, text: str = "", timeout: float = 20.0) -> str:
        """Run a program to its end and return its output; ``text`` is its standard input.

        Raises subprocess.CalledProcessError (with the error output) and subprocess.TimeoutExpired.
        """
        return subprocess.run(
            [*launcher(net=self.descriptor), *command],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout,
            pass_fds=(self.descriptor,),
            env=environment(),
        ).stdout


class Lab:
    """Namespaces, links and processes that end together; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.namespaces: dict[str, Namespace] = {}
        self.processes: list[Process] = []
        self._numbers = itertools.count(1)
        self._names: set[str] = set()

    def __getitem__(self, name: str) -> Namespace:
        return self.namespaces[name]

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, name: str) -> Namespace:
        self.namespaces[name] = Namespace(name, self)
        return self.namespaces[name]

    def site_folder(self, name: str) -> Path:
        """The folder that is all a site's processes see of the lab (made on first use, for its owner only)."""
        place = self.folder / "sites" / name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    def link(self, left: str, left_interface: str, right: str, right_interface: str) -> None:
        """A veth pair between two namespaces; addresses and state are set with ``Namespace.address``."""
        with kernel.inside(self[left].descriptor), IPRoute() as route:
            peer = {"ifname": right_interface, "net_ns_fd": self[right].descriptor}
            route.link("add", ifname=left_interface, kind="veth", peer=peer)

    def adopt(self, process: Process) -> Process:
        self.processes.append(process)
        return process

    def unused(self, name: str) -> str:
        """``name``, or with a number behind it where a process of that name was started before."""
        if name in self._names:
            name = f"{name}-{next(self._numbers)}"
        self._names.add(name)
        return name

    def close(self) -> None:
        """End every process, then let the namespaces go."""
        for process in self.processes:
            process.kill()
        for namespace in self.namespaces.values():
            os.close(namespace.descriptor)
        self.namespaces.clear()
        self.processes.clear()


def two_sites(folder: Path) -> Lab:
    """The lab of the drawing above, with addresses, routes and forwarding through ``net`` in both families."""
    lab = Lab(folder)
    for name in (*SITES, "net", "fibre"):
        lab.add(name)
    lab["net"].sysctl("ipv4/ip_forward", "1")
    lab["net"].sysctl("ipv6/conf/all/forwarding", "1")
    for site in SITES:
        _attach(lab, site)
    return lab


def _attach(lab: Lab, site: str) -> None:
    lab.link(site, "wan", "net", f"to-{site}")
    lab["net"].address(f"to-{site}", f"{ROUTER4[site]}/24", f"{ROUTER6[site]}/64")
    lab[site].address("wan", f"{WAN4[site]}/24", f"{WAN6[site]}/64")
    # A default route over the outside: traffic that misses the tunnel would really leave, and be seen.
    lab[site].default_route(ROUTER4[site])
    lab[site].default_route(ROUTER6[site])
    lab.link(site, "fibre", "fibre", f"to-{site}")
    lab["fibre"].address(f"to-{site}", f"{FIBRE_END4[site]}/29")
    lab[site].address("fibre", f"{FIBRE4[site]}/29")
