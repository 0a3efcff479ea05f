"""A clock that only calls move, and results that nobody measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from normwise.bench.cases import AnyCase, Case, ModelCase, Pass
from normwise.bench.results import Outcome, Results, Timed
from normwise.bench.timing import Spread

LEARN = Pass("training", backward=True)
ROWS = Case("layer_norm", (64, 100), "float32", "contiguous", LEARN)
IMAGES = Case("batch_norm", (2, 4, 5, 5), "bfloat16", "channels_last", Pass("training"))
LLAMA = ModelCase("llama", "training")
MACHINE = {"processor": "<b>abacus</b>", "cores": 2, "threads": 2, "torch": "2", "heap": "warm"}


class Clock:
    """Seconds, and seconds that the process waited for a core; work moves both."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: float, delays: Iterator[float] | None = None) -> Callable[[], None]:
        """A call that lasts so long; each takes the next of the delays as well, if there is one left."""

        def call() -> None:
            delay = next(delays, 0.0) if delays is not None else 0.0
            self.calls.append(name)
            self.now += seconds + delay
            self.waited += delay

        return call


def around(value: float, width: float = 0.02) -> Spread:
    return Spread(value * (1 - width), value, value * (1 + width))


def timed(seconds: float, reference: float, ours: float) -> Timed:
    return Timed(around(seconds), around(reference / seconds), around(seconds / ours), 0.0)


def outcome(case: AnyCase = ROWS, *, ours: float = 0.002, torch: float = 0.003, copy: float = 0.001) -> Outcome:
    times = {"normwise": ours, "torch": torch} | ({} if isinstance(case, ModelCase) else {"copy": copy})
    reference = torch if isinstance(case, ModelCase) else copy
    return Outcome(case, {name: timed(t, reference, ours) for name, t in times.items()}, {}, {}, 9, 1)


def failed(case: AnyCase = ROWS) -> Outcome:
    return Outcome(case, {}, {"normwise": "the output is off by 0.2 of its largest value"}, {}, 0, 0)


def results(*outcomes: Outcome, complete: bool = True) -> Results:
    return Results(MACHINE, complete, outcomes or (outcome(LLAMA), outcome(ROWS), outcome(IMAGES)))
