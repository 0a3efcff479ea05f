"""The records of a benchmark, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normwise.bench.cases import AnyCase, Case, ModelCase, Pass
from normwise.bench.timing import Spread
from normwise.errors import StudyError
from normwise.tuning.output import write

RESULTS, PAGE = "results.json", "bench.html"
SCHEMA = 1


@dataclass(frozen=True)
class Timed:
    """One contender of a case.

    Attributes:
        seconds: Of a call.
        share: The reference's time over this one's, round by round: of operations the copy's, of models torch's.
        ratio: This one's time over normwise's, round by round.
        faults: Page faults of a call.
    """

    seconds: Spread
    share: Spread
    ratio: Spread
    faults: float


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: What was measured.
        timed: By contender; nothing if normwise's layer was wrong.
        excluded: Why a contender was left out.
        inexact: What is wrong with a contender that was timed all the same.
        rounds: How many rounds count.
        dirty: How many were disturbed.
    """

    case: AnyCase
    timed: Mapping[str, Timed]
    excluded: Mapping[str, str]
    inexact: Mapping[str, str]
    rounds: int
    dirty: int

    @property
    def is_quiet(self) -> bool:
        """Whether at most half of its rounds were disturbed."""
        return self.dirty <= self.rounds

    def speed(self, contender: str) -> float | None:
        """GB/s of the bytes that must be moved; None for a model."""
        if isinstance(self.case, ModelCase):
            return None
        return self.case.bytes / self.timed[contender].seconds.median / 1e9

    def percent(self, contender: str) -> float | None:
        """The speed as a part of the copy's, in percent; None for a model.

        The copy moves as many tensors as it has inputs, twice, and a backward moves more: both are set off.
        """
        if isinstance(self.case, ModelCase):
            return None
        copied = 2 * self.case.inputs * self.case.tensor_bytes
        return 100 * self.timed[contender].share.median * self.case.bytes / copied


@dataclass(frozen=True)
class Results:
    """Everything that was measured in one run, and where.

    Attributes:
        machine: Facts of the machine, by name.
        complete: Whether every case that was asked for is there.
        outcomes: One a case.
    """

    machine: Mapping[str, str | int]
    complete: bool
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> str:
        """As JSON, with the version of its schema."""
        outcomes = [{**asdict(outcome), "name": str(outcome.case)} for outcome in self.outcomes]
        data = {"schema": SCHEMA, "machine": dict(self.machine), "complete": self.complete, "outcomes": outcomes}
        return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> Results:
    """What `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    data = json.loads(text)
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']}, and this version reads {SCHEMA}")
    return Results(data["machine"], data["complete"], tuple(map(_outcome, data["outcomes"])))


def read(path: Path) -> Results:
    """The results in a file, or in the file of a folder.

    Raises:
        StudyError: there are none in it.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"cannot read the results {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} holds no results of normwise bench: {type(error).__name__}: {error}") from error


def save(results: Results, folder: Path) -> Path:
    """Write results.json, all of it or nothing."""
    return write(folder, RESULTS, results.to_json())


def _outcome(data: dict[str, Any]) -> Outcome:
    timed = {name: _timed(one) for name, one in data["timed"].items()}
    return Outcome(_case(data["case"]), timed, data["excluded"], data["inexact"], data["rounds"], data["dirty"])


def _timed(data: dict[str, Any]) -> Timed:
    return Timed(Spread(*data["seconds"]), Spread(*data["share"]), Spread(*data["ratio"]), data["faults"])


def _case(data: dict[str, Any]) -> AnyCase:
    if "model" in data:
        return ModelCase(**data)
    return Case(**{**data, "shape": tuple(data["shape"]), "what": Pass(**data["what"])})
