"""The generated and the textual built-in sets: what is in them, and that it never changes."""

import platform

import torch
from torch import nn

from normwise.tuning.data import chance, load


def test_wine_and_breast_cancer_are_as_scikit_learn_has_them() -> None:
    assert load("wine", "cross_entropy").fingerprint() == "bda2d6089050"
    data = load("breast_cancer", "cross_entropy")
    assert [len(split) for _, split in data.splits()] == [284, 114, 171]
    spread = data.train.inputs.std(dim=0)
    assert spread.max() / spread.min() > 100_000


def test_text_predicts_each_next_character() -> None:
    data = load("text", "cross_entropy")
    assert data.facts["data"].startswith(f"text: the help topics of Python {platform.python_version()} ")
    assert (len(data.validation), len(data.test)) == (500, 1000)
    assert len(data.train) > 3000
    for _, split in data.splits():
        assert split.inputs.dtype == split.targets.dtype == torch.int64
        assert split.inputs.shape == split.targets.shape == (len(split), 64)
        assert split.inputs[:, 1:].equal(split.targets[:, :-1])
    tokens = torch.cat([split.targets for _, split in data.splits()])
    assert 60 < tokens.unique().numel() <= int(tokens.max()) + 1 < 256
    inputs = torch.cat([split.inputs for _, split in data.splits()])
    assert inputs.unique(dim=0).shape[0] > 0.95 * len(inputs)  # tables repeat
    uniform = torch.tensor(float(tokens.max() + 1)).log().item()
    assert 2.5 < (chance(data.train.targets, "cross_entropy") or 0) < uniform


def test_sequences_last_as_long_as_their_mark() -> None:
    data = load("sequences", "cross_entropy")
    assert [tuple(split.inputs.shape) for _, split in data.splits()] == [(1500, 32, 4), (600, 32, 4), (900, 32, 4)]
    x = data.train.inputs
    lasts = x[..., 3]
    lengths = lasts.sum(dim=1)
    assert set(lengths.int().tolist()) == set(range(16, 33))
    assert (lasts == (torch.arange(32) < lengths[:, None])).all()
    assert (x[lasts == 0] == 0).all()
    assert (x[lasts == 1][:, :3] != 0).all()
    assert data.train.targets.bincount().min() > 300


def test_the_mean_of_the_sequences_drifts_by_more_than_they_swing() -> None:
    x = load("sequences", "cross_entropy").train.inputs
    means = torch.stack([x[:, t][x[:, t, 3] == 1][:, :3].mean() for t in (0, 15, 31)])
    assert means[0].abs() < 0.2
    assert 2 < means[1] < 4
    assert means[2] > 5


def test_the_classes_are_in_the_swing_and_in_no_mean() -> None:
    """What tells the classes apart is the period, and which of two sensors leads."""
    data = load("sequences", "cross_entropy")
    x, labels = data.train.inputs[:, :16, :3], data.train.targets
    means = torch.stack([x[labels == k].mean(dim=(0, 1)) for k in range(4)])
    assert (means - means.mean(dim=0)).abs().max() < 0.3
    swing = x - x.mean(dim=1, keepdim=True)
    trend = torch.linspace(-1, 1, 16)[:, None]
    swing = swing - trend * (swing * trend).sum(dim=1, keepdim=True) / trend.square().sum()
    leads = ((swing[:, 1:, 0] * swing[:, :-1, 1]).sum(1) - (swing[:, :-1, 0] * swing[:, 1:, 1]).sum(1)) > 0
    spectrum = torch.fft.rfft(swing, n=35, dim=1).abs().square().sum(dim=2)
    slow = spectrum[:, 5] > spectrum[:, 7]  # periods of 7 and of 5 steps
    assert (slow == (labels % 2 == 1)).float().mean() > 0.9
    agreement = (leads == (labels < 2)).float().mean()
    assert max(agreement, 1 - agreement) > 0.9


def test_generated_data_do_not_depend_on_the_callers_generator() -> None:
    first = load("sequences", "cross_entropy").fingerprint()
    nn.init.normal_(torch.empty(5))
    assert load("sequences", "cross_entropy").fingerprint() == first
