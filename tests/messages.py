"""What provokes an error, of which kind, and its lines: the check that every table of messages shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def lines(*text: str) -> str:
    return "\n".join(text)


Message = tuple[Callable[[], object], type[Exception], tuple[str, ...]]


def check(message: Message) -> None:
    provoke, kind, expected = message
    with pytest.raises(kind) as caught:
        provoke()
    assert str(caught.value) == lines(*expected)
