"""The words of the command line for models: `normwise inspect`, `swap`, `fold`, `recalibrate`, `doctor`."""

from __future__ import annotations

import json as jsons
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normwise.console import plainly, shape_of

if TYPE_CHECKING:
    from torch import nn

    from normwise.recipes import Code
    from normwise.record import Record
    from normwise.sources import Input
    from normwise.surgery.find import Normalizations

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="module:factory; it is called without arguments.")]
Weights = Annotated[
    Path | None, typer.Option(help="A .safetensors or .pt file with its weights. [default: the factory's]")
]
Out = Annotated[Path, typer.Option(help="The file to write, .safetensors or .pt; never the one that is read.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
Shape = Annotated[str | None, typer.Option(help="Shape of a random input, for example 2,3,224,224.")]
Ids = Annotated[int | None, typer.Option(min=1, help="With --shape: token ids below this number.")]
Data = Annotated[str | None, typer.Option(help="module:function that returns a batch, or batches.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


@app.command("inspect")
def inspect_(
    model: Model,
    weights: Weights = None,
    shape: Shape = None,
    ids: Ids = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """List the normalizations of a model: what they are, what they remember, and who reads them."""
    with plainly():
        from normwise.surgery.find import find

        with _user_code(f"inspect of {model!r}"):
            made = _loaded(model, weights)
            given = _input(made, shape, ids, data)
            found = find(made, _batch(given))
        typer.echo(jsons.dumps(found.to_dict(), indent=2) if json else f"{found}\n\n{_summary(made, found)}")


@app.command()
def fold(
    model: Model,
    out: Out,
    weights: Weights = None,
    steps: Annotated[
        str | None, typer.Option(help="Which of statistics,gain,bias,center. [default: all of them]")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="The largest difference of outputs that is allowed. [default: 1e-4]")
    ] = None,
    shape: Shape = None,
    ids: Ids = None,
    data: Data = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fold normalizations into the layers around them; in evaluation the model computes the same."""
    with plainly():
        from normwise.surgery.fold import fold as operate

        _check_out(out, weights, force)
        with _user_code(f"fold of {model!r}"):
            made = _loaded(model, weights).eval()
            given = _input(made, shape, ids, data)
            if given is None:
                _check_findable(made)
            wanted = None if steps is None else [step.strip() for step in steps.split(",")]
            options = _given(steps=wanted, tolerance=tolerance)
            record = operate(made, _batch(given), **options)
            python = _folded_again(model, out, record, given, options) if record.changed else None
        _finish(record, out, python, json)


@app.command()
def swap(
    model: Model,
    what: Annotated[str, typer.Option(help="batch, instance, group, layer, rms, or l2.")],
    to: Annotated[str, typer.Option(help="batch, instance, group, group:G, layer, rms, or none.")],
    out: Out,
    weights: Weights = None,
    names: Annotated[
        list[str] | None, typer.Option(help="Only layers of these paths, as in 'layer1.*'. Can be repeated.")
    ] = None,
    shape: Shape = None,
    ids: Ids = None,
    data: Data = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Exchange normalizations of one kind for another, keeping gains and biases; then train the model."""
    with plainly():
        from normwise.recipes import Code, assigned, calling, operation
        from normwise.surgery.swap import swap as operate

        _check_out(out, weights, force)
        with _user_code(f"swap of {model!r}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"swap: ", UserWarning)  # it is among the record's notes
            made = _loaded(model, weights)
            given = _input(made, shape, ids, data)
            options = _given(names=names or None)
            record = operate(made, what, to, batch=_batch(given), **options)
        python = operation("swap", [calling(model), Code(repr(what)), Code(repr(to))], options)
        _finish(record, out, assigned(python), json)


@app.command()
def recalibrate(
    model: Model,
    data: Annotated[str, typer.Option(help="module:function that returns batches.")],
    out: Out,
    weights: Weights = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Use so many batches at most. [default: all]")] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="One layer after another: exact, and a pass over the data for each.")
    ] = False,
    loss: Annotated[
        str | None, typer.Option(help="Measured before and after: cross_entropy, mse, or module:function.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Give every layer that remembers statistics those of these batches joined; nothing is trained."""
    with plainly():
        from normwise.recipes import assigned, calling
        from normwise.sources import Batches
        from normwise.surgery.recalibrate import recalibrate as operate
        from normwise.tuning.training import find_loss

        _check_out(out, weights, force)
        with _user_code(f"recalibrate of {model!r}"):
            measured = None if loss is None else find_loss(loss)
            made = _loaded(model, weights)
            record = operate(made, Batches(data, batches), loss=measured, layerwise=layerwise)
        _finish(record, out, assigned(calling(model)), json)


@app.command()
def doctor(
    model: Model,
    data: Annotated[str, typer.Option(help="module:function that returns batches, or a loader of them.")],
    weights: Weights = None,
    loss: Annotated[
        str | None,
        typer.Option(help="cross_entropy, mse, or module:function. [default: the model's own]"),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="module:function that makes the optimizer of a model.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate, if it is not the optimizer's.")] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches whose gradients are added up for a step.")] = 1,
    batches: Annotated[int, typer.Option(min=1, help="Look at so many batches.")] = 8,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit with 1 for findings so harmful or more: fatal, severe, moderate, minor.")
    ] = None,
    json: Json = False,
) -> None:
    """Examine a model as it is trained: what is wrong, where, the number that shows it, and the fix."""
    with plainly():
        from normwise.diagnose.doctor import doctor as examine
        from normwise.diagnose.findings import checked_harm
        from normwise.sources import Batches, made_optimizer
        from normwise.tuning.training import find_loss

        level = None if fail_on is None else checked_harm(fail_on)
        with _user_code(f"doctor of {model!r}"):
            measured = None if loss is None else find_loss(loss)
            made = _loaded(model, weights)
            stepping = None if optimizer is None else made_optimizer(optimizer, made)
            given = Batches(data, None).given
            found = examine(
                made,
                given,
                measured,
                optimizer=stepping,
                lr=lr,
                accumulation=accumulation,
                most=batches,
                progress=_progress,
            )
        typer.echo(found.to_json() if json else found.text(names=False))
        if level is not None and found.at_least(level):
            raise typer.Exit(1)


def _progress(what: str) -> None:
    """Say what is done, where somebody is looking."""
    if sys.stderr.isatty():
        typer.echo(f"looking at: {what}", err=True)


# ---------------------------------------------------------------------------------------------------- what all share


def _check_out(out: Path, weights: Path | None, force: bool) -> None:
    from normwise.weight_files import check_out

    check_out(out, weights, force=force)


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    """What the user's code prints goes to standard error, and what it raises is one line."""
    from normwise.sources import operating

    with redirect_stdout(sys.stderr), operating(what):
        yield


def _loaded(model: str, weights: Path | None) -> nn.Module:
    from normwise.sources import loaded

    made, notes = loaded(model, weights)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    return made


def _input(model: nn.Module, shape: str | None, ids: int | None, data: str | None) -> Input | None:
    from normwise.sources import given_input

    return given_input(model, None if shape is None else shape_of(shape), ids, data)


def _batch(given: Input | None) -> Any:
    return None if given is None else given.batch


def _check_findable(model: nn.Module) -> None:
    """Refuse a model for which no input can be found."""
    from normwise.errors import SurgeryError
    from normwise.surgery.probes import found_batch

    if found_batch(model) is None:
        raise SurgeryError(
            f"no input was found that {type(model).__name__} takes: give --shape 2,3,224,224 (for token ids with "
            "--ids 1000), or --data module:function"
        )


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; for the others the operation has its own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _folded_again(model: str, out: Path, record: Record, given: Input | None, options: dict[str, Any]) -> Code | None:
    """Python that makes a model for the folded weights; None: none was found.

    Where only gains were folded, the factory's model will do. What else is folded may depend on values: a bias of
    zeros, as a new LayerNorm has it, stands in no way. So it is tried, with the factory's weights, and with those of
    the folded model where it still has them.
    """
    from normwise.recipes import Code, assigned, calling, operation, prepared
    from normwise.sources import made

    make = calling(model)
    make = Code(f"{make.text}.eval()", make.imports)
    batch = [] if given is None else [given.code]
    new = made(model).eval()
    if _fits(new, record.model):
        return assigned(make)
    if _fits(_folded(new, given, options), record.model):
        return assigned(operation("fold", [make, *batch], options))
    new = made(model).eval()
    new.load_state_dict(record.model.state_dict(), strict=False)
    if _fits(_folded(new, given, options), record.model):
        return prepared(make, out, operation("fold", [Code("model"), *batch], options))
    return None


def _folded(model: nn.Module, given: Input | None, options: dict[str, Any]) -> nn.Module:
    """The model folded; as it is, where a factory's weights, which may be anything, stand in the way."""
    from normwise.surgery.fold import fold as operate

    try:
        return operate(model, _batch(given), **options).model
    except Exception:  # noqa: BLE001 - a model without its weights may raise any error
        return model


def _fits(new: nn.Module, model: nn.Module) -> bool:
    """Whether two models have the same layers, and take each other's weights."""
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (new, model)]
    return repr(new) == repr(model) and shapes[0] == shapes[1]


def _finish(record: Record, out: Path, python: Code | None, json: bool) -> None:
    """Write the weights and say so; exit code 1 if there is nothing to write."""
    from normwise.recipes import note, to_load
    from normwise.weight_files import write

    text = record.to_json() if json else str(record)
    if not record.changed:
        typer.echo(text)
        typer.echo(f"{record.operation} changed nothing, and nothing is written", err=True)
        raise typer.Exit(1)
    state = record.model.state_dict()
    write(state, out, note(record, python))
    typer.echo(text)
    if json:
        return
    typer.echo(f"\nwritten: {out}, {len(state)} tensors, {out.stat().st_size / 1e6:.3g} MB")
    if python is None:
        typer.echo("what is folded depends on the weights: to load it, fold the model with its old weights first")
    else:
        typer.echo("\n".join(["to load it:", *(f"  {line}" for line in to_load(out, python))]))


def _summary(model: nn.Module, found: Normalizations) -> str:
    """How many normalizations of which kinds, and how many parameters."""
    from torch.nn.parameter import is_lazy

    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in found).items())
    sized = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    unsized = len(list(model.parameters())) - len(sized)
    text = f"{len(found)} normalization{'s' * (len(found) != 1)}{f' ({kinds})' * bool(kinds)}; "
    text += f"{sum(parameter.numel() for parameter in sized):,} parameters"
    text += f", and {unsized} tensors without a size yet" * bool(unsized)
    if found and all(one.calls is None for one in found):
        text += "\nno input was found: --shape or --data gives one, to count calls and see who reads what"
    return text
