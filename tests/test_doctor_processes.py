"""The doctor where several processes train together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from sick_models import Patient, batch_mlp, rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normwise as nw


def kinds(patient: Patient) -> list[str]:
    return [one.kind for one in patient.diagnosis().findings]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, as its first member."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _examine(rank: int, folder: str) -> None:
    """One of two processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(rank)
    written = []
    for count in (8, 16):
        patient = Patient(DistributedDataParallel(batch_mlp()), rows(count))
        found = patient.diagnosis().findings
        written += [f"{count} {one}" for one in found]
        written += [type(patient.treated(one.fix).model.module[1]).__name__ for one in found]
    activated = nn.Sequential(nw.BatchNorm(8, activation="silu"), nn.Linear(8, 4, bias=False), nw.BatchNorm(4))
    patient = Patient(activated, rows(8))
    (finding,) = patient.diagnosis().findings
    written += [finding.fix, *(type(module).__name__ for module in patient.treated(finding.fix).model.modules())]
    Path(folder, str(rank)).write_text("\n".join(written))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_few_samples_each(tmp_path: Path) -> None:
    multiprocessing.spawn(_examine, (str(tmp_path),), nprocs=2)
    assert (
        (tmp_path / "0").read_text()
        == (tmp_path / "1").read_text()
        == (
            "8 unsynchronized (moderate, certain) in 1\n"
            "  Each of 2 processes normalizes by its own few samples and has a memory of its own.\n"
            "  samples a statistic, at least: 8, expected at least 16\n"
            "  fix:\n"
            "    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on GPUs, before it is wrapped\n"
            "SyncBatchNorm\n"
            "from dataclasses import replace\n"
            "\n"
            "for path in ['0']:\n"
            "    norm = model.get_submodule(path)\n"
            "    norm.spec = replace(norm.spec, activation=None)\n"
            "    model.set_submodule(path, torch.nn.Sequential(norm, torch.nn.SiLU()))\n"
            "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on GPUs, before it is wrapped\n"
            "Sequential\nSequential\nSyncBatchNorm\nSiLU\nLinear\nSyncBatchNorm"
        )
    )


@pytest.mark.usefixtures("group")
def test_one_process_in_a_group_is_alone() -> None:
    assert kinds(Patient(DistributedDataParallel(batch_mlp()), rows(8))) == ["few-samples"]
