"""Routes beside a search through everything, and maps that are refused."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.base import Origin
from keysource.network import routes
from keysource.network.errors import NoRoute, TopologyError
from keysource.network.topology import (
    EXAMPLE,
    NODE_EXAMPLE,
    NodeConfig,
    Topology,
    hops_over,
    load_node,
    load_topology,
)

NODES = "abcdef"
capacities = st.dictionaries(
    st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)).filter(lambda pair: pair[0] != pair[1]),
    st.integers(0, 60),
    max_size=24,
)


def everything(capacity: dict[tuple[str, str], int], count: int, max_hops: int, need: int) -> list[tuple[str, ...]]:
    """The slow way: the best set of paths there is, by trying them all."""
    inner = [node for node in NODES if node not in "af"]
    ways = []
    for length in range(min(max_hops, len(inner)) + 1):
        for middle in itertools.permutations(inner, length):
            path = ("a", *middle, "f")
            if all(capacity.get(pair, 0) >= need for pair in itertools.pairwise(path)):
                ways.append(path)
    best: list[tuple[str, ...]] = []
    for chosen in itertools.combinations(ways, count):
        middles = [node for path in chosen for node in path[1:-1]]
        if len(set(middles)) == len(middles) and (
            not best or worth(capacity, need, chosen) > worth(capacity, need, best)
        ):
            best = list(chosen)
    return best


def worth(capacity: dict[tuple[str, str], int], need: int, paths: Iterable[tuple[str, ...]]) -> int:
    """Units on the poorest link of these paths; beyond plenty, more is no better."""
    poorest = min(capacity.get(pair, 0) for path in paths for pair in itertools.pairwise(path))
    return min(routes.PLENTY * need, poorest)


@settings(max_examples=200, deadline=None)
@given(capacities, st.integers(1, 3), st.integers(0, 4), st.integers(1, 6))
def test_as_good_as_trying_everything(
    capacity: dict[tuple[str, str], int], count: int, max_hops: int, need: int
) -> None:
    best = everything(capacity, count, max_hops, need)
    try:
        found = routes.disjoint_paths(capacity, "a", "f", count, max_hops, need)
    except NoRoute:
        assert not best
        return
    assert len(found) == count and all(path[0] == "a" and path[-1] == "f" for path in found)
    inner = [node for path in found for node in path[1:-1]]
    assert len(set(inner)) == len(inner) and not {"a", "f"} & set(inner)
    assert all(len(path) - 2 <= max_hops for path in found)
    assert all(capacity[pair] >= need for path in found for pair in itertools.pairwise(path))
    assert best and worth(capacity, need, found) == worth(capacity, need, best)


def test_a_path_is_taken_back_for_two() -> None:
    """The trap: the shortest path a-b-c-f blocks both ways round it."""
    edges = ["ab", "bc", "cf", "ad", "dc", "be", "ef"]
    found = routes.disjoint_paths({(x[0], x[1]): 9 for x in edges}, "a", "f", 2, 4, 1)
    assert found == [("a", "b", "e", "f"), ("a", "d", "c", "f")]


def test_more_key_before_fewer_nodes_but_only_up_to_plenty() -> None:
    short, rich = {("a", "f"): 20}, {("a", "b"): 100, ("b", "f"): 100}
    assert routes.disjoint_paths(short | rich, "a", "f", 1, 4, 10) == [("a", "b", "f")]
    assert routes.disjoint_paths(short | rich, "a", "f", 1, 4, 2) == [("a", "f")]
    assert routes.disjoint_paths(short | rich, "a", "f", 1, 0, 10) == [("a", "f")]


def test_a_large_dense_map_is_answered_soon() -> None:
    names = [f"n{i}" for i in range(40)]
    capacity = {(x, y): 50 for x in names for y in names if x != y}
    found = routes.disjoint_paths(capacity, "n0", "n39", 8, 1, 5)
    assert len(found) == 8
    with pytest.raises(NoRoute, match="8 disjoint paths"):
        routes.disjoint_paths(capacity, "n0", "n39", 8, 0, 5)


def test_the_examples_are_right(tmp_path: Path) -> None:
    (tmp_path / "network.toml").write_text(EXAMPLE)
    (tmp_path / "node.toml").write_text(NODE_EXAMPLE)
    config, map_ = load_node(tmp_path / "node.toml")
    assert (config.node.id, map_.connection[0].max_hops) == ("kme-paris", 4)
    assert map_.origin_at_most() is Origin.RELAYED


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('id = "kme-dijon"', 'id = "kme-paris"', "stands twice"),
        ('ends = ["kme-paris", "kme-lyon"]', 'ends = ["kme-paris", "kme-nice"]', "no [[node]]"),
        ('ends = ["kme-paris", "kme-lyon"]', 'ends = ["kme-lyon", "kme-lyon"]', "ends where it begins"),
        ('name = "dijon-lyon"', 'name = "paris-dijon"', "stands twice"),
        ("paths = 1", "paths = 0", "connection.0.paths"),
        ("max_hops = 4", 'max_hops = "4"', "connection.0.max_hops"),
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = ", "not TOML"),
        ('url = "https://192.0.2.1:8450"', 'url = "http://192.0.2.1:8450"', "https"),
    ],
)
def test_maps_that_are_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "network.toml"
    assert old in EXAMPLE
    file.write_text(EXAMPLE.replace(old, new, 1))
    with pytest.raises(TopologyError) as caught:
        load_topology(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_a_node_must_fit_its_map(tmp_path: Path) -> None:
    (tmp_path / "network.toml").write_text(EXAMPLE)
    for old, new, said in (
        ('id = "kme-paris"', 'id = "kme-rome"', "not on the map"),
        ('name = "paris-dijon"', 'name = "dijon-lyon"', "[[link]]"),
        ('name = "paris-lyon"', 'name = "paris-nice"', "[[connection]]"),
    ):
        (tmp_path / "node.toml").write_text(NODE_EXAMPLE.replace(old, new))
        with pytest.raises(TopologyError, match=said.replace("[", r"\[")):
            load_node(tmp_path / "node.toml")
    NodeConfig.model_validate(tomllib.loads(NODE_EXAMPLE))


def test_paths_are_judged_by_the_map() -> None:
    map_ = Topology.model_validate(
        {
            "version": 1,
            "node": [{"id": node, "url": f"https://{node}:1"} for node in "abcde"],
            "link": [
                {"name": "".join(pair), "ends": list(pair), "origin": "simulated" if pair == ("a", "d") else "qkd"}
                for pair in [("a", "b"), ("b", "c"), ("a", "d"), ("d", "c"), ("d", "e"), ("e", "c")]
            ],
            "connection": [{"name": "long", "ends": ["a", "c"], "paths": 2, "max_hops": 1}],
        }
    )
    long = map_.connection[0]
    good = (("a", "b", "c"), ("a", "d", "c"))
    assert map_.paths_mistake(long, good) == ""
    assert hops_over(good) == 1
    assert map_.origin_over(good) is Origin.SIMULATED and map_.origin_over(good[:1]) is Origin.RELAYED
    for paths, said in (
        ((("a", "b", "c"),), "1 paths where"),
        ((("a", "b", "c"), ("a", "b", "c")), "in common"),
        ((("a", "b", "c"), ("c", "d", "a")), "one of its ends"),
        ((("a", "b", "c"), ("a", "d", "e", "c")), "2 trusted nodes"),
        ((("a", "b", "c"), ("a", "e", "c")), "not on the map"),
        ((("a", "b", "c"), ("a", "d", "a", "c")), "crosses itself"),
    ):
        assert said in map_.paths_mistake(long, paths)
