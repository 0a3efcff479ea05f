"""Why a figure is not in the page, and how to get it."""

from __future__ import annotations

from collections.abc import Mapping

from normwise.report import words
from normwise.report.figures import Figure
from normwise.tuning.records import Settings, Summary

INSIDE = ("gradient", "sharpness", "activations", "gap")  # the figures of the section that looks into the training
_MEASURED = {
    "gradient": "The loss along the gradient could not be measured",
    "sharpness": "The curvature could not be computed",
    "activations": "The activations could not be measured",
    "gap": "There is no gap between training and evaluation to draw: nothing here remembers statistics",
}


def edges(summary: Summary) -> str:
    """Why no edge is drawn."""
    if summary.settings.sampler != "grid":
        return f"Edges are not drawn: {_drawn_rates(summary.settings)}."
    if summary.settings.own_loop:
        return "Edges are not drawn: without losses, a run that trains cannot be told from one that is stuck."
    return "Edges are not drawn: no seed of any normalization has one."


def sensitivity(summary: Summary) -> str:
    """Why no sensitivity is drawn."""
    if summary.settings.sampler != "grid":
        return "Sensitivity is not drawn for the same reason: it is a mean over a grid."
    if summary.settings.own_loop:
        return "Sensitivity is not drawn: the training loop reported no losses."
    return "Sensitivity is not drawn: no normalization has finite losses."


def dashes(settings: Settings) -> str | None:
    """What the dashes of the overview mean where a sampler drew the rates; None where there are edges."""
    if settings.sampler == "grid":
        return None
    missing = f"{words.MISSING} under lr_train, lr_diverge, Margin and Sensitivity"
    return f"{missing}: {_drawn_rates(settings)}."


def control(summary: Summary) -> str | None:
    """How to get the control; None where it was run, or where there is no edge to hold it against."""
    if summary.settings.control or summary.settings.own_loop or summary.settings.sampler != "grid":
        return None
    return "The control, which holds gamma, beta and the output layer still, was not run: --control runs it."


def axes(settings: Settings) -> str | None:
    """How to study more settings; None where the study did."""
    if settings.axes or settings.own_loop:
        return None
    return (
        "Batch size, optimizer, start and the rest had one value each. Several, as in --batch-size 8,32,128, are "
        "studied together, and the score is then drawn against each."
    )


def inside(summary: Summary, figures: Mapping[str, Figure | None]) -> str | None:
    """What of the inside of the training is not drawn, and why; None where all is."""
    if all(norm.measures is None for norm in summary.norms):
        return _unmeasured(summary)
    missing = [_MEASURED[name] for name in INSIDE if figures[name] is None]
    return ". ".join([*missing, ""]).strip() or None


def doctor(summary: Summary) -> str | None:
    """How to ask the doctor; None where it was asked."""
    if any(norm.measures and norm.measures.findings is not None for norm in summary.norms):
        return None
    return "The doctor was not asked about the winner: nw.doctor(model, batches) examines a trained model."


def cost(summary: Summary) -> str:
    """Why the score is not drawn against its cost."""
    if summary.settings.own_loop:
        return "The score is not drawn against cost: the steps of your own loop cannot be timed from outside."
    return "The score is not drawn against cost: no normalization differs from another in one that is known."


def _unmeasured(summary: Summary) -> str:
    if summary.settings.own_loop:
        return (
            "Nothing was measured inside your own loop: a nw.Monitor in it records the loss along the gradient, "
            "curvature and activations."
        )
    if all(norm.lr_best is None or not norm.confirmation for norm in summary.norms):
        return "Nothing was measured inside the training: no normalization was confirmed at a best rate."
    return "Nothing was measured inside the training: the study was condensed without it. Running it again does."


def _drawn_rates(settings: Settings) -> str:
    return (
        f"the {settings.sampler} sampler drew the learning rates, and drawn rates enclose no edge; --sampler grid "
        "finds them"
    )
