"""Where the modules of a model stand, so that one can be exchanged wherever it is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import getitem, setitem
from typing import Any

from torch import nn

from normwise.errors import SurgeryError


@dataclass(frozen=True)
class Place:
    """A place that holds a module.

    Attributes:
        path: As `named_modules` writes it; `blocks.0.norms[1]` in a list that is no `ModuleList`; "" for the root.
        module: What stands there.
        registered: Whether `state_dict`, `to` and `train` reach it there.
    """

    path: str
    module: nn.Module
    registered: bool
    put: Callable[[nn.Module], None] = field(compare=False, repr=False)
    get: Callable[[], Any] = field(compare=False, repr=False)  # what stands there now


def places(model: nn.Module) -> list[Place]:
    """Every place that holds a module, in the order of `named_modules`; the root, which nothing holds, comes first.

    A module that is held twice has two places. Beside children these are plain attributes, and the lists, tuples and
    dictionaries in them, which `named_modules` does not see.

    >>> model = nn.Sequential(nn.ReLU())
    >>> model.norms = [nn.BatchNorm1d(3)]
    >>> [place.path for place in places(model)]
    ['', '0', 'norms[0]']
    """
    found = [Place("", model, True, refuse, partial(_same, model))]
    seen: set[nn.Module] = set()
    _visit("", model, seen, found)
    return found


def all_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Every module of a model, those in plain lists and attributes included, with its first path."""
    found: dict[nn.Module, str] = {}
    for place in places(model):
        found.setdefault(place.module, place.path)
    return found


def refuse(new: nn.Module) -> None:
    """Nothing holds the model."""
    raise SurgeryError("the model itself cannot be exchanged in place")


def _same(module: nn.Module) -> nn.Module:
    return module


def _visit(path: str, module: nn.Module, seen: set[nn.Module], found: list[Place]) -> None:
    """The places in a module and below, each module visited once."""
    if module in seen:
        return
    seen.add(module)
    here = list(_held_by(path, module))
    for place in here:
        found.append(place)
        _visit(place.path, place.module, seen, found)


def _held_by(path: str, module: nn.Module) -> Iterator[Place]:
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        if child is not None:
            put, get = partial(setitem, module._modules, name), partial(getitem, module._modules, name)
            yield Place(prefix + name, child, True, put, get)
    for name, value in module.__dict__.items():
        if name not in OWN_ATTRIBUTES:
            put, get = partial(_put_attribute, module, name), partial(getattr, module, name)
            yield from _in_value(prefix + name, value, put, get, ())


OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)  # what torch itself keeps in a module


def _in_value(
    path: str, value: Any, put: Callable[[Any], None], get: Callable[[], Any], within: tuple[int, ...]
) -> Iterator[Place]:
    """The modules in an attribute's value, however deep in lists, tuples and dictionaries."""
    if isinstance(value, nn.Module):
        yield Place(path, value, False, put, get)
    elif isinstance(value, (list, tuple, dict)) and id(value) not in within:
        current: Any = list(value) if isinstance(value, tuple) else value
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            if not isinstance(value[key], (nn.Module, list, tuple, dict)):
                continue
            into: Callable[[Any], None] = partial(setitem, value, key)
            if isinstance(value, tuple):
                into = partial(_put_into_tuple, value, current, key, put)
            out = partial(getitem, current, key)
            yield from _in_value(f"{path}[{key!r}]", value[key], into, out, (*within, id(value)))


def _put_attribute(module: nn.Module, name: str, new: Any) -> None:
    module.__dict__[name] = new  # not the dictionary itself is kept: a copy of the module has another


def _put_into_tuple(value: tuple[Any, ...], current: list[Any], at: int, put: Callable[[Any], None], new: Any) -> None:
    """A tuple cannot be written into: another one, of what is in `current`, takes its place."""
    current[at] = new
    if all(now is before for now, before in zip(current, value, strict=True)):
        put(value)
    else:
        put(value._make(current) if hasattr(value, "_make") else type(value)(current))
