"""The built-in data sets: pairs of inputs and targets to train on, validate with and test with, and facts on them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from normwise.errors import MissingExtraError
from normwise.tuning.idx import FASHION, read_idx_folder

SPLIT_SEED = 0
_VALIDATION, _TEST = 0.2, 0.3  # of a built-in set; the test share is large because it decides the verdict's precision
_HELD_OUT = 2000  # training images to validate with: each trial is evaluated on them
_WINDOW = 64  # characters that a network sees at once
_TEXT_VALIDATION, _TEXT_TEST = 500, 1000  # windows, of some 7000
_SEQUENCES, _STEPS, _SHORTEST = 3000, 32, 16

Pair = tuple[Tensor, Tensor]
Loaded = tuple[list[Pair], dict[str, str]]

_QUARTERS = f"50/20/30 %, drawn with split seed {SPLIT_SEED}"


def shuffled(count: int) -> Tensor:
    """The whole numbers below `count` in an order that is always the same.

    >>> sorted(shuffled(3).tolist())
    [0, 1, 2]
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


# ------------------------------------------------------------------------------------------------------------ tables


def _digits() -> Loaded:
    inputs, labels = _bunch("digits")
    train, validation, test = _partition(inputs, labels)
    mean, std = train[0].mean(dim=0), train[0].std(dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std, 0.0)
    splits = [((x - mean) * scale, y) for x, y in (train, validation, test)]
    return splits, {
        "data": "digits: 1797 handwritten digits of 8x8 pixels in 10 classes, from scikit-learn",
        "split": _QUARTERS,
        "inputs": "each pixel standardized with the training set's mean and standard deviation; constant pixels are 0",
    }


def _wine() -> Loaded:
    return _partition(*_bunch("wine")), {
        "data": "wine: 178 wines by 13 measurements in 3 classes, from scikit-learn",
        "split": _QUARTERS,
        "inputs": "raw; the features' scales differ by a factor of 1000",
    }


def _breast_cancer() -> Loaded:
    return _partition(*_bunch("breast_cancer")), {
        "data": "breast_cancer: 569 tumours by 30 measurements in 2 classes, from scikit-learn",
        "split": _QUARTERS,
        "inputs": "raw; the features' scales differ by a factor of more than 100,000",
    }


def _bunch(name: str) -> Pair:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(f"the built-in data set {name!r}", "tune") from error
    inputs, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)


def _partition(inputs: Tensor, targets: Tensor) -> list[Pair]:
    return _parts(inputs, targets, round(len(inputs) * _VALIDATION), round(len(inputs) * _TEST))


def _parts(inputs: Tensor, targets: Tensor, validation: int, test: int) -> list[Pair]:
    return [(inputs[part], targets[part]) for part in _rows(len(inputs), validation, test)]


def _rows(count: int, validation: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which examples to train on, to validate with and to test with."""
    order = shuffled(count)
    return order[validation + test :], order[:validation], order[validation : validation + test]


# ------------------------------------------------------------------------------------------------------------ images


def _fashion() -> Loaded:
    splits, facts = idx_images(FASHION)
    return splits, {**facts, "data": "fashion: Fashion-MNIST, images of clothes in 10 classes (Xiao et al. 2017)"}


def idx_images(folder: Path) -> Loaded:
    """The images of a folder with idx files, (n, 1, height, width), with 2000 of the training images to validate with.

    All are standardized with one mean and one standard deviation, those of the pixels to train on. Of fewer than 8000
    training images a quarter is held out.

    Raises StudyError that names the file that is missing or cannot be read.
    """
    (images, labels), (test, test_labels) = read_idx_folder(folder)
    held_out = min(_HELD_OUT, len(images) // 4)
    kept, out, _ = _rows(len(images), held_out, 0)
    pixels = images[kept].float()
    mean, std = pixels.mean(), pixels.std(correction=0).clamp_min(1e-12)
    splits = [
        ((pixels - mean) / std, labels[kept]),
        ((images[out].float() - mean) / std, labels[out]),
        ((test.float() - mean) / std, test_labels),
    ]
    return splits, {
        "data": f"{folder}: images of {images.shape[-2]}x{images.shape[-1]} pixels",
        "split": f"validation drawn from the training images with split seed {SPLIT_SEED}; the test images as they are",
        "inputs": "standardized with one mean and one standard deviation, those of the training pixels",
    }


# --------------------------------------------------------------------------------------------------------- sequences


def _text() -> Loaded:
    inputs, targets, characters = _windows()
    return _parts(inputs, targets, _TEXT_VALIDATION, _TEXT_TEST), {
        "data": f"text: the help topics of Python {platform.python_version()} (pydoc_data.topics, differs by version), "
        f"{characters} different characters; each is to be predicted from those before it",
        "split": f"windows drawn with split seed {SPLIT_SEED}",
        "inputs": f"windows of {_WINDOW} characters that do not overlap, as tokens",
    }


def _windows() -> tuple[Tensor, Tensor, int]:
    """Windows of tokens, the same one character later, and the number of different characters."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    token = {character: number for number, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([token[character] for character in text])
    count = (len(codes) - 1) // _WINDOW
    inputs = codes[: count * _WINDOW].view(count, _WINDOW)
    targets = codes[1 : count * _WINDOW + 1].view(count, _WINDOW)
    return inputs, targets, len(token)


def _sequences() -> Loaded:
    return _partition(*_waves()), {
        "data": f"sequences: {_SEQUENCES} generated ones of 3 sensors that swing about a drifting mean, in 4 classes "
        "by period (5 or 7 steps) and by the order of the sensors",
        "split": _QUARTERS,
        "inputs": f"raw: {_SHORTEST} to {_STEPS} steps, then zeros; a fourth feature is 1 while a sequence lasts",
    }


def _waves() -> Pair:
    """Swings of amplitude 1 about a mean that starts near 0 and drifts to about 6, with noise of 0.3.

    The drift is larger than the swing, and few sequences are left where it is largest: statistics shared over time fit
    no step, those of late steps rest on few sequences, and the padding counts in both.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    labels = torch.randint(4, (_SEQUENCES,), generator=generator)
    lengths = torch.randint(_SHORTEST, _STEPS + 1, (_SEQUENCES,), generator=generator)
    steps = torch.arange(_STEPS)
    period = 5.0 + 2 * (labels % 2)
    ahead = 1 - 2 * (labels // 2)  # whether the second sensor is a third of a period ahead of the first, or behind
    phase = 2 * math.pi * (steps / period[:, None] + torch.rand(_SEQUENCES, 1, generator=generator))
    swing = torch.sin(phase[..., None] + ahead[:, None, None] * torch.arange(3) * 2 * math.pi / 3)
    drift = (6 + normal(_SEQUENCES, 1, 3)) * (steps / _STEPS)[:, None]
    signal = swing + drift + normal(_SEQUENCES, 1, 3) + 0.3 * normal(_SEQUENCES, _STEPS, 3)
    lasts = (steps < lengths[:, None])[..., None].float()
    return torch.cat([signal * lasts, lasts], dim=2), labels


BUILT_IN: dict[str, Callable[[], Loaded]] = {
    "digits": _digits,
    "wine": _wine,
    "breast_cancer": _breast_cancer,
    "fashion": _fashion,
    "text": _text,
    "sequences": _sequences,
}
