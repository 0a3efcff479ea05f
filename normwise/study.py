"""The study: run what the search asks for, keep every trial, judge, and write it all down."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from normwise import report as page
from normwise.errors import StudyError
from normwise.tuning import output
from normwise.tuning.data import Source
from normwise.tuning.joining import (
    BACKGROUND,
    MEASURES,
    WAIT_SECONDS,
    Asked,
    Background,
    await_study,
    background_in,
    check_same,
    joined,
    measures_in,
)
from normwise.tuning.measures import measure, with_measures
from normwise.tuning.models import Factory
from normwise.tuning.options import AUTO, DEFAULT_NORMS, Names, Numbers, Options, Rates, Wholes
from normwise.tuning.place import Place, check_place, check_worker
from normwise.tuning.preflight import measure_steps
from normwise.tuning.prepare import DEFAULT_DATA, DEFAULT_MODEL, Plan, default_name
from normwise.tuning.progress import Progress, watch
from normwise.tuning.records import Record, Settings, Summary, Variant, Verdict
from normwise.tuning.running import StudyInterrupted, background_here, open_store, ordered, run_all, run_shared, told
from normwise.tuning.search import best_choices, expected_trials, next_requests
from normwise.tuning.storage import Store
from normwise.tuning.summary import rows, summarize
from normwise.tuning.training import Loss
from normwise.tuning.trial import OwnLoop


@dataclass(frozen=True)
class Study:
    """A finished study: what was recorded, and what it says."""

    settings: Settings
    records: tuple[Record, ...]
    summary: Summary
    out: Path | None  # where its files are

    @property
    def verdict(self) -> Verdict:
        """Which normalization to use, and how sure that is; `verdict.sentence` says it."""
        return self.summary.verdict

    def table(self) -> str:
        """One line a normalization, for a terminal."""
        return _aligned(rows(self.summary))

    def to_frame(self) -> Any:
        """Every trial as a row of a `pandas.DataFrame`, with the columns of trials.csv.

        Raises StudyError when pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped]
        except ImportError as error:
            raise StudyError("to_frame() needs pandas, which is not installed: pip install pandas") from error
        return pd.DataFrame([output.row(record) for record in self.records])

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that needs nothing else, and return its path."""
        page.write(self.summary, path)
        return Path(path)

    def __repr__(self) -> str:
        return f"{self.verdict.sentence}\n\n{self.table()}"

    def _repr_html_(self) -> str:
        head, *body = rows(self.summary)
        lines = [f"<p><strong>{html.escape(self.verdict.sentence)}</strong></p>", "<table>"]
        lines += ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
        return "\n".join([*lines, "</table>"])


def tune(
    model: str | Factory = DEFAULT_MODEL,
    data: Source = DEFAULT_DATA,
    *,
    train: str | OwnLoop | None = None,
    norms: str | Sequence[str] = DEFAULT_NORMS,
    lrs: Rates = AUTO,
    seeds: int = 3,
    confirm: int = 10,
    steps: int | None = None,
    batch_size: Wholes | None = None,
    loss: str | Loss = "cross_entropy",
    metric: str | None = None,
    optimizer: Names = "sgd",
    schedule: str = "constant",
    margin: float | None = None,
    device: str = "cpu",
    start: Names | None = None,
    placement: Names | None = None,
    weight_decay: Numbers | None = None,
    epochs: Wholes | None = None,
    sampler: str = "grid",
    trials: int | None = None,
    prune: bool = False,
    control: bool = False,
    workers: int | None = None,
    storage: str | None = None,
    study: str | None = None,
    worker: bool = False,
    wait: float = WAIT_SECONDS,
    out: str | Path | None = None,
    measures: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Study:
    """Find out which normalization and which learning rate a network wants.

    Each normalization is given its own best learning rate on the selection seeds; then all are compared on fresh seeds
    and test data, with simultaneous intervals and a margin. `batch_size`, `optimizer`, `start`, `placement`,
    `weight_decay` and `epochs` take several values as well: each normalization is then judged at its own best
    combination of them.

    Args:
        model: "mlp", "cnn", `module:factory`, or a factory. One with an argument `norm` makes its layers as
            `norm(features, axis=1)` (-1: channels last); in any other's model, torch's normalizations are exchanged.
        data: "digits", "wine", `module:function`, a function, or (train, validation, test) itself; each an (X, y) pair,
            a map-style Dataset or a DataLoader. Of (train, test), a quarter of train becomes the validation data.
        train: A training loop of your own, `train(model, lr=, seed=, trial=)`, that returns the metric and may call
            `trial.log(step, loss)`; it brings its own data, loss and optimizer. Use test data
            where `trial.phase` is not "select".
        norms: none, rms, layer, group:G, instance, batch, and patterns such as "mine=[n] c [...]".
        lrs: "auto" for a grid that widens by itself, "LOW:HIGH:COUNT", or the rates.
        seeds: Seeds that select the learning rate.
        confirm: Fresh seeds that confirm it.
        steps: Steps of a trial; 200 if not given, 40 or 100 on built-in data, whatever a loop of your own decides.
        batch_size: Examples of a step; 128 if not given.
        loss: "cross_entropy", "mse", `module:function`, or a function of outputs and targets.
        metric: "accuracy" or "loss"; with `train`, "name:max" or "name:min" (default: accuracy in percent).
        optimizer: "sgd", "momentum" (0.9) or "adamw"; with `train`, only the range of rates depends on it.
        schedule: "constant" or "cosine".
        margin: The smallest difference that matters, in the metric's unit; 0.5 points for accuracy.
        device: Where to train, as torch names it.
        start: Of the weights: "default" (torch's own), "he" or "orthogonal"; as the factory makes them if not given.
        placement: Of the normalization, as the model's factory names it; its own default if not given.
        weight_decay: The optimizer's; 0 for "sgd" and "momentum" and 0.01 for "adamw" if not given.
        epochs: Passes through the training data, instead of steps.
        sampler: "grid" runs every combination and shows the edges; "qmc" and "tpe" draw `trials` points.
        trials: Points that the sampler draws for each normalization; each runs on all selection seeds.
        prune: Cut the worse points short, by successive halving within a normalization.
        control: Run the learning rates once more with gamma, beta and the output layer frozen.
        workers: Worker processes; None is one a core, 0 runs the trials in this process.
        storage: Any Optuna storage URL, which workers on other machines can join; by default `study.db` in `out`, or
            memory.
        study: The study's name in the storage; by default that of the folder.
        worker: Join the study of that name, and run trials of it until it is complete. The study says what is run;
            model, data, train and loss are to be given only where it was begun with ones that have no name in a shell.
        wait: How many seconds a worker waits for a study that has not begun.
        out: Folder for study.db, trials.csv, summary.json and report.html.
        measures: Look into one more training of each normalization at its best rate, and ask the doctor about the
            winner; of built-in training only.
        resume: Go on with the study that is there; finished trials are not repeated.
        force: Replace the study that is there.
        progress: Show progress on standard error.

    Raises:
        StudyError: the study cannot be run as asked; the message names the culprit.
        StudyInterrupted: on Ctrl-C; a KeyboardInterrupt that says how to go on.

    >>> from normwise.study import tune
    >>> study = tune(norms="batch,none", lrs=[0.1, 1.0], seeds=1, confirm=2, steps=5, workers=0, progress=False)
    >>> study.verdict.winner
    'batch'
    """
    options = Options(
        norms=norms,
        lrs=lrs,
        seeds=seeds,
        confirm=confirm,
        steps=steps,
        batch_size=batch_size,
        loss=loss,
        metric=metric,
        optimizer=optimizer,
        schedule=schedule,
        margin=margin,
        device=device,
        start=start,
        placement=placement,
        weight_decay=weight_decay,
        epochs=epochs,
        sampler=sampler,
        trials=trials,
        prune=prune,
        control=control,
    ).plain()
    asked = Asked(model, data, train, options)
    folder = None if out is None else Path(out)
    name = default_name(model, data, train) if folder is None else folder.name
    place = Place(workers, storage, folder, resume, force, study, name, measures)
    if worker:
        return join(asked, place, wait=wait, progress=progress)[0]
    check_place(place)
    return carry_out(asked, asked.plan(), place, progress=progress)


def carry_out(asked: Asked, plan: Plan, place: Place, *, progress: bool = True) -> Study:
    """Run a plan to its end, and write its files where `place` says.

    Raises StudyError when a trial cannot be run, and StudyInterrupted on Ctrl-C; finished trials are kept.
    """
    view = watch(plan.settings, shown=progress)
    with output.Folder(place.out, resume=place.resume, force=place.force) as folder:
        store = open_store(asked, plan, place)
        with told(plan, place, store):
            records = run_all(plan, place, store, folder, view)
            view.say("measuring the time of a step")
            best = {label: choice.variant for label, choice in best_choices(plan.settings, records).items()}
            background = background_here(plan, place, _step_times(plan, best, view))
            store.note(BACKGROUND, background.to_dict())
            study = _study(store, background, records, place.out)
            if place.measures:
                study = _looked_into(study, plan, store, view)
            _write(study)
    return study


def join(given: Asked, place: Place, *, wait: float = WAIT_SECONDS, progress: bool = True) -> tuple[Study, int]:
    """Work on a study that was begun elsewhere until it is complete: the study, and how many trials were run here.

    Raises StudyError when there is no such study or this machine would run another one, and StudyInterrupted on
    Ctrl-C; the trials that were running are given back.
    """
    check_worker(place)
    if not wait >= 0:
        raise StudyError(f"wait={wait:g}: must be 0 seconds or more")
    url, name = str(place.storage), place.study_name
    store = await_study(url, name, wait, _say if progress else _keep_quiet)
    view = watch(store.settings, shown=progress)
    plan = joined(given, store).plan()
    check_same(plan, store, "a worker runs what the study says")
    _compare_versions(background_in(store), background_here(plan, place), view)
    try:
        mine = run_shared(plan, place, store, view)
    except KeyboardInterrupt:
        raise StudyInterrupted(f"interrupted; what was running is given back to the study {name!r}") from None
    finally:
        view.stop()
    return gather(url, name), mine


def gather(url: str, name: str, out: Path | None = None) -> Study:
    """A finished study from its storage alone, with its files in `out` if that is given.

    Raises StudyError when there is no such study, or it is not finished; the message says how far it is.

    >>> gather("sqlite:///:memory:", "mine")
    Traceback (most recent call last):
    ...
    normwise.errors.StudyError: the storage sqlite:///:memory: has no study named 'mine'; there is none at all
    """
    store = await_study(url, name, 0.0, _keep_quiet)
    background, records = background_in(store), ordered(store.settings, store.records())
    missing = len(next_requests(store.settings, records, chance=background.chance))
    if missing:
        raise StudyError(
            f"the study {name!r} is not finished: {len(records)} of about {expected_trials(store.settings)} trials are "
            f"done, and the next {missing} are to be run; a worker can join it with normwise tune --worker"
        )
    study = _study(store, background, records, out)
    if out is not None:
        _check_other(study, out)
        with output.Folder(out, resume=True, force=False):
            _write(study)
    return study


def _study(store: Store, background: Background, records: list[Record], out: Path | None) -> Study:
    summary = summarize(
        store.settings,
        records,
        chance=background.chance,
        facts=store.facts,
        described=background.described,
        parameters=background.parameters,
        ms_per_step=background.ms_per_step,
        reproduce=background.reproduce,
        seconds=store.seconds(),
    )
    return Study(store.settings, tuple(records), with_measures(summary, measures_in(store) or {}), out)


def _step_times(plan: Plan, best: dict[str, Variant], view: Progress) -> dict[str, float | None]:
    """Milliseconds of a step by label; a verdict that stands is not lost for want of them."""
    try:
        return measure_steps(plan.problem, plan.checks, best)
    except StudyError as error:
        view.say(str(error))
        return dict.fromkeys(plan.problem.choices)


def _looked_into(study: Study, plan: Plan, store: Store, view: Progress) -> Study:
    """The study with the measures of its best trainings; those of a study that is complete are not taken again."""
    if measures_in(store) is not None:
        return study
    found = measure(plan.problem, study.summary, view)
    store.note(MEASURES, {label: asdict(one) for label, one in found.items()})
    return replace(study, summary=with_measures(study.summary, found))


def _write(study: Study) -> None:
    if study.out is not None:
        output.write(study.out, output.TRIALS, output.to_csv(study.records))
        output.write(study.out, output.SUMMARY, output.to_json(study.summary))
        output.write(study.out, output.REPORT, page.render(study.summary))


def _check_other(study: Study, out: Path) -> None:
    output.check(out, resume=True, force=False)
    if (out / output.SUMMARY).is_file() and _settings_in(out) != study.settings:
        raise StudyError(f"{out} holds the report of another study: --out names another folder")


def _settings_in(out: Path) -> Settings | None:
    try:
        return Settings.from_dict(output.read_summary(out)["settings"])
    except (KeyError, TypeError):
        return None


def _compare_versions(there: Background, here: Background, view: Progress) -> None:
    mine, theirs = here.reproduce["versions"], there.reproduce["versions"]
    if mine != theirs:
        view.say(f"note: versions differ, and so may numbers: here {mine}; where the study was begun {theirs}")


def _say(message: str) -> None:
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def _keep_quiet(message: str) -> None:
    pass


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is flush left, the others, which are numbers, right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *rest = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([f"{first.strip():{widths[0]}}", *rest]).rstrip())
    return "\n".join(lines)
