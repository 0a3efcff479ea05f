"""Weight files: what is read, that nothing else is, and that a file is written in whole or not at all."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import Tied
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import normwise as nw
from normwise.errors import SurgeryError
from normwise.weight_files import Weights, load, read, write


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def refusal(function: Callable[[], object]) -> str:
    with pytest.raises(SurgeryError) as error:
        function()
    return str(error.value)


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_what_is_written_is_read(ending: str, tmp_path: Path) -> None:
    path, model = tmp_path / f"w{ending}", nn.Sequential(linear(), nn.BatchNorm1d(2))
    model(torch.randn(4, 3))
    write(model.state_dict(), path, {})
    other = nn.Sequential(linear(), nn.BatchNorm1d(2))
    assert load(other, read(path)) == ()
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("layer", [nw.BatchNorm(4), nw.Norm("[n] t c", memory=nw.Moving("t c", decay=0.9))])
def test_normwises_layers_are_read_strictly(layer: nn.Module, tmp_path: Path) -> None:
    fresh = copy.deepcopy(layer)
    layer(torch.randn(3, 5, 4) if isinstance(layer, nw.Norm) and "t" in layer.spec.text else torch.randn(6, 4))
    write(layer.state_dict(), tmp_path / "w.safetensors", {})
    load(fresh, read(tmp_path / "w.safetensors"))
    assert same(dict(fresh.state_dict()), dict(layer.state_dict()))


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict"])
def test_a_checkpoint_has_its_weights_in_an_entry(entry: str, tmp_path: Path) -> None:
    path, model, other = tmp_path / "c.pt", linear(), linear()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"epoch": 3, "optimizer": optimizer.state_dict(), entry: model.state_dict()}, path)
    assert load(other, read(path)) == (f"the weights are the entry {entry!r} of {path}",)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_versions_of_a_state_are_kept(tmp_path: Path) -> None:
    """A batch norm of an old version has no counter; torch sees by the version that none is missing."""
    old, path = nn.BatchNorm1d(2).state_dict(), tmp_path / "old.pt"
    del old["num_batches_tracked"]
    assert isinstance(old, OrderedDict)
    old._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    torch.save(old, path)
    load(nn.BatchNorm1d(2), read(path))
    old._metadata[""]["version"] = 2  # type: ignore[attr-defined]
    torch.save(old, path)
    assert refusal(lambda: load(nn.BatchNorm1d(2), read(path))) == (
        f"{path} does not fit BatchNorm1d: it misses num_batches_tracked"
    )


def test_another_dtype_is_said() -> None:
    model, values = linear(), torch.randn(2, 3, dtype=torch.bfloat16)
    notes = load(model, Weights(Path("w.pt"), {"weight": values, "bias": torch.zeros(2)}))
    assert notes == ("torch.bfloat16 in the file became torch.float32, as the model has it: weight",)
    assert torch.equal(model.weight, values.float())


# -------------------------------------------------------------------------------------------------------------- tied


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", Tied()
    write(model.state_dict(), path, {})
    found = load_file(path)
    assert list(found) == sorted(model.state_dict())
    assert torch.equal(found["head.weight"], model.embed.weight)
    assert torch.equal(found["embed.weight"], model.embed.weight)
    other = Tied()
    other.load_state_dict(found)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_views_of_one_memory_are_written_apart(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    write(
        {"all": x, "rows": x[1:3], "columns": x[:, 2:4], "turned": x.T, "none": x[:0]}, tmp_path / "w.safetensors", {}
    )
    found = load_file(tmp_path / "w.safetensors")
    for name, expected in {"all": x, "rows": x[1:3], "columns": x[:, 2:4], "turned": x.T, "none": x[:0]}.items():
        assert torch.equal(found[name], expected), name


def test_one_file_of_torchs_keeps_one_memory(tmp_path: Path) -> None:
    write(Tied().state_dict(), tmp_path / "w.pt", {})
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


@pytest.mark.parametrize("left_out", ["head.weight", "embed.weight"])
def test_of_tied_names_one_is_enough(left_out: str, tmp_path: Path) -> None:
    model, other, path = Tied(), Tied(), tmp_path / "w.safetensors"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != left_out}
    save_file(state, path)
    load(other, read(path))
    assert other.head.weight is other.embed.weight
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_files_that_safetensors_writes_of_tied_models_are_read(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save_model(model, str(tmp_path / "w.safetensors"))
    load(other, read(tmp_path / "w.safetensors"))
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_both_tied_names_missing_is_an_error() -> None:
    state = {name: tensor for name, tensor in Tied().state_dict().items() if "weight" not in name or "norm" in name}
    text = refusal(lambda: load(Tied(), Weights(Path("w.pt"), state)))
    assert text == "w.pt does not fit Tied: it misses embed.weight, up.weight, head.weight"


def test_tied_names_with_different_values_are_refused() -> None:
    """Loading would silently let the last one win."""
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["head.weight"][3, 2] += 1
    assert refusal(lambda: load(Tied(), Weights(Path("w.pt"), state))) == (
        "w.pt: embed.weight and head.weight are one tensor in the model, and differ in the file"
    )
    state["head.weight"] = state["embed.weight"].clone().fill_(float("nan"))
    state["embed.weight"] = state["head.weight"].clone()  # NaN is no difference
    load(Tied(), Weights(Path("w.pt"), state))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_names_that_do_not_fit_are_listed() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert refusal(lambda: load(model, Weights(Path("w.pt"), state))) == (
        "w.pt does not fit Sequential: it misses 0.weight, 0.bias, 1.weight and 3 more; it has what the model does "
        "not: module.0.weight, module.0.bias, module.1.weight and 3 more"
    )


def test_shapes_that_do_not_fit_are_listed() -> None:
    state = {"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}
    assert refusal(lambda: load(linear(), Weights(Path("w.pt"), state))) == (
        "w.pt does not fit Linear: size mismatch for weight: copying a param with shape torch.Size([3, 3]) from "
        "checkpoint, the shape in current model is torch.Size([2, 3])."
    )


@pytest.mark.parametrize(
    ("note", "model"),
    [
        (
            '{"python": "model = make()\\nmodel = nw.fold(model).model"}',
            ": model = make(); model = nw.fold(model).model",
        ),
        ("?", ""),
    ],
)
def test_a_file_that_normwise_wrote_says_for_which_model(note: str, model: str, tmp_path: Path) -> None:
    write({"weight": torch.zeros(2, 3)}, tmp_path / "w.safetensors", {"normwise": note})
    text = refusal(lambda: load(linear(), read(tmp_path / "w.safetensors")))
    assert text.endswith(
        f"w.safetensors does not fit Linear: it misses bias; normwise wrote it for another model{model}"
    )


class Attack:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("w.json", None, "{}: the name of a weight file ends in .safetensors, .pt, .pth, .bin"),
        ("w", None, "{}: the name of a weight file ends in .safetensors, .pt, .pth, .bin"),
        ("w.pt", None, "there is no file {}"),
        ("w.pt", Path.mkdir, "{} is a folder, not a file"),
        (
            "m.safetensors.index.json",
            Path.touch,
            "{} lists the files that the weights are spread over; save them in one file, or let the factory load them",
        ),
        (
            "m-00002-of-00003.safetensors",
            Path.touch,
            "{} is one of 3 files that the weights are spread over; save them in one file, or let the factory load "
            "them",
        ),
        (
            "w.safetensors",
            lambda path: path.write_text("no"),
            "{} cannot be read: Error while deserializing header: header too small",
        ),
        (
            "w.pt",
            lambda path: torch.save(Attack(), path),
            "{} holds more than tensors, or is no file of torch's, and is not opened, because that could run code: "
            "save the model's state_dict()",
        ),
        ("w.pt", Path.touch, "{} cannot be read: EOFError"),
        (
            "w.pt",
            lambda path: torch.save({"net": {"weight": torch.zeros(2)}}, path),
            "{} holds no tensors by name, and neither do its entries state_dict, model_state_dict, model",
        ),
        (
            "w.pt",
            lambda path: torch.save(torch.zeros(2), path),
            "{} holds no tensors by name, and neither do its entries state_dict, model_state_dict, model",
        ),
    ],
)
def test_a_file_that_cannot_be_read(
    name: str, make: Callable[[Path], object] | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if make is not None:
        make(path)
    assert refusal(lambda: read(path)) == text.format(path)
    assert not Path("attacked").exists()


def test_the_only_part_of_one_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "m-00001-of-00001.safetensors")
    assert list(read(tmp_path / "m-00001-of-00001.safetensors").state) == ["x"]
