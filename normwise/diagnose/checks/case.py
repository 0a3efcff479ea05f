"""The facts that the doctor's checks share: each is found out once, when the first check asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss, feed, loss_of, rows_of
from normwise.diagnose.activations import Activations, activations
from normwise.diagnose.checks.columns import Columns, watched
from normwise.norm import Norm
from normwise.spec import NormSpec
from normwise.surgery.exchange import Site, sites
from normwise.surgery.flow import Flow, trace
from normwise.surgery.kinds import kind_of
from normwise.untouched import Moment

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
ENOUGH_ROWS = 128  # to tell a unit that never fires from one that does for a few in a hundred examples


class Unchecked(Exception):  # noqa: N818 - it is no error, but an answer
    """A check cannot be made, and the text says why."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A normalization of the model whose meaning is known.

    Attributes:
        site: Where it stands.
        kind: "batch", "instance", "group", "layer", "rms", "l2".
        converted: The layer in normwise's words.
    """

    site: Site
    kind: str
    converted: Norm

    @property
    def path(self) -> str:
        """Its first path."""
        return self.site.path

    @property
    def module(self) -> Any:
        """The module, whose attributes depend on its library."""
        return self.site.module

    @property
    def spec(self) -> NormSpec:
        """Its declaration."""
        return self.converted.spec

    @property
    def frozen(self) -> bool:
        """Whether nothing in it moves, whatever the mode."""
        return bool(getattr(self.module, "frozen", False))

    @property
    def measures(self) -> bool:
        """Whether it normalizes by the batch, in the mode that it is in."""
        memory = self.spec.memory
        return memory is None or (self.module.training and memory.updates and not self.frozen)

    @property
    def rate(self) -> float | None:
        """The weight of a new batch in its moving average; None: it is no moving average."""
        return getattr(self.spec.memory, "update_rate", None)

    @property
    def mean(self) -> Tensor | None:
        """The remembered mean, flat, in float64."""
        return _flat(self.module._buffers.get("running_mean"))

    @property
    def var(self) -> Tensor | None:
        """The remembered variance, flat, in float64."""
        return _flat(self.module._buffers.get("running_var"))

    @property
    def updates(self) -> int | None:
        """How many batches have entered the memory; None: nobody counts them."""
        count = self.module._buffers.get("num_batches_tracked")
        return None if count is None or count.is_meta or count.numel() == 0 else int(count.max())

    @property
    def starts(self) -> bool:
        """Whether the memory is as a new layer has it: mean 0 and variance 1 everywhere."""
        mean, var = self.mean, self.var
        return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())


class Case:
    """A model in training mode, and all that is known of its training.

    Attributes:
        modes: The mode of each module before it was put in training mode.
        given: The batches as the user gave them.
        batches: Those that are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Any,
        batches: list[Any],
        modes: Mapping[nn.Module, bool],
        loss: Loss | None = None,
        forward: Forward | None = None,
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        accumulation: int = 1,
    ) -> None:
        self.model, self.given, self.batches, self.modes = model, given, batches, modes
        self.loss, self.forward, self.optimizer, self.lr = loss, forward, optimizer, lr
        self.accumulation = accumulation
        self._moment = Moment(model)

    def start(self) -> None:
        """Put memories, modes and random numbers back to where every check begins."""
        self._moment.back()

    def run(self, batch: Any) -> Any:
        """The model's output."""
        return feed(self.model, batch, self.forward)

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            DiagnosisError: there is none.
        """
        return loss_of(self.model, batch, self.loss, self.forward)

    def need_rows(self, least: int) -> None:
        """Say that there are too few examples.

        Raises:
            Unchecked: there are fewer.
        """
        if self.rows < least:
            raise Unchecked(f"{self.rows} examples are too few: give batches with {least} or more")

    @property
    def rows(self) -> int:
        """The examples of all batches."""
        return sum(map(rows_of, self.batches))

    @property
    def batches_code(self) -> str:
        """The batches in Python, as something to iterate over."""
        return "[batches]" if isinstance(self.given, (Tensor, Mapping, tuple)) else "batches"

    @property
    def batch_code(self) -> str:
        """The first of them in Python."""
        return "batches" if isinstance(self.given, (Tensor, Mapping, tuple)) else "next(iter(batches))"

    @property
    def forward_code(self) -> str:
        """The argument that says how the model is called, where it has to be said."""
        return "" if self.forward is None else ", forward=forward"

    @cached_property
    def layers(self) -> list[Layer]:
        """The normalizations whose meaning is known."""
        kinds = ((site, kind_of(site.module)) for site in sites(self.model))
        return [
            Layer(site, kind.name, kind.converted)
            for site, kind in kinds
            if kind is not None and kind.spec is not None and isinstance(kind.converted, Norm)
        ]

    @property
    def batch_norms(self) -> list[Layer]:
        """Those that normalize over the batch."""
        return [layer for layer in self.layers if layer.kind == "batch"]

    @property
    def remembering(self) -> list[Layer]:
        """The batch normalizations with a memory of means and variances."""
        return [layer for layer in self.batch_norms if layer.mean is not None and layer.var is not None]

    @cached_property
    def flow(self) -> Flow:
        """What reads what in a forward in training mode; in evaluation, where training mode refuses the batch."""
        dropouts = [site.module for site in sites(self.model) if isinstance(site.module, DROPOUTS)]
        wholes = [*(layer.module for layer in self.layers), *dropouts]
        self.start()
        try:
            return self._traced(wholes)
        except (ValueError, RuntimeError):
            self.start()
            self.model.eval()
            return self._traced(wholes)
        finally:
            self.start()

    def _traced(self, wholes: Iterable[nn.Module]) -> Flow:
        return trace(self.model, lambda: self.run(self.batches[0]), wholes)

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """The statistics of what each normalization reads, by path, in training mode."""
        return self.columns_in(self.model.modules())

    @cached_property
    def samples(self) -> dict[str, Columns]:
        """The same, or those of evaluation mode, where training mode refuses the batch."""
        try:
            return self.columns
        except (ValueError, RuntimeError):
            return self.columns_in(())

    def columns_in(self, training: Iterable[nn.Module]) -> dict[str, Columns]:
        """The statistics of what each normalization reads with some modules in training mode, as far as they were."""
        self.start()
        modes = {module: module.training for module in self.model.modules()}
        wanted = set(training)
        for module, mode in modes.items():
            module.training = mode and module in wanted
        with watched({layer.path: (layer.module, layer.spec) for layer in self.layers}) as found, torch.no_grad():
            for batch in self.batches:
                self.run(batch)
        self.start()
        return {path: Columns(tuple(calls)) for path, calls in found.items() if calls}

    @cached_property
    def activations(self) -> Activations:
        """The statistics of what each layer gives, of the first batches with rows enough."""
        self.start()
        return activations(self.model, self._first(ENOUGH_ROWS), mode="current", forward=self.forward)

    def _first(self, rows: int) -> list[Any]:
        """The first batches that have so many rows together."""
        before = accumulate(map(rows_of, self.batches), initial=0)
        return [batch for batch, seen in zip(self.batches, before, strict=False) if seen < rows]


def _flat(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or buffer.is_meta or buffer.numel() == 0 else buffer.detach().double().flatten()
