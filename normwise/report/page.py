"""The page: the summary's figures, tables and sentences in one HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from normwise.report import (
    absent,
    axes,
    confirmation,
    cost,
    curvature,
    curves,
    gradient,
    heat,
    layers,
    rates,
    stability,
    tables,
    words,
)
from normwise.report.figures import Figure
from normwise.report.paper import script, template, written
from normwise.tuning.records import Found, NormSummary, Settings, Summary


def render(summary: Summary) -> str:
    """The report of a study as one self-contained HTML page.

    Scripts and styles are inside; nothing is loaded from anywhere. Every text of the summary is escaped.

    Args:
        summary: what the study found.

    >>> from normwise.tuning.records import Edge, NormSummary, Settings, Verdict
    >>> edge = Edge(None, None, None, seeds=0)
    >>> norm = NormSummary(
    ...     "<b>mine</b>", "batch", "BatchNorm(64)", None, {}, edge, None, None, (), (), (), (), None, None, None, None,
    ...     failures=0, ms_per_step=None, weight_norm=None, trials=0, parameters=None)
    >>> settings = Settings(model="mlp", data="digits", norms=(("<b>mine</b>", "batch"),))
    >>> verdict = Verdict("<b>mine</b>", None, "<b>mine</b>", "undecided", "Nothing trained.", ())
    >>> page = render(Summary(settings, {}, None, (0.1, 1.0), (norm,), verdict, None, (), {}, 1.0, 0))
    >>> "Nothing trained." in page, "&lt;b&gt;mine&lt;/b&gt;" in page, "<b>mine</b>" in page
    (True, True, False)
    """
    figures, varied = _figures(summary), axes.figures(summary)
    drawn = [figure for figure in (*figures.values(), *varied) if figure]
    return template("report.html").render(
        summary=summary,
        settings=summary.settings,
        title=_title(summary.settings),
        evidence=_evidence(summary),
        effort=f"{words.plural(summary.trials, 'training run')} in {words.duration(summary.seconds)}",
        overview=tables.overview(summary),
        declarations=tables.declarations(summary),
        fixed=tables.settings_rows(summary.settings),
        tolerance=tables.tolerance(summary),
        control=stability.control_sentence(summary),
        measured=_measured(summary),
        examined=_examined(summary),
        varied=varied,
        axes=axes.named(summary) if summary.settings.axes else "",
        why=_why(summary, figures),
        horizon=_horizon(summary),
        reproduce={key: value for key, value in summary.reproduce.items() if key != "command"},
        figures=figures,
        drawings=[figure.drawing for figure in drawn],
        numbers={figure.name: number for number, figure in enumerate(drawn, start=1)},
        plotly=script(),
    )


def write(summary: Summary, path: str | os.PathLike[str]) -> Path:
    """Write the report to a file, all of it or nothing: a reader never finds half a page.

    Raises:
        StudyError: the file cannot be written.
    """
    return written(render(summary), path, "report")


def _figures(summary: Summary) -> dict[str, Figure | None]:
    """Every figure by its place in the page; None where the study has no data for it."""
    return {
        "rates": rates.figure(summary),
        "map": heat.figure(summary),
        "confirmation": confirmation.scores(summary),
        "pairs": confirmation.pairs(summary),
        "curves": curves.losses(summary),
        "edges": stability.edges(summary),
        "sensitivity": stability.sensitivity(summary),
        "weights": curves.weights(summary),
        "gradient": gradient.along_gradient(summary),
        "sharpness": curvature.sharpness(summary),
        "activations": layers.activations(summary),
        "gap": layers.gap(summary),
        "cost": cost.figure(summary),
    }


def _why(summary: Summary, figures: dict[str, Figure | None]) -> dict[str, str | None]:
    """By place in the page, why something is not there."""
    return {
        "dashes": absent.dashes(summary.settings),
        "edges": absent.edges(summary),
        "sensitivity": absent.sensitivity(summary),
        "control": absent.control(summary),
        "inside": absent.inside(summary, figures),
        "doctor": absent.doctor(summary),
        "cost": absent.cost(summary),
        "axes": absent.axes(summary.settings),
    }


def _measured(summary: Summary) -> str:
    """Which runs were looked into."""
    seeds = sorted({norm.measures.seed for norm in summary.norms if norm.measures})
    if not seeds:
        return ""
    own = "from one seed" if len(seeds) == 1 else "from one seed each"
    return f"{own} ({', '.join(map(str, seeds))})"


def _examined(summary: Summary) -> list[tuple[str, tuple[Found, ...]]]:
    """What the doctor found, by label, in those that it was asked about."""
    asked = [(norm.label, norm.measures.findings if norm.measures else None) for norm in summary.norms]
    return [(label, findings) for label, findings in asked if findings is not None]


def _title(settings: Settings) -> str:
    subject = settings.model if settings.own_loop or not settings.data else f"{settings.model} on {settings.data}"
    return f"Normalizations for {subject}"


def _evidence(summary: Summary) -> list[str]:
    """What the answer rests on: the two best and the recommended one, their differences, and whether the lead lasts."""
    verdict = summary.verdict
    labels = dict.fromkeys([verdict.recommended, verdict.winner, verdict.runner_up])
    known = {norm.label: norm for norm in summary.norms}
    lines = [_score_line(norm, summary.settings) for label in labels if label and (norm := known.get(label))]
    pairs = [pair for pair in verdict.comparisons if {pair.better, pair.other} <= set(labels)]
    lines += [confirmation.sentence(pair, summary.settings) for pair in pairs]
    return lines + ([] if summary.horizon is None else [_horizon(summary)])


def _score_line(norm: NormSummary, settings: Settings) -> str:
    if norm.mean is None:
        return f"{norm.label}: no score; no confirmation seed gave one."
    metric, seeds = settings.metric.replace("_", " "), words.plural(len(norm.scores), "fresh seed")
    failed = f", of which {norm.failures} did not train" if norm.failures else ""
    rate = "" if norm.lr_best is None else f" at learning rate {words.number(norm.lr_best)}"
    return f"{norm.label}: mean {metric} {words.measured(norm, settings.unit)} over {seeds}{failed}{rate}."


def _horizon(summary: Summary) -> str:
    """Winner and runner-up at the study's steps and at twice as many, in words."""
    found = summary.horizon
    if found is None:
        return "Winner and runner-up were not run again at twice the steps, so whether the lead lasts is not known."
    lead, doubled = (
        _lead(value, found.winner, found.runner_up, summary.settings) for value in (found.lead, found.lead_doubled)
    )
    turn = " The order reverses: train longer before you rely on this answer." if found.reversed else ""
    own = "" if found.runner_up_steps is None else f" ({found.runner_up} at {found.runner_up_steps:,} of its own)"
    again = "twice as many" if own else f"{2 * found.steps:,} steps"
    return f"At {found.steps:,} steps{own} {lead}; at {again} {doubled}.{turn}"


def _lead(value: float, winner: str, runner_up: str, settings: Settings) -> str:
    ahead, behind = (winner, runner_up) if value >= 0 else (runner_up, winner)
    amount = words.with_unit(words.score(abs(value), settings.unit), words.difference_unit(settings))
    return f"{ahead} leads {behind} by {amount}"
