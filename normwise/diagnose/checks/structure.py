"""What stands where: a bias or dropout before a normalization, normalizations on and off the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from normwise.diagnose.checks.case import DROPOUTS, Case, Layer, Unchecked, paths_code
from normwise.diagnose.checks.residual import Link, streams
from normwise.diagnose.findings import Finding
from normwise.surgery.flow import Flow, Step, Value
from normwise.surgery.folding import Fold, Subject, useless_bias

_SHIFT = 0.05  # of a variance, by dropout
_DEEP = 12  # normalizations on a residual stream from which on the learning rate has to be warmed up: six layers


def bias_before_norm(case: Case) -> Iterator[Finding]:
    """A bias that the normalization after it takes out again."""
    measuring = [layer for layer in case.layers if layer.measures]
    found: dict[str, nn.Module] = {}
    for layer in measuring:
        subject = Subject(layer.site, layer.converted, case.flow)
        fold = None if subject.obstacle else useless_bias(subject)
        if isinstance(fold, Fold):
            found |= {_path(case, linear): linear for linear in fold.weights}
    if found:
        biases = [module.bias for module in found.values()]
        yield Finding(
            "bias-before-norm",
            "A bias is added that the normalization behind it takes out again with the mean.",
            tuple(found),
            "parameters without effect",
            sum(bias.numel() for bias in biases if isinstance(bias, torch.Tensor)),
            (0, 0),
            f'nw.fold(model, {case.batch_code}, steps=["bias"]{case.forward_code})',
            "certain",
            "minor",
        )


def _path(case: Case, module: nn.Module) -> str:
    return next((path for path, one in case.model.named_modules() if one is module), type(module).__name__)


# ------------------------------------------------------------------------------------------------------------ dropout


def dropout_before_norm(case: Case) -> Iterator[Finding]:
    """Dropout whose variance a batch normalization behind it remembers, though evaluation has another."""
    pairs = {layer: near for layer in case.remembering if layer.measures and (near := _dropouts_before(case, layer))}
    if not pairs:
        return
    ratios = _shifts(case)
    shifted = {layer: ratios[layer.path] for layer in pairs if abs(ratios.get(layer.path, 1.0) - 1) > _SHIFT}
    if shifted:
        dropouts = sorted({_path(case, module) for layer in shifted for module in pairs[layer]})
        yield Finding(
            "dropout-before-norm",
            f"Dropout in {', '.join(dropouts)} changes the variance that is remembered, and evaluation has none.",
            tuple(layer.path for layer in shifted),
            "variance with dropout, relative to that without",
            max(shifted.values(), key=lambda ratio: abs(ratio - 1)),
            (1 - _SHIFT, 1 + _SHIFT),
            f"for path in {paths_code(dropouts)}:\n"
            "    model.get_submodule(path).p = 0.0  # dropout has its place behind the last batch normalization",
            "certain",
            "moderate",
        )


def _dropouts_before(case: Case, layer: Layer) -> list[nn.Module]:
    """The dropout layers in a straight line before a normalization, with no other one between."""
    norms = {other.module for other in case.layers}
    found: list[nn.Module] = []
    for call in case.flow.calls(layer.module):
        step = _only_writer(case.flow, call)
        while step is not None and step.layer not in norms:
            if isinstance(step.layer, DROPOUTS) and getattr(step.layer, "p", 0) > 0:
                found.append(step.layer)
            step = _only_writer(case.flow, step)
    return list(dict.fromkeys(found))


def _only_writer(flow: Flow, step: Step) -> Step | None:
    """The step that has made the one tensor of data that a step reads; None: there are several, or it is an input."""
    values: list[Value] = step.takes if step.layer is not None else step.reads
    data = [value for value in values if id(value.tensor) not in flow.holders]
    return data[0].writer if len(data) == 1 else None


def _shifts(case: Case) -> dict[str, float]:
    """The variance that each normalization reads with dropout, relative to that without; the median channel's."""
    others = [module for module in case.model.modules() if not isinstance(module, DROPOUTS)]
    still = case.columns_in(others)
    tiny = torch.finfo(torch.float64).tiny
    return {
        path: float((columns.within.clamp_min(tiny) / still[path].within.clamp_min(tiny)).median())
        for path, columns in case.columns.items()
        if path in still and still[path].within.shape == columns.within.shape
    }


# ----------------------------------------------------------------------------------------------- the residual stream


def mixed_order(case: Case) -> Iterator[Finding]:
    """A residual stream that is normalized between some of its blocks, and not between others."""
    for links in streams(case.flow, {layer.module for layer in case.layers}):
        on = [link for link in links if link.norms]
        if len(links) < 3 or not 0 < len(on) < len(links):
            continue
        yield Finding(
            "mixed-norm-order",
            f"A residual stream is normalized after {len(on)} of {len(links)} blocks: what some blocks add is scaled "
            "down by the next norm, and what the others add is not.",
            tuple(_names(on)),
            "blocks that are unlike the others",
            min(len(on), len(links) - len(on)),
            (0, 0),
            f"for path in {paths_code(_names(on))}:\n"
            "    model.set_submodule(path, torch.nn.Identity())  # and a norm in front of what each block computes",
            "likely",
            "moderate",
        )


def post_norm_without_warmup(case: Case) -> Iterator[Finding]:
    """A deep network with its norms on the residual stream, which is to start at the full learning rate."""
    deep = [
        links
        for links in streams(case.flow, {layer.module for layer in case.layers})
        if len(links) >= _DEEP and all(link.norms for link in links)
    ]
    if not deep:
        return
    if case.optimizer is None:
        raise Unchecked("no optimizer was given")
    scheduled = any("initial_lr" in group for group in case.optimizer.param_groups)
    if scheduled or case.optimizer.state:
        return
    for links in deep:
        yield Finding(
            "post-norm-without-warmup",
            f"The residual stream is normalized after each of {len(links)} blocks, whose first gradients are large in "
            "the last layers, and no schedule warms the learning rate up (Xiong et al. 2020, arXiv:2002.04745).",
            tuple(_names(links)),
            "normalizations on the residual stream without warm-up",
            len(links),
            (0, _DEEP - 1),
            "schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=1000)"
            "  # schedule.step() after each optimizer.step()",
            "possible",
            "moderate",
        )


def _names(links: list[Link]) -> list[str]:
    return list(dict.fromkeys(step.name for link in links for step in link.norms))
