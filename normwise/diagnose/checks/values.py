"""What the numbers are: gains, inputs, eps beside the variance, dead and saturated units, explosions, NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnose.activations import Activation
from normwise.diagnose.checks.case import ENOUGH_ROWS, Case, Layer, paths_code, split
from normwise.diagnose.findings import Finding
from normwise.diagnose.nonfinite import NonFinite, first_nonfinite
from normwise.diagnose.results import number
from normwise.normalizers import RMS, Standardize
from normwise.recoveries import OffsetScale
from normwise.surgery.absorb import is_linear
from normwise.surgery.folding import Subject, gain_map

_NO_GAIN = 1e-3  # what passes no gradient to speak of to what is before it
_MANY = 0.25  # of a layer's gains
_MOST = 0.5  # of a layer's units
_EXAMPLES = 32  # to tell what is always so from chance
_EXPLODED = 1000.0  # times what the first layer gives: more than trained language models have


def gain_near_zero(case: Case) -> Iterator[Finding]:
    """Gains so small that nothing passes: a quarter of a layer or more, unless all begin at 0 on purpose."""
    shares = {layer: _share_without_gain(case, layer) for layer in case.layers}
    small = {layer: share for layer, share in shares.items() if share > _MANY}
    if small:
        lines = [
            f"gains = model.get_parameter({layer.path + '.weight'!r}).data\n"
            f"gains[{_absolute(layer)} < {_NO_GAIN:g}] = {0.0 if _is_offset(layer) else 1.0}"
            for layer in small
        ]
        yield Finding(
            "gain-near-zero",
            "Many gains are all but 0: these channels pass nothing on, and no gradient back.",
            tuple(layer.path for layer in small),
            f"share of gains below {_NO_GAIN:g}",
            max(small.values()),
            (0, _MANY),
            "\n".join(lines),
            "likely",
            "moderate",
        )


def _share_without_gain(case: Case, layer: Layer) -> float:
    """The share of gains that are all but 0; none, where all of them are 0, as residual branches begin."""
    gain = gain_map(Subject(layer.site, layer.converted, case.flow))
    if isinstance(gain, str) or layer.module._parameters.get("weight") is None or not bool(gain.scale.any()):
        return 0.0
    return float((gain.scale.abs() < _NO_GAIN).double().mean())


def _is_offset(layer: Layer) -> bool:
    return isinstance(layer.spec.recovery, OffsetScale)


def _absolute(layer: Layer) -> str:
    return "(1 + gains).abs()" if _is_offset(layer) else "gains.abs()"


def constant_inputs(case: Case) -> Iterator[Finding]:
    """Columns of the input, or channels of images, that are the same in every example."""
    case.need_rows(_EXAMPLES)
    for name, parts in _inputs(case.batches).items():
        constant = _constant(parts)
        if not constant or len(constant) == parts[0].shape[1]:
            continue
        kept = [column for column in range(parts[0].shape[1]) if column not in constant]
        yield Finding(
            "constant-inputs",
            f"{len(constant)} of {parts[0].shape[1]} input columns are the same in all {case.rows} examples that were "
            "looked at, and tell the model nothing.",
            (name,),
            "constant input columns",
            len(constant),
            (0, 0),
            f"kept = {kept!r}\n{_without(case, name)}  # for a model with as many inputs",
            "likely",
            "minor",
        )


def _inputs(batches: list[Any]) -> dict[str, list[Tensor]]:
    """The floating-point inputs with columns, by name, of all batches."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        named = given.items() if isinstance(given, Mapping) else [("input", given)]
        for name, x in named:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (2, 4, 5):
                found.setdefault(str(name), []).append(x)
    return found


def _constant(parts: list[Tensor]) -> list[int]:
    """The columns, along the second dimension, that have one value."""
    if any(part.shape[1] != parts[0].shape[1] for part in parts):
        return []
    columns = torch.cat([part.detach().movedim(1, 0).flatten(1) for part in parts], 1)
    return torch.nonzero((columns == columns[:, :1]).all(1)).flatten().tolist()


def _without(case: Case, name: str) -> str:
    """Python that leaves the columns out."""
    batch = case.batches[0]
    if isinstance(batch, Mapping):
        return f"batches = [{{**batch, {name!r}: batch[{name!r}][:, kept]}} for batch in {case.batches_code}]"
    if isinstance(batch, (tuple, list)):
        return f"batches = [(x[:, kept], *rest) for x, *rest in {case.batches_code}]"
    return f"batches = [x[:, kept] for x in {case.batches_code}]"


def eps_rivals_variance(case: Case) -> Iterator[Finding]:
    """A normalization of so small values that eps is more than half of what it divides by."""
    small = {}
    for layer in case.layers:
        variance = _typical(case, layer)
        eps = getattr(layer.spec.normalizer, "eps", None)
        if variance is not None and eps and variance < eps:
            small[layer] = (variance, eps)
    if small:
        layer, (variance, eps) = min(small.items(), key=lambda item: item[1][0] / item[1][1])
        lines = [
            f"model.get_submodule({one.path!r}).{_eps_name(one)} = {_below(value)}" for one, (value, _) in small.items()
        ]
        yield Finding(
            "eps-rivals-variance",
            f"The values that {layer.path} reads vary so little that its eps of {eps:g} is more than half of what it "
            "divides by: it does not normalize. Scale its input up, or take a smaller eps.",
            tuple(one.path for one in small),
            "variance of the median column, relative to eps",
            variance / eps,
            (1, math.inf),
            "\n".join(lines),
            "certain",
            "moderate",
        )


def _typical(case: Case, layer: Layer) -> float | None:
    """The median of what is standardized by, over the columns that are not constant; None: there are none."""
    columns = case.samples.get(layer.path)
    normalizer = layer.spec.normalizer
    if columns is None or not isinstance(normalizer, (Standardize, RMS)):
        return None
    means, variances = (torch.cat([getattr(call, name) for call in columns.calls]) for name in ("mean", "var"))
    if isinstance(normalizer, RMS):
        values = variances + means.square()
        values = values[values > 0]
    else:
        values = variances[variances > 1e-12 * means.square()]  # what rounding leaves of a constant
    return float(values.median()) if values.numel() else None


def _eps_name(layer: Layer) -> str:
    return next((name for name in ("eps", "variance_epsilon", "epsilon") if hasattr(layer.module, name)), "eps")


def _below(variance: float) -> str:
    """A round number a thousandth of the variance or less."""
    return f"1e{math.floor(math.log10(variance)) - 3}"


# -------------------------------------------------------------------------------------------------------------- units


def dead_units(case: Case) -> Iterator[Finding]:
    """Layers most of whose units are 0 for every example."""
    case.need_rows(ENOUGH_ROWS)
    dead = [row for row in case.activations.calls if row.dead is not None and row.dead > _MOST]
    if dead:
        yield Finding(
            "dead-units",
            "Most of these units are 0 for every example: they compute nothing, and get no gradient.",
            _paths(dead),
            "share of dead units",
            max(row.dead for row in dead if row.dead is not None),
            (0, _MOST),
            _leaking(case, dead),
            "certain",
            "severe",
        )


def _leaking(case: Case, dead: list[Activation]) -> str:
    """Activations that pass a gradient on either side, in the place of the dead ones or beside their normalizations."""
    modules = list(dict.fromkeys(row.path for row in dead if not row.layer.endswith("()")))
    norms = [path for path in modules if path in case.activated]
    others = [path for path in modules if path not in norms]
    if not modules:
        return case.smaller_rate("from the start again: units that are dead do not come back")
    fixes = [split(dict.fromkeys(norms, _LEAKS))] if norms else []
    if others:
        fixes.append(f"for path in {paths_code(others)}:\n    model.set_submodule(path, {_LEAKS})")
    return "\n".join(fixes)


_LEAKS = "torch.nn.LeakyReLU(0.01)"


def saturated_units(case: Case) -> Iterator[Finding]:
    """Hidden layers most of whose units stay at a bound of tanh or a sigmoid."""
    case.need_rows(_EXAMPLES)
    ends = {step.name for value in case.flow.output.reads for step in [value.writer] if step is not None}
    stuck = [row for row in case.activations.calls if row.saturated is not None and row.saturated > _MOST]
    stuck = [row for row in stuck if not any(end == row.path or end.endswith(f" in {row.path}") for end in ends)]
    if stuck:
        yield Finding(
            "saturated-units",
            "Most of these units stay at a bound of their function, where its slope is all but 0.",
            _paths(stuck),
            "share of saturated units",
            max(row.saturated for row in stuck if row.saturated is not None),
            (0, _MOST),
            _centred(case, stuck),
            "possible" if all("igmoid" in row.layer.lower() for row in stuck) else "likely",  # a gate may be open
            "severe",
        )


def _centred(case: Case, stuck: list[Activation]) -> str:
    """A normalization in front of what saturates."""
    norms = {row.path: _norm(row.shape) for row in stuck if not row.layer.endswith("()")}
    return _in_front(case, norms) or "# put a normalization before the function, as nw.LayerNorm"


def exploding(case: Case) -> Iterator[Finding]:
    """Activations a thousand times as large as those of the first layer, and as 1."""
    rows = [row for row in case.activations.calls if row.output == 0 and math.isfinite(row.rms)]
    if not rows:
        return
    first = max(1.0, rows[0].rms, rows[0].input_rms or 0.0)
    large = [row for row in rows if row.rms > _EXPLODED * first]
    if large:
        worst = max(large, key=lambda row: row.rms)
        yield Finding(
            "exploding-activations",
            f"Activations grow from {number(rows[0].rms)} to {number(worst.rms)} in {worst.name}: nothing holds "
            "their scale, and gradients grow with them.",
            _paths(large),
            "largest root mean square, relative to the first layer's (1 at least)",
            worst.rms / first,
            (0, _EXPLODED),
            _normalized(case) or "# put a normalization in front of the layers that make them large, as nw.LayerNorm",
            "likely",
            "severe",
        )


def _normalized(case: Case) -> str:
    """A normalization in front of each layer with a weight that reads larger values than the model does."""
    modules = dict(case.model.named_modules())
    rows = [row for row in case.activations.calls if row.weighted and (row.input_rms or 0.0) > 2]
    return _in_front(case, {row.path: _reads(modules[row.path]) for row in rows if is_linear(modules.get(row.path))})


def _in_front(case: Case, norms: Mapping[str, str]) -> str:
    """Python that puts a normalization in front of each module, by path."""
    paths: dict[str, list[str]] = {}
    for path, norm in norms.items():
        paths.setdefault(norm, []).append(path)
    fix = "\n".join(
        f"for path in {paths_code(held)}:\n"
        f"    model.set_submodule(path, torch.nn.Sequential({norm}, model.get_submodule(path)))"
        for norm, held in paths.items()
    )
    return case.trained(fix) if fix else ""


def _reads(layer: Any) -> str:
    """A normalization of what a linear layer or a convolution reads."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return f"torch.nn.GroupNorm(1, {layer.in_channels})"
    return f"nw.LayerNorm({layer.in_features if isinstance(layer, nn.Linear) else layer.nx})"


def _norm(shape: tuple[int, ...]) -> str:
    """A normalization of activations of a shape."""
    return f"torch.nn.GroupNorm(1, {shape[1]})" if len(shape) == 4 else f"nw.LayerNorm({shape[-1]})"


def _paths(rows: list[Activation]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.path for row in rows))


# ----------------------------------------------------------------------------------------------------------- not finite


def non_finite(case: Case) -> Iterator[Finding]:
    """The first module that makes NaN or infinity."""
    found = first_nonfinite(case.model, list(case.batches), case.loss, mode="current", forward=case.forward)
    if found.found and not (found.phase == "buffer" and "running_" in found.path):  # that is a memory's finding
        yield Finding(
            "non-finite",
            f"{found.meaning[0].upper()}{found.meaning[1:]}.",
            (found.path,),
            "values that are not finite",
            found.values,
            (0, 0),
            _finite_again(case, found),
            "certain",
            "fatal",
        )


def _finite_again(case: Case, found: NonFinite) -> str:
    if found.phase in ("parameter", "buffer"):
        return f"model.get_{found.phase}({found.path!r}).data.nan_to_num_(0.0, 0.0, 0.0)  # or load an older checkpoint"
    if found.phase == "batch":
        return (
            "from normwise.batches import mapped\n"
            f"batches = [mapped(batch, torch.nan_to_num) for batch in {case.batches_code}]"
        )
    if "float16" in found.dtype and "bfloat16" not in found.dtype:
        return "model.float()  # or bfloat16, whose range is float32's"
    if _has_grown(found):
        return case.smaller_rate("or with a smaller start of the weights, if it is so at the start")
    place = "the loss" if found.phase == "loss" or not found.path else f"module {found.path}"
    operation = found.operation.removesuffix("Backward0").lower() or "it computes"
    return f"# in {place}: keep what {operation} reads where it is finite, as x.clamp_min(1e-6) for log, sqrt, division"


def _has_grown(found: NonFinite) -> bool:
    """Whether values have become too large for their dtype, by and by, rather than one operation left its domain."""
    return (found.largest_input or 0.0) > math.sqrt(torch.finfo(getattr(torch, found.dtype)).max)
