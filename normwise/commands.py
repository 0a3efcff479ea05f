"""The words of the command line: `tune`, `report`, `explain`, `backends`, `lessons`, and those of `model_commands`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise import model_commands
from normwise.bench import command as bench
from normwise.console import plainly, shape_of
from normwise.errors import StudyError
from normwise.lessons import command as lessons
from normwise.norm import Norm

if TYPE_CHECKING:
    from normwise.study import Study

app = typer.Typer(
    help="The normalization and tuning toolkit for deep networks in PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normwise {metadata.version('normwise')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The normalization and tuning toolkit for deep networks in PyTorch."""


# Options of `tune`

_WAIT = 60.0  # seconds
Norms = Annotated[str, typer.Option(help="Names, group:G, patterns; name=... gives a label.")]
Margin = Annotated[float | None, typer.Option(help="The smallest difference that matters. [default: 0.5 points]")]
Steps = Annotated[int | None, typer.Option(help="Steps of a trial. [default: 200; 40 or 100 on built-in data]")]
Epochs = Annotated[
    str | None, typer.Option(help="Passes through the data, instead of steps. Several: an axis, as 2,5.")
]
BatchSize = Annotated[
    str | None, typer.Option(help="Examples of a step. Several: an axis, as 8,32,128. [default: 128]")
]
Optimizer = Annotated[str, typer.Option(help="sgd, momentum, adamw. Several: an axis.")]
WeightDecay = Annotated[str | None, typer.Option(help="Several: an axis. [default: 0; 0.01 for adamw]")]
Start = Annotated[
    str | None,
    typer.Option(help="Of the weights: default, he, orthogonal. Several: an axis. [default: the model's]"),
]
Placement = Annotated[
    str | None,
    typer.Option(help="Of the normalization, as the model names it. Several: an axis. [default: the model's]"),
]
Sampler = Annotated[str, typer.Option(help="grid: every combination, with edges; qmc, tpe: points drawn from them.")]
Trials = Annotated[int | None, typer.Option(help="Points that qmc or tpe draws a normalization.")]
Prune = Annotated[bool, typer.Option("--prune", help="Cut points short by successive halving within a normalization.")]
Control = Annotated[
    bool, typer.Option("--control", help="Repeat the rates with gamma, beta and the output layer frozen.")
]
Model = Annotated[str, typer.Argument(help="mlp, cnn, resnet, transformer, lstm, or module:factory.")]
Data = Annotated[
    str, typer.Option(help="digits, wine, breast_cancer, fashion, text, sequences, a folder, or module:function.")
]
Loop = Annotated[str | None, typer.Option(help="Your own training loop, module:function; it brings its data.")]
Measures = Annotated[
    bool, typer.Option("--measures/--no-measures", help="Look inside one more training of each normalization.")
]
Metric = Annotated[
    str | None,
    typer.Option(help="accuracy, loss; with --train name:max, name:min. [default: accuracy; loss for other losses]"),
]


@app.command()
def tune(
    model: Model = "mlp",
    data: Data = "digits",
    train: Loop = None,
    norms: Norms = "batch,layer,group,rms,none",
    lrs: Annotated[str, typer.Option(help="auto, or LOW:HIGH:COUNT.")] = "auto",
    seeds: Annotated[int, typer.Option(help="Seeds that select the learning rate.")] = 3,
    confirm: Annotated[int, typer.Option(help="Fresh seeds that confirm it.")] = 10,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, or module:function.")] = "cross_entropy",
    metric: Metric = None,
    optimizer: Optimizer = "sgd",
    weight_decay: WeightDecay = None,
    start: Start = None,
    placement: Placement = None,
    schedule: Annotated[str, typer.Option(help="constant, or cosine.")] = "constant",
    margin: Margin = None,
    sampler: Sampler = "grid",
    trials: Trials = None,
    prune: Prune = False,
    control: Control = False,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0: none. [default: one a core]")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL. [default: study.db in the folder]")] = None,
    study: Annotated[
        str | None, typer.Option(help="The study's name in the storage. [default: the folder's name]")
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Join the study, from any machine; it says what is run.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds that a worker waits for the study to begin.")] = _WAIT,
    device: Annotated[str, typer.Option(help="Where to train, as torch names it.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Output folder. [default: runs/MODEL-DATA]")] = None,
    measures: Measures = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the study in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Find out which normalization and which learning rate a network wants."""
    with plainly():
        from normwise.study import carry_out, join
        from normwise.tuning.joining import Asked
        from normwise.tuning.options import Options
        from normwise.tuning.output import to_json
        from normwise.tuning.place import Place, check_place, check_words
        from normwise.tuning.prepare import default_name

        common = (norms, lrs, seeds, confirm, steps, batch_size, loss, metric, optimizer, schedule, margin, device)
        axes = (start, placement, weight_decay, epochs)
        options = Options(*common, *axes, sampler, trials, prune, control).plain()
        asked = Asked(model, data, train, options)
        _check_modes(worker=worker, dry_run=dry_run, json=json, waits=wait != _WAIT)
        if worker:
            finished, mine = join(asked, Place(workers, storage, out, resume, force, study), wait=wait)
            typer.echo(f"the study {study!r} is complete: {mine} of its {len(finished.records)} trials were run here")
            return
        folder = out or Path("runs", default_name(model, data, train))
        place = Place(workers, storage, folder, resume, force, study, folder.name, measures)
        (check_words if dry_run else check_place)(place)
        plan = asked.plan()
        if dry_run:
            typer.echo(plan.text(place.count(device)))
            return
        finished = carry_out(asked, plan, place)
        typer.echo(to_json(finished.summary) if json else _answer(finished, folder), nl=not json)


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A study's output folder.")] = None,
    storage: Annotated[str | None, typer.Option(help="The storage of a study, instead of a folder.")] = None,
    study: Annotated[str | None, typer.Option(help="The study's name in the storage.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder for a study in a storage. [default: runs/STUDY]")
    ] = None,
) -> None:
    """Write the report of a finished study anew, from the summary.json in its folder or from its storage."""
    with plainly():
        if folder is not None and storage is None and study is None and out is None:
            typer.echo(_redrawn(folder))
        elif folder is None and storage is not None and study is not None:
            typer.echo(_gathered(storage, study, out or Path("runs", study)))
        else:
            raise StudyError("a report is made of a folder, or with --storage, --study and perhaps --out")


@app.command()
def explain(
    pattern: Annotated[str, typer.Argument(help="For example '[n] c [...]'.")],
    shape: Annotated[str, typer.Argument(help="For example 32,64,56,56.")],
    sizes: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=SIZE", help="Sizes of axes, for example g=8.")
    ] = None,
) -> None:
    """Say what a normalization does to a tensor of a shape, in its four steps."""
    with plainly():
        typer.echo(Norm(pattern, sizes=dict(map(_size, sizes or ()))).explain(shape_of(shape)))


@app.command()
def backends(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Say which backends there are, and why one is not available.

    The exit code is 2 where NORMWISE_BACKEND asks for one that is not.
    """
    with plainly():
        from normwise.kernels import backends as kinds

        found = kinds.backends()
        typer.echo(kinds.to_json(found) if json else "\n".join(map(str, found)))
        request = kinds.requested()
        if not json:
            typer.echo(
                f"NORMWISE_BACKEND asks for {request}" + (": whichever takes a call" if request == "auto" else "")
            )


app.add_typer(model_commands.app)
app.add_typer(lessons.app)
app.add_typer(bench.app)


def _check_modes(*, worker: bool, dry_run: bool, json: bool, waits: bool) -> None:
    """Refuse options that would do nothing. Raises StudyError."""
    idle = (
        ("dry-run", dry_run, "worker", worker),
        ("json", json, "worker", worker),
        ("json", json, "dry-run", dry_run),
    )
    for name, given, mode, chosen in idle:
        if given and chosen:
            raise StudyError(f"{name} does nothing with {mode}")
    if waits and not worker:
        raise StudyError("wait does nothing without worker")


def _redrawn(folder: Path) -> Path:
    from normwise.report import render
    from normwise.tuning.output import REPORT, read_summary, write
    from normwise.tuning.summary import summary_from_dict

    try:
        summary = summary_from_dict(read_summary(folder))
    except (KeyError, TypeError) as error:
        raise StudyError(f"the summary in {folder} is of another version of normwise: {error}") from error
    return write(folder, REPORT, render(summary))


def _gathered(storage: str, study: str, out: Path) -> Path:
    from normwise.study import gather
    from normwise.tuning.output import REPORT

    gather(storage, study, out)
    return out / REPORT


def _size(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    if not (name and equals and size.isdecimal()):
        raise StudyError(f"size {text!r}: write the name of an axis and a whole number, as in g=8")
    return name, int(size)


def _answer(study: Study, folder: Path) -> str:
    from normwise.tuning.output import REPORT

    warnings = "\n".join(f"warning: {warning}" for warning in study.summary.warnings)
    parts = [study.verdict.sentence, study.table(), warnings, f"report: {folder / REPORT}"]
    return "\n\n".join(part for part in parts if part)
