"""A made-up study of the size and shape of a real one, for the tests of the report."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import geometric_mean, mean, median, stdev

from normwise.tuning.records import (
    ActivationPoint,
    Comparison,
    Edge,
    Found,
    GapPoint,
    Horizon,
    Measures,
    NormSummary,
    Outcome,
    Phase,
    Record,
    Request,
    Settings,
    SharpnessPoint,
    SmoothnessPoint,
    Summary,
    Variant,
    VariantSummary,
    Verdict,
)

CHANCE = math.log(10)
STEPS = 200
RATES = tuple(2.0**power for power in range(-9, 5))
LOOKS = tuple(range(0, STEPS, 34))  # the steps at which a training is looked into
BATCHES = (8, 32, 128)
AXES = (("batch_size", BATCHES), ("optimizer", ("sgd", "momentum")))
FINDINGS = (
    Found(
        kind="too-few-samples",
        what="Statistics of 8 samples are noisy.",
        where=("block.1.norm", "block.2.norm"),
        measured="samples a statistic: 8",
        expected="at least 16",
        fix="nw.swap(model, nw.BatchNorm, lambda old: nw.GroupNorm(8, old.num_features))\n"
        "nw.recalibrate(model, batches)",
        confidence="likely",
    ),
    Found(
        kind="decay-on-norm",
        what="Weight decay pulls gamma towards zero.",
        where=("block.1.norm",),
        measured="weight decay of normalization parameters: 0.01",
        expected="0",
        fix="optimizer = torch.optim.SGD(nw.param_groups(model, weight_decay=0.01), lr=0.5)",
        confidence="certain",
    ),
)
_FACTORS = (("0.9", 1.9), ("0.5", 1.0), ("0.25", 0.8))  # of the edge at half of chance, by share of chance
_T_95 = 2.262  # Student's t, 9 degrees of freedom


@dataclass(frozen=True)
class Network:
    """What a normalization does in this made-up world."""

    label: str
    declaration: str
    described: str
    score: float  # percent
    noise: float  # points, between seeds
    loss: float  # nats at the best rate
    best: float  # learning rate
    edge: float  # largest rate that trains
    diverges: float | None
    width: float  # octaves in which the loss rises by a factor of e
    weight: float
    ms: float


NETWORKS = (
    Network("batch", "batch", "BatchNorm(100)", 94.6, 0.45, 0.19, 0.5, 4.0, None, 2.6, 41.3, 2.41),
    Network("layer", "layer", "LayerNorm(100)", 92.9, 0.6, 0.25, 0.125, 0.71, 2.0, 1.7, 38.9, 2.17),
    Network("group", "group:10", "GroupNorm(10, 100)", 92.7, 0.7, 0.26, 0.125, 0.71, 2.0, 1.7, 39.0, 2.52),
    Network("rms", "rms", "RMSNorm(100)", 92.4, 0.8, 0.27, 0.125, 0.5, 1.41, 1.6, 38.2, 2.08),
    Network("none", "none", "no normalization", 88.1, 1.9, 0.47, 0.0625, 0.3, 0.71, 1.1, 36.5, 1.46),
)


def example() -> Summary:
    """Five normalizations on the digits: one better, three alike, none last."""
    return study(NETWORKS)


def study(networks: tuple[Network, ...]) -> Summary:
    norms = tuple(_norm(network, random.Random(index)) for index, network in enumerate(networks))
    return Summary(
        settings=Settings(model="mlp", data="digits", norms=tuple((norm.label, norm.declaration) for norm in norms)),
        facts={
            "data": "digits: 1,797 images of 8 x 8 pixels, 10 classes",
            "split": "1,077 train, 360 validation, 360 test; by class, seed 0",
            "inputs": "standardized by pixel with the training set's moments",
            "start": "He normal",
            "placement": "linear, normalization, ReLU",
            "batch": "128, so that a statistic of BatchNorm sees 128 samples",
        },
        chance=CHANCE,
        lr_range=(RATES[0], RATES[-1]),
        norms=norms,
        verdict=_verdict(norms),
        horizon=Horizon("batch", "layer", STEPS, lead=1.72, lead_doubled=0.94, reversed=False)
        if len(norms) > 1
        else None,
        warnings=(
            "boundary: batch has not diverged at 16, the largest rate tried; its lr_diverge is a lower bound.",
            "undecided: layer and group differ by less than 10 seeds can tell.",
        ),
        reproduce={
            "command": "normwise tune mlp --data digits --norms batch,layer,group:10,rms,none --seeds 3 --confirm 10",
            "versions": "normwise 0.1.0, torch 2.13.0, Python 3.11.9",
            "seeds": "selection 0 to 2, confirmation 1000 to 1009",
            "when": "2026-03-04 09:12 UTC",
        },
        seconds=187.3,
        trials=sum(norm.trials for norm in norms),
    )


def own_loop() -> Summary:
    """A user's own training loop: scores and nothing else."""
    full = example()
    norms = tuple(
        replace(
            norm,
            lr_train={},
            lr_diverge=Edge(None, None, None, seeds=3),
            margin_octaves=None,
            sensitivity=None,
            ms_per_step=None,
            selection=tuple(map(_bare, norm.selection)),
            confirmation=tuple(map(_bare, norm.confirmation)),
        )
        for norm in full.norms
    )
    settings = replace(full.settings, own_loop=True, steps=None, data="")
    return replace(full, settings=settings, norms=norms, chance=None, horizon=None)


def nothing_trained() -> Summary:
    """Every trial diverged, and every number that may be missing is."""
    full = example()
    norms = tuple(
        replace(
            norm,
            lr_best=None,
            lr_train={key: Edge(None, None, None, seeds=3) for key in ("0.9", "0.5", "0.25")},
            lr_diverge=Edge(RATES[0], RATES[0], RATES[0], seeds=3),
            margin_octaves=None,
            sensitivity=None,
            selection=tuple(map(_diverged, norm.selection)),
            confirmation=(),
            scores=(),
            mean=None,
            median=None,
            low=None,
            high=None,
            ms_per_step=None,
            weight_norm=None,
            parameters=None,
        )
        for norm in full.norms
    )
    verdict = Verdict("batch", None, "batch", "undecided", "No normalization trained at any learning rate.", ())
    return replace(full, norms=norms, verdict=verdict, horizon=None, chance=None, facts={}, reproduce={}, warnings=())


def measured() -> Summary:
    """The example with everything that a study can hold: measures, two axes, the control, findings."""
    full = example()
    norms = tuple(_measured(norm, network) for norm, network in zip(full.norms, NETWORKS, strict=True))
    settings = replace(full.settings, axes=AXES, batch_size=8, control=True)
    return replace(full, settings=settings, norms=norms)


def healthy() -> Summary:
    """A study as it comes by default: measured, nothing varied, no control, and a clean bill."""
    full = measured()
    norms = tuple(
        replace(norm, variant=(), variants=(), control=None, control_diverge=None, measures=_clean(norm.measures))
        for norm in full.norms
    )
    return replace(full, settings=replace(full.settings, axes=(), batch_size=128, control=False), norms=norms)


def sampled() -> Summary:
    """Rates drawn by a sampler, which have no edges and no grid."""
    full = example()
    nowhere = Edge(None, None, None, seeds=0)
    norms = tuple(
        replace(norm, lr_train={}, lr_diverge=nowhere, margin_octaves=None, sensitivity=None) for norm in full.norms
    )
    return replace(full, settings=replace(full.settings, sampler="tpe", trials=14), norms=norms)


def _clean(measures: Measures | None) -> Measures | None:
    return replace(measures, findings=() if measures.findings else None) if measures else None


def _measured(norm: NormSummary, network: Network) -> NormSummary:
    variants = tuple(_variant(network, batch, optimizer) for batch in BATCHES for optimizer in dict(AXES)["optimizer"])
    left = 0.3 if network.label == "batch" else 0.9
    return replace(
        norm,
        variant=_combination(128, "sgd"),
        variants=variants,
        control={share: _edge(network.edge * left * factor) for share, factor in _FACTORS},
        control_diverge=_edge(network.edge * left * 3.0),
        measures=_measures(norm, network),
    )


def _combination(batch: int, optimizer: str) -> Variant:
    return (("batch_size", batch), ("optimizer", optimizer))


def _variant(network: Network, batch: int, optimizer: object) -> VariantSummary:
    """Small batches hurt what takes its statistics from them; without normalization, momentum at 8 trains nowhere."""
    hurt = 12.0 if network.label == "batch" else 1.2
    score = network.score - hurt * math.log(128 / batch) / math.log(16) - (0.4 if optimizer == "momentum" else 0.0)
    lost = network.label == "none" and batch == 8
    rate = network.best * math.sqrt(batch / 128)
    edge = Edge(None, None, None, seeds=3) if lost else _edge(network.edge * math.sqrt(batch / 128))
    return VariantSummary(_combination(batch, str(optimizer)), None if lost else rate, None if lost else score, edge)


def _measures(norm: NormSummary, network: Network) -> Measures:
    """Loss ranges, curvatures and growths of the size that such networks have."""
    batch = network.label == "batch"
    rough = 0.17 if batch else 2.0 / network.width
    return Measures(
        seed=1000,
        smoothness=tuple(_smoothness(network, rough, step) for step in LOOKS),
        sharpness=tuple(_sharpness(network, step) for step in LOOKS),
        activations=tuple(_activation(network, layer) for layer in range(6 if network.label == "none" else 12)),
        gap=GapPoint(0.34, 0.21, 0.24) if batch else None,
        saved_bytes=round(1_310_720 * (1.0 if network.label == "none" else 1.6) * (1 + 0.02 * network.ms)),
        findings=FINDINGS if batch else None,
    )


def _smoothness(network: Network, rough: float, step: int) -> SmoothnessPoint:
    loss = network.loss + (2.41 - network.loss) * math.exp(-step / 30)
    fade = 0.4 + 0.6 * math.exp(-step / 60)
    high = None if network.label == "none" and step == 0 else loss + rough * fade
    beta = (10.7 if network.label == "batch" else 14.0 + 2 * network.noise) * fade
    weight = 24.0 + (network.weight - 24.0) * step / STEPS
    return SmoothnessPoint(step, loss - 0.3 * rough * fade, high, 6.0 * rough * fade, beta, weight)


def _sharpness(network: Network, step: int) -> SharpnessPoint:
    threshold = 2 / network.best
    largest = threshold * (1.05 - 0.9 * math.exp(-step / 50) / (0.5 + network.width / 2))
    return SharpnessPoint(step, largest, -0.1 * threshold, 0.4 * largest, threshold)


def _activation(network: Network, layer: int) -> ActivationPoint:
    growth = 1.35 if network.label == "none" else 1.02
    return ActivationPoint(f"body.{layer}", 0.9 * growth**layer, 1.1 * growth ** (1.3 * layer))


def one() -> Summary:
    """A single normalization."""
    return study(NETWORKS[:1])


def twelve() -> Summary:
    """As many normalizations as a report should bear."""
    copies = tuple(
        replace(NETWORKS[index % 5], label=f"copy {index} of {NETWORKS[index % 5].label}") for index in range(12)
    )
    return study(copies)


def relabelled(label: str) -> Summary:
    """The example with its winner under another name, everywhere."""
    networks = (replace(NETWORKS[0], label=label, declaration=label), *NETWORKS[1:])
    return study(networks)


def _bare(record: Record) -> Record:
    outcome: Outcome = "diverged" if record.score is None else "trains"
    return Record(record.request, outcome, score=record.score, seconds=record.seconds)


def _diverged(record: Record) -> Record:
    return Record(record.request, "diverged", first_loss=2.4, seconds=record.seconds)


def _norm(network: Network, chance: random.Random) -> NormSummary:
    selection = tuple(_trial(network, "select", lr, seed, chance) for lr in RATES for seed in range(3))
    confirmation = tuple(_trial(network, "confirm", network.best, 1000 + seed, chance) for seed in range(10))
    scores = tuple(record.score if record.score is not None else 10.0 for record in confirmation)
    half = _T_95 * stdev(scores) / math.sqrt(len(scores))
    return NormSummary(
        label=network.label,
        declaration=network.declaration,
        described=network.described,
        lr_best=network.best,
        lr_train={share: _edge(network.edge * factor) for share, factor in _FACTORS},
        lr_diverge=_edge(network.diverges)
        if network.diverges
        else Edge(RATES[-1], RATES[-1], RATES[-1], 3, censored=3),
        margin_octaves=math.log2(network.edge / network.best),
        sensitivity=round(2.4 / network.width - network.loss, 3),
        selection=selection,
        confirmation=confirmation,
        horizon=(),
        scores=scores,
        mean=mean(scores),
        median=median(scores),
        low=mean(scores) - half,
        high=mean(scores) + half,
        failures=sum(record.outcome != "trains" for record in confirmation),
        ms_per_step=network.ms,
        weight_norm=network.weight,
        trials=len(selection) + len(confirmation),
        parameters=None if network.declaration == "none" else 58_210,
    )


def _edge(middle: float) -> Edge:
    low, high = middle / math.sqrt(2), middle * math.sqrt(2)
    return Edge(geometric_mean([low, middle, high]), low, high, seeds=3)


def _trial(network: Network, phase: Phase, lr: float, seed: int, chance: random.Random) -> Record:
    request = Request(phase, network.label, lr, seed, STEPS)
    luck = chance.gauss(0.0, 1.0)
    if network.diverges and lr >= network.diverges * 2 ** (0.2 * luck):
        return Record(request, "diverged", first_loss=2.41, curve=((0, 2.41), (4, 9.8), (8, 3.1e4)), seconds=0.1)
    octaves = abs(math.log2(lr / network.best)) / network.width
    loss = min(network.loss * math.exp(octaves + 0.06 * luck), 2.9 + 0.2 * abs(luck))
    stuck = loss > CHANCE / 2
    score = max(network.score - 9.0 * octaves**2 + network.noise * luck, 9.7 + abs(luck))
    if phase == "confirm" and network.declaration == "none" and seed == 1003:
        stuck, loss, score = True, CHANCE, 10.3
    return Record(
        request,
        "stuck" if stuck else "trains",
        score=min(score, 100.0),
        first_loss=2.41,
        tail_loss=loss * 0.6,
        val_loss=loss,
        test_loss=None if phase == "select" else loss * 1.05,
        weight_norm=network.weight * (1 + 0.1 * lr),
        curve=_curve(loss * 0.6, chance),
        weights=_growth(24.0, network.weight * (1 + 0.1 * lr)),
        seconds=0.4,
    )


def _growth(start: float, end: float) -> tuple[tuple[int, float], ...]:
    return tuple((step, start + (end - start) * step / STEPS) for step in range(0, STEPS + 1, 10))


def _curve(end: float, chance: random.Random) -> tuple[tuple[int, float], ...]:
    return tuple(
        (step, end + (2.41 - end) * math.exp(-step / 22) * math.exp(0.12 * chance.gauss(0.0, 1.0)))
        for step in range(0, STEPS, 2)
    )


def _verdict(norms: tuple[NormSummary, ...]) -> Verdict:
    order = sorted(norms, key=lambda norm: -(norm.mean or 0.0))
    winner = order[0]
    if len(order) == 1:
        sentence = f"Use {winner.label} at learning rate {winner.lr_best:g}; there was nothing to compare it with."
        return Verdict(winner.label, None, winner.label, "undecided", sentence, ())
    pairs = tuple(_compare(one, other) for index, one in enumerate(order) for other in order[index + 1 :])
    sentence = (
        f"Use {winner.label} normalization at a learning rate of {winner.lr_best:g}: it reaches {winner.mean:.1f} % on "
        f"the test split, better than every other, and {order[1].label} is next with {order[1].mean:.1f} %."
    )
    return Verdict(winner.label, order[1].label, winner.label, "better", sentence, pairs)


def _compare(one: NormSummary, other: NormSummary) -> Comparison:
    difference = mean(one.scores) - mean(other.scores)
    half = 2.9 * math.sqrt((stdev(one.scores) ** 2 + stdev(other.scores) ** 2) / 10)
    low, high = difference - half, difference + half
    if low > 0.5:
        return Comparison(one.label, other.label, difference, low, high, "better")
    if low > -1.0 and high < 1.0:
        return Comparison(one.label, other.label, difference, low, high, "equivalent")
    return Comparison(one.label, other.label, difference, low, high, "undecided", more_seeds=14)
