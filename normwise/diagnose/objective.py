"""The loss as a function of the parameters alone: the same batches, memory and random numbers in every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from normwise.batches import Forward, Loss, loss_of, rows_of
from normwise.errors import DiagnosisError
from normwise.untouched import Moment, untouched

Mode = Literal["train", "eval", "current"]  # "current": every module as it is, frozen ones in a model that trains
Batches = Iterable[Any]


class Objective:
    """The mean loss of some batches, weighted by their rows, as a function of a model's parameters.

    Every evaluation begins with the same buffers and random numbers, so that dropout drops the same units and a moving
    average is what it was; and without what an autocast around it has cached, which are casts of weights before a move.
    Vectors in the space of the parameters are flat tensors of `size` numbers, in float32, or float64 where a parameter
    is.

    It is to be used within `measuring`, which puts everything back.

    Attributes:
        parameters: The parameters it is a function of.
        size: How many numbers they have.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loss: Loss | None = None,
        forward: Forward | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        wanted = model.parameters() if parameters is None else parameters
        self.parameters = tuple(p for p in wanted if p.requires_grad)
        if not self.parameters:
            raise DiagnosisError("no parameter requires a gradient, so the loss is a function of nothing")
        if any(p.is_complex() for p in self.parameters):
            raise DiagnosisError("a parameter is complex: hold its real and imaginary parts (torch.view_as_real)")
        self._model, self._loss, self._forward = model, loss, forward
        rows = [rows_of(batch) for batch in batches]
        self._batches = [(batch, count / sum(rows)) for batch, count in zip(batches, rows, strict=True)]
        self._moment = Moment(model)
        self.size = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        double = any(p.dtype == torch.float64 for p in self.parameters)
        self.dtype = torch.float64 if double else torch.float32

    def losses(self) -> Iterator[tuple[Tensor, float]]:
        """The loss of each batch and its weight, one after another; a training that goes on sees nothing of it."""
        for batch, weight in self._batches:
            self._moment.back()
            torch.clear_autocast_cache()
            yield loss_of(self._model, batch, self._loss, self._forward), weight
        self._moment.back()

    def value(self) -> float:
        """The loss at the parameters as they are."""
        with torch.no_grad():
            return sum(loss.item() * weight for loss, weight in self.losses())

    def gradient(self) -> Tensor:
        """The gradient at the parameters as they are."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Both, at the parameters as they are."""
        total, gradient = 0.0, self.zeros()
        for loss, weight in self.losses():
            total += loss.item() * weight
            gradient += weight * self.flat(self._derivatives(loss, self.parameters))
        return total, gradient

    def hessian_times(self, vector: Tensor) -> Tensor:
        """Hessian-vector product by differentiating the gradient's product with the vector.

        Raises RuntimeError where an operation has no second derivative, if `require_second_derivatives` lets it pass.
        """
        product = self.zeros()
        for loss, weight in self.losses():
            first = self._derivatives(loss, self.parameters, create_graph=True)
            parts = self.parts(vector)
            along = sum((g * v).sum() for g, v in zip(first, parts, strict=True) if g is not None and g.requires_grad)
            if isinstance(along, Tensor):
                product += weight * self.flat(self._derivatives(along, self.parameters))
        return product

    def require_second_derivatives(self) -> None:
        """Raise RuntimeError where an operation is marked as differentiable once.

        Its gradients carry a node that raises when it is reached, but it leads to no parameter: differentiating with
        respect to the parameters leaves it out, and would be silently wrong.
        """
        for loss, _ in self.losses():
            first = self._derivatives(loss, self.parameters, create_graph=True)
            for node in _nodes(gradient.grad_fn for gradient in first if gradient is not None):
                if node.name() == "torch::autograd::Error":
                    node(self.zeros())

    def gradient_change(self, vector: Tensor, distance: float) -> Tensor:
        """Hessian-vector product by the central difference of two gradients at `distance` along the vector."""
        step = distance / float(vector.norm())
        with self.moved(step * vector):
            ahead = self.gradient()
        with self.moved(-step * vector):
            behind = self.gradient()
        return (ahead - behind) / (2 * step)

    @contextmanager
    def moved(self, vector: Tensor) -> Iterator[None]:
        """The parameters moved along a vector, and then exactly where they were."""
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for parameter, part in zip(self.parameters, self.parts(vector), strict=True):
                    parameter.add_(part)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    def distance(self) -> float:
        """The length of the parameters as a vector."""
        return float(self.flat(self.parameters).norm())

    def zeros(self) -> Tensor:
        """The vector 0."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flat(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """One tensor a parameter (None: zero) as a vector."""
        pairs = zip(tensors, self.parameters, strict=True)
        filled = (torch.zeros_like(p) if t is None else t.detach() for t, p in pairs)
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in filled])

    def parts(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor a parameter."""
        pieces = torch.split(vector, [p.numel() for p in self.parameters])
        return [v.view(p.shape).to(p.device, p.dtype) for v, p in zip(pieces, self.parameters, strict=True)]

    def _derivatives(
        self, value: Tensor, parameters: Sequence[nn.Parameter], *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        if not value.requires_grad:
            raise DiagnosisError("the loss has no gradient: it does not depend on the parameters, or was detached")
        return torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)


@contextmanager
def measuring(
    model: nn.Module, mode: Mode, *, values: bool = True, optimizer: Any = None, batches: Any = None
) -> Iterator[None]:
    """The model in a mode, with gradients; afterwards it is as it was, bit for bit, whatever happens within.

    Raises:
        DiagnosisError: what is given is no model; an unknown mode; sizes that are not known yet.
    """
    if not isinstance(model, nn.Module):
        raise DiagnosisError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if mode not in get_args(Mode):
        raise DiagnosisError(f"mode={mode!r}: it is 'train', 'eval' or 'current', which leaves every module in its own")
    waiting = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if waiting:
        raise DiagnosisError(f"{waiting[0]} has no size yet: run a batch through the model first")
    differentiable = torch.inference_mode(False), torch.enable_grad()
    with untouched(model, values=values, optimizer=optimizer, batches=batches), differentiable[0], differentiable[1]:
        if mode != "current":
            model.train(mode == "train")
        yield


def read(batches: Batches, most: int | None = None) -> list[Any]:
    """The batches, the first `most` of them; a tensor, a tuple or a mapping is one batch.

    So is a list of tensors that differ in dtype or in their number of dimensions, as torch's loaders give inputs and
    labels: the batches of one stream agree in both.

    A loader is read through a copy, so that an iterator that is at work on it goes on undisturbed, and one that stays
    for the next pass (`persistent_workers`) is not begun. `measuring` puts its generators back.

    Raises:
        DiagnosisError: there are none, or they could be read only once and would be lost.
    """
    if isinstance(batches, (Tensor, Mapping, tuple)) or _is_one_batch(batches):
        return [batches]
    if isinstance(batches, Iterator):
        kind = type(batches).__name__
        raise DiagnosisError(f"batches is a {kind}, whose batches would be lost: give a list, or the loader itself")
    if not isinstance(batches, Iterable):
        raise DiagnosisError(f"batches is a {type(batches).__name__}: give a batch, a list of batches or a loader")
    found = list(islice(iter(_apart(batches)), most))
    if not found:
        raise DiagnosisError("there are no batches to measure with")
    return found


def _is_one_batch(batches: Any) -> bool:
    """Whether a list has inputs and targets in it, and not batches."""
    if not isinstance(batches, list) or not all(isinstance(part, Tensor) for part in batches):
        return False
    return len({(part.dtype, part.ndim) for part in batches}) > 1


def _apart(batches: Iterable[Any]) -> Iterable[Any]:
    """What is no loader, or a copy of it without the persistent iterator that its owner may be in the middle of."""
    if isinstance(batches, DataLoader):
        batches = copy(batches)
        batches.__dict__["_iterator"] = None
    return batches


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """The nodes of an autograd graph, each once."""
    waiting, seen = [node for node in roots if node is not None], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
            yield node


def weight_norm(parameters: Iterable[Tensor]) -> float:
    """L2 norm of all weights: the parameters of two or more dimensions.

    >>> weight_norm([torch.full((2, 2), -3.0), torch.ones(7)])
    6.0
    """
    squares = [float(p.detach().double().square().sum()) for p in parameters if p.ndim >= 2]
    return float(sum(squares) ** 0.5)
