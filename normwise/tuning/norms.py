"""The normalizations of a study: from what the user wrote to a callable that makes the layer.

A choice is called as `norm(features, axis=1)`: channels first as in images, or `axis=-1` for channels last as in
sequences. The names are those of `surgery.words`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from normwise.errors import PatternError, StudyError
from normwise.memory import Moving
from normwise.norm import Norm
from normwise.normalizers import Standardize
from normwise.pattern import ELLIPSIS, Pattern, parse
from normwise.recoveries import Affine
from normwise.surgery.words import UPDATE_RATE, WORDS, Axis, group_count, grouped, named_layer

NormFactory = Callable[..., nn.Module]

_GROUPS = 8
_LABEL = re.compile(r"[^\W\d][\w.:+-]*")
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[(]*[\])])")


@dataclass(frozen=True)
class NormChoice:
    """A normalization under its label; calling it makes a layer for a number of features.

    >>> NormChoice("group", "group")(6).num_groups
    3
    >>> NormChoice("mine", "none")(16)
    Identity()
    """

    label: str
    declaration: str

    @property
    def simplicity(self) -> int:
        """Rank for a choice between equals: none < rms < layer < group < instance < what depends on the batch."""
        name = self.declaration.partition(":")[0]
        if name in WORDS:
            return WORDS.index(name)
        return WORDS.index("batch" if _reduces_batch(parse(self.declaration)) else "group")

    def __call__(self, features: int, axis: Axis = 1) -> nn.Module:
        """A layer for `features` channels, on the second axis (1) or on the last (-1)."""
        if axis not in (1, -1):
            raise StudyError(f"norm(features, axis=...) knows axis 1 (channels first) and -1 (last), not {axis!r}")
        name, _, groups = self.declaration.partition(":")
        if name == "group":
            return _group(features, axis, int(groups) if groups else _divisor(features))
        if name in WORDS:
            return named_layer(name, features, axis)
        return _from_pattern(parse(self.declaration), features)


def parse_norms(entries: str | Iterable[str]) -> tuple[NormChoice, ...]:
    """Read the normalizations to compare: names, `group:G`, patterns, each with a label before `=` if wanted.

    Raises StudyError for an unknown name, a pattern without a channel axis, two of the same label, or nothing at all.

    >>> [choice.label for choice in parse_norms("batch, group:4, mine=[n] c [...]")]
    ['batch', 'group:4', 'mine']
    """
    texts = _OUTSIDE_BRACKETS.split(entries) if isinstance(entries, str) else list(entries)
    choices = tuple(_choice(text.strip()) for text in texts if text.strip())
    if not choices:
        raise StudyError(f"no normalization to try: name some of {', '.join(WORDS)}, or a pattern")
    labels = [choice.label for choice in choices]
    for label in labels:
        if labels.count(label) > 1:
            raise StudyError(f"two normalizations are called {label!r}: give one another name, as in mine={label}")
    return choices


def _choice(text: str) -> NormChoice:
    label, equals, declaration = text.rpartition("=")
    label, declaration = label.strip(), declaration.strip()
    if equals and not _LABEL.fullmatch(label):
        raise StudyError(f"{label!r} in {text!r} is no label: letters, digits and _ . : + - after a first letter")
    _check(declaration)
    return NormChoice(label or declaration, declaration)


def _check(declaration: str) -> None:
    name, colon, groups = declaration.partition(":")
    if name == "group" and colon:
        if not groups.isdecimal() or int(groups) < 1:
            raise StudyError(f"{declaration!r}: the number of groups is a whole number from 1, as in group:8")
    elif declaration not in WORDS:
        if not re.search(r"[\[\](). ]", declaration):
            raise StudyError(_unknown(declaration))
        try:
            pattern = parse(declaration)
        except PatternError as error:
            raise StudyError(f"normalization {declaration!r}: {error}") from error
        _channels(pattern)
        if _reduces_batch(pattern):
            _memory(pattern)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, WORDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"no normalization named {name!r}; there are {', '.join(WORDS)}, group:G, and patterns as '[n] c [...]'{hint}"
    )


# ------------------------------------------------------------------------------------------------------- the layers


def _group(features: int, axis: Axis, groups: int) -> nn.Module:
    """As many groups as were asked for, if need be of one channel each."""
    if features % groups:
        raise StudyError(f"group:{groups} cannot split {features} features into {groups} equal groups")
    return grouped(features, axis, groups)


def _divisor(features: int) -> int:
    """The largest number of groups, 8 at most, that divides the features and leaves two a group or more; or one."""
    return group_count(features, _GROUPS) if features > 1 else 1


def _from_pattern(pattern: Pattern, features: int) -> nn.Module:
    channels = _channels(pattern)
    memory = Moving(_memory(pattern), update_rate=UPDATE_RATE) if _reduces_batch(pattern) else None
    return Norm(pattern.text, Standardize(), Affine(channels), memory, sizes=_sizes(channels, features))


def _sizes(channels: str, features: int) -> dict[str, int]:
    if channels == "c":
        return {"c": features}
    outer, inner = channels.strip("()").split()
    groups = _divisor(features)
    return {outer: groups, inner: features // groups}


def _channels(pattern: Pattern) -> str:
    """The channel axis of a pattern, as a recovery names it: `c`, or two axes in parentheses."""
    if "c" in pattern.names and all(len(dim) == 1 for dim in pattern.dims):
        return "c"
    split = [dim for dim in pattern.dims if len(dim) == 2]
    if len(split) == 1:
        return f"({split[0][0].name} {split[0][1].name})"
    raise StudyError(
        f"pattern {pattern.text!r} has no channel axis: call it c, or split it in two as (g [k]), "
        "for example '[n] c [...]' or 'n (g [k]) [...]'"
    )


def _reduces_batch(pattern: Pattern) -> bool:
    return pattern.axes[0].reduced


def _memory(pattern: Pattern) -> str:
    """The axes whose statistics are remembered for evaluation: all that are kept and named."""
    kept = [axis.name for axis in pattern.axes if not axis.reduced and axis.name != ELLIPSIS]
    if not kept:
        raise StudyError(
            f"pattern {pattern.text!r} normalizes over the batch and keeps no named axis, so that nothing can be "
            "remembered for evaluation: keep the channels, as in '[n] c [...]'"
        )
    return " ".join(kept)
