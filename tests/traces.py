"""A model with everything that a forward could leave a trace in, and all that has to be as before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normwise import BatchNorm
from tests.test_memory import bits


def network() -> nn.Sequential:
    """Memories of torch's and normwise's, dropout, a spectral norm, whose buffers move in training; a layer twice."""
    shared = BatchNorm(6)
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(4, 6), shared, nn.Dropout(), linear, nn.BatchNorm1d(6), shared)


def objects(model: nn.Module) -> list[tuple[str, int]]:
    """Which tensors the model's parameters, gradients and buffers are, in order."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(f"{name}.grad", p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return [(name, id(tensor)) for name, tensor in tensors]


def everything(model: nn.Module) -> dict[str, object]:
    """What has to be as before."""
    parameters = dict(model.named_parameters())
    return {
        "values": bits(model),
        "keys": list(model.state_dict()),
        "objects": objects(model),
        "modes": [(path, module.training) for path, module in model.named_modules()],
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        "counts": [
            (path, None if skips is None else (id(skips), skips.tolist()), module.__dict__.get("_fed"))
            for path, module in model.named_modules()
            for skips in [module.__dict__.get("_skips")]
        ],
    }


def step(model: nn.Module, width: int = 4) -> Tensor:
    """A forward and a backward; the output."""
    y = model(torch.randn(8, width) * 3 + 1)
    (y * torch.randn_like(y)).sum().backward()
    return y
