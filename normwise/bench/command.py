"""The command `normwise bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normwise.console import plainly, shape_of
from normwise.errors import StudyError

if TYPE_CHECKING:
    from normwise.bench.cases import AnyCase
    from normwise.bench.results import Results

app = typer.Typer()

Op = Annotated[str | None, typer.Option(help="Operations and models, as rms_norm,llama. [default: all]")]
Shape = Annotated[str | None, typer.Option(help="One shape for the operations, as 32,64,56,56. [default: theirs]")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16, float64; several with commas. [default: the first two]")
]
Layout = Annotated[str | None, typer.Option(help="contiguous, channels_last; several with commas. [default: both]")]
Compile = Annotated[
    str | None, typer.Option(help="Compiled layers too: all, some, none. [default: some; all with --op]")
]
Against = Annotated[Path | None, typer.Option(help="Earlier results, a file or its folder: say what moved since.")]


@app.command()
def bench(
    op: Op = None,
    shape: Shape = None,
    dtype: Dtype = None,
    layout: Layout = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: fewer shapes, float32, no compiler.")] = False,
    compile: Compile = None,  # noqa: A002 - the option's name
    heap: Annotated[str, typer.Option(help="warm: freed memory is kept; default: as any program has it.")] = "warm",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. [default: torch's]")] = None,
    against: Against = None,
    out: Annotated[Path, typer.Option(help="Output folder: results.json and bench.html.")] = Path("runs/bench"),
) -> None:
    """Time every layer against torch's, and against a copy of the same bytes; whole models first.

    The exit code is 1 where a layer of normwise's is wrong; it is then not timed.
    """
    with plainly():
        from normwise.bench import cases, machine
        from normwise.bench.results import read
        from normwise.kernels.backends import requested

        wanted = cases.Wanted(
            _listed(op), None if shape is None else shape_of(shape), _listed(dtype), _listed(layout), compile, quick
        )
        asked = cases.cases(wanted)
        requested()
        earlier = None if against is None else read(against)
        _check(heap, out)
        if heap == "warm" and not machine.can_be_warm():
            typer.echo("note: only glibc can keep the heap warm; it is left as it is", err=True)
        elif heap == "warm" and not machine.is_warm():
            machine.restart_warm()
        failed = _carry_out(asked, earlier, out, quick=quick, threads=threads)
    if failed:
        raise typer.Exit(1)


def _carry_out(
    asked: Sequence[AnyCase], earlier: Results | None, out: Path, *, quick: bool, threads: int | None
) -> bool:
    """Measure, write and show; whether a layer was wrong."""
    import torch

    from normwise.bench import page, screen
    from normwise.bench.compare import compare
    from normwise.bench.run import FULL, QUICK

    if threads is not None:
        torch.set_num_threads(threads)
    results = _measured(asked, out, QUICK if quick else FULL)
    screen.show(results.outcomes)
    if earlier is not None:
        typer.echo(screen.changes(compare(earlier, results)))
    typer.echo("\n".join(filter(None, ["", screen.headline(results.outcomes), f"page: {page.write(results, out)}"])))
    if not results.complete:
        raise KeyboardInterrupt(f"interrupted: {len(results.outcomes)} of {len(asked)} cases are in {out}")
    return not all(outcome.timed for outcome in results.outcomes)


def _measured(asked: Sequence[AnyCase], out: Path, budget: float) -> Results:
    """The results, saved after every case; an interrupt ends them early."""
    from normwise.bench import machine, screen
    from normwise.bench.results import Results, save
    from normwise.bench.run import run

    results = Results(machine.facts(), complete=False, outcomes=())
    out.mkdir(parents=True, exist_ok=True)
    try:
        for outcome in run(asked, budget):
            outcomes = (*results.outcomes, outcome)
            results = Results(results.machine, len(outcomes) == len(asked), outcomes)
            save(results, out)
            typer.echo(f"{len(outcomes)} of {len(asked)}: {screen.line(outcome)}", err=True)
    except KeyboardInterrupt:
        if not results.outcomes:
            raise
    return results


def _check(heap: str, out: Path) -> None:
    from normwise.tuning.output import check

    if heap not in ("warm", "default"):
        raise StudyError(f"heap {heap!r}: there are warm, default")
    check(out, resume=True, force=False)


def _listed(text: str | None) -> Any:
    """Words between commas."""
    return None if text is None else tuple(dict.fromkeys(word.strip() for word in text.split(",")))
