"""Which seeds a normalization runs on, and the requests that this makes."""

from __future__ import annotations

from collections.abc import Iterable

from normwise.errors import StudyError
from normwise.tuning.records import Phase, Request, Settings, Variant

SEED_BLOCK, CONFIRM_OFFSET = 10_000, 1_000


def labels(settings: Settings) -> tuple[str, ...]:
    """The normalizations, in the order given.

    >>> labels(Settings("mlp", "digits", (("a", "batch"), ("b", "none"))))
    ('a', 'b')
    """
    return tuple(label for label, _ in settings.norms)


def seeds(settings: Settings, label: str, phase: Phase) -> tuple[int, ...]:
    """The seeds of a normalization in a phase: no two normalizations share one, selection and confirmation neither.

    Selection seed j of normalization i is `base_seed + 10000 i + j`, confirmation seed j is 1000 above that. Within a
    normalization the same seeds run at every learning rate and every value of the axes, from the same start and in the
    same data order; the control repeats the selection seeds, the horizon those of the confirmation. With seeds shared
    between normalizations, two copies of one would be equal bit for bit, and their comparison would show nothing.

    Raises StudyError for more seeds than the blocks hold (1000 for selection, 9000 for confirmation).

    >>> settings = Settings("mlp", "digits", (("a", "batch"), ("b", "batch")), seeds=2, confirm=3)
    >>> seeds(settings, "b", "select"), seeds(settings, "b", "confirm")
    ((10000, 10001), (11000, 11001, 11002))
    """
    selects = phase in ("select", "control")
    first, count, most = 0, settings.seeds, CONFIRM_OFFSET
    if not selects:
        first, count, most = CONFIRM_OFFSET, settings.confirm, SEED_BLOCK - CONFIRM_OFFSET
    if count > most:
        name = "seeds" if selects else "confirm"
        raise StudyError(f"{name}={count}: at most {most}, or the seeds of two normalizations would be the same")
    start = settings.base_seed + SEED_BLOCK * labels(settings).index(label) + first
    return tuple(range(start, start + count))


def select_requests(
    settings: Settings,
    label: str,
    variant: Variant,
    rates: Iterable[float],
    *,
    steps: int | None,
    phase: Phase = "select",
) -> tuple[Request, ...]:
    """A normalization at a combination of the axes' values, at every rate and on every seed of the phase."""
    own = seeds(settings, label, phase)
    return tuple(Request(phase, label, lr, seed, steps, variant) for lr in rates for seed in own)
