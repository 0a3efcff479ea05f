"""All checks, in the order in which they are made: what each looks for, and what it is called in a clean bill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from normwise.diagnose.checks import memory, samples, settings, structure, values
from normwise.diagnose.checks.case import Case
from normwise.diagnose.findings import Finding


class Check(NamedTuple):
    """Something to look for.

    Attributes:
        name: What is looked at, for people.
        run: Gives the findings, or raises `Unchecked`.
    """

    name: str
    run: Callable[[Case], Iterator[Finding]]


CHECKS = (
    Check("values that are not finite", values.non_finite),
    Check("memories that are not finite", memory.not_finite),
    Check("memories never updated", memory.never_updated),
    Check("the last batch", samples.last_batch_of_one),
    Check("samples a statistic", samples.few_samples),
    Check("statistics across processes", samples.unsynchronized),
    Check("memories against the batches", memory.drifted),
    Check("batches of different kinds", memory.mixed_domains),
    Check("Bessel's factor", memory.bessel),
    Check("dropout before batch normalization", structure.dropout_before_norm),
    Check("checkpointed forwards", samples.computed_again),
    Check("accumulated gradients", samples.micro_batches),
    Check("normalizations frozen by halves", settings.frozen_by_halves),
    Check("weight decay on normalizations", settings.decay_on_norms),
    Check("biases before normalizations", structure.bias_before_norm),
    Check("norms on the residual stream", structure.mixed_order),
    Check("warm-up of a post-norm network", structure.post_norm_without_warmup),
    Check("gains near zero", values.gain_near_zero),
    Check("eps beside the variance", values.eps_rivals_variance),
    Check("constant inputs", values.constant_inputs),
    Check("dead units", values.dead_units),
    Check("saturated units", values.saturated_units),
    Check("growth of activations", values.exploding),
    Check("learning rate against sharpness", settings.rate_against_sharpness),
)
