"""Built-in data, the user's data, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from normwise.errors import StudyError
from normwise.tuning.data import chance, check_labels, load


def pair(count: int = 8, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count * 3.0).view(count, 3), torch.arange(count) % classes


def message(source: Any, loss: str = "cross_entropy") -> str:
    with pytest.raises(StudyError) as caught:
        load(source, loss)
    return str(caught.value)


def test_digits_are_standardized_with_the_training_set() -> None:
    data = load("digits", "cross_entropy")
    pixels = data.train.inputs
    constant = pixels.std(dim=0) == 0
    assert [len(split) for _, split in data.splits()] == [899, 359, 539]
    assert pixels.mean(dim=0).abs().max() < 1e-5
    assert (pixels.std(dim=0, correction=0)[~constant] - 1).abs().max() < 1e-5
    assert constant.sum() == 4
    assert (data.validation.inputs[:, constant] == 0).all()
    assert set(data.train.targets.tolist()) == set(range(10))


def test_splits_share_no_example_and_never_change() -> None:
    first, again = load("wine", "cross_entropy"), load("wine", "cross_entropy")
    assert first.fingerprint() == again.fingerprint() == first.facts["data fingerprint"]
    rows = [tuple(row.tolist()) for _, split in first.splits() for row in split.inputs]
    assert len(rows) == 178
    assert len(set(rows)) == 178
    assert [len(split) for _, split in first.splits()] == [89, 36, 53]


def test_wine_keeps_its_raw_scales() -> None:
    spread = load("wine", "cross_entropy").train.inputs.std(dim=0)
    assert spread.max() / spread.min() > 1000


def test_two_sets_are_split_further_and_the_facts_say_so() -> None:
    data = load((pair(40), pair(10)), "cross_entropy")
    assert [len(split) for _, split in data.splits()] == [30, 10, 10]
    rows = torch.cat([data.train.inputs, data.validation.inputs])[:, 0].sort().values
    assert rows.equal(pair(40)[0][:, 0])
    assert data.facts["split"] == (
        "30 training, 10 validation and 10 test examples; a quarter of the training data held out for validation, "
        "drawn with split seed 0"
    )


def test_pairs_datasets_and_loaders_give_the_same() -> None:
    tensors = load((pair(), pair(), pair()), "cross_entropy")
    dataset = TensorDataset(*pair())
    arrays = pair()[0].double().numpy(), pair()[1].to(torch.int32).numpy()
    for part in (arrays, [*pair()], dataset, DataLoader(dataset, batch_size=3)):
        assert load((part, part, part), "cross_entropy").fingerprint() == tensors.fingerprint()


def test_a_shuffling_loader_is_read_in_the_same_order_every_time() -> None:
    def sets() -> tuple[Any, ...]:
        loader = DataLoader(TensorDataset(*pair(50)), batch_size=7, shuffle=True)
        return loader, pair(), pair()

    state = torch.get_rng_state()
    assert load(sets, "cross_entropy").fingerprint() == load(sets, "cross_entropy").fingerprint()
    assert torch.get_rng_state().equal(state)


def test_targets_follow_the_loss() -> None:
    numbers = pair()[0], torch.arange(8)
    assert load((numbers,) * 3, "mse").train.targets.shape == (8, 1)
    assert load((numbers,) * 3, "mse").train.targets.dtype == torch.float32
    tokens = torch.arange(8).view(8, 1), torch.arange(8) % 2
    assert load((tokens,) * 3, "cross_entropy").train.inputs.dtype == torch.int64
    images = torch.ones(8, 1, dtype=torch.uint8), torch.arange(8) % 2
    assert load((images,) * 3, "cross_entropy").train.inputs.dtype == torch.float32


def test_what_is_no_data_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([pair()])

    class Failing(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise OSError("disk is gone")

    fine = pair()
    assert message("didgits") == (
        "no data named 'didgits'; there are digits, wine, breast_cancer, fashion, text, sequences, or module:function "
        "or a folder for your own"
    )
    assert message((fine,)) == "data 'given in Python' gave 1 parts; give (train, validation, test) or (train, test)"
    assert message(lambda: None).endswith("gave a NoneType; give (train, validation, test) or (train, test)")
    assert message((fine, "x", fine)) == (
        "validation data is a str; give an (X, y) pair, a map-style Dataset or a DataLoader"
    )
    assert message((Stream(), fine)) == (
        "training data is an IterableDataset, whose order no seed decides; give a map-style Dataset"
    )
    assert message((Failing(), fine)).startswith(
        "training data could not be read: OSError: disk is gone (test_tune_data"
    )
    assert message((TensorDataset(fine[0]), fine)) == "training data gives list batches; each must be an (X, y) pair"
    assert message((([[1], [2, 3]], [0, 1]), fine)).startswith(
        "training data: X is a list that makes no tensor: ValueError"
    )
    assert message((pair(3), fine)) == ("training data has 3 examples, too few to hold out a quarter for validation")


def test_values_that_cannot_be_used_are_counted_and_the_first_is_shown() -> None:
    inputs, labels = pair(20)
    holes = inputs.clone()
    holes[7, 1] = math.nan
    holes[9] = math.inf
    negative = labels.clone()
    negative[4] = -1
    fine = pair()
    assert message((fine, (holes, labels), fine)) == (
        "validation data: 2 of 20 inputs are NaN or infinite, the first at index 7"
    )
    assert message(((holes, labels), fine)).startswith("training data: 2 of 20 inputs")
    assert message((fine, fine, (inputs, negative))) == (
        "test data: 1 of 20 labels are negative, the first (-1) at index 4"
    )
    assert message(((inputs, labels[:19]), fine)) == "training data: 20 inputs but 19 targets"
    assert message(((inputs[:0], labels[:0]), fine)) == "training data is empty"
    assert message(((inputs, labels.float()), fine)) == (
        "training data: cross_entropy needs whole-number labels, these are float32; use loss mse, or .long()"
    )
    assert message(((inputs, np.full(20, np.nan)), fine), "mse") == (
        "training data: 20 of 20 targets are NaN or infinite, the first at index 0"
    )


def test_labels_beyond_the_outputs_are_refused() -> None:
    data = load((pair(), pair(), pair(9, classes=3)), "cross_entropy")
    check_labels(data, 3)
    with pytest.raises(StudyError) as caught:
        check_labels(data, 2)
    assert str(caught.value) == ("test data: 3 of 9 labels are beyond the model's 2 outputs, the first (2) at index 2")


def test_chance_is_the_loss_of_the_best_constant_prediction() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    constant = torch.tensor([0.75, 1e-30, 0.25]).log().expand(4, 3)
    best = torch.nn.functional.cross_entropy(constant, labels).item()
    assert chance(labels, "cross_entropy") == pytest.approx(best, rel=1e-6)
    targets = torch.tensor([[1.0, 0.0], [4.0, 2.0], [1.0, 4.0]])
    best = torch.nn.functional.mse_loss(targets.mean(dim=0).expand(3, 2), targets).item()
    assert chance(targets, "mse") == pytest.approx(best)
    assert chance(targets, "my:loss") is None
