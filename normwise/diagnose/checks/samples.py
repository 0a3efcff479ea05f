"""Too few samples a statistic: in a batch, in the last one, in each of several processes or micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from normwise.batches import rows_of
from normwise.diagnose.checks.case import Case, Layer, Unchecked, paths_code, split
from normwise.diagnose.findings import Finding, Harm
from normwise.layers import BatchNorm
from normwise.normalizers import Standardize

ENOUGH = 16  # of a batch: the noise of a variance is then sqrt(2 / 15) = 37 %; an MLP lost 1.7 points with 8
SCARCE = 4  # where a batch normalization loses tens of points, and what others standardize is little but signs


def few_samples(case: Case) -> Iterator[Finding]:
    """Batch normalizations with fewer than 16 samples a statistic, others that standardize fewer than 4."""
    few: dict[tuple[str, Harm], dict[str, int]] = {}
    for layer, rows in _measured(case):
        is_batch = layer.kind == "batch"
        joined = rows * processes() if is_batch else rows  # what `unsynchronized` is about
        if joined < (ENOUGH if is_batch else SCARCE):
            harm: Harm = "severe" if joined <= SCARCE else "moderate"
            few.setdefault((layer.kind, harm), {})[layer.path] = rows
    for (kind, harm), rows_by_path in few.items():
        yield _few(case, kind, harm, rows_by_path)


def _measured(case: Case) -> Iterator[tuple[Layer, int]]:
    """The layers that standardize by the batch, and their samples a statistic."""
    for layer in case.layers:
        if layer.measures and isinstance(layer.spec.normalizer, Standardize) and layer.path in case.samples:
            yield layer, case.samples[layer.path].rows


def _few(case: Case, kind: str, harm: Harm, rows: dict[str, int]) -> Finding:
    what = f"In batches of {rows_of(case.batches[0])} rows a statistic is made of few samples: "
    what += "training is noisy, and evaluation differs from it." if kind == "batch" else "little but signs is left."
    return Finding(
        "few-samples",
        what,
        tuple(rows),
        "samples a statistic, at least",
        min(rows.values()),
        (ENOUGH if kind == "batch" else SCARCE, math.inf),
        case.swapped(kind, _alternative(case, kind, rows), list(rows)),
        "certain",
        harm,
    )


def _alternative(case: Case, kind: str, rows: dict[str, int]) -> str:
    """A normalization with more samples: of groups, where there are maps."""
    if kind in ("layer", "group"):
        return "rms" if kind == "layer" else "layer"
    calls = [call for path in rows for call in case.samples[path].calls]
    return "group" if all(call.rank > 2 and call.rows >= ENOUGH * call.examples for call in calls) else "layer"


def last_batch_of_one(case: Case) -> Iterator[Finding]:
    """A last batch of one example, where that leaves a batch normalization one sample a statistic."""
    usual = rows_of(case.batches[0])
    if usual == 1 or _rows_of_last(case) != 1:
        return
    single = [layer.path for layer, _ in _measured(case) if layer.kind == "batch" and _is_single(case, layer)]
    if single:
        yield Finding(
            "last-batch-of-one",
            f"After batches of {usual} rows comes a last one of 1 row, in which each statistic has one sample and no "
            "variance: training mode refuses it.",
            tuple(single),
            "rows in the last batch",
            1,
            (2, usual),
            _WITHOUT_LAST if isinstance(case.given, DataLoader) else "batches = batches[:-1]",
            "certain",
            "fatal",
        )


_WITHOUT_LAST = """batches = torch.utils.data.DataLoader(
    batches.dataset, batches.batch_size, sampler=batches.sampler, num_workers=batches.num_workers,
    collate_fn=batches.collate_fn, drop_last=True,
)"""


def _rows_of_last(case: Case) -> int:
    """How many rows the last batch will have; a loader is not read to its end for it.

    Raises:
        Unchecked: nobody knows.
    """
    given = case.given
    if case.last_rows is not None:
        return case.last_rows
    if not isinstance(given, DataLoader) or given.batch_size is None or not isinstance(given.sampler, Sized):
        raise Unchecked("only a list, or a DataLoader that knows its size, tells what the last batch will be")
    last = len(given.sampler) % given.batch_size
    return given.batch_size if given.drop_last or last == 0 else last


def _is_single(case: Case, layer: Layer) -> bool:
    """Whether one example leaves one sample a statistic."""
    return any(call.rows == call.examples for call in case.samples[layer.path].calls)


def micro_batches(case: Case) -> Iterator[Finding]:
    """Gradients accumulated over micro-batches, each of which enters the memories by itself."""
    if case.accumulation == 1:
        return
    apart = [layer.path for layer in case.remembering if layer.measures and not getattr(layer.module, "_window", 0)]
    if apart:
        yield Finding(
            "micro-batches-apart",
            f"Gradients are accumulated over {case.accumulation} micro-batches, and each of them enters the memories "
            "by itself, as if it were a step.",
            tuple(apart),
            "updates of a memory a step",
            case.accumulation,
            (1, 1),
            "import contextlib\n"
            "\n"
            "nw.adopt(model)\n"
            "training = contextlib.ExitStack()\n"
            f"training.enter_context(nw.accumulate(model, {case.accumulation}))  # until training.close()",
            "certain",
            "minor",
        )


def computed_again(case: Case) -> Iterator[Finding]:
    """Memories that a batch enters twice, because a checkpointed forward is computed again in the backward pass."""
    counted = [layer for layer in case.remembering if layer.measures and layer.updates is not None]
    if not counted:
        return
    before = [_updates(layer) for layer in counted]
    loss = case.loss_of(case.batches[0])
    forwards = [_updates(layer) for layer in counted]
    torch.autograd.backward(loss)
    both = [_updates(layer) for layer in counted]
    paths = [layer.path for layer, one, two in zip(counted, forwards, both, strict=True) if two > one]
    if paths:
        at = next(at for at, layer in enumerate(counted) if layer.path == paths[0])
        yield Finding(
            "updated-twice",
            "A checkpointed forward is computed again in the backward pass, and the batch enters the memory again.",
            tuple(paths),
            "updates of a memory a step",
            both[at] - before[at],
            (forwards[at] - before[at], forwards[at] - before[at]),
            "nw.adopt(model)",
            "certain",
            "minor",
        )


def _updates(layer: Layer) -> int:
    return cast("int", layer.updates)


def unsynchronized(case: Case) -> Iterator[Finding]:
    """Several processes, of which each makes statistics of its own few samples."""
    if processes() == 1:
        return
    apart = {
        layer.path: rows
        for layer, rows in _measured(case)
        if layer.kind == "batch" and not isinstance(layer.module, nn.SyncBatchNorm) and rows < ENOUGH
    }
    if apart:
        yield Finding(
            "unsynchronized",
            f"Each of {processes()} processes normalizes by its own few samples and has a memory of its own.",
            tuple(apart),
            "samples a statistic, at least",
            min(apart.values()),
            (ENOUGH, math.inf),
            _synchronized(case),
            "certain",
            "severe" if min(apart.values()) <= SCARCE else "moderate",
        )


def _synchronized(case: Case) -> str:
    """torch's conversion, which replaces layers by their class: what else they do has to leave them first."""
    fix = "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on GPUs, before it is wrapped"
    modules, known = dict(case.model.named_modules()), case.activated.items()
    lost = {path: layer for path, layer in known if isinstance(modules[path], nn.modules.batchnorm._BatchNorm)}
    gated = [path for path, module in modules.items() if isinstance(module, BatchNorm) and module.spec.gate]
    if gated:
        fix = f"# first multiply by the gates of {paths_code(gated)} yourself, since torch's layer takes none\n{fix}"
    return f"{split(lost)}\n{fix}" if lost else fix


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
