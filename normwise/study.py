"""The study: run what the search asks for, keep every trial, judge, and write it all down."""

from __future__ import annotations

import html
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normwise import report as page
from normwise.errors import StudyError
from normwise.tuning import output, storage
from normwise.tuning.data import Source
from normwise.tuning.models import Factory
from normwise.tuning.options import AUTO, DEFAULT_NORMS, Options, Rates
from normwise.tuning.preflight import measure_steps
from normwise.tuning.prepare import DEFAULT_DATA, DEFAULT_MODEL, Plan, default_name, make_plan
from normwise.tuning.progress import Progress, watch
from normwise.tuning.records import Record, Settings, Summary, Verdict
from normwise.tuning.reproduce import reproduction
from normwise.tuning.search import expected_trials, next_requests
from normwise.tuning.summary import rows, summarize
from normwise.tuning.training import Loss
from normwise.tuning.trial import OwnLoop
from normwise.tuning.workers import Pool, Serial, default_workers, pack

_PHASES = ("select", "confirm", "horizon")


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


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C: the study has ended early, and its finished trials are kept. The message says how to go on."""


@dataclass(frozen=True)
class Place:
    """How and where a study runs, which its outcome does not depend on."""

    workers: int | None = None  # None: one a core; 0: no worker process
    storage: str | None = None
    out: Path | None = None
    resume: bool = False
    force: bool = False
    name: str = "study"

    @property
    def url(self) -> str | None:
        """The address of Optuna's storage; None: in memory."""
        if self.storage is not None or self.out is None:
            return self.storage
        return f"sqlite:///{(self.out / output.STUDY).absolute()}"

    def count(self, device: str) -> int:
        """The number of worker processes."""
        return default_workers(device) if self.workers is None else self.workers

    @property
    def study_name(self) -> str:
        """The study's name in the storage."""
        return "normwise" if self.storage is None else self.name


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
    batch_size: int = 128,
    loss: str | Loss = "cross_entropy",
    metric: str | None = None,
    optimizer: str = "sgd",
    schedule: str = "constant",
    margin: float | None = None,
    device: str = "cpu",
    workers: int | None = None,
    storage: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Study:
    """Find out which normalization and which learning rate a network wants.

    Each normalization is given its own best learning rate on the selection seeds; then all are compared on fresh seeds
    and test data, with simultaneous intervals and a margin.

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
        steps: Steps of a trial; 200 if not given, 40 on built-in data, and whatever a loop of your own decides.
        batch_size: Examples of a step.
        loss: "cross_entropy", "mse", `module:function`, or a function of outputs and targets.
        metric: "accuracy" or "loss"; with `train`, "name:max" or "name:min" (default: accuracy in percent).
        optimizer: "sgd", "momentum" (0.9) or "adamw"; with `train`, only the range of rates depends on it.
        schedule: "constant" or "cosine".
        margin: The smallest difference that matters, in the metric's unit; 0.5 points for accuracy.
        device: Where to train, as torch names it.
        workers: Worker processes; None is one a core, 0 runs the trials in this process.
        storage: Any Optuna storage URL; by default `study.db` in `out`, or memory.
        out: Folder for study.db, trials.csv, summary.json and report.html.
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
    options = Options(norms, lrs, seeds, confirm, steps, batch_size, loss, metric, optimizer, schedule, margin, device)
    folder = None if out is None else Path(out)
    name = default_name(model, data, train) if folder is None else folder.name
    place = Place(workers, storage, folder, resume, force, name)
    check_place(place)
    return carry_out(make_plan(model, data, train, options), place, progress=progress)


def check_place(place: Place) -> None:
    """Refuse what cannot be written to before anything is computed. Raises StudyError."""
    if place.workers is not None and place.workers < 0:
        raise StudyError(f"workers={place.workers}: must be 0 (this process) or more")
    if place.resume and place.force:
        raise StudyError("resume goes on with a study, force replaces it: choose one")
    if place.resume and place.url is None:
        raise StudyError("there is nothing to resume: give the out folder or the storage of the study")
    if place.out is None:
        return
    output.check(place.out, resume=place.resume, force=place.force)
    if place.resume and place.storage is None and not (place.out / output.STUDY).is_file():
        raise StudyError(f"{place.out} has no study to resume: leave --resume out to start one")


def carry_out(plan: Plan, place: Place, *, progress: bool = True) -> Study:
    """Run a plan to its end, and write its files where `place` says.

    Raises StudyError when a trial cannot be run, and StudyInterrupted on Ctrl-C; finished trials are kept.
    """
    view = watch(plan.settings, shown=progress)
    with output.Folder(place.out, resume=place.resume, force=place.force) as folder:
        store = _store(plan, place)
        with _told(plan, place, store):
            records = _run(plan, place, store, folder, view)
            view.say("measuring the time of a step")
            times = measure_steps(plan.problem, plan.checks)
            summary = _summary(plan, place, store, records, times)
            study = Study(plan.settings, tuple(records), summary, place.out)
            _write(study)
    return study


def _store(plan: Plan, place: Place) -> storage.Store:
    if not place.resume or place.url is None:
        return storage.create(place.url, place.study_name, plan.settings, plan.facts, replace=place.force)
    if place.storage is None and not storage.begun(place.url, place.study_name):  # killed in its first moments
        return storage.create(place.url, place.study_name, plan.settings, plan.facts, replace=True)
    store = storage.open_study(place.url, place.study_name)
    different = plan.settings.differences(store.settings)
    if different:
        pairs = ", ".join(f"{name} ({mine!r}, was {theirs!r})" for name, (mine, theirs) in different.items())
        raise StudyError(f"the study was started with other settings: {pairs}; resume with those, or start anew")
    for fact in ("data fingerprint", "model"):
        if plan.facts.get(fact) != store.facts.get(fact):
            raise StudyError(
                f"the study was started with another {fact}: {plan.facts.get(fact)}, was {store.facts.get(fact)}"
            )
    return store


def _run(plan: Plan, place: Place, store: storage.Store, folder: output.Folder, view: Progress) -> list[Record]:
    """Every trial that the search asks for, those of an earlier run included."""
    records = store.records()
    view.start(max(expected_trials(plan.settings), len(records)), records)
    started = time.monotonic()
    try:
        with _runner(plan, place, view) as runner:
            while requests := next_requests(plan.settings, records, chance=plan.problem.chance):
                for record in runner.run(requests):
                    store.add(record)
                    folder.keep()
                    records.append(record)
                    view.finished(record)
    finally:
        view.stop()
        store.spend(time.monotonic() - started)
    return sorted(records, key=lambda record: _order(plan.settings, record))


def _runner(plan: Plan, place: Place, view: Progress) -> Serial | Pool:
    workers = place.count(plan.settings.device)
    packed = pack(plan.problem) if workers else None
    if workers and packed is None:
        view.say("part of the study cannot be sent to worker processes; the trials run in this one")
    return Serial(plan.problem) if packed is None else Pool(packed, workers)


def _order(settings: Settings, record: Record) -> tuple[int, int, float, int]:
    request, labels = record.request, [label for label, _ in settings.norms]
    return _PHASES.index(request.phase), labels.index(request.norm), request.lr, request.seed


@contextmanager
def _told(plan: Plan, place: Place, store: storage.Store) -> Iterator[None]:
    """Say in the error what is kept and how to go on; a new study without a finished trial is not kept."""
    try:
        yield
    except (KeyboardInterrupt, StudyError) as error:
        message = _kept(plan, place, store)
        if isinstance(error, KeyboardInterrupt):
            raise StudyInterrupted(f"interrupted; {message}") from None
        raise StudyError(f"{error}; {message}") from error


def _kept(plan: Plan, place: Place, store: storage.Store) -> str:
    count = len(store.records())
    if count == 0 and not place.resume:
        store.discard()
        return "no trial had finished, nothing is kept"
    if place.url is None:
        return "nothing is kept without an out folder or a storage"
    where = f" in {place.out}" if place.out else ""
    return f"{count} finished trials are kept{where}; go on with {_resume(plan, place)}"


def _resume(plan: Plan, place: Place) -> str:
    if plan.command.startswith("nw.tune("):
        return "resume=True"
    return " ".join([_full_command(plan, place), "--resume"])


def _full_command(plan: Plan, place: Place) -> str:
    """The command with its folder and storage; a password is not repeated."""
    if plan.command.startswith("nw.tune("):
        return plan.command
    words = ["--storage", storage.shown(place.storage)] if place.storage else []
    words += ["--out", str(place.out)] if place.out else []
    return " ".join([plan.command, shlex.join(words)]).strip()


def _summary(
    plan: Plan, place: Place, store: storage.Store, records: list[Record], times: dict[str, float | None]
) -> Summary:
    return summarize(
        plan.settings,
        records,
        chance=plan.problem.chance,
        facts=plan.facts,
        described={label: check.described for label, check in plan.checks.items()},
        parameters={label: check.parameters for label, check in plan.checks.items()},
        ms_per_step=times,
        reproduce=reproduction(plan.settings, _full_command(plan, place), place.count(plan.settings.device)),
        seconds=store.seconds(),
    )


def _write(study: Study) -> None:
    if study.out is not None:
        output.write(study.out, output.TRIALS, output.to_csv(study.records))
        output.write(study.out, output.SUMMARY, output.to_json(study.summary))
        output.write(study.out, output.REPORT, page.render(study.summary))


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is flush left, the others, which are numbers, right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *rest = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([f"{first.strip():{widths[0]}}", *rest]).rstrip())
    return "\n".join(lines)
