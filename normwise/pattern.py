"""Text to axes: the bracket notation, parsed once, at construction. Knows no torch.

A pattern names the dimensions of a tensor in order. `[ ]` marks the axes that are normalized over, `( )` splits one
dimension into several axes, and `...` stands for any number of dimensions, once::

    [n] c [...]        batch normalization
    n (g [k]) [...]    group normalization

The notation is that of einx (https://github.com/fferflo/einx); the three choices it leaves to the caller (what is
grouped, what is done, how it is recovered) follow Huang et al., arXiv:2009.12836. Stricter than einx: brackets never
mean parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from normwise.errors import PatternError

ELLIPSIS = "..."

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*|\.\.\.|[\[\]()]")
_CLOSES = {"]": "[", ")": "("}
_INSIDE = {"[": "brackets", "(": "parentheses"}


@dataclass(frozen=True)
class Axis:
    """A named axis of a pattern: whether it is normalized over, and where its name stands in the text."""

    name: str
    reduced: bool
    at: int = field(compare=False, repr=False)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: for each dimension of the tensor the axes it is split into (`...` is one entry).

    Two patterns are equal when their texts are, up to white space.

    >>> pattern = parse("n (g [k]) [...]")
    >>> pattern.names
    ('n', 'g', 'k', '...')
    >>> [axis.name for axis in pattern.axes if axis.reduced]
    ['k', '...']
    """

    text: str
    dims: tuple[tuple[Axis, ...], ...] = field(compare=False, repr=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis in order."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes in order."""
        return tuple(axis.name for axis in self.axes)

    @property
    def open_ended(self) -> bool:
        """Whether `...` stands in the pattern."""
        return ELLIPSIS in self.names

    @property
    def over_features_only(self) -> bool:
        """Whether only features are normalized over, as in layer normalization.

        That is so when batch and space are kept: the first dimension, and whatever `...` stands for.
        """
        kept = {axis.name for axis in self.axes if not axis.reduced}
        return ELLIPSIS in kept and self.axes[0].name in kept

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        return next(axis for axis in self.axes if axis.name == name)

    def error(self, message: str, name: str) -> PatternError:
        """A `PatternError` that points at an axis."""
        return PatternError(message, self.text, self.axis(name).at)


def parse(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        PatternError: with a caret under what cannot be read.
    """
    text = " ".join(text.split())
    dims: list[tuple[Axis, ...]] = []
    split: list[Axis] = []
    opened: list[tuple[str, int]] = []
    seen: set[str] = set()
    for word, at in _words(text):
        within = [mark for mark, _ in opened]
        if word in _INSIDE:
            if word in within:
                raise PatternError(f"{_INSIDE[word]} cannot stand in {_INSIDE[word]}", text, at)
            opened.append((word, at))
        elif word in _CLOSES:
            _close(word, at, opened, text)
            if word == ")":
                dims.append(tuple(split))
                split = []
        else:
            _check_name(word, at, within, seen, text)
            axis = Axis(word, "[" in within, at)
            if "(" in within:
                split.append(axis)
            else:
                dims.append((axis,))
    if opened:
        mark, at = opened[-1]
        raise PatternError(f"'{mark}' is never closed", text, at)
    if not dims:
        raise PatternError("the pattern is empty: name the input's dimensions, for example '[n] c [...]'")
    return Pattern(text, tuple(dims))


def parse_names(text: str) -> tuple[tuple[str, ...], ...]:
    """Read the axes of a parameter or a memory: `"c"` is (c,), `"h w"` is (h, w), `"(g k)"` is one flat axis.

    >>> parse_names("h w"), parse_names("(g k)")
    ((('h',), ('w',)), (('g', 'k'),))
    """
    if not text.strip():
        raise PatternError("no axis is named: for example 'c', 'h w', or '(g k)' for one flat axis")
    pattern = parse(text)
    for axis in pattern.axes:
        if axis.reduced:
            raise PatternError("brackets mark what is normalized over; here they mean nothing", text, axis.at)
        if axis.name == ELLIPSIS:
            raise PatternError("name the axes one by one: '...' has no fixed size", text, axis.at)
    return tuple(tuple(axis.name for axis in dim) for dim in pattern.dims)


def check_known(pattern: Pattern, names: Iterable[str], what: str) -> None:
    """Refuse names that are not axes of the pattern; `what` says whose they are."""
    for name in names:
        if name not in pattern.names:
            known = ", ".join(n for n in pattern.names if n != ELLIPSIS)
            raise PatternError(
                f"{what} names axis '{name}', which is not in the pattern (it has {known})", pattern.text
            )


def _words(text: str) -> Iterator[tuple[str, int]]:
    at = 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        match = _WORD.match(text, at)
        if match is None:
            raise PatternError(f"unknown character {text[at]!r}", text, at)
        yield match.group(), at
        at = match.end()


def _close(word: str, at: int, opened: list[tuple[str, int]], text: str) -> None:
    mark = _CLOSES[word]
    if mark not in (m for m, _ in opened):
        raise PatternError(f"'{word}' was never opened", text, at)
    last, last_at = opened.pop()
    if last != mark:
        raise PatternError(f"'{last}' is never closed", text, last_at)
    if text[last_at + 1 : at].strip() == "":
        raise PatternError(f"nothing stands in the {_INSIDE[mark]}", text, last_at)


def _check_name(name: str, at: int, within: list[str], seen: set[str], text: str) -> None:
    if name in seen:
        raise PatternError("'...' stands twice" if name == ELLIPSIS else f"axis '{name}' is named twice", text, at)
    if name == ELLIPSIS and "(" in within:
        raise PatternError("'...' cannot stand in parentheses: it is whole dimensions", text, at)
    seen.add(name)
