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
        of_layers: Whether a finding is over for a layer that another one's fix exchanges.
    """

    name: str
    run: Callable[[Case], Iterator[Finding]]
    of_layers: bool = False


CHECKS = (
    Check("values that are not finite", values.non_finite),
    Check("memories that are not finite", memory.not_finite, of_layers=True),
    Check("memories never updated", memory.never_updated, of_layers=True),
    Check("the last batch", samples.last_batch_of_one),
    Check("samples a statistic", samples.few_samples, of_layers=True),
    Check("statistics across processes", samples.unsynchronized),
    Check("memories against the batches", memory.drifted, of_layers=True),
    Check("batches of different kinds", memory.mixed_domains, of_layers=True),
    Check("Bessel's factor", memory.bessel, of_layers=True),
    Check("dropout before batch normalization", structure.dropout_before_norm, of_layers=True),
    Check("checkpointed forwards", samples.computed_again, of_layers=True),
    Check("accumulated gradients", samples.micro_batches, of_layers=True),
    Check("normalizations frozen by halves", settings.frozen_by_halves, of_layers=True),
    Check("parameters that are not trained", settings.untrained_parameters),
    Check("weight decay on normalizations", settings.decay_on_norms),
    Check("biases before normalizations", structure.bias_before_norm),
    Check("norms on the residual stream", structure.mixed_order, of_layers=True),
    Check("warm-up of a post-norm network", structure.post_norm_without_warmup),
    Check("gains near zero", values.gain_near_zero, of_layers=True),
    Check("eps beside the variance", values.eps_rivals_variance, of_layers=True),
    Check("constant inputs", values.constant_inputs),
    Check("dead units", values.dead_units),
    Check("saturated units", values.saturated_units),
    Check("growth of activations", values.exploding),
    Check("learning rate against sharpness", settings.rate_against_sharpness),
)
