"""How a model is trained: what is frozen, what decays, and how large the steps are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from normwise.diagnose.checks.case import Case, Layer, Unchecked, joined, paths_code
from normwise.diagnose.checks.values import exploding
from normwise.diagnose.findings import Finding
from normwise.diagnose.results import number
from normwise.diagnose.sharpness import sharpness
from normwise.diagnose.thresholds import stability_threshold

_FAR = 2.0  # times the threshold: networks hover about it, and minibatches above
_ENOUGH = 2  # batches: of fewer examples the eigenvalue is larger, which the factor before covers
_TOO_FAR = 10.0  # what a network bore at its start, where curvature falls at once
_BEYOND = 1000.0  # what no choice of a rate explains
_CAUSE = " So much is rather the work of activations that grow, or of a normalization that is missing."


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
        f"nw.adopt(model)\nnw.freeze(model, {paths_code(paths)})",
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
            _split(case.optimizer),
            "certain",
            "minor",
        )


def _split(optimizer: Optimizer) -> str:
    """Python that takes the normalizations out of each group that decays, and leaves all else, state and rates, be."""
    scheduled = any("initial_lr" in group for group in optimizer.param_groups)
    return _WITHOUT_DECAY + _SCHEDULED * scheduled


_WITHOUT_DECAY = """norms = set()
for p in nw.param_groups(model, weight_decay=0.0).parameters:
    if p.role == "normalization":
        norms.add(model.get_parameter(p.name))
for group in list(optimizer.param_groups):
    taken, left = [], []
    for p in group["params"]:
        (taken if p in norms else left).append(p)
    if taken and group.get("weight_decay"):
        group["params"] = left
        optimizer.add_param_group({**group, "params": taken, "weight_decay": 0.0})"""
_SCHEDULED = """
# and for the schedule: schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]"""


def untrained_parameters(case: Case) -> Iterator[Finding]:
    """Parameters that take a gradient and are not the optimizer's, as those of a layer that was exchanged."""
    if case.optimizer is None:
        raise Unchecked("no optimizer was given")
    held = {parameter for group in case.optimizer.param_groups for parameter in group["params"]}
    trainable = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in trainable.items() if parameter not in held]
    if missing:
        none = len(missing) == len(trainable)
        what = "The optimizer holds none of the model's parameters: it is another model's."
        some = "These parameters take a gradient, but the optimizer does not hold them: they stay as they are, unless "
        yield Finding(
            "untrained-parameters",
            what if none else f"{some}another optimizer trains them.",
            tuple(missing),
            "parameter tensors that the optimizer does not hold",
            len(missing),
            (0, 0),
            _HELD if none else joined(0),
            "certain" if none else "likely",
            "severe",
        )


_HELD = """optimizer.state.clear()
del optimizer.param_groups[1:]
optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]"""


def rate_against_sharpness(case: Case) -> Iterator[Finding]:
    """A learning rate that the curvature here does not bear."""
    threshold = _threshold(case)
    if any(exploding(case)):
        raise Unchecked("activations explode, which decides what rate is borne: measure again when that is mended")
    given = case.batches[:_ENOUGH]
    measured = sharpness(case.model, given, case.loss, mode="current", forward=case.forward, tolerance=0.1, most=20)
    found = measured.largest.value
    excess = found / threshold
    if excess > _FAR:
        yield Finding(
            "rate-above-stability",
            f"The largest eigenvalue of the Hessian, {number(found)}, is above what the step is stable for, "
            f"{number(threshold)}. That is so here and now: curvature changes as training goes on."
            + _CAUSE
            * (excess > _BEYOND),
            (),
            "largest eigenvalue, relative to the stability threshold",
            excess,
            (0, _FAR),
            _bearable(case, threshold),
            "likely" if excess > _TOO_FAR else "possible",
            "severe",
        )


def _bearable(case: Case, threshold: float) -> str:
    """Python that measures again, after what else is mended, and makes the rate as much smaller as it has to be."""
    arguments = f"model, {case.few_batches_code}{case.loss_code}{case.mode_code}{case.forward_code}"
    smaller = f"{threshold:.4g} / max(largest, {threshold:.4g})"
    measured = f"largest = nw.sharpness({arguments}, tolerance=0.1, most=20).largest.value"
    if case.optimizer is None or case.lr is not None:
        return f"{measured}\nlr *= {smaller}"
    return f'{measured}\nfor group in optimizer.param_groups:\n    group["lr"] *= {smaller}'


def _threshold(case: Case) -> float:
    """The curvature that the step is stable for.

    Raises:
        Unchecked: it is not known.
    """
    if case.optimizer is None:
        if case.lr is None:
            raise Unchecked("no optimizer and no learning rate were given")
        return stability_threshold(case.lr)
    if type(case.optimizer) is not torch.optim.SGD:
        kind = type(case.optimizer).__name__
        raise Unchecked(f"{kind} steps by its own scale of each parameter, not by the curvature")
    group = max(case.optimizer.param_groups, key=lambda group: float(group["lr"]))
    lr = float(group["lr"]) if case.lr is None else case.lr
    if lr <= 0:
        raise Unchecked(f"the learning rate is {lr:g}")
    return stability_threshold(lr, group["momentum"], nesterov=group["nesterov"], dampening=group["dampening"])
