"""Trials to draw, and the traces that a figure draws of a normalization."""

from __future__ import annotations

from typing import Any

from normwise.report.figures import Figure
from normwise.tuning.records import Record, Request


def trial(lr: float, seed: int, outcome: str, loss: float | None, norm: str = "batch") -> Record:
    return Record(Request("select", norm, lr, seed, 100), outcome, val_loss=loss)  # type: ignore[arg-type]


def of_label(figure: Figure, label: str, yaxis: str = "y") -> list[dict[str, Any]]:
    """The traces of a normalization in one panel, the entry of the legend left out."""
    named = [trace for trace in figure.traces if trace.get("legendgroup") == label and "hovertext" in trace]
    return [trace for trace in named if trace.get("yaxis", "y") == yaxis]
