"""Fold normalizations into the linear layers around them, by data flow, exactly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from normwise.batches import Forward, feed
from normwise.errors import SurgeryError
from normwise.norm import Norm
from normwise.places import all_modules
from normwise.record import Line, Record, shown
from normwise.surgery.absorb import is_linear
from normwise.surgery.centre import centre
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import leave_fast_path, named_parameters, opened, sites, with_stale_parameters
from normwise.surgery.flow import trace
from normwise.surgery.folding import Fold, Subject, gain_into_after, into_after, into_before, set_weights, useless_bias
from normwise.surgery.kinds import kind_of
from normwise.surgery.probes import Probe, probes_for
from normwise.surgery.proof import Proof
from normwise.untouched import untouched

_TOLERANCE = 1e-4
Rule = Callable[[Subject], Fold | str]
STEPS = ("statistics", "gain", "bias", "center")


def fold(
    model: nn.Module,
    batch: Any = None,
    *,
    steps: Iterable[str] = STEPS,
    forward: Forward | None = None,
    copy: bool = False,
    tolerance: float = _TOLERANCE,
) -> Record:
    """Fold normalizations into the linear layers and convolutions around them; the model computes the same.

    ============  =====================================================================================================
    step          what is folded
    ============  =====================================================================================================
    "statistics"  a normalization with remembered statistics, in evaluation, vanishes into the layer before it, or into
                  those after it where that is exact (no padding with zeros): W' = W * gain / sqrt(var + eps)
    "gain"        the gain and bias of any other normalization go into the linear layers that read it; its own become 1
                  and 0
    "bias"        a bias before a normalization that takes each channel's mean out again is removed
    "center"      where everything that is added up before a LayerNorm can be centred by its weights, the LayerNorm
                  becomes an RMS norm
    ============  =====================================================================================================

    What reads what is seen in a forward. What is not exact is left, and the record says why: a convolution that is
    called elsewhere too, one with hooks, tied weights, a normalization over another axis, one that is read by more. The
    activation of a layer that vanishes stays in its place, and nothing is folded through one.

    Which layers it then has does not depend on the values of its weights: folded weights fit into any model of the same
    kind that was folded likewise.

    Args:
        model: A model; in training mode nothing that depends on the mode is folded.
        batch: What to run it on: a tensor, a mapping of keywords, or a tuple that begins with the input. Without one an
            input is looked for.
        steps: Which of them.
        forward: `forward(model, batch)`, for models that are called otherwise.
        copy: Operate on a copy.
        tolerance: The largest difference allowed, relative to outputs above 1.

    Raises:
        SurgeryError: no input is known; or the model computes something else then, and is as it was.

    Sources: folding BatchNorm into convolutions: Jacob et al., arXiv:1712.05877; LayerNorm to RMSNorm: Ashkboos et al.
    (SliceGPT), arXiv:2401.15024.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> record = nw.fold(model)
    >>> record, model[1]
    (Record('fold', 1 changed, 0 left), Identity())
    """
    wanted = _checked(steps)
    model = opened(model, copy=copy)
    probes = probes_for(model, batch, forward)
    proof = Proof("fold", model, probes, forward)
    if not proof.probes:
        raise SurgeryError("fold: on the meta device there are no weights to fold")
    parameters = named_parameters(model)
    with Edits() as edits:
        changed, left = _fold_all(model, probes[0], forward, wanted, edits)
        leave_fast_path(model, edits)
        checks = proof.check(model, edits, tolerance) if changed else ()
        record = Record("fold", model, tuple(changed), tuple(left), checks, inverse=edits.undo)
        record = with_stale_parameters(record, parameters)
        if model.training and any(_waits_for_evaluation(layer) for layer in all_modules(model)):
            record.notes += ("the model is in training mode: after model.eval() more can be folded",)
        if changed and not model.training:
            record.notes += ("folded in evaluation: in training it is another model now",)
        return record


def _checked(steps: Iterable[str]) -> frozenset[str]:
    wanted = frozenset([steps] if isinstance(steps, str) else steps)
    for step in wanted - frozenset(STEPS):
        raise SurgeryError(f"fold knows the steps {', '.join(STEPS)}, not {step!r}")
    return wanted


def _fold_all(
    model: nn.Module, probe: Probe, forward: Forward | None, wanted: frozenset[str], edits: Edits
) -> tuple[list[Line], list[Line]]:
    """Fold until nothing more can be; each round sees the model as the one before has left it."""
    changed: list[Line] = []
    done: set[tuple[nn.Module, Rule]] = set()  # each rule once: one may take away what another has added
    while True:
        try:
            subjects, left = _look(model, probe, forward)
        except Exception as error:
            if not changed:
                raise
            raise SurgeryError(
                f"fold: the model then fails on {probe.name}: {error}; everything is as it was"
            ) from error
        lines: list[Line] = []
        for subject in subjects:
            fold = _first(subject, wanted, done)
            if isinstance(fold, Fold):
                lines.append(_carry_out(fold, subject, edits))
            else:
                left.append(Line(subject.site.path, shown(subject.layer), None, fold))
        if not lines and "center" in wanted:
            lines, reasons = centre(subjects, edits)
            left = [replace(line, why="; ".join(filter(None, (line.why, reasons.get(line.path))))) for line in left]
        changed += lines
        if not lines:
            paths = {line.path for line in changed}
            return changed, [line for line in left if line.path not in paths]


def _look(model: nn.Module, probe: Probe, forward: Forward | None) -> tuple[list[Subject], list[Line]]:
    """The normalizations in a forward, and those of which nothing is known."""
    kinds = [(site, kind) for site in sites(model) if (kind := kind_of(site.module)) is not None]
    wholes = [site.module for site, _ in kinds] + [module for module in all_modules(model) if is_linear(module)]
    with untouched(model):
        flow = trace(model, lambda: feed(model, probe.batch, forward), wholes)
    subjects, unknown = [], []
    for site, kind in kinds:
        if isinstance(kind.converted, Norm) and kind.spec is not None:
            subjects.append(Subject(site, kind.converted, flow))
        else:
            reason = kind.reason or "it has no declaration"
            unknown.append(Line(site.path, shown(site.module), None, reason))
    return subjects, unknown


def _first(subject: Subject, wanted: frozenset[str], done: set[tuple[nn.Module, Rule]]) -> Fold | str:
    """The first rule that applies, or why none does."""
    if subject.obstacle is not None:
        return subject.obstacle
    reasons = []
    for step, rule in _RULES:
        if step in wanted and (subject.layer, rule) not in done:
            result = rule(subject)
            if isinstance(result, Fold):
                done.add((subject.layer, rule))
                return result
            reasons.append(result)
    return "; ".join(dict.fromkeys(filter(None, reasons))) or "it has nothing to fold"


_RULES: tuple[tuple[str, Rule], ...] = (
    ("statistics", into_before),
    ("statistics", into_after),
    ("gain", gain_into_after),
    ("bias", useless_bias),
)


def _carry_out(fold: Fold, subject: Subject, edits: Edits) -> Line:
    before = shown(subject.layer)
    for layer, weights in fold.weights.items():
        set_weights(layer, weights, subject.layer, edits)
    for name, values in fold.own.items():
        edits.set_values(getattr(subject.layer, name), values)
    if fold.new is None:
        return Line(subject.site.path, before, before, fold.why)
    for place in subject.site.places:
        edits.exchange(place, fold.new)
    return Line(subject.site.path, before, shown(fold.new), fold.why)


def _waits_for_evaluation(layer: nn.Module) -> bool:
    """Whether it remembers statistics, and would use them in evaluation."""
    return (
        layer.training and isinstance(layer._buffers.get("running_var"), Tensor) and not getattr(layer, "frozen", False)
    )
