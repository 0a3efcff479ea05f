"""One network in training: batches from the seed, loss, optimizer, schedule, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from normwise.errors import StudyError
from normwise.tuning.control import Freezer
from normwise.tuning.data import Split
from normwise.tuning.records import Settings
from normwise.tuning.user import resolve

Loss = Callable[[Tensor, Tensor], Tensor]

WEIGHT_DECAY = {"sgd": 0.0, "momentum": 0.0, "adamw": 0.01}  # torch's defaults
_EVALUATION_BATCH = 1024


class Training:
    """A model on its way: `step()` takes one optimization step and returns the loss before it.

    The order of the data depends on `seed` alone: each epoch is a new permutation, of which full batches are taken and
    the rest is left out; data smaller than one batch are one batch. `freezer` freezes part of the model after the first
    forward.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        settings: Settings,
        loss: Loss,
        *,
        lr: float,
        seed: int,
        steps: int,
        freezer: Freezer | None = None,
    ) -> None:
        self.model = model.train()
        self._freezer = freezer
        self._settings, self._loss, self._lr, self._steps = settings, loss, lr, steps
        self._batches = batches(data, settings.batch_size, seed)
        self._next: tuple[Tensor, Tensor] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._schedule: LRScheduler | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; of a model with lazy layers after the first step only."""
        return self._optimizer or self._prepare()

    def peek(self) -> tuple[Tensor, Tensor]:
        """The batch of the next step."""
        if self._next is None:
            self._next = next(self._batches)
        return self._next

    def step(self) -> float:
        """Forward, backward, update; the training loss of this batch."""
        (inputs, targets), self._next = self.peek(), None
        loss = self._loss(self.model(inputs), targets)
        optimizer = self.optimizer
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        return float(loss.item())

    def finite(self) -> bool:
        """Whether every parameter is finite. If one is not, no later step can mend it."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _prepare(self) -> torch.optim.Optimizer:
        """The optimizer, made after the first forward, which gives lazy layers their parameters."""
        if self._freezer is not None:
            self._freezer.freeze()
        self._optimizer = make_optimizer(self._settings.optimizer, self.model, self._lr, self._settings.weight_decay)
        if self._settings.schedule == "cosine":
            self._schedule = CosineAnnealingLR(self._optimizer, self._steps)
        return self._optimizer


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float | None = None) -> torch.optim.Optimizer:
    """SGD, SGD with momentum 0.9, or AdamW, with torch's defaults, for all parameters that are not frozen.

    AdamW's weight decay is decoupled from the gradient, SGD's is added to it (an L2 penalty); both spare nothing.

    >>> make_optimizer("momentum", nn.Linear(1, 1), 0.5).defaults["momentum"]
    0.9
    >>> make_optimizer("adamw", nn.Linear(1, 1), 0.5, 0.1).defaults["weight_decay"]
    0.1
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = WEIGHT_DECAY[name] if weight_decay is None else weight_decay
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr, momentum=0.9 if name == "momentum" else 0.0, weight_decay=decay)


def batches(data: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in an order that `seed` decides."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(data))
    while True:
        order = torch.randperm(len(data), generator=generator).to(data.inputs.device)
        for start in range(0, len(data) - size + 1, size):
            rows = order[start : start + size]
            yield data.inputs[rows], data.targets[rows]


def weight_norm(model: nn.Module) -> float:
    """L2 norm of all parameters of two or more dimensions.

    >>> weight_norm(nn.Bilinear(1, 1, 1, bias=False).requires_grad_(False).apply(lambda m: m.weight.fill_(-3.0)))
    3.0
    """
    sized = (p for p in model.parameters() if not is_lazy(p))
    squares = [float(p.detach().double().square().sum()) for p in sized if p.ndim >= 2]
    return math.sqrt(sum(squares))


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs in evaluation mode; the mode is put back afterwards."""
    mode = model.training
    model.eval()
    outputs = torch.cat([model(chunk) for chunk in torch.split(inputs, _EVALUATION_BATCH)])
    model.train(mode)
    return outputs


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent; the classes are on axis 1.

    >>> accuracy(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    50.0
    """
    return 100 * (outputs.argmax(dim=1) == labels).double().mean().item()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error; shapes must be equal, because broadcasting (n,) against (n, 1) compares everything with all.

    >>> squared_error(torch.zeros(2, 1), torch.ones(2, 1))
    tensor(1.)
    """
    if outputs.shape != targets.shape:
        raise StudyError(f"mse: the model's outputs are {tuple(outputs.shape)}, the targets {tuple(targets.shape)}")
    return F.mse_loss(outputs, targets)


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": squared_error}


def find_loss(loss: str | Loss) -> Loss:
    """The loss of a name, of `module:function`, or the function itself; called as `loss(outputs, targets)`."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES and ":" not in loss:
        raise StudyError(f"no loss named {loss!r}; there are {', '.join(LOSSES)}, or module:function for your own")
    return LOSSES[loss] if loss in LOSSES else resolve(loss, "loss")
