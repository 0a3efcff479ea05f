"""The facade: what `import normwise as nw` offers, complete, sorted, documented."""

from __future__ import annotations

import inspect
import pkgutil
from pathlib import Path

import pytest

import normwise as nw
from normwise import errors, layers, memory, normalizers, recoveries

LOADED = [name for name in nw.__all__ if name in vars(nw)]  # the others need the optional packages
OBJECTS = [name for name in LOADED if not inspect.ismodule(getattr(nw, name))]


def test_all_is_sorted_and_without_doubles() -> None:
    """As ruff sorts it: constants (RMS looks like one), classes, functions."""
    assert nw.__all__ == sorted(set(nw.__all__), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_dir_lists_every_public_name() -> None:
    assert set(nw.__all__) <= set(dir(nw))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'normwise' has no attribute 'BachNorm'$"):
        _ = nw.BachNorm


@pytest.mark.parametrize("module", [errors, layers, memory, normalizers, recoveries], ids=lambda m: m.__name__)
def test_every_public_class_of_these_modules_is_offered(module: object) -> None:
    own = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    protocols_and_plumbing = {"Line", "Memory", "Normalizer", "Normalized", "Recovery"}
    assert own - protocols_and_plumbing <= set(nw.__all__)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_name_is_documented_and_annotated(name: str) -> None:
    value = getattr(nw, name)
    assert value.__module__.startswith("normwise")
    first = (value.__doc__ or "").strip().splitlines()
    assert first, f"{name} has no docstring"
    assert first[0].rstrip()[-1] in ".:", f"{name}: {first[0]}"
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert [p.name for p in inspect.signature(value).parameters.values() if p.annotation is p.empty] == []


@pytest.mark.parametrize("module", ["functional", "textbook"])
def test_every_public_function_is_documented_with_an_example(module: str) -> None:
    for name, value in vars(getattr(nw, module)).items():
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == f"normwise.{module}":
            assert ">>>" in (value.__doc__ or ""), name


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(nw.__file__).parent / "py.typed").exists()


def test_version() -> None:
    assert [part.isdigit() for part in nw.__version__.split(".")] == [True] * 3


def test_no_submodule_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(nw.__path__)}
    lazy = {name for name in nw.__all__ if name not in modules or not inspect.ismodule(getattr(nw, name))}
    assert modules.isdisjoint(lazy)
