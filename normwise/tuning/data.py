"""A study's data: the built-in sets and the user's, as checked tensors in three splits.

Everything is read once and kept as tensors, so that a trial's data depend on its seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from normwise.diagnose.chance import entropy, spread
from normwise.errors import StudyError
from normwise.tuning.datasets import BUILT_IN, SPLIT_SEED, Loaded, Pair, shuffled
from normwise.tuning.folders import is_path, read_folder
from normwise.tuning.seeding import seeded
from normwise.tuning.user import blame, name_of, resolve

_NAMES = ("training", "validation", "test")

Source = str | Callable[[], Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Split:
    """Examples and what they should be mapped to; the first axis of both counts examples."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: str) -> Split:
        """The same examples on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Data:
    """Training, validation and test data, and what the report says of them."""

    label: str
    train: Split
    validation: Split
    test: Split
    facts: dict[str, str]

    def splits(self) -> Iterator[tuple[str, Split]]:
        """The three splits by name."""
        return zip(_NAMES, (self.train, self.validation, self.test), strict=True)

    def to(self, device: str) -> Data:
        """The same data on a device."""
        return Data(self.label, self.train.to(device), self.validation.to(device), self.test.to(device), self.facts)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when any value of the data does."""
        digest = hashlib.sha256()
        for _, split in self.splits():
            for tensor in (split.inputs, split.targets):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def load(source: Source, loss: str) -> Data:
    """Read a built-in set by name, a path, `module:function`, a function, or (train, validation, test), and check it.

    A path is that of a folder of arrays or of idx files; see `tuning.folders`. `loss` decides what the targets are:
    whole-number labels for "cross_entropy", float32 otherwise.

    Raises StudyError for an unknown name, a function that fails, and values that cannot be used; the message names the
    split and the first index.

    >>> data = load("digits", "cross_entropy")
    >>> [len(split) for _, split in data.splits()]
    [899, 359, 539]
    """
    with seeded(SPLIT_SEED):  # a loader that shuffles is read in the same order every time
        pairs, facts, label = _read(source)
    names = _NAMES if len(pairs) == 3 else ("training", "test")
    splits = [_checked(pair, f"{name} data", loss) for name, pair in zip(names, pairs, strict=True)]
    train, validation, test = splits if len(splits) == 3 else (*_halved(splits[0]), splits[1])
    sizes = f"{len(train)} training, {len(validation)} validation and {len(test)} test examples"
    data = Data(label, train, validation, test, {**facts, "split": f"{sizes}; {facts['split']}"})
    data.facts["data fingerprint"] = data.fingerprint()
    return data


def _read(source: Source) -> tuple[list[Pair], dict[str, str], str]:
    """Pairs of tensors, unchecked, facts on them, and what the data are called."""
    if isinstance(source, str) and source in BUILT_IN:
        return *BUILT_IN[source](), source
    if isinstance(source, str) and is_path(source):
        return *_with_split(*read_folder(source)), source
    return _users(source)


def chance(targets: Tensor, loss: str) -> float | None:
    """Loss of the best constant prediction.

    The entropy of the labels' distribution in nats for cross-entropy; the biased variance, averaged over the target's
    columns, for the squared error; None for any other loss.

    >>> round(chance(torch.tensor([0, 1, 0, 1]), "cross_entropy"), 6)
    0.693147
    >>> chance(torch.tensor([[1.0], [3.0]]), "mse")
    1.0
    """
    if loss == "cross_entropy":
        return entropy(targets)
    return spread(targets) if loss == "mse" else None


def check_labels(data: Data, classes: int) -> None:
    """Refuse labels that a model with `classes` outputs cannot predict."""
    for name, split in data.splits():
        wrong = split.targets >= classes
        if wrong.any():
            first = _first(wrong)
            raise StudyError(
                f"{name} data: {_count(wrong)} labels are beyond the model's {classes} outputs, "
                f"the first ({split.targets[first].max()}) at index {first}"
            )


# ------------------------------------------------------------------------------------------------- the user's own data


def _users(source: Source) -> tuple[list[Pair], dict[str, str], str]:
    if isinstance(source, str) and ":" not in source:
        raise StudyError(
            f"no data named {source!r}; there are {', '.join(BUILT_IN)}, or module:function or a folder for your own"
        )
    if isinstance(source, tuple):
        sets, label = source, "given in Python"
    else:
        function = resolve(source, "data") if isinstance(source, str) else source
        label = source if isinstance(source, str) else name_of(function)
        with blame(f"data {label!r} raised"):
            sets = function()
    if not isinstance(sets, tuple | list) or len(sets) not in (2, 3):
        got = f"{len(sets)} parts" if isinstance(sets, tuple | list) else f"a {type(sets).__name__}"
        raise StudyError(f"data {label!r} gave {got}; give (train, validation, test) or (train, test)")
    names = _NAMES if len(sets) == 3 else ("training", "test")
    pairs = [_pair(part, f"{name} data") for name, part in zip(names, sets, strict=True)]
    facts = {"data": label, "split": "as the data came", "inputs": "as the data came"}
    return *_with_split(pairs, facts), label


def _with_split(pairs: list[Pair], facts: dict[str, str]) -> Loaded:
    """Of two sets the first is split further, which the facts say."""
    if len(pairs) == 2:
        split = f"a quarter of the training data held out for validation, drawn with split seed {SPLIT_SEED}"
        return pairs, {**facts, "split": split}
    return pairs, facts


def _halved(split: Split) -> tuple[Split, Split]:
    """Three quarters to train on, and a quarter to validate with."""
    held_out = len(split) // 4
    if held_out == 0:
        raise StudyError(f"training data has {len(split)} examples, too few to hold out a quarter for validation")
    order = shuffled(len(split))
    kept, out = order[held_out:], order[:held_out]
    return Split(split.inputs[kept], split.targets[kept]), Split(split.inputs[out], split.targets[out])


def _pair(part: Any, who: str) -> Pair:
    if isinstance(part.dataset if isinstance(part, DataLoader) else part, IterableDataset):
        raise StudyError(f"{who} is an IterableDataset, whose order no seed decides; give a map-style Dataset")
    if isinstance(part, tuple | list) and len(part) == 2:
        return _tensor(part[0], f"{who}: X"), _tensor(part[1], f"{who}: y")
    if isinstance(part, DataLoader):
        return _collected(part, who)
    if isinstance(part, Dataset):
        return _collected(DataLoader(part, batch_size=1024), who)
    raise StudyError(f"{who} is a {type(part).__name__}; give an (X, y) pair, a map-style Dataset or a DataLoader")


def _collected(loader: Iterable[Any], who: str) -> Pair:
    with blame(f"{who} could not be read:"):
        batches = list(loader)
    if not batches:
        raise StudyError(f"{who} is empty")
    if not all(isinstance(batch, tuple | list) and len(batch) == 2 for batch in batches):
        raise StudyError(f"{who} gives {type(batches[0]).__name__} batches; each must be an (X, y) pair")
    columns = [[_tensor(batch[i], f"{who}: {'Xy'[i]}") for batch in batches] for i in (0, 1)]
    with blame(f"{who}: the batches cannot be joined:"):
        return torch.cat(columns[0]), torch.cat(columns[1])


def _tensor(values: Any, who: str) -> Tensor:
    with blame(f"{who} is a {type(values).__name__} that makes no tensor:"):
        return torch.as_tensor(values).detach().cpu()


# ------------------------------------------------------------------------------------------------------------ checks


def _checked(pair: Pair, who: str, loss: str) -> Split:
    inputs, targets = pair
    _same_length(inputs, targets, who)
    if len(inputs) == 0:
        raise StudyError(f"{who} is empty")
    _finite(inputs, who, "inputs")
    _finite(targets, who, "targets")
    return Split(_as_input(inputs), _labels(targets, who) if loss == "cross_entropy" else _columns(targets, loss))


def _same_length(inputs: Tensor, targets: Tensor, who: str) -> None:
    if inputs.ndim == 0 or targets.ndim == 0:
        raise StudyError(f"{who} is a single number; its first axis must count examples")
    if len(inputs) != len(targets):
        raise StudyError(f"{who}: {len(inputs)} inputs but {len(targets)} targets")


def _finite(values: Tensor, who: str, what: str) -> None:
    wrong = ~values.isfinite()
    if wrong.any():
        raise StudyError(f"{who}: {_count(wrong)} {what} are NaN or infinite, the first at index {_first(wrong)}")


def _as_input(inputs: Tensor) -> Tensor:
    """float32, except integers, which may be tokens of a vocabulary."""
    whole = not inputs.is_floating_point() and inputs.dtype not in (torch.uint8, torch.bool)
    return inputs.long() if whole else inputs.float()


def _labels(targets: Tensor, who: str) -> Tensor:
    if targets.is_floating_point() or targets.is_complex():
        kind = str(targets.dtype).removeprefix("torch.")
        raise StudyError(f"{who}: cross_entropy needs whole-number labels, these are {kind}; use loss mse, or .long()")
    wrong = targets < 0
    if wrong.any():
        first = _first(wrong)
        value = targets[first].min()
        raise StudyError(f"{who}: {_count(wrong)} labels are negative, the first ({value}) at index {first}")
    return targets.long()


def _columns(targets: Tensor, loss: str) -> Tensor:
    if loss != "mse":
        return targets.float() if targets.is_floating_point() else targets
    return targets.float().unsqueeze(1) if targets.ndim == 1 else targets.float()


def _count(wrong: Tensor) -> str:
    bad = int(wrong.flatten(1).any(dim=1).sum()) if wrong.ndim > 1 else int(wrong.sum())
    return f"{bad} of {len(wrong)}"


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])
