"""What a study writes down: requests, records, settings. Plain data, JSON in and out.

Nothing here computes. `search` reads records and asks for more, `judge` compares their scores, `summary` condenses
them, `report` draws them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

Phase = Literal["select", "confirm", "horizon", "control"]
Outcome = Literal["trains", "stuck", "diverged"]
Direction = Literal["max", "min"]
Value = str | int | float
Variant = tuple[tuple[str, Value], ...]  # a value for each axis that varies, in the settings' order; () where none does


@dataclass(frozen=True)
class Request:
    """One trial to run: a normalization at a learning rate, from a seed.

    `phase` says what the trial is for: *select* chooses the learning rate (validation data only), *confirm* runs each
    normalization at its own best rate on fresh seeds and the test data, *horizon* repeats winner and runner-up at
    twice the steps, *control* selects again with gamma, beta and the output layer frozen. `steps` is None where the
    user's own loop decides.
    """

    phase: Phase
    norm: str
    lr: float
    seed: int
    steps: int | None
    variant: Variant = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, JSON in between or not."""
        return cls(**{**data, "variant": _pairs(data.get("variant", ()))})


@dataclass(frozen=True)
class Record:
    """What came of one request.

    Scores are in the metric's unit as the report shows it (accuracy in percent). A number that does not exist is
    None (no test data in selection; no losses in a user's loop that logs none) and one that is not finite is stored as
    None as well, because JSON has no NaN; `outcome` says which of the two it was.
    """

    request: Request
    outcome: Outcome
    score: float | None = None  # primary metric on validation data (selection) or on test data (confirm, horizon)
    first_loss: float | None = None  # training loss of the first step
    tail_loss: float | None = None  # mean training loss of the last tenth of the steps
    val_loss: float | None = None  # validation loss at the end, in evaluation mode
    test_loss: float | None = None  # test loss at the end, in evaluation mode; None in selection
    weight_norm: float | None = None  # L2 norm of all parameters of two or more dimensions, at the end
    curve: tuple[tuple[int, float], ...] = ()  # (step, training loss), at most 100 points, finite ones only
    weights: tuple[tuple[int, float], ...] = ()  # (step, L2 norm as weight_norm), about 20 points; built-in training
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `to_dict` gave, JSON in between or not."""
        curve, weights = (_points(data.get(name, ())) for name in ("curve", "weights"))
        return cls(**{**data, "request": Request.from_dict(data["request"]), "curve": curve, "weights": weights})


def _points(pairs: Iterable[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(value)) for step, value in pairs)


def _pairs(pairs: Iterable[Sequence[Any]]) -> Variant:
    return tuple((name, value) for name, value in pairs)


@dataclass(frozen=True)
class Settings:
    """Everything that a study's outcome depends on, besides the model and the data themselves."""

    model: str
    data: str
    norms: tuple[tuple[str, str], ...]  # (label, declaration), in the order given
    lrs: tuple[float, ...] | None = None  # None: the grid that widens by itself
    seeds: int = 3
    confirm: int = 10
    steps: int | None = 200
    batch_size: int = 128
    loss: str = "cross_entropy"
    metric: str = "accuracy"
    direction: Direction = "max"
    unit: str = "%"
    optimizer: str = "sgd"
    schedule: str = "constant"
    margin: float = 0.5
    base_seed: int = 0
    own_loop: bool = False  # --train: the user's own training loop
    device: str = "cpu"
    start: str | None = None  # of the weights; None: as the model's factory makes them
    placement: str | None = None  # of the normalization; None: the factory's own
    weight_decay: float | None = None  # None: the optimizer's own default, 0 for SGD and 0.01 for AdamW
    epochs: int | None = None  # instead of steps, which are then epochs times full batches an epoch
    examples: int | None = None  # training examples; known where epochs are counted
    axes: tuple[tuple[str, tuple[Value, ...]], ...] = ()  # the settings above that have several values
    sampler: str = "grid"
    trials: int | None = None  # points a normalization, for samplers that draw them
    prune: bool = False
    control: bool = False  # select again with gamma, beta and the output layer frozen

    def at(self, variant: Variant) -> Settings:
        """The settings of one variant, with nothing left to vary.

        >>> grown = Settings("mlp", "digits", (), axes=(("batch_size", (8, 32)),), epochs=2, examples=100)
        >>> fixed = grown.at((("batch_size", 32),))
        >>> fixed.batch_size, fixed.steps, fixed.axes
        (32, 6, ())
        """
        values: dict[str, Any] = dict(variant)
        fixed = replace(self, axes=(), **values)
        if fixed.epochs is None or not fixed.examples:
            return fixed
        return replace(fixed, steps=fixed.epochs * (fixed.examples // min(fixed.batch_size, fixed.examples)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `to_dict` gave, JSON in between or not."""
        norms = tuple((label, declaration) for label, declaration in data["norms"])
        lrs = None if data["lrs"] is None else tuple(data["lrs"])
        axes = tuple((name, tuple(values)) for name, values in data.get("axes", ()))
        return cls(**{**data, "norms": norms, "lrs": lrs, "axes": axes})

    def differences(self, other: Settings) -> dict[str, tuple[Any, Any]]:
        """The settings in which two studies differ, by name."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}


@dataclass(frozen=True)
class Edge:
    """A learning rate read from several seeds: geometric mean and the seeds' range.

    `censored` counts the seeds for which the edge lies beyond the largest rate tried; their value is then that rate,
    and the report writes "none up to". `mean` is None where no seed has the edge at all (no rate trained).
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: int
    censored: int = 0


@dataclass(frozen=True)
class VariantSummary:
    """A normalization at one combination of the axes' values."""

    variant: Variant
    lr_best: float | None
    score: float | None  # mean over the selection seeds at that rate, on validation data; a failed seed has no part
    lr_train: Edge | None  # at half of chance; None where the sampler draws rates, which have no edges
    failed: int = 0  # selection seeds without a score at that rate; the combination with the fewest is the best


@dataclass(frozen=True)
class SmoothnessPoint:
    """The loss along the gradient at one training step."""

    step: int
    loss_low: float | None  # the range of the loss over the step sizes tried
    loss_high: float | None
    predictiveness: float | None  # the largest change of the gradient, an L2 norm
    beta: float | None  # the largest change of the gradient over the distance gone
    weight_norm: float | None


@dataclass(frozen=True)
class SharpnessPoint:
    """The ends of the Hessian's spectrum at one training step, and the curvature at which its rate turns unstable."""

    step: int
    largest: float | None
    smallest: float | None
    along_gradient: float | None  # gᵀHg / gᵀg
    threshold: float | None  # 2/lr for SGD, 2(1+b)/lr for heavy ball; None where there is no such rule


@dataclass(frozen=True)
class ActivationPoint:
    """The root mean square of one layer's output, before training and after."""

    layer: str  # path
    rms_start: float | None
    rms_end: float | None


@dataclass(frozen=True)
class GapPoint:
    """The loss on the same data by moving statistics, by batch statistics, and by recalibrated ones."""

    moving: float | None
    batch: float | None
    recalibrated: float | None


@dataclass(frozen=True)
class Found:
    """A finding of the doctor's, in words."""

    kind: str
    what: str
    where: tuple[str, ...]  # paths
    measured: str
    expected: str
    fix: str  # code
    confidence: str


@dataclass(frozen=True)
class Measures:
    """What one more training of a normalization at its best rate showed, from one seed."""

    seed: int
    smoothness: tuple[SmoothnessPoint, ...] = ()
    sharpness: tuple[SharpnessPoint, ...] = ()
    activations: tuple[ActivationPoint, ...] = ()  # in the order of calls
    gap: GapPoint | None = None
    saved_bytes: int | None = None  # kept for backward by one step
    findings: tuple[Found, ...] | None = None  # the doctor's at the end of that training; None: it was not asked

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, JSON in between or not."""
        gap, findings = data.get("gap"), data.get("findings")
        return cls(
            seed=data["seed"],
            smoothness=tuple(SmoothnessPoint(**point) for point in data.get("smoothness", ())),
            sharpness=tuple(SharpnessPoint(**point) for point in data.get("sharpness", ())),
            activations=tuple(ActivationPoint(**point) for point in data.get("activations", ())),
            gap=None if gap is None else GapPoint(**gap),
            saved_bytes=data.get("saved_bytes"),
            findings=None if findings is None else tuple(Found(**{**f, "where": tuple(f["where"])}) for f in findings),
        )


@dataclass(frozen=True)
class NormSummary:
    """All that a study knows of one normalization."""

    label: str
    declaration: str  # what the user wrote: "batch", "group:8", "[n] c"
    described: str  # the layer in normwise's language, for a reader: its repr
    lr_best: float | None
    lr_train: dict[str, Edge]  # by threshold, as a share of chance: "0.9", "0.5", "0.25"; the headline is "0.5"
    lr_diverge: Edge  # like lr_train empty where the sampler draws rates, which have no edges
    margin_octaves: float | None  # log2(lr_train at 0.5 / lr_best)
    sensitivity: float | None
    selection: tuple[Record, ...]
    confirmation: tuple[Record, ...]
    horizon: tuple[Record, ...]
    scores: tuple[float, ...]  # what the judge saw: confirmation scores, a failed seed at its imputed value
    mean: float | None
    median: float | None
    low: float | None  # 95 % interval of this normalization's own mean (Student's t over seeds)
    high: float | None
    failures: int  # confirmation seeds that did not train
    ms_per_step: float | None  # measured alone after the study; None for a user's own loop
    weight_norm: float | None  # median over confirmation seeds
    trials: int
    parameters: int | None
    variant: Variant = ()  # the best combination of the axes' values, which all of the above is read at
    variants: tuple[VariantSummary, ...] = ()  # every combination tried; () where there are no axes
    control: dict[str, Edge] | None = None  # lr_train with gamma, beta and the output layer frozen, by threshold
    control_diverge: Edge | None = None  # lr_diverge of the same
    measures: Measures | None = None


@dataclass(frozen=True)
class Comparison:
    """One pair of normalizations, `better` minus `other`: the one with the better mean comes first.

    `difference`, `low` and `high` are oriented so that positive always favours `better`, whichever way the metric
    runs. `verdict` is *better* when the simultaneous 95 % bound lies beyond the margin, *equivalent* when the interval
    lies inside twice the margin, *undecided* otherwise; `more_seeds` is then about how many further seeds would decide.
    """

    better: str
    other: str
    difference: float
    low: float
    high: float
    verdict: Literal["better", "equivalent", "undecided"]
    more_seeds: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The judge's answer."""

    winner: str  # the best mean
    runner_up: str | None  # the best of the others
    recommended: str  # the simplest of those equivalent to the winner, the winner itself otherwise
    kind: Literal["better", "equivalent", "undecided"]  # "better": the winner beats every other
    sentence: str  # the whole answer, for a person
    comparisons: tuple[Comparison, ...]  # every pair


@dataclass(frozen=True)
class Horizon:
    """Winner and runner-up at twice the steps."""

    winner: str
    runner_up: str
    steps: int
    lead: float  # at the study's steps, in the metric's unit, positive: the winner leads
    lead_doubled: float
    reversed: bool
    runner_up_steps: int | None = None  # the runner-up's own steps, where they are not the winner's


@dataclass(frozen=True)
class Summary:
    """A finished study, condensed. This is summary.json, and all that the report is drawn from."""

    settings: Settings
    facts: dict[str, str]  # what was fixed, one line each, in order: data, split, inputs, start, placement, batch, ...
    chance: float | None  # loss of the best constant prediction, nats for cross-entropy
    lr_range: tuple[float, float]  # the declared range over which the sensitivity is averaged
    norms: tuple[NormSummary, ...]  # in the order the user gave
    verdict: Verdict
    horizon: Horizon | None
    warnings: tuple[str, ...]  # headline first
    reproduce: dict[str, str]  # command, versions, seeds, when, where
    seconds: float
    trials: int
    version: int = field(default=2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
