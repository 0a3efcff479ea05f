"""Probes: inputs are found for models of every usual kind, hard ones are made of them, and no model is touched."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from normwise import SurgeryError
from normwise.surgery.probes import found_batch, probes_for
from tests.test_adopt import everything, linear_bn, net

Batch = namedtuple("Batch", "x y")


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.norm = nn.GRU(5, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.rnn(x)[0])

    return Recurrent()


FOUND = {
    "linear": linear_bn(),
    "linear of flat images": nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6)),
    "1d": nn.Sequential(nn.Conv1d(3, 6, 5), nn.BatchNorm1d(6)),
    "2d": net(),
    "3d": nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)),
    "images of 224": nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2)),
    "embedding": nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6)),
    "recurrent": recurrent(),
    "norm only, 2d": nn.BatchNorm2d(6),
    "norm only, last": nn.LayerNorm((6,)),
    "double": linear_bn().double(),
    "half": nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).bfloat16(),
}


@pytest.mark.parametrize("model", FOUND.values(), ids=FOUND)
def test_an_input_is_found_and_the_model_is_left_as_it_is(model: nn.Module) -> None:
    before, generator = everything(model), torch.get_rng_state()
    first, second = found_batch(model), found_batch(model)
    assert isinstance(first, Tensor)
    assert torch.equal(first, second)
    probes = probes_for(model)
    assert probes[0].name == "found from the model"
    assert torch.equal(probes[0].batch, first)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert model(first) is not None


def offering(name: str, **config: object) -> nn.Module:
    class Offering(nn.Module):
        main_input_name = name

        def __init__(self) -> None:
            super().__init__()
            self.config, self.linear = SimpleNamespace(**config), nn.Linear(2, 2)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            assert set(inputs) == {name}
            return inputs

    return Offering()


def test_what_a_model_says_of_its_inputs_is_believed() -> None:
    images = found_batch(offering("pixel_values", image_size=20, num_channels=5))
    assert images["pixel_values"].shape == (2, 5, 20, 20)
    words = found_batch(offering("input_ids", vocab_size=11))
    assert words["input_ids"].max() < 11
    assert found_batch(offering("input_values"))["input_values"].dim() == 2
    features = found_batch(offering("input_features", num_mel_bins=7, max_source_positions=3))
    assert features["input_features"].shape == (2, 7, 6)


def test_nothing_is_found_where_nothing_fits() -> None:
    class Picky(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return image + text

    with pytest.raises(SurgeryError, match=r"^no input was found that Picky takes: give a batch of yours$"):
        probes_for(Picky())


def test_a_batch_that_the_model_does_not_take_says_so_itself() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        probes_for(linear_bn(), torch.randn(5, 3))


def test_harder_ones() -> None:
    x = torch.randn(4, 3, 8, 8)
    probes = {probe.name: probe.batch for probe in probes_for(net().eval(), x)}
    assert list(probes) == [
        "given", "a mean of 30", "a constant channel", "odd sizes", "the first example only",
    ]  # fmt: skip
    assert probes["given"] is x
    assert torch.equal(probes["a mean of 30"], x + 30)
    assert (probes["a constant channel"][:, 0] == 3).all()
    assert torch.equal(probes["a constant channel"][:, 1:], x[:, 1:])
    assert probes["odd sizes"].shape == (3, 3, 7, 7)
    assert torch.equal(probes["the first example only"], x[:1])


def test_probes_that_the_model_does_not_take_are_left_out() -> None:
    names = [probe.name for probe in probes_for(linear_bn().train(), torch.randn(4, 4))]
    assert names == ["given", "a mean of 30", "a constant channel", "odd sizes"]  # one row has no variance


def test_targets_and_integers_are_not_disturbed() -> None:
    for make in (lambda *parts: tuple(parts), lambda *parts: list(parts), Batch):
        batch = make(torch.randn(4, 4), torch.arange(4))
        for probe in probes_for(linear_bn().eval(), batch):
            assert type(probe.batch) is type(batch)
            assert set(probe.batch[1].tolist()) <= {0, 1, 2, 3}
    words = torch.randint(0, 7, (4, 6))
    embedding = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6))
    assert all(probe.batch.max() < 7 for probe in probes_for(embedding, words))


def test_mappings_and_a_forward_of_ones_own() -> None:
    class Named(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return x

    assert {type(probe.batch) for probe in probes_for(Named(), {"x": torch.randn(4, 4)})} == {dict}
    probes = probes_for(Named(), {"deep": [torch.randn(4, 4)]}, lambda m, batch: m(x=batch["deep"][0]))
    assert [probe.batch["deep"][0].shape[0] for probe in probes] == [4, 4, 4, 3, 1]
