"""Each kind of finding, with a model that has it and one that almost has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sick_models import (
    Checkpointed,
    Half,
    Patient,
    Twice,
    accumulated,
    batch_mlp,
    bias_then,
    chain,
    columns,
    cross_entropy,
    decaying,
    deep,
    domains,
    elsewhere,
    forgotten,
    frozen,
    gains,
    holding,
    images,
    joined,
    labelled,
    loader,
    mode_only,
    new,
    parabola,
    parameters_only,
    remembering,
    residual,
    rows,
    seen,
    shut,
    shut_norm,
    small_batches,
    small_groups,
    spoilt,
    started,
    tiny,
    wide,
)
from torch import nn


@dataclass(frozen=True)
class Sickness:
    """A kind of finding, who has it, and who almost has it."""

    kind: str
    sick: Callable[[], Patient]
    almost: Callable[[], Patient]
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.kind


# Each kind of finding; those of several processes have a test of their own.
SICKNESSES = (
    Sickness("few-samples", lambda: small_batches(15), lambda: small_batches(16)),
    Sickness("few-samples", lambda: small_groups(16), lambda: small_groups(8), "few-samples of a group"),
    Sickness("last-batch-of-one", lambda: loader(33), lambda: loader(34)),
    Sickness("last-batch-of-one", lambda: loader(49), images, "last-batch-of-one, but not of images"),
    Sickness("last-batch-of-one", lambda: loader(17), lambda: loader(17, drop_last=True), "last batch dropped"),
    Sickness(
        "last-batch-of-one",
        lambda: Patient(batch_mlp(), [*rows(16), torch.randn(1, 8)]),
        lambda: Patient(batch_mlp(), [*rows(16), torch.randn(2, 8)]),
        "last of a list",
    ),
    Sickness("micro-batches-apart", accumulated, joined),
    Sickness(
        "updated-twice",
        lambda: Patient(Checkpointed(), labelled(32), cross_entropy),
        lambda: Patient(Twice(), labelled(32), cross_entropy),
    ),
    Sickness("memory-lags", lambda: seen(5), lambda: seen(60)),
    Sickness("memory-never-updated", forgotten, new),
    Sickness("memory-non-finite", lambda: remembering(torch.nan), lambda: remembering(1e30)),
    Sickness("memory-non-finite", lambda: remembering(-1e-5), lambda: remembering(0.0), "negative variance"),
    Sickness("memory-differs", lambda: elsewhere(1.0), lambda: elsewhere(0.4)),
    Sickness("memory-mixes-domains", lambda: domains(1.0), lambda: domains(0.5)),
    Sickness("bessel-gap", lambda: chain(64), lambda: chain(256)),
    Sickness(
        "bias-before-norm", lambda: bias_then(nn.BatchNorm1d(32)), lambda: bias_then(nn.ReLU(), nn.BatchNorm1d(32))
    ),
    Sickness(
        "bias-before-norm",
        lambda: bias_then(nn.BatchNorm1d(32), nn.ReLU()),
        lambda: bias_then(nn.LayerNorm(32), nn.ReLU()),
        "bias before a layer norm is none",
    ),
    Sickness(
        "dropout-before-norm",
        lambda: bias_then(nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(32)),
        lambda: bias_then(nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5)),
    ),
    Sickness(
        "dropout-before-norm",
        lambda: bias_then(nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)),
        lambda: bias_then(nn.Dropout(0.3), nn.LayerNorm(32), nn.Linear(32, 32), nn.BatchNorm1d(32)),
        "dropout before another norm",
    ),
    Sickness(
        "mixed-norm-order",
        lambda: residual(["none", "post", "none", "none", "post", "none"]),
        lambda: residual(["post"] * 6),
    ),
    Sickness(
        "mixed-norm-order",
        lambda: residual(["pre", "post", "pre", "pre"]),
        lambda: residual(["pre"] * 4, last=True),
        "a last norm is none of them",
    ),
    Sickness("post-norm-without-warmup", lambda: started(12), lambda: started(11)),
    Sickness("post-norm-without-warmup", lambda: started(14), lambda: started(14, scheduled=True), "warm-up"),
    Sickness("frozen-but-updating", parameters_only, frozen),
    Sickness("evaluating-but-learning", lambda: mode_only(parameters=True), lambda: mode_only(parameters=False)),
    Sickness("decay-on-norms", lambda: decaying(grouped=False), lambda: decaying(grouped=True)),
    Sickness("untrained-parameters", lambda: holding(0, 1), lambda: holding(0, 1, 3)),
    Sickness("untrained-parameters", lambda: holding(), lambda: holding(0, 1, 3), "another model's optimizer"),
    Sickness("rate-above-stability", lambda: parabola(0.5), lambda: parabola(0.4)),
    Sickness(
        "rate-above-stability",
        lambda: parabola(1.0, momentum=0.9),
        lambda: parabola(0.8, momentum=0.9),
        "rate with momentum",
    ),
    Sickness("gain-near-zero", lambda: gains(9), lambda: gains(8)),
    Sickness("gain-near-zero", lambda: gains(31, 0.0), lambda: gains(32, 0.0), "all gains start at 0"),
    Sickness("constant-inputs", lambda: columns(0.0), lambda: columns(1e-3)),
    Sickness("eps-rivals-variance", lambda: tiny(1e-3), lambda: tiny(1e-2)),
    Sickness(
        "eps-rivals-variance",
        lambda: tiny(1e-3, nn.RMSNorm(8, eps=1e-5)),
        lambda: tiny(1e-2, nn.RMSNorm(8, eps=1e-5)),
        "eps of an RMS norm",
    ),
    Sickness("dead-units", lambda: shut(17), lambda: shut(16)),
    Sickness("dead-units", lambda: shut_norm(17), lambda: shut_norm(16), "dead units of a normalization"),
    Sickness("saturated-units", lambda: wide(50.0), lambda: wide(0.5)),
    Sickness("saturated-units", lambda: wide(80.0), lambda: wide(80.0, at_the_end=True), "the output saturates"),
    Sickness("exploding-activations", lambda: deep(nn.Identity), lambda: deep(lambda: nn.LayerNorm(64))),
    Sickness("non-finite", lambda: spoilt(torch.nan), lambda: spoilt(30.0)),
    Sickness(
        "non-finite", lambda: Patient(Half(3e4), rows(32)), lambda: Patient(Half(30.0), rows(32)), "half overflows"
    ),
)
