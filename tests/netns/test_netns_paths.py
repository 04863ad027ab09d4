"""The path between the sites changes: an address moves, a NAT stands in between, a link is narrow or gone."""

from __future__ import annotations

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import measure, payload, sites
from qvpn.demo.lab import Lab
from qvpn.demo.sites import INNER4
from qvpn.demo.steps import wait_for

MARKER = payload.new_marker()
MOVED = "192.0.2.77"
pytestmark = pytest.mark.timeout(180)


def _answered(lab: Lab, site: str, there: str) -> bool:
    return measure.ping(lab, site, INNER4[there], count=1, timeout=0.5)["received"] == 1


def _through(lab: Lab, what: str, *, within: float) -> None:
    for here, there in (topology.SITES, topology.SITES[::-1]):
        name = f"an answer for {here} {what}"
        wait_for(name, lambda h=here, t=there: _answered(lab, h, t), within=within)


def test_a_site_that_moves_is_found_again(tunnel, transport: str) -> None:
    tunnel.configure("--rekey", "2s", transport=transport)
    tunnel.up()
    lab: Lab = tunnel.lab
    ip = lab["alice"].run
    ip(["ip", "addr", "del", f"{topology.WAN4['alice']}/24", "dev", "wan"])
    ip(["ip", "addr", "add", f"{MOVED}/24", "dev", "wan"])
    ip(["ip", "route", "replace", "default", "via", topology.ROUTER4["alice"]])
    _through(lab, "after the move", within=15)
    assert tunnel.daemons["bob"].peer()["endpoint"] == f"{MOVED}:51840"
    tunnel.daemons["bob"].wait_epochs(tunnel.daemons["bob"].peer()["epochs"] + 2, within=20)
    _through(lab, "two rekeys after the move", within=5)


def test_a_site_behind_a_nat_is_reached(tunnel, transport: str) -> None:
    tunnel.configure("--rekey", "2s", transport=transport)
    lab: Lab = tunnel.lab
    # Bob knows no address of alice: what he learns is what the NAT shows him.
    sites.change(lab, "bob", lambda table: table["peer"][0].pop("endpoint"))
    rule = 'oifname "to-bob" masquerade'
    lab["net"].run(
        ["nft", "-f", "-"],
        text=f"table ip n {{\n chain p {{\n type nat hook postrouting priority 100;\n {rule}\n }}\n}}\n",
    )
    tunnel.up()
    assert tunnel.daemons["bob"].peer()["endpoint"].startswith(f"{topology.ROUTER4['bob']}:")
    _through(lab, "through the NAT", within=5)
    assert measure.transfer(lab, "bob", "alice", INNER4["alice"], MARKER, total=1_000_000).same_hash
    tunnel.daemons["bob"].wait_epochs(3, within=25)
    _through(lab, "two rekeys later", within=5)


def test_a_narrow_link_on_the_way_carries_what_the_tunnel_sends(tunnel, transport: str) -> None:
    tunnel.configure(transport=transport)
    lab: Lab = tunnel.lab
    for site, interface in (("net", "to-bob"), ("bob", "wan")):
        lab[site].run(["ip", "link", "set", interface, "mtu", "1300"])
    tunnel.up()
    assert measure.transfer(lab, "alice", "bob", INNER4["bob"], MARKER, total=500_000, timeout=15).same_hash
    assert measure.transfer(lab, "bob", "alice", INNER4["alice"], MARKER, total=500_000, timeout=15).same_hash


def test_a_cable_that_is_pulled_and_put_back(tunnel, transport: str) -> None:
    tunnel.configure("--rekey", "2s", transport=transport)
    tunnel.up()
    lab: Lab = tunnel.lab
    lab["net"].set_link("to-bob", up=False)
    for daemon in tunnel.daemons.values():
        daemon.wait_state("blocked", within=20)  # its keys have come to their hard end
    lab["net"].set_link("to-bob", up=True)
    lab["net"].run(["ip", "addr", "replace", f"{topology.ROUTER6['bob']}/64", "dev", "to-bob"])
    _through(lab, "after the cable is back", within=30)
