"""Settings of the whole process, changed for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def changed(read: Callable[[], T], write: Callable[[T], object], value: T) -> Iterator[None]:
    """A setting has another value, and then the one that it had."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def threads(count: int) -> AbstractContextManager[None]:
    """As many threads of torch's as are asked for."""
    return changed(torch.get_num_threads, torch.set_num_threads, count)
