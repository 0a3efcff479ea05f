"""Data in a folder: arrays by name, or idx files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from normwise.errors import StudyError
from normwise.tuning.datasets import Loaded, Pair, idx_images
from normwise.tuning.idx import is_idx_folder
from normwise.tuning.user import blame

_PARTS = {"train": "training", "val": "validation", "test": "test"}  # of the arrays' names, and what they are called


def is_path(source: str) -> bool:
    """Whether a text names something on disk, and not a data set or `module:function`.

    >>> is_path("./arrays"), is_path("digits"), is_path("my.data:sets")
    (True, False, False)
    """
    return Path(source).exists() or (":" not in source and ("/" in source or "\\" in source))


def read_folder(source: str) -> Loaded:
    """(train, validation, test), or (train, test), from a folder of arrays, one .npz file, or a folder of idx files.

    Arrays are called X_train, y_train, X_test, y_test and, if there are any, X_val, y_val: as .npy files, or in one
    .npz file. The first axis of each counts examples.

    Raises StudyError that names what is missing or cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise StudyError(f"no data at {source!r}: there is no such file or folder")
    if path.is_dir() and is_idx_folder(path):
        return idx_images(path)
    arrays = _arrays(path)
    pairs = [_pair(arrays, part, path) for part in _PARTS if part != "val" or _given(arrays, "val")]
    facts = {"data": f"arrays from {source}", "split": "as the data came", "inputs": "as the data came"}
    return pairs, facts


def _arrays(path: Path) -> dict[str, Path | Tensor]:
    """Files or tensors by name: .npy files are read only if they are asked for."""
    if path.is_file():
        return _archive(path)
    archives = sorted(path.glob("*.npz"))
    files: dict[str, Path | Tensor] = {file.stem: file for file in path.glob("*.npy")}
    return files if files or len(archives) != 1 else _archive(archives[0])


def _archive(path: Path) -> dict[str, Path | Tensor]:
    import numpy as np

    if path.suffix != ".npz":
        raise StudyError(f"{path} is no .npz file; give one, a folder of .npy files, or a folder of idx files")
    with blame(f"{path} cannot be read:"), np.load(path) as archive:
        return {name: torch.as_tensor(archive[name]) for name in archive.files}


def _given(arrays: dict[str, Path | Tensor], part: str) -> bool:
    return any(name in arrays for name in _names(part))


def _names(part: str) -> tuple[str, str]:
    return f"X_{part}", f"y_{part}"


def _pair(arrays: dict[str, Path | Tensor], part: str, path: Path) -> Pair:
    for name in _names(part):
        if name not in arrays:
            there = f"there are {', '.join(sorted(arrays))}" if arrays else "there are no arrays and no idx files"
            raise StudyError(
                f"{path} has no {name} for the {_PARTS[part]} data ({there}): name the arrays X_train, y_train, "
                "X_test, y_test and, if there are any, X_val, y_val"
            )
    inputs, targets = (_read(arrays[name]) for name in _names(part))
    return inputs, targets


def _read(array: Path | Tensor) -> Tensor:
    import numpy as np

    if isinstance(array, Tensor):
        return array
    with blame(f"{array} cannot be read:"):
        return torch.as_tensor(np.load(array))
