"""The words of the command line: `normwise tune`, `report`, `explain`, and those of `model_commands`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise import model_commands
from normwise.console import plainly, shape_of
from normwise.errors import StudyError
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


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="mlp, cnn, or module:factory.")] = "mlp",
    data: Annotated[str, typer.Option(help="digits, wine, or module:function.")] = "digits",
    train: Annotated[
        str | None, typer.Option(help="Your own training loop, module:function; it brings its data.")
    ] = None,
    norms: Annotated[
        str, typer.Option(help="Names, group:G, patterns; name=... gives a label.")
    ] = "batch,layer,group,rms,none",
    lrs: Annotated[str, typer.Option(help="auto, or LOW:HIGH:COUNT.")] = "auto",
    seeds: Annotated[int, typer.Option(help="Seeds that select the learning rate.")] = 3,
    confirm: Annotated[int, typer.Option(help="Fresh seeds that confirm it.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Steps of a trial. [default: 200; 40 on built-in data]")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 128,
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, or module:function.")] = "cross_entropy",
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, loss; with --train name:max, name:min. [default: accuracy; loss for other losses]"
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum, or adamw.")] = "sgd",
    schedule: Annotated[str, typer.Option(help="constant, or cosine.")] = "constant",
    margin: Annotated[
        float | None, typer.Option(help="The smallest difference that matters. [default: 0.5 points]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0: none. [default: one a core]")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL. [default: study.db in the folder]")] = None,
    device: Annotated[str, typer.Option(help="Where to train, as torch names it.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Output folder. [default: runs/MODEL-DATA]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the study in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Find out which normalization and which learning rate a network wants."""
    with plainly():
        from normwise.study import Place, carry_out, check_place
        from normwise.tuning.options import Options
        from normwise.tuning.output import to_json
        from normwise.tuning.prepare import default_name, make_plan

        asked = Options(
            norms, lrs, seeds, confirm, steps, batch_size, loss, metric, optimizer, schedule, margin, device
        )
        folder = out or Path("runs", default_name(model, data, train))
        place = Place(workers, storage, folder, resume, force, folder.name)
        if not dry_run:
            check_place(place)
        plan = make_plan(model, data, train, asked)
        if dry_run:
            typer.echo(plan.text(place.count(device)))
            return
        study = carry_out(plan, place)
        typer.echo(to_json(study.summary) if json else _answer(study, folder), nl=not json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's output folder.")],
) -> None:
    """Write the report of a finished study anew, from its summary.json."""
    with plainly():
        from normwise.report import render
        from normwise.tuning.output import REPORT, read_summary, write
        from normwise.tuning.summary import summary_from_dict

        try:
            summary = summary_from_dict(read_summary(folder))
        except (KeyError, TypeError) as error:
            raise StudyError(f"the summary in {folder} is of another version of normwise: {error}") from error
        typer.echo(write(folder, REPORT, render(summary)))


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


app.add_typer(model_commands.app)


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
