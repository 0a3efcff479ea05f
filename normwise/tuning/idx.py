"""Images and labels in idx files, the format of MNIST and its successors, compressed by gzip or not.

An idx file begins with two zero bytes, a code of its values' type (8: unsigned bytes), the number of dimensions, and
their sizes as big-endian 32-bit integers; the values follow in C order (Yann LeCun, "The MNIST database").
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from normwise.errors import StudyError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
_BYTES = 8  # the code of unsigned bytes
_NAMES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_WAYS_OUT = "install Debian's images with `apt install dataset-fashion-mnist`, or give a folder with idx files as data"


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder has at least one of the four files."""
    return any(_existing(folder / name) for pair in _NAMES for name in pair)


def read_idx_folder(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Images, (n, 1, height, width) in whole numbers from 0 to 255, and labels, (n,), to train on and to test with.

    Raises StudyError that names the file that is missing or cannot be read.
    """
    return [
        (read_idx(_found(folder / images), 3).unsqueeze(1), read_idx(_found(folder / labels), 1).long())
        for images, labels in _NAMES
    ]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of an idx file with so many dimensions.

    Raises StudyError that names the file: another magic number, too few or too many bytes, a broken gzip stream.
    """
    content = _content(path)
    expected = bytes((0, 0, _BYTES, dimensions))
    if content[:4] != expected:
        raise StudyError(
            f"{path} begins with {content[:4].hex(' ') or 'nothing'}, where an idx file of bytes in {dimensions} "
            f"dimensions begins with {expected.hex(' ')}: it is damaged or another kind of file"
        )
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise StudyError(
            f"{path} has {len(content)} bytes where its header, {' x '.join(map(str, shape))}, needs "
            f"{start + math.prod(shape)}: it is cut off or damaged; fetch it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _found(path: Path) -> Path:
    existing = _existing(path)
    if existing is None:
        what = f"{path.parent} has no {path.name}.gz or {path.name}" if path.parent.is_dir() else f"no {path.parent}"
        raise StudyError(f"{what}: {_WAYS_OUT}")
    return existing


def _existing(path: Path) -> Path | None:
    candidates = (path.with_name(f"{path.name}.gz"), path)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path} cannot be read: {error}; fetch it again") from error
