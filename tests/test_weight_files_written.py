"""Weight files: never written over another, in whole or not at all, and all that a file can hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import alone, lazy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_weight_files import refusal, same
from torch import Tensor

from normwise.errors import MissingExtraError, SurgeryError
from normwise.weight_files import check_out, read, write

# --------------------------------------------------------------------------------------------------- whether to write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file({"x": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize("how", ["itself", "relative", "link", "hard link", "folder link"])
@pytest.mark.parametrize("force", [False, True])
def test_the_input_is_never_written_over(
    how: str, force: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    monkeypatch.chdir(tmp_path)
    if how == "link":
        out.symlink_to(source)
    elif how == "hard link":
        out.hardlink_to(source)
    elif how == "folder link":
        Path("folder").symlink_to(tmp_path)
    out = {"itself": source, "relative": Path("in.safetensors"), "folder link": Path("folder/in.safetensors")}.get(
        how, out
    )
    assert refusal(lambda: check_out(out, source, force=force)) == (
        f"{out} is the file that the weights are read from: --out names another file"
    )


@pytest.mark.parametrize("there", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_file_that_exists_is_replaced_only_by_force(
    there: Callable[[Path], object], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    there(out)
    text = refusal(lambda: check_out(out, source, force=False))
    assert text == f"{out} exists already: --force replaces it, --out names another file"
    check_out(out, source, force=True)


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    precious, out = tmp_path / "precious.safetensors", tmp_path / "out.safetensors"
    precious.write_text("precious")
    out.symlink_to(precious)
    write({"x": torch.ones(2)}, out, {})
    assert precious.read_text() == "precious"
    assert not out.is_symlink()
    assert torch.equal(load_file(out)["x"], torch.ones(2))


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("w.onnx", "{}: the name of a weight file ends in .safetensors, .pt, .pth, .bin"),
        ("nowhere/w.pt", "{} cannot be written: there is no folder {.parent}"),
        ("in.safetensors/w.pt", "{} cannot be written: there is no folder {.parent}"),
        ("folder.pt", "{} is a folder, not a file"),
    ],
)
def test_a_file_that_cannot_be_written(out: str, text: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    path = tmp_path / out
    assert refusal(lambda: check_out(path, source, force=True)) == text.format(path, path)


def test_without_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    out = tmp_path / "w.pt"
    assert (
        refusal(lambda: check_out(out, source, force=False)) == f"{out} cannot be written: no permission in {tmp_path}"
    )


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_file_has_the_rights_of_any_new_file(ending: str, tmp_path: Path) -> None:
    out, other = tmp_path / f"w{ending}", tmp_path / "other"
    write({"x": torch.ones(2)}, out, {})
    other.touch()
    assert out.stat().st_mode == other.stat().st_mode


def test_metadata_go_into_a_safetensors_file(tmp_path: Path) -> None:
    write({"x": torch.ones(2)}, tmp_path / "w.safetensors", {"normwise": "folded"})
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "normwise": "folded"}
    assert read(tmp_path / "w.safetensors").metadata["normwise"] == "folded"


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("moment", ["while it is saved", "before it gets its name"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_what_was_there(
    ending: str, moment: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def fail(*args: object, **_: object) -> None:
        for path in args:
            if isinstance(path, Path):
                path.write_bytes(b"half of it")
                (path.parent / ".tmp12345").touch()  # as safetensors does
        raise error

    out = tmp_path / f"w{ending}"
    out.write_text("precious")
    if moment == "while it is saved":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SurgeryError if isinstance(error, OSError) else type(error)) as raised:
        write({"x": torch.ones(2)}, out, {})
    if isinstance(error, OSError):
        assert str(raised.value) == f"{out} cannot be written: [Errno 28] No space left on device"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(out.name, "precious")]


@pytest.mark.parametrize(
    ("ending", "state", "text"),
    [
        ("pt", lazy().state_dict, "0.weight has no size yet: let the factory run a batch through the model"),
        (
            "pt",
            lambda: {"x": torch.zeros(2, device="meta")},
            "x is on the meta device and has no values: let the factory make it on the CPU",
        ),
        (
            "safetensors",
            lambda: {"x": torch.eye(2).to_sparse()},
            "safetensors holds dense tensors only, and x is a sparse_coo tensor: write a .pt file",
        ),
        (
            "safetensors",
            lambda: {"x._extra_state": {"step": 3}},
            "safetensors holds dense tensors only, and x._extra_state is a dict: write a .pt file",
        ),
    ],
)
def test_what_a_file_cannot_hold(ending: str, state: Callable[[], dict[str, Any]], text: str, tmp_path: Path) -> None:
    assert refusal(lambda: write(state(), tmp_path / f"w.{ending}", {})) == text
    assert list(tmp_path.iterdir()) == []


def test_extra_state_goes_into_a_file_of_torchs(tmp_path: Path) -> None:
    write({"x": torch.ones(2), "_extra_state": {"step": 3}}, tmp_path / "w.pt", {})
    assert read(tmp_path / "w.pt").state["_extra_state"] == {"step": 3}


@pytest.mark.parametrize("use", [lambda path: read(path), lambda path: check_out(path, None, force=True)])
def test_without_safetensors(
    use: Callable[[Path], object], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError) as error:
        use(source)
    assert str(error.value) == (
        "a .safetensors file needs packages that are not installed: pip install 'normwise[tune]'"
    )
    check_out(tmp_path / "w.pt", None, force=False)


def test_a_gradient_is_not_in_the_way(tmp_path: Path) -> None:
    model = alone()
    write(model.state_dict(keep_vars=True), tmp_path / "w.safetensors", {})
    assert set(load_file(tmp_path / "w.safetensors")) == set(model.state_dict())


def test_devices_and_dtypes_are_kept(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {
        str(dtype): torch.randn(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64)
    }
    write(state, tmp_path / "w.safetensors", {})
    assert same(dict(sorted(read(tmp_path / "w.safetensors").state.items())), dict(sorted(state.items())))
