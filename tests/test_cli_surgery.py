"""`normwise inspect`, `swap`, `fold`, `recalibrate`: what they print and write, and that nothing is written in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cli_models
import pytest
import torch
from cli_models import lines_to_load, loaded, names_in, written
from safetensors.torch import load_file, save_file
from test_cli import NORMWISE, call
from tolerances import MEMORY, VALUES, check
from torch import Tensor, nn

import normwise as nw
from normwise import model_commands

Captured = pytest.CaptureFixture[str]
NOTE = "note: without --weights the weights are those that cli_models:{} gives\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images() -> Tensor:
    return torch.randn(5, 3, 9, 9) * 2 + 1


# ----------------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_what_find_finds(folder: Path, capsys: Captured) -> None:
    model = written(cli_models.conv).train()
    assert call("inspect", "cli_models:conv", "--weights", "in.safetensors") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{nw.find(model)}\n\n2 normalizations (2 batch); 356 parameters\n"
    assert printed.err == "made by the factory\n"
    assert sum(parameter.numel() for parameter in model.parameters()) == 356


def test_inspect_as_json_is_alone_on_standard_output(folder: Path, capsys: Captured) -> None:
    model = written(cli_models.conv).train()
    assert call("inspect", "cli_models:conv", "--weights", "in.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(nw.find(model).to_dict()))


@pytest.mark.parametrize(
    ("model", "last"),
    [
        ("plain", "no normalization\n\n0 normalizations; 40 parameters\n"),
        ("alone", "1 normalization (1 batch); 8 parameters\n"),
        ("lazy", "; 16 parameters, and 2 tensors without a size yet\n"),
        (
            "Tied.small",
            "1 normalization (1 layer); 246 parameters\n"
            "no input was found: --shape or --data gives one, to count calls and see who reads what\n",
        ),
    ],
)
def test_inspect_sums_up(model: str, last: str, folder: Path, capsys: Captured) -> None:
    assert call("inspect", f"cli_models:{model}") == 0
    printed = capsys.readouterr()
    assert last in printed.out
    assert printed.err == NOTE.format(model)


@pytest.mark.parametrize(
    "given", [["--shape", "2,12", "--ids", "20"], ["--data", "cli_models:ids"], ["--data", "cli_models:keywords"]]
)
def test_an_input_counts_calls(given: list[str], folder: Path, capsys: Captured) -> None:
    assert call("inspect", "cli_models:Tied", *given, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["calls"], found["users"]) == (1, ["up"])


def test_a_random_input_has_the_dtype_of_the_model(folder: Path, capsys: Captured) -> None:
    assert call("inspect", "cli_models:half", "--shape", "6,4", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["calls"] == 1


# -------------------------------------------------------------------------------------------------------------- fold


@pytest.mark.parametrize("name", ["in.safetensors", "in.pt"])
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
def test_fold_writes_weights_that_the_printed_lines_load(name: str, out: str, folder: Path, capsys: Captured) -> None:
    model = written(cli_models.conv, name)
    assert call("fold", "cli_models:conv", "--weights", name, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("fold: 2 changed, 0 left as they were\n")
    size = f"{Path(out).stat().st_size / 1e6:.3g}"
    assert f"\nwritten: {out}, 6 tensors, {size} MB\nto load it:\n" in printed.out
    note = "note: the weights are the entry 'model' of in.pt\n" if name == "in.pt" else ""
    assert printed.err == f"made by the factory\n{note}made by the factory\n"
    assert lines_to_load(printed.out)[-2] == "model = nw.fold(conv().eval()).model"
    folded = loaded(printed.out)
    assert [type(folded[at]).__name__ for at in (1, 4)] == ["Identity", "Identity"]
    x = images()
    check(folded(x), model(x), VALUES)
    assert names_in(folder) == sorted([name, out])


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (["--shape", "2,3,10,10"], "torch.randn((2, 3, 10, 10))"),
        (["--data", "cli_models:pictures"], "pictures()"),
        (["--data", "cli_models:named_pictures"], "next(iter(named_pictures()))"),
    ],
)
def test_fold_of_a_model_whose_input_is_given(given: list[str], again: str, folder: Path, capsys: Captured) -> None:
    model = written(cli_models.Placed)
    words = [
        "--weights",
        "in.safetensors",
        "--out",
        "out.safetensors",
        "--tolerance",
        "1e-3",
        "--steps",
        "bias, statistics",
    ]
    assert call("fold", "cli_models:Placed", *words, *given) == 0
    printed = capsys.readouterr().out
    assert lines_to_load(printed)[-2] == (
        f"model = nw.fold(Placed().eval(), {again}, steps=['bias', 'statistics'], tolerance=0.001).model"
    )
    folded, x = loaded(printed), cli_models.pictures()
    assert isinstance(folded.norm, nn.Identity)
    check(folded(x), model(x), VALUES)


@pytest.mark.parametrize(
    "given", [["--shape", "2,12", "--ids", "20"], ["--data", "cli_models:ids"], ["--data", "cli_models:keywords"]]
)
def test_weights_with_folded_gains_fit_the_factorys_model(given: list[str], folder: Path, capsys: Captured) -> None:
    """Its matrix is tied, and the file has one of the two names."""
    model = written(cli_models.Tied)
    save_file({k: v for k, v in load_file("in.safetensors").items() if k != "head.weight"}, "in.safetensors")
    words = ["--weights", "in.safetensors", "--out", "out.safetensors"]
    assert call("fold", "cli_models:Tied.small", *words, *given) == 0
    printed = capsys.readouterr().out
    assert lines_to_load(printed)[-2] == "model = Tied.small().eval()"
    folded, x = loaded(printed), torch.randint(20, (3, 12))
    assert torch.equal(folded.norm.weight, torch.ones(6))
    assert folded.head.weight is folded.embed.weight
    check(folded(x), model(x), VALUES)


def test_what_folding_leaves_does_not_depend_on_the_weights(folder: Path, capsys: Captured) -> None:
    """A new LayerNorm has a bias of zeros, and still stays one here, as the trained one does."""
    model = written(cli_models.biased)
    assert call("fold", "cli_models:biased", "--weights", "in.safetensors", "--out", "out.safetensors") == 0
    printed = capsys.readouterr().out
    assert lines_to_load(printed)[-2] == "model = nw.fold(biased().eval()).model"
    folded, x = loaded(printed), torch.randn(5, 4)
    assert [type(folded[at]).__name__ for at in (1, 3)] == ["Identity", "LayerNorm"]
    check(folded(x), model(x), VALUES)


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
def test_where_a_model_does_not_run_without_weights_the_printed_lines_load_them_first(
    out: str, folder: Path, capsys: Captured
) -> None:
    model, factory = written(cli_models.biased), "demanding"
    assert call("fold", f"cli_models:{factory}", "--weights", "in.safetensors", "--out", out) == 0
    printed = capsys.readouterr().out
    reading = f"load_file({out!r})" if out.endswith("safetensors") else f"torch.load({out!r}, weights_only=True)"
    assert lines_to_load(printed)[-4:] == [
        f"model = {factory}().eval()",
        f"model.load_state_dict({reading}, strict=False)",
        "model = nw.fold(model).model",
        f"model.load_state_dict({reading})",
    ]
    folded, x = loaded(printed), torch.randn(5, 4)
    assert [type(folded[at]).__name__ for at in (1, 3)] == ["Identity", "LayerNorm"]
    check(folded(x), model(x), VALUES)
    if out.endswith("safetensors"):
        assert call("inspect", f"cli_models:{factory}", "--weights", out) == 2
        assert capsys.readouterr().err.endswith(
            f"another model: model = {factory}().eval(); model.load_state_dict({reading}, strict=False); "
            "model = nw.fold(model).model\n"
        )


def test_where_no_lines_are_found_it_says_so(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_commands, "_fits", lambda new, model: False)
    written(cli_models.conv)
    assert call("fold", "cli_models:conv", "--weights", "in.safetensors", "--out", "out.safetensors") == 0
    assert capsys.readouterr().out.endswith(
        " MB\nwhat is folded depends on the weights: to load it, fold the model with its old weights first\n"
    )
    assert call("inspect", "cli_models:conv", "--weights", "out.safetensors") == 2
    assert capsys.readouterr().err.endswith("; normwise wrote it for another model\n")


def test_a_random_input_of_a_model_in_half_precision(folder: Path, capsys: Captured) -> None:
    written(cli_models.half)
    words = ["--weights", "in.safetensors", "--out", "out.safetensors", "--shape", "6,4", "--tolerance", "0.05"]
    assert call("fold", "cli_models:half", *words) == 0
    printed = capsys.readouterr().out
    assert "torch.randn((6, 4), dtype=torch.bfloat16), tolerance=0.05)" in printed
    assert isinstance(loaded(printed)[1], nn.Identity)


def test_when_nothing_is_folded_nothing_is_written(folder: Path, capsys: Captured) -> None:
    assert call("fold", "cli_models:alone", "--out", "out.pt") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("fold: 0 changed, 1 left as they were\n")
    assert printed.err == NOTE.format("alone") + "fold changed nothing, and nothing is written\n"
    assert names_in(folder) == []


# -------------------------------------------------------------------------------------------------------------- swap


def test_swap_writes_weights_that_the_printed_lines_load(folder: Path, capsys: Captured) -> None:
    model = written(cli_models.conv)
    words = ["--what", "batch", "--to", "group:4", "--weights", "in.safetensors", "--out", "out.safetensors"]
    assert call("swap", "cli_models:conv", *words) == 0
    printed = capsys.readouterr()
    assert printed.err == "made by the factory\n"  # the warning is among the notes
    assert "note: swap: the weights were trained with other normalizations: train the model" in printed.out
    assert lines_to_load(printed.out) == [
        "import normwise as nw",
        "from cli_models import conv",
        "from safetensors.torch import load_file",
        "model = nw.swap(conv(), 'batch', 'group:4').model",
        "model.load_state_dict(load_file('out.safetensors'))",
    ]
    x, swapped = images(), loaded(printed.out)
    for at in (1, 4):
        model[at] = _grouped(model[at])
    check(swapped(x), model(x), VALUES)


def _grouped(batch: nn.BatchNorm2d) -> nn.GroupNorm:
    """torch's, with the same gain and bias."""
    group = nn.GroupNorm(4, batch.num_features)
    group.load_state_dict({"weight": batch.weight, "bias": batch.bias})
    return group


def test_swap_of_some_names(folder: Path, capsys: Captured) -> None:
    written(cli_models.conv)
    words = ["--what", "batch", "--to", "layer", "--names", "4*", "--names", "6", "--weights", "in.safetensors"]
    assert call("swap", "cli_models:conv", *words, "--out", "out.safetensors", "--data", "cli_models:stream") == 0
    printed = capsys.readouterr().out
    assert "model = nw.swap(conv(), 'batch', 'layer', names=['4*', '6']).model" in printed
    assert [type(loaded(printed)[at]).__name__ for at in (1, 4)] == ["BatchNorm2d", "LayerNorm2d"]


def test_swap_of_a_model_that_is_one_layer(folder: Path, capsys: Captured) -> None:
    model = written(cli_models.alone)
    words = ["--what", "batch", "--to", "layer", "--weights", "in.safetensors", "--out", "out.safetensors"]
    assert call("swap", "cli_models:alone", *words) == 0
    swapped = loaded(capsys.readouterr().out)
    assert isinstance(swapped, nw.LayerNorm2d)
    assert torch.equal(swapped.weight, model.weight)


# ------------------------------------------------------------------------------------------------------- recalibrate


@pytest.mark.parametrize("data", ["examples", "stream"])
@pytest.mark.parametrize("batches", [None, 2])
def test_recalibrate_writes_the_statistics_of_the_batches(
    data: str, batches: int | None, folder: Path, capsys: Captured
) -> None:
    model = written(cli_models.conv)
    words = ["--weights", "in.safetensors", "--out", "out.safetensors", "--data", f"cli_models:{data}", "--layerwise"]
    words += [] if batches is None else ["--batches", str(batches)]
    assert call("recalibrate", "cli_models:conv", *words, "--loss", "cross_entropy") == 0
    printed = capsys.readouterr()
    assert "note: mean loss in evaluation: " in printed.out
    assert lines_to_load(printed.out)[-2] == "model = conv()"
    recalibrated = loaded(printed.out).eval()
    x = torch.cat([x for x, _ in cli_models.examples()[:batches]])
    for at in (1, 4):
        inputs = recalibrated[:at](x).transpose(0, 1).flatten(1).double()
        check(recalibrated[at].running_mean, inputs.mean(1).float(), MEMORY)
        check(recalibrated[at].running_var, inputs.var(1).float(), MEMORY)
        assert recalibrated[at].num_batches_tracked == (batches or 3)
        assert torch.equal(recalibrated[at].weight, model[at].weight)


def test_recalibrate_with_nothing_to_do_writes_nothing(folder: Path, capsys: Captured) -> None:
    words = ["--data", "cli_models:wrong", "--out", "out.pt"]
    assert call("recalibrate", "cli_models:Tied", *words) == 1
    printed = capsys.readouterr()
    assert printed.out == "recalibrate: 0 changed, 0 left as they were\n\nnote: no layer remembers anything\n"
    assert printed.err == NOTE.format("Tied") + "recalibrate changed nothing, and nothing is written\n"
    assert names_in(folder) == []


# ------------------------------------------------------------------------------------------- processes of their own


def test_from_one_command_to_the_next_in_processes_of_their_own(folder: Path) -> None:
    model = written(cli_models.conv)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    done = run(*NORMWISE, "fold", "cli_models:conv", "--weights", "in.safetensors", "--out", "out.safetensors")
    assert done.returncode == 0, done.stderr
    x = images()
    torch.save(x, "x.pt")
    lines = [*lines_to_load(done.stdout), "import torch", "torch.save(model(torch.load('x.pt')).detach(), 'y.pt')"]
    again = run(sys.executable, "-c", "\n".join(lines))
    assert again.returncode == 0, again.stderr
    check(torch.load("y.pt"), model(x).detach(), VALUES)
