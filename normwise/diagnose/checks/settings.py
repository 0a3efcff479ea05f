"""How a model is trained: what is frozen, what decays, and how large the steps are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from normwise.diagnose.checks.case import Case, Layer, Unchecked
from normwise.diagnose.findings import Finding
from normwise.diagnose.results import number
from normwise.diagnose.sharpness import sharpness
from normwise.diagnose.thresholds import stability_threshold

_FAR = 2.0  # times the threshold: networks hover about it, and minibatches above
_ENOUGH = 2  # batches: of fewer examples the eigenvalue is larger, which the factor before covers
_TOO_FAR = 10.0  # what a network bore at its start, where curvature falls at once


def frozen_by_halves(case: Case) -> Iterator[Finding]:
    """A normalization of which parameters stand still and statistics move, or the other way round."""
    if not any(parameter.requires_grad for parameter in case.model.parameters()):
        return
    evaluating = [layer for layer in case.remembering if _is_in_evaluation(case, layer)]
    others = [layer for layer in case.remembering if layer.measures and layer not in evaluating]
    moving = [layer for layer in others if _takes_gradient(layer) is False]
    still = [layer for layer in evaluating if _takes_gradient(layer)]
    if moving:
        what = "Its parameters are frozen, but in training mode its statistics still move."
        yield _half_frozen("frozen-but-updating", what, moving)
    if still:
        what = "It is in evaluation mode within a model in training mode, but its parameters still learn; "
        what += "model.train() ends that."
        yield _half_frozen("evaluating-but-learning", what, still)


def _takes_gradient(layer: Layer) -> bool | None:
    """Whether one of its parameters takes a gradient; None: it has none."""
    own = list(layer.module.parameters(recurse=False))
    return any(parameter.requires_grad for parameter in own) if own else None


def _is_in_evaluation(case: Case, layer: Layer) -> bool:
    """Whether it was in evaluation mode while the model was training, and is not frozen."""
    return case.modes[case.model] and not case.modes.get(layer.module, True) and not layer.frozen


def _half_frozen(kind: str, what: str, layers: list[Layer]) -> Finding:
    paths = [layer.path for layer in layers]
    return Finding(
        kind,
        what,
        tuple(paths),
        "parts of it that move, parameters or statistics",
        1,
        (0, 0),
        f"nw.adopt(model)\nnw.freeze(model, {paths!r})",
        "likely",
        "moderate",
    )


def decay_on_norms(case: Case) -> Iterator[Finding]:
    """Weight decay on the gains and biases of normalizations."""
    if case.optimizer is None:
        raise Unchecked("no optimizer was given")
    decays = {
        id(parameter): float(group["weight_decay"])
        for group in case.optimizer.param_groups
        for parameter in group["params"]
        if group.get("weight_decay")
    }
    found = {
        layer.path: max(decays[id(p)] for p in layer.module.parameters(recurse=False) if id(p) in decays)
        for layer in case.layers
        if any(id(p) in decays for p in layer.module.parameters(recurse=False))
    }
    if found:
        decay = max(found.values())
        yield Finding(
            "decay-on-norms",
            "Weight decay pulls gains and biases of normalizations towards 0, where it regularizes nothing.",
            tuple(found),
            "weight decay on normalizations",
            decay,
            (0, 0),
            _made_again(case.optimizer, decay),
            "certain",
            "minor",
        )


def _made_again(optimizer: Optimizer, decay: float) -> str:
    """The same optimizer over groups of which one has no decay."""
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    settings = optimizer.param_groups[0]
    options = {
        name: settings[name]
        for name, parameter in known.items()
        if name in settings and name not in ("params", "weight_decay") and settings[name] != parameter.default
    }
    options = {"lr": settings["lr"], **options} if "lr" in settings else options
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"optimizer = type(optimizer)(nw.param_groups(model, weight_decay={decay!r}){given})"


def rate_against_sharpness(case: Case) -> Iterator[Finding]:
    """A learning rate that the curvature here does not bear."""
    lr, threshold = _step(case)
    given = case.batches[:_ENOUGH]
    measured = sharpness(case.model, given, case.loss, mode="current", forward=case.forward, tolerance=0.1, most=20)
    found = measured.largest.value
    excess = found / threshold
    if excess > _FAR:
        bearable = float(f"{lr / excess:.1e}")
        yield Finding(
            "rate-above-stability",
            f"The largest eigenvalue of the Hessian, {number(found)}, is above what the step is stable for, "
            f"{number(threshold)}. That is so here and now: curvature changes as training goes on.",
            (),
            "largest eigenvalue, relative to the stability threshold",
            excess,
            (0, _FAR),
            f"lr = {bearable!r}"
            if case.optimizer is None
            else f'for group in optimizer.param_groups:\n    group["lr"] = {bearable!r}',
            "likely" if excess > _TOO_FAR else "possible",
            "severe",
        )


def _step(case: Case) -> tuple[float, float]:
    """The learning rate, and the curvature that the step is stable for.

    Raises:
        Unchecked: it is not known.
    """
    if case.optimizer is None:
        if case.lr is None:
            raise Unchecked("no optimizer and no learning rate were given")
        return case.lr, stability_threshold(case.lr)
    if type(case.optimizer) is not torch.optim.SGD:
        kind = type(case.optimizer).__name__
        raise Unchecked(f"{kind} steps by its own scale of each parameter, not by the curvature")
    group = max(case.optimizer.param_groups, key=lambda group: float(group["lr"]))
    lr = float(group["lr"]) if case.lr is None else case.lr
    if lr <= 0:
        raise Unchecked(f"the learning rate is {lr:g}")
    return lr, stability_threshold(lr, group["momentum"], nesterov=group["nesterov"], dampening=group["dampening"])
