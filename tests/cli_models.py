"""Models and batches that the tests of the command line name as `cli_models:...`.

No two calls of a factory give the same weights, so that a test sees where weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from architectures import disturb
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS = (3, 5, 8)  # of the batches


def conv() -> nn.Module:
    """Images of 3 channels to 4 classes."""
    print("made by the factory")  # noqa: T201 - as users' code does
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def half() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).to(torch.bfloat16)


class Tied(nn.Module):
    """Tokens to logits, by one matrix; only for sequences of 12, which nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.places = nn.Parameter(torch.randn(12, 6))
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.embed(ids) + self.places)))

    @classmethod
    def small(cls) -> Tied:
        """A factory that is an attribute of an attribute."""
        return cls()


class Placed(nn.Module):
    """Images of 10 x 10, and no others, which nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.places = nn.Parameter(torch.randn(8, 8))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)) + self.places


def biased() -> nn.Module:
    """A LayerNorm that keeps its bias, behind what can be folded."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.LayerNorm(8))


class Demanding(nn.Sequential):
    """Refuses to run without its weights."""

    def forward(self, x: Tensor) -> Tensor:
        if not self[0].weight.isfinite().all():
            raise RuntimeError("no weights")
        return super().forward(x)


def demanding() -> nn.Module:
    """The same, without its weights."""
    model = Demanding(*biased())
    nn.init.constant_(model[0].weight, float("nan"))
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU())


def alone() -> nn.Module:
    return nn.BatchNorm1d(4)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8))


def needy(width: int, depth: int = 2, *, norm: object) -> nn.Module:
    raise AssertionError


def broken() -> nn.Module:
    raise RuntimeError("out of luck")


def nothing() -> None:
    pass


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


instance = nn.Linear(2, 2)


# ------------------------------------------------------------------------------------------------------------- batches


def examples() -> list[tuple[Tensor, Tensor]]:
    """The same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, 3, 8, 8, generator=generator) + rows, torch.randint(4, (rows,), generator=generator))
        for rows in ROWS
    ]


def stream() -> Iterator[tuple[Tensor, Tensor]]:
    """The same, readable once."""
    print("made by the data")  # noqa: T201
    yield from examples()


def failing() -> Iterator[tuple[Tensor, Tensor]]:
    yield examples()[0]
    raise OSError("the disk is gone")


def ids() -> Tensor:
    return torch.randint(20, (2, 12))


def keywords() -> list[dict[str, Tensor]]:
    return [{"ids": ids()}]


def pictures() -> Tensor:
    return torch.randn(2, 3, 10, 10)


def named_pictures() -> list[dict[str, Tensor]]:
    return [{"images": pictures()}]


def number() -> int:
    return 3


def empty() -> list[Tensor]:
    return []


def wrong() -> list[Tensor]:
    return [torch.randn(2, 5, 8, 8)]


# --------------------------------------------------------------------------------------- around a call of the command


def written(make: Callable[[], nn.Module], name: str = "in.safetensors") -> nn.Module:
    """A model with weights as after some training, in evaluation, which are in a file."""
    with redirect_stdout(None):
        model = make().eval()
    disturb(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(state, name)
    else:
        torch.save({"epoch": 3, "model": state}, name)
    return model


def lines_to_load(printed: str) -> list[str]:
    head, colon, lines = printed.partition("to load it:\n")
    assert colon, head
    return [line.removeprefix("  ") for line in lines.splitlines()]


def loaded(printed: str) -> nn.Module:
    """The model that the printed lines of Python make."""
    names: dict[str, Any] = {}
    with redirect_stdout(None):
        exec("\n".join(lines_to_load(printed)), names)
    return names["model"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
