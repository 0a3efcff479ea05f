"""Models with something the doctor has a word for, and models that almost have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.diagnose.findings import Diagnosis

cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss


@dataclass
class Patient:
    """What `nw.doctor` is given."""

    model: nn.Module
    batches: Any
    loss: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    kept: Any = None  # what has to stay open

    def diagnosis(self) -> Diagnosis:
        return nw.doctor(self.model, self.batches, self.loss, **self.options)

    def treated(self, fix: str) -> Patient:
        """The patient after a fix."""
        names = {"model": self.model, "batches": self.batches, "loss": self.loss, "nw": nw, "torch": torch}
        names |= self.options
        exec(fix, names)
        options = {name: names[name] for name in self.options}
        return Patient(names["model"], names["batches"], self.loss, options, names)


def run(model: nn.Module, batches: Any, times: int = 1) -> nn.Module:
    """Let the memories see batches."""
    model.train()
    with torch.no_grad():
        for _ in range(times):
            for batch in batches:
                model(batch)
    return model


def rows(count: int, width: int = 8, batches: int = 4, mean: float = 0.0, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(count, width) * scale + mean for _ in range(batches)]


def labelled(count: int, width: int = 8, batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randint(3, (count,))) for x in rows(count, width, batches)]


def mlp(*middle: nn.Module, bias: bool = False) -> nn.Sequential:
    """8 inputs to 3 classes by 32 units."""
    return nn.Sequential(nn.Linear(8, 32, bias=bias), *middle, nn.Linear(32, 3))


def batch_mlp() -> nn.Sequential:
    return mlp(nn.BatchNorm1d(32), nn.ReLU())


# ------------------------------------------------------------------------------------------------------------ samples


def small_batches(count: int) -> Patient:
    return Patient(batch_mlp(), rows(count))


def small_groups(groups: int) -> Patient:
    return Patient(mlp(nn.GroupNorm(groups, 32), nn.ReLU()), rows(32))


def loader(count: int, *, drop_last: bool = False) -> Patient:
    data = TensorDataset(torch.randn(count, 8))
    return Patient(batch_mlp(), DataLoader(data, 16, drop_last=drop_last))


def images() -> Patient:
    """One example, and many samples a statistic."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    return Patient(model, DataLoader(TensorDataset(torch.randn(33, 3, 8, 8)), 16))


def accumulated() -> Patient:
    return Patient(batch_mlp(), rows(16), options={"accumulation": 4})


def joined() -> Patient:
    """The same within `nw.accumulate`, which stays open."""
    patient = accumulated()
    nw.adopt(patient.model)
    patient.kept = ExitStack()
    patient.kept.enter_context(nw.accumulate(patient.model, 4))
    return patient


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 32, bias=False), batch_mlp()[1:]

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.first(x), use_reentrant=False)


class Twice(nn.Module):
    """One layer, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.linear(self.norm(self.linear(x)))))


# ------------------------------------------------------------------------------------------------------------- memory


def seen(times: int) -> Patient:
    """A memory that has seen so many batches, of a mean far from 0."""
    given = rows(32, mean=3.0)
    return Patient(run(mlp(nn.BatchNorm1d(32), nn.ReLU()), given[:1], times), given)


def forgotten() -> Patient:
    """One of two memories was never updated."""
    model, given = two_memories(), rows(32)
    run(model, given, 20)
    model[4].reset_running_stats()
    return Patient(model, given)


def new() -> Patient:
    """Nothing was ever trained."""
    return Patient(two_memories(), rows(32))


def two_memories() -> nn.Sequential:
    return mlp(nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())


def remembering(value: float) -> Patient:
    """A number among the remembered variances."""
    patient = seen(60)
    patient.model[1].running_var[3] = value
    return patient


def elsewhere(distance: float) -> Patient:
    """Batches so many standard deviations from those that were trained on."""
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    run(model, rows(64), 25)
    return Patient(model, rows(64, mean=distance))


def domains(distance: float) -> Patient:
    """Batches of two kinds in turn."""
    given = [x + (distance if at % 2 else -distance) for at, x in enumerate(rows(32, batches=8))]
    return Patient(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), given)


def chain(count: int, depth: int = 20) -> Patient:
    """A chain of batch normalizations that are used to batches of so many rows."""
    blocks = [block for _ in range(depth) for block in (nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32))]
    model = nn.Sequential(*blocks)
    return Patient(run(model, rows(count, 32, batches=100)), rows(count, 32, batches=8))


# ---------------------------------------------------------------------------------------------------------- structure


def bias_then(*middle: nn.Module) -> Patient:
    return Patient(mlp(*middle, bias=True), rows(32))


class Block(nn.Module):
    """x + f(x), normalized before, after, or not at all."""

    def __init__(self, order: str, width: int = 16) -> None:
        super().__init__()
        self.order = order
        self.norm = nn.LayerNorm(width) if order != "none" else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x) if self.order == "pre" else x
        y = x + self.down(torch.relu(self.up(inner)))
        return self.norm(y) if self.order == "post" else y


def residual(orders: list[str], *, last: bool = False, **options: Any) -> Patient:
    ends = [nn.LayerNorm(16), nn.Linear(16, 3)] if last else [nn.Linear(16, 3)]
    model = nn.Sequential(nn.Linear(8, 16), *map(Block, orders), *ends)
    return Patient(model, labelled(32), cross_entropy, options)


def started(depth: int, *, scheduled: bool = False) -> Patient:
    """A post-norm network and its optimizer."""
    patient = residual(["post"] * (depth + 1))
    optimizer = torch.optim.AdamW(nw.param_groups(patient.model, weight_decay=0.01), lr=1e-3)
    if scheduled:
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=100)
    patient.options["optimizer"] = optimizer
    return patient


# ----------------------------------------------------------------------------------------------------------- settings


def parameters_only() -> Patient:
    model = batch_mlp().train()
    model[1].requires_grad_(False)
    return Patient(model, rows(32))


def frozen() -> Patient:
    model = batch_mlp().train()
    nw.adopt(model)
    nw.freeze(model)
    return Patient(model, rows(32))


def mode_only(*, parameters: bool) -> Patient:
    """In evaluation mode within a model in training mode, and perhaps its parameters frozen too."""
    model = batch_mlp().train()
    model[1].eval().requires_grad_(parameters)
    return Patient(model, rows(32))


def decaying(*, grouped: bool) -> Patient:
    model = batch_mlp()
    parameters = nw.param_groups(model, weight_decay=0.01) if grouped else model.parameters()
    options: dict[str, Any] = {} if grouped else {"weight_decay": 0.01}
    return Patient(model, rows(32), options={"optimizer": torch.optim.AdamW(parameters, 1e-3, (0.8, 0.9), **options)})


def holding(*layers: int) -> Patient:
    """An optimizer of some layers; without any, of another model."""
    model = batch_mlp()
    held = [p for at in layers for p in model[at].parameters()]
    return Patient(model, rows(32), options={"optimizer": torch.optim.SGD(held or batch_mlp().parameters(), 0.1)})


def parabola(lr: float, **options: Any) -> Patient:
    """A Hessian of which the largest eigenvalue is 9."""
    model = nn.Linear(2, 1, bias=False)
    batch = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    if options:
        return Patient(model, [batch], mse, {"optimizer": torch.optim.SGD(model.parameters(), lr, **options)})
    return Patient(model, [batch], mse, {"lr": lr})


# ------------------------------------------------------------------------------------------------------------- values


def gains(small: int, value: float = 1e-6) -> Patient:
    """So many of 32 gains have a small value."""
    patient = Patient(mlp(nn.LayerNorm(32), nn.ReLU()), rows(32))
    patient.model[1].weight.data[:small] = value
    return patient


class AnyWidth(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1, keepdim=True))


def columns(spread: float) -> Patient:
    """Three of eight columns vary so little."""
    given = labelled(32)
    for x, _ in given:
        x[:, [0, 3, 7]] = 5 + spread * torch.randn(32, 3)
    return Patient(AnyWidth(), given, cross_entropy)


def tiny(scale: float, norm: nn.Module | None = None) -> Patient:
    """Inputs of so small a scale before a normalization with eps 1e-5."""
    return Patient(nn.Sequential(norm or nn.LayerNorm(8), nn.Linear(8, 3)), rows(32, scale=scale))


def shut(dead: int) -> Patient:
    """So many of 32 units never fire."""
    model = mlp(nn.ReLU(), bias=True)
    model[0].bias.data[:dead] = -100.0
    return Patient(model, rows(32))


def shut_norm(dead: int) -> Patient:
    """The same of a normalization that applies the function itself."""
    model = mlp(nw.BatchNorm(32, activation="relu"))
    model[1].bias.data[:dead] = -100.0
    return Patient(model, rows(32))


def wide(scale: float, *, at_the_end: bool = False) -> Patient:
    """A tanh of values so large."""
    model = mlp(nn.Tanh())
    model = nn.Sequential(model[0], nn.Tanh()) if at_the_end else model
    model[0].weight.data.normal_(std=scale)
    return Patient(model, rows(32))


class Adding(nn.Module):
    """x + f(x), with the start that a network without normalization is given for its branches alone."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(64, 64), nn.Linear(64, 64)
        for linear in (self.up, self.down):
            nn.init.kaiming_normal_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def deep(norm: Callable[[], nn.Module]) -> Patient:
    """20 residual blocks."""
    return Patient(nn.Sequential(*(Adding(norm()) for _ in range(20))), rows(64, 64))


def spoilt(value: float) -> Patient:
    """A value among the weights."""
    patient = Patient(batch_mlp(), labelled(32), cross_entropy)
    patient.model[0].weight.data[0, 0] = value
    return patient


class Half(nn.Module):
    """Computes in its own dtype."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(8, 8), scale
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.to(self.first.weight.dtype) * self.scale) * self.scale
