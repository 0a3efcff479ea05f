"""`normwise inspect`, `swap`, `fold`, `recalibrate`: files that are never written over, errors in one line, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_models
import pytest
from cli_models import names_in, written
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import call

import normwise as nw

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- files

OPERATIONS = {
    "fold": ["fold", "cli_models:conv"],
    "swap": ["swap", "cli_models:conv", "--what", "batch", "--to", "rms"],
    "recalibrate": ["recalibrate", "cli_models:conv", "--data", "cli_models:examples"],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_json_is_the_record_and_alone_on_standard_output(operation: str, folder: Path, capsys: Captured) -> None:
    written(cli_models.conv)
    words = ["--weights", "in.safetensors", "--out", "out.safetensors", "--json"]
    assert call(*OPERATIONS[operation], *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["operation"], [line["path"] for line in record["changed"]]) == (operation, ["1", "4"])
    with safe_open("out.safetensors", framework="pt") as file:
        note = json.loads(file.metadata()["normwise"])
    assert note["operation"] == operation
    assert note["version"] == nw.__version__
    assert note["changed"] == {line["path"]: line["after"] for line in record["changed"]}
    names: dict[str, Any] = {}
    exec("\n".join([*note["imports"], note["python"]]), names)
    names["model"].load_state_dict(load_file("out.safetensors"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_written_over(operation: str, folder: Path, capsys: Captured) -> None:
    written(cli_models.conv)
    before = Path("in.safetensors").read_bytes()
    Path("link.safetensors").symlink_to("in.safetensors")
    Path("old.safetensors").write_text("precious")
    words = [*OPERATIONS[operation], "--weights", "in.safetensors", "--out"]
    for out in ("link.safetensors", str(folder / "in.safetensors")):
        assert call(*words, out, "--force") == 2
        assert capsys.readouterr() == (
            "",
            f"error: {out} is the file that the weights are read from: --out names another file\n",
        )
    assert call(*words, "old.safetensors") == 2
    assert capsys.readouterr() == (
        "",
        "error: old.safetensors exists already: --force replaces it, --out names another file\n",
    )
    assert Path("old.safetensors").read_text() == "precious"
    assert call(*words, "old.safetensors", "--force") == 0
    assert len(load_file("old.safetensors")) > 0
    assert Path("in.safetensors").read_bytes() == before
    assert names_in(folder) == ["in.safetensors", "link.safetensors", "old.safetensors"]


def test_a_file_written_for_another_model_says_so(folder: Path, capsys: Captured) -> None:
    written(cli_models.conv)
    call(*OPERATIONS["swap"], "--weights", "in.safetensors", "--out", "out.safetensors")
    capsys.readouterr()
    assert call("inspect", "cli_models:conv", "--weights", "out.safetensors") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out.safetensors does not fit Sequential: it misses 1.bias, 1.running_mean, 1.running_var and 3 "
        "more; normwise wrote it for another model: model = nw.swap(conv(), 'batch', 'rms').model"
    )


def test_ctrl_c_in_the_factory(folder: Path, capsys: Captured) -> None:
    assert call("fold", "cli_models:interrupted", "--out", "out.pt") == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert names_in(folder) == []


# ------------------------------------------------------------------------------------------------------------- errors

FOLD = "fold cli_models:{} --out out.pt"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("inspect resnet", "model 'resnet' is not of the form module:function"),
        ("inspect cli_models:no", "model 'cli_models:no': cli_models has no attribute 'no'"),
        ("inspect cli_models:ROWS", "model 'cli_models:ROWS' is a tuple, not a function"),
        (
            "inspect cli_models:instance",
            "model 'cli_models:instance' is a Linear: give a function that returns it",
        ),
        (
            "inspect cli_models:needy",
            "model 'cli_models:needy' needs the arguments width, norm: give a function that needs none",
        ),
        ("inspect cli_models:nothing", "model 'cli_models:nothing' returned a NoneType, not a torch.nn.Module"),
        (
            "inspect cli_models:broken",
            "model 'cli_models:broken' raised RuntimeError: out of luck (cli_models.py:{broken})",
        ),
        ("inspect cli_models:plain --weights no.pt", "there is no file no.pt"),
        (
            "inspect cli_models:plain --shape 2,x",
            "shape '2,x': write whole numbers with commas between them, as in 32,64,56,56",
        ),
        (
            "inspect cli_models:alone --ids 10",
            "--ids needs the shape of the token ids: --shape 2,128 --ids 1000",
        ),
        (
            "inspect cli_models:alone --shape 2,4 --data cli_models:ids",
            "the input is of a --shape or comes from --data, not both",
        ),
        (
            "inspect cli_models:alone --data cli_models:number",
            "data 'cli_models:number' returned a int, neither a batch nor batches",
        ),
        ("inspect cli_models:alone --data cli_models:empty", "data 'cli_models:empty' returned no batch"),
        (
            "inspect cli_models:alone --data cli_models:needy",
            "data 'cli_models:needy' needs the arguments width, norm: give a function that needs none",
        ),
        (
            "inspect cli_models:conv --data cli_models:wrong",
            "inspect of 'cli_models:conv' raised RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected "
            "input[2, 5, 8, 8] to have 3 channels, but got 5 channels instead",
        ),
        (
            FOLD.format("Tied"),
            "no input was found that Tied takes: give --shape 2,3,224,224 (for token ids with --ids 1000), or --data "
            "module:function",
        ),
        (FOLD.format("conv") + " --steps gains", "fold knows the steps statistics, gain, bias, center, not 'gains'"),
        ("fold cli_models:conv --out out", "out: the name of a weight file ends in .safetensors, .pt, .pth, .bin"),
        (
            "fold cli_models:conv --out no/out.pt",
            "no/out.pt cannot be written: there is no folder no",
        ),
        (
            "swap cli_models:conv --what bach --to rms --out out.pt",
            "no kind of normalization is called 'bach'; there are batch, instance, group, layer, rms, l2, other",
        ),
        (
            "swap cli_models:conv --what layer --to rms --out out.pt",
            "no normalization is meant by 'layer'; there are: 1 (batch), 4 (batch)",
        ),
        (
            "swap cli_models:conv --what batch --to group:3 --out out.pt",
            "1: 3 groups do not divide 8 features into two or more each; group counts that work: 1, 2, 4",
        ),
        (
            "recalibrate cli_models:conv --data cli_models:ids --out out.pt",
            "data 'cli_models:ids' returned a Tensor, not batches: a list, a loader or a generator of them",
        ),
        (
            "recalibrate cli_models:conv --data cli_models:empty --out out.pt",
            "there are no batches to recalibrate with",
        ),
        (
            "recalibrate cli_models:conv --data cli_models:failing --out out.pt",
            "data 'cli_models:failing' raised OSError: the disk is gone (cli_models.py:{failing})",
        ),
        (
            "recalibrate cli_models:conv --data cli_models:examples --loss l1 --out out.pt",
            "no loss named 'l1'; there are cross_entropy, mse, or module:function for your own",
        ),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_leaves_nothing(
    words: str, text: str, folder: Path, capsys: Captured
) -> None:
    assert call(*words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    source = Path(cli_models.__file__).read_text().splitlines()
    raising = {"broken": "out of luck", "failing": "the disk is gone"}
    numbers = {name: 1 + next(i for i, line in enumerate(source) if said in line) for name, said in raising.items()}
    expected = text.format(**numbers)
    assert printed.err.splitlines()[-1] == f"error: {expected}"
    assert "Traceback" not in printed.err
    assert names_in(folder) == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_ctrl_c_writes_nothing(operation: str, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert call(*OPERATIONS[operation], "--out", "out.safetensors") == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\ninterrupted\n")
    assert names_in(folder) == []


def test_without_safetensors_nothing_is_begun(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert call("fold", "cli_models:broken", "--out", "out.safetensors") == 2
    assert capsys.readouterr().err == (
        "error: a .safetensors file needs packages that are not installed: pip install 'normwise[tune]'\n"
    )


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("command", "sentence", "options"),
    [
        (
            "inspect",
            "List the normalizations of a model: what they are, what they remember, and who reads them.",
            "weights shape ids data json",
        ),
        (
            "fold",
            "Fold normalizations into the layers around them; in evaluation the model computes the same.",
            "out weights steps tolerance shape ids data force json",
        ),
        (
            "swap",
            "Exchange normalizations of one kind for another, keeping gains and biases; then train the model.",
            "what to out weights names shape ids data force json",
        ),
        (
            "recalibrate",
            "Give every layer that remembers statistics those of these batches joined; nothing is trained.",
            "data out weights batches layerwise loss force json",
        ),
    ],
)
def test_help(command: str, sentence: str, options: str, capsys: Captured) -> None:
    assert call(command, "--help") == 0
    words = capsys.readouterr().out.split()
    assert f"normwise {command} [OPTIONS] {{model}}" in " ".join(words)
    assert sentence in " ".join(words)
    assert "module:factory; it is called without arguments. [required]" in " ".join(words)
    listed = list(dict.fromkeys(word for word in words if word.startswith("--") and len(word) > 2))
    assert set(listed) - {"--shape:"} == {f"--{option}" for option in [*options.split(), "help"]}


def test_help_loads_no_operation() -> None:
    code = "import sys; sys.argv = ['normwise', '--help']\nfrom normwise.cli import main\ntry:\n    main()\n"
    code += "finally:\n    print([n for n in sys.modules if n in ('safetensors', 'optuna', 'torch._dynamo')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {command} " in done.stdout for command in ("inspect", "fold", "swap", "recalibrate"))
