"""Studies of made-up trials, condensed."""

from collections.abc import Iterable

from normwise.tuning.records import Record, Settings, Summary
from normwise.tuning.summary import summarize


def summary(settings: Settings, records: Iterable[Record], chance: float | None) -> Summary:
    """The summary of a study with nothing measured besides its trials."""
    labels = [label for label, _ in settings.norms]
    return summarize(
        settings,
        records,
        chance=chance,
        facts={},
        described=dict.fromkeys(labels, ""),
        parameters=dict.fromkeys(labels, 1),
        ms_per_step=None,
        reproduce={},
        seconds=1.0,
    )
