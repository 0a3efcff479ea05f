"""The facts that the doctor's checks share: each is found out once, when the first check asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from textwrap import fill, indent
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss, feed, loss_of, rows_of
from normwise.diagnose.activations import Activations, activations
from normwise.diagnose.checks.columns import Columns, watched
from normwise.norm import Norm
from normwise.pointwise import FUNCTIONS
from normwise.spec import NormSpec
from normwise.surgery.exchange import Site, sites
from normwise.surgery.flow import Flow, trace
from normwise.surgery.kinds import kind_of
from normwise.untouched import Moment

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WIDTH = 90  # of a list of paths in a fix
_NUMBERED = re.compile(r"(|.*?\.)(\d+)(|\..*)")  # a path through one of many blocks
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
        """Whether the memory is as a new layer has it: variance 1 everywhere, and mean 0 or what a folded bias left."""
        mean, var = self.mean, self.var
        if mean is None or var is None or not bool((var == 1).all()):
            return False
        return self.updates == 0 or not bool(mean.any())


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
        self._is_one_batch = len(batches) == 1 and batches[0] is given
        self._moment = Moment(model)

    def without(self, paths: Iterable[str]) -> Case:
        """The same case, but for some normalizations that nobody looks at any more."""
        gone, other = set(paths), copy(self)
        other.layers = [layer for layer in self.layers if layer.path not in gone]
        return other

    @property
    def last_rows(self) -> int | None:
        """The rows of the last one of a list of batches; None: it is no list."""
        return rows_of(self.given[-1]) if isinstance(self.given, list) and not self._is_one_batch else None

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
        return "[batches]" if self._is_one_batch else "batches"

    @property
    def batch_code(self) -> str:
        """The first of them in Python."""
        return "batches" if self._is_one_batch else "next(iter(batches))"

    @property
    def forward_code(self) -> str:
        """The argument that says how the model is called, where it has to be said."""
        return "" if self.forward is None else ", forward=forward"

    @property
    def loss_code(self) -> str:
        """The argument for the loss, where there is one."""
        return "" if self.loss is None else ", loss"

    @property
    def mode_code(self) -> str:
        """The argument that says in which mode the model is trained, where some of it is in evaluation mode."""
        return ', mode="current"' if self.modes[self.model] and not all(self.modes.values()) else ""

    @property
    def few_batches_code(self) -> str:
        """The first two batches in Python."""
        if self._is_one_batch:
            return "batches"
        return "batches[:2]" if isinstance(self.given, list) else "[one for one, _ in zip(batches, range(2))]"

    def smaller_rate(self, where: str) -> str:
        """Python for a tenth of the learning rate, where it is known."""
        if self.optimizer is not None:
            return f'for group in optimizer.param_groups:\n    group["lr"] *= 0.1  # {where}'
        return f"lr = 0.1 * lr  # {where}" if self.lr is not None else f"# train with a smaller learning rate, {where}"

    @property
    def activated(self) -> dict[str, str]:
        """The normalizations of ours that apply an activation, by path, and torch's layer that does it, in Python.

        Not those that multiply by a gate as well: what is applied before that cannot stand behind them.
        """
        norms = {path: m.spec for path, m in self.model.named_modules() if isinstance(m, Norm)}
        declared = {path: spec.activation for path, spec in norms.items() if spec.gate is None}
        return {path: f"torch.nn.{FUNCTIONS[name].layer.__name__}()" for path, name in declared.items() if name}

    def swapped(self, kind: str, to: str, paths: list[str]) -> str:
        """Python that exchanges normalizations of a kind, all of them or those at the paths."""
        chosen = len(paths) < sum(layer.kind == kind for layer in self.layers)
        names = f", names={paths_code(paths)}" if chosen else ""
        return self.trained(f"nw.swap(model, {kind!r}, {to!r}{names})", paths)

    def trained(self, fix: str, paths: Iterable[str] = ()) -> str:
        """A fix that makes new parameters, and gives them to the optimizer where there is one.

        They join the group that holds the first parameter of the layers at the paths; otherwise the one that decays
        least. A new group would be none of an attached schedule's.
        """
        if self.optimizer is None:
            return fix
        groups = self.optimizer.param_groups
        own = {layer.path: layer.module for layer in self.layers}
        old = {p for path in paths for p in own[path].parameters(recurse=False)}
        holding = [at for at, group in enumerate(groups) if not old.isdisjoint(group["params"])]
        least = min(range(len(groups)), key=lambda at: float(groups[at].get("weight_decay") or 0.0))
        return f"{fix}\n{joined(holding[0] if holding else least)}"

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


def paths_code(paths: list[str]) -> str:
    """A list of paths in Python, in short where there are blocks, and on several lines where it is long.

    >>> paths_code(["a", "b"])
    "['a', 'b']"
    >>> print(paths_code([f"blocks.{at}.{name}" for at in range(9) for name in ("up", "down")]))
    [f'blocks.{at}{end}' for at in range(0, 9) for end in ['.up', '.down']]
    """
    if len(repr(paths)) <= _WIDTH:
        return repr(paths)
    of_blocks = _of_blocks(paths)
    if of_blocks:
        return of_blocks
    lines = fill(", ".join(f"{path!r}" for path in paths), _WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"[\n{indent(lines, '    ')},\n]"


def _of_blocks(paths: list[str]) -> str:
    """The same for paths that go through numbered blocks, and are the same in all of them; "" for others."""
    matches = [match for path in paths if (match := _NUMBERED.fullmatch(path))]
    starts, ends = ({match[part]: None for match in matches} for part in (1, 3))
    numbers = sorted({int(match[2]) for match in matches})
    if len(starts) != 1 or numbers != list(range(numbers[0], numbers[-1] + 1)):
        return ""
    start = next(iter(starts))
    if sorted(paths) != sorted(f"{start}{at}{end}" for at in numbers for end in ends):
        return ""
    listed = f"for at in range({numbers[0]}, {numbers[-1] + 1})"
    if len(ends) == 1:
        return f"[f'{start}{{at}}{next(iter(ends))}' {listed}]"
    return f"[f'{start}{{at}}{{end}}' {listed} for end in {list(ends)!r}]"


def split(activations: Mapping[str, str]) -> str:
    """Python that puts a layer behind each normalization, by path, instead of the activation that it applies.

    >>> print(split({"1": "torch.nn.ReLU()"}))
    from dataclasses import replace
    <BLANKLINE>
    for path in ['1']:
        norm = model.get_submodule(path)
        norm.spec = replace(norm.spec, activation=None)
        model.set_submodule(path, torch.nn.Sequential(norm, torch.nn.ReLU()))
    """
    paths: dict[str, list[str]] = {}
    for path, layer in activations.items():
        paths.setdefault(layer, []).append(path)
    loops = [
        f"for path in {paths_code(held)}:\n"
        "    norm = model.get_submodule(path)\n"
        "    norm.spec = replace(norm.spec, activation=None)\n"
        f"    model.set_submodule(path, torch.nn.Sequential(norm, {layer}))"
        for layer, held in paths.items()
    ]
    return "\n".join(["from dataclasses import replace", "", *loops])


def joined(group: int) -> str:
    """Python that gives the parameters that the optimizer does not hold to one of its groups.

    It is a loop, because within a function a comprehension that is run by `exec` sees no names of the code around it.
    """
    return (
        'held = {p for group in optimizer.param_groups for p in group["params"]}\n'
        "for p in model.parameters():\n"
        "    if p.requires_grad and p not in held:\n"
        f'        optimizer.param_groups[{group}]["params"].append(p)'
    )


def _flat(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or buffer.is_meta or buffer.numel() == 0 else buffer.detach().double().flatten()
