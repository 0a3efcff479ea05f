"""Where modules stand: wherever one is held, it is found and can be exchanged, and the holder is otherwise the same."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable

import pytest
from torch import nn

from normwise import SurgeryError
from normwise.places import Place, places

Pair = namedtuple("Pair", "norm act")


def norm() -> nn.Module:
    return nn.BatchNorm1d(3)


def paths(model: nn.Module) -> list[str]:
    return [place.path for place in places(model)]


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> list[Place]:
    """Exchange a module wherever it stands."""
    where = [place for place in places(model) if place.module is old]
    for place in where:
        place.put(new)
    return where


def held(value: object) -> nn.Module:
    """A module with something in a plain attribute."""
    model = nn.Module()
    model.held = value
    return model


def test_children_come_as_named_modules_has_them() -> None:
    block = nn.ModuleDict({"a": nn.ModuleList([nn.ReLU(), norm()]), "b": nn.Sequential(norm())})
    model = nn.Sequential(block, nn.Linear(2, 2))
    assert paths(model) == [name for name, _ in model.named_modules()]
    assert all(place.registered for place in places(model))


def test_a_child_that_is_none_is_no_place() -> None:
    model = nn.Module()
    model.register_module("downsample", None)
    assert paths(model) == [""]


def test_one_module_under_two_names_has_two_places_and_its_children_are_visited_once() -> None:
    block = nn.Sequential(norm())
    model = nn.ModuleDict({"a": block, "b": block})
    assert paths(model) == ["", "a", "a.0", "b"]
    new = nn.Identity()
    put(model, block[0], new)
    assert model["a"][0] is model["b"][0] is new
    put(model, block, new)
    assert model["a"] is model["b"] is new


@pytest.mark.parametrize(
    ("make", "path", "get"),
    [
        (lambda m: [nn.ReLU(), m], "held[1]", lambda v: v[1]),
        (lambda m: (nn.ReLU(), m), "held[1]", lambda v: v[1]),
        (lambda m: Pair(m, 3), "held[0]", lambda v: v.norm),
        (lambda m: {"a": m}, "held['a']", lambda v: v["a"]),
        (lambda m: OrderedDict(a=[m]), "held['a'][0]", lambda v: v["a"][0]),
        (lambda m: defaultdict(list, {3: (m,)}), "held[3][0]", lambda v: v[3][0]),
        (lambda m: [({"x": (0, [m])},)], "held[0][0]['x'][1][0]", lambda v: v[0][0]["x"][1][0]),
        (lambda m: ((1, (2, m)), 4), "held[0][1][1]", lambda v: v[0][1][1]),
    ],
    ids=["list", "tuple", "namedtuple", "dict", "ordered dict", "defaultdict", "deep", "tuple in tuple"],
)
def test_containers_in_attributes(
    make: Callable[[nn.Module], object], path: str, get: Callable[[object], nn.Module]
) -> None:
    old, new = norm(), nn.Identity()
    model = held(make(old))
    kind = type(model.held)
    assert [(place.path, place.registered) for place in put(model, old, new)] == [(path, False)]
    assert get(model.held) is new
    assert type(model.held) is kind
    if isinstance(model.held, defaultdict):
        assert model.held.default_factory is list
    assert all(place.module is not old for place in places(model))


def test_two_modules_of_one_tuple_are_both_exchanged() -> None:
    old, other = norm(), norm()
    model = held((old, "text", other))
    for place in [place for place in places(model) if isinstance(place.module, nn.BatchNorm1d)]:
        place.put(nn.Identity())
    assert [type(part) for part in model.held] == [nn.Identity, str, nn.Identity]


def test_a_tuple_that_stands_twice_in_an_attribute_is_exchanged_twice() -> None:
    old, new = norm(), nn.Identity()
    inner = (old,)
    model = held([inner, {"again": inner}])
    put(model, old, new)
    assert model.held[0][0] is model.held[1]["again"][0] is new


def test_a_plain_attribute_that_is_no_child() -> None:
    model, old, new = nn.Sequential(nn.Linear(2, 2)), norm(), nn.Identity()
    object.__setattr__(model, "hidden", old)
    assert [place.path for place in put(model, old, new)] == ["hidden"]
    assert model.hidden is new
    assert list(model._modules) == ["0"]


def test_a_child_that_an_attribute_holds_as_well() -> None:
    old, new = norm(), nn.Identity()
    model = nn.Sequential(nn.Linear(2, 3), old)
    model.norms = [old]
    assert [(place.path, place.registered) for place in put(model, old, new)] == [("1", True), ("norms[0]", False)]
    assert model[1] is model.norms[0] is new


def test_modules_inside_of_unregistered_modules() -> None:
    old, new = norm(), nn.Identity()
    model = held([nn.Sequential(nn.ReLU(), old)])
    assert [place.path for place in put(model, old, new)] == ["held[0].1"]
    assert model.held[0][1] is new


def test_circles_end() -> None:
    model = nn.Sequential(norm())
    object.__setattr__(model[0], "parent", model)
    ring: list[object] = [norm()]
    ring.append(ring)
    model.ring = ring
    assert paths(model) == ["", "0", "0.parent", "ring[0]"]


def test_containers_of_torchs_own_are_not_looked_into() -> None:
    model = nn.Sequential(norm())
    model.register_forward_hook(lambda *_: None)
    model[0].register_forward_pre_hook(nn.Identity())
    assert paths(model) == ["", "0"]


def test_the_root_is_first_and_cannot_be_exchanged() -> None:
    model = norm()
    (root,) = places(model)
    assert (root.path, root.module) == ("", model)
    with pytest.raises(SurgeryError, match=r"^the model itself cannot be exchanged in place$"):
        root.put(nn.Identity())


def test_looking_changes_nothing() -> None:
    model = held(([norm()], {"a": (norm(),)}))
    before, parts = dict(model.__dict__), model.held
    places(model)
    assert model.__dict__ == before
    assert model.held is parts
