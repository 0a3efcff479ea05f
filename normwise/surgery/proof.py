"""Does the model still compute the same? Outputs before and after an operation, compared on probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from normwise.batches import Forward, feed, mapped, tensors_in
from normwise.errors import SurgeryError
from normwise.places import all_modules
from normwise.record import Check
from normwise.surgery.edits import Edits
from normwise.surgery.probes import Probe
from normwise.untouched import seed, untouched

_SEED = 0  # of the random numbers, for dropout in training mode
_SLACK = 8.0  # how much farther from float64 the result may be than the original, where rounding is amplified

Outputs = list[Tensor]


class Proof:
    """What a model computed before an operation, to be compared with what it computes afterwards.

    Both are run in the model's own mode and dtype, with the same random numbers, and leave no trace. A model in
    training mode is run in evaluation as well, with the memory that the training forward has left.

    On the meta device there is nothing to compare, and no probe.

    Args:
        operation: Its name, for the error.
        model: The model before.
        probes: What it is run on.
        forward: How a batch is given to it, where that is not usual.
        exact: Whether the result may round otherwise than the original: only the difference in float64 then counts.

    Raises:
        SurgeryError: what the model returns holds no finite numbers, so that nothing can be compared.
    """

    def __init__(
        self,
        operation: str,
        model: nn.Module,
        probes: Sequence[Probe],
        forward: Forward | None,
        *,
        exact: bool = False,
    ) -> None:
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        self._operation, self._forward, self._exact = operation, forward, exact
        self.probes = [] if on_meta else list(probes)
        self._model = model
        self._before = [outputs_of(model, probe, forward) for probe in self.probes]
        self._differentiable = bool(self.probes) and _is_differentiable(model, self.probes[0], forward)
        if self._before and not any(map(_is_telling, self._before[0])):
            raise SurgeryError(
                f"{operation}: what the model returns holds no finite numbers, so that nothing can be compared: give "
                "another batch, or forward=lambda model, batch: ... that returns tensors"
            )

    def check(self, model: nn.Module, edits: Edits, tolerance: float) -> tuple[Check, ...]:
        """Compare with what the model computes now.

        A difference above the tolerance is allowed only where it is rounding: in float64 the two then agree, and the
        original is off by as much itself. Half precision is allowed a few of its own steps.

        The first probe is run with gradients, because changes in place may be refused there.

        Raises:
            SurgeryError: the model computes something else; what was edited is undone.
        """
        checks = []
        for probe, before in zip(self.probes, self._before, strict=True):
            try:
                after = outputs_of(
                    model, probe, self._forward, gradients=self._differentiable and probe is self.probes[0]
                )
            except Exception as error:
                edits.undo()
                raise SurgeryError(
                    f"{self._operation}: the model then fails on {probe.name}: {error}; everything is as it was"
                ) from error
            allowed = max([tolerance, *(4 * _eps(tensor) for tensor in before)])
            check = Check(probe.name, distance(before, after), allowed)
            if not check.difference <= allowed:
                check = self._arbitrated(check, model, probe, (before, after), edits)
            checks.append(check)
        return tuple(checks)

    def _arbitrated(
        self, check: Check, model: nn.Module, probe: Probe, outputs: Sequence[Outputs], edits: Edits
    ) -> Check:
        """Tell rounding, which a deep network in training mode amplifies without bounds, from another function."""
        before, after = outputs
        try:
            exact_after = self._in_double(model, probe)
            edits.undo()
            exact = self._in_double(self._model, probe)
        except Exception as error:  # something in the model has a dtype of its own: there is no arbiter
            raise self._refusal(check, edits) from error
        in_double, *errors = (distance(exact, other) for other in (exact_after, before, after))
        check = replace(check, in_double=in_double, error_before=errors[0], error_after=errors[1])
        rounds_alike = self._exact or errors[1] <= max(check.tolerance, _SLACK * errors[0])
        if not (in_double <= check.tolerance and rounds_alike):
            raise self._refusal(check, edits)
        edits.redo()
        return check

    def _in_double(self, model: nn.Module, probe: Probe) -> Outputs:
        with in_double(model):
            return outputs_of(model, Probe(probe.name, mapped(probe.batch, _doubled)), self._forward)

    def _refusal(self, check: Check, edits: Edits) -> SurgeryError:
        edits.undo()
        return SurgeryError(
            f"{self._operation}: the model then computes something else, by {check.difference:.1e} on {check.probe} "
            f"(allowed: {check.tolerance:.0e}); everything is as it was"
        )


def _is_differentiable(model: nn.Module, probe: Probe, forward: Forward | None) -> bool:
    """Whether it runs with gradients as well: one that gives NumPy arrays does not."""
    try:
        outputs_of(model, probe, forward, gradients=True)
    except Exception:  # noqa: BLE001 - a model may refuse with any error
        return False
    return True


def _is_telling(x: Tensor) -> bool:
    return (x.is_floating_point() or x.is_complex()) and bool(x.isfinite().any())


def _eps(x: Tensor) -> float:
    """The step of a half-precision number next to 1; others keep the tolerance that is asked for."""
    return torch.finfo(x.dtype).eps if x.dtype in (torch.float16, torch.bfloat16) else 0.0


def outputs_of(model: nn.Module, probe: Probe, forward: Forward | None = None, *, gradients: bool = False) -> Outputs:
    """What comes out; in training mode also in evaluation afterwards, with the memory that the forward has left."""
    with untouched(model), torch.set_grad_enabled(gradients):
        seed(_SEED)
        outputs = [tensor.detach().clone() for tensor in tensors_in(feed(model, probe.batch, forward))]
        if model.training:
            outputs += [tensor.detach() for tensor in tensors_in(feed(model.eval(), probe.batch, forward))]
        return outputs


def distance(a: Outputs, b: Outputs) -> float:
    """The largest difference of two lists of outputs, each relative to its largest value where that is above 1.

    >>> distance([torch.tensor([1.0, 100.0])], [torch.tensor([1.0, 101.0])])
    0.01
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max((_distance(_widest(x), _widest(y)) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _widest(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.is_meta or b.is_meta:  # shapes are all there is
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    largest = torch.where(a.isfinite(), a, torch.zeros_like(a)).abs().max().clamp_min(1.0)
    difference = float((torch.where(same, torch.zeros_like(a), a - b).abs() / largest).max())
    return float("inf") if difference != difference else difference


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Within this context the model's floating-point parameters and buffers are in float64."""
    held = (t for m in all_modules(model) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    tensors = list({id(tensor): tensor for tensor in held if tensor.is_floating_point()}.values())
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
