"""A monitor in a training loop: what it sees, and that the training does not see it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.errors import DiagnosisError

LOSS = nn.functional.mse_loss


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(x, x.sum(1, keepdim=True)) for x in torch.randn(count, 16, 4, generator=generator)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: nw.Monitor | None) -> list[float]:
    """Six steps; the loss of each."""
    losses = []
    torch.manual_seed(2)
    for batch in batches(6):
        if monitor is not None:
            monitor.step(batch)
        optimizer.zero_grad()
        loss = LOSS(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_training_goes_on_as_if_it_were_not_there() -> None:
    model = network()
    twin = copy.deepcopy(model)
    watched, alone = (torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin))
    names = ["smoothness", "sharpness", "activations", "gap"]
    monitor = nw.Monitor(model, LOSS, optimizer=watched, every=2, measures=names)
    assert train(model, watched, monitor) == train(twin, alone, None)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [snapshot.step for snapshot in monitor.history.snapshots] == [0, 2, 4]
    assert all(list(snapshot.results) == names and not snapshot.failed for snapshot in monitor.history.snapshots)


def test_it_measures_what_the_functions_measure_at_the_weights_of_the_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    monitor = nw.Monitor(model, LOSS, optimizer=optimizer, every=3, measures=["sharpness"])
    torch.manual_seed(2)  # as `train` does: dropout drops the same units
    expected = nw.sharpness(model, batches(1), LOSS).largest.value
    train(model, optimizer, monitor)
    first, second = monitor.history.rows()
    assert first["largest"] == pytest.approx(expected)
    assert second["largest"] != first["largest"]
    assert (first["lr"], first["threshold"]) == (0.1, pytest.approx(38.0))
    assert json.loads(monitor.history.to_json())["snapshots"][1]["step"] == 3
    assert repr(monitor.history).startswith("History: 2 snapshots; before step 3: lr 0.1, threshold 38, largest ")


def test_the_threshold_of_adam_is_unknown_and_a_schedule_is_followed() -> None:
    model = network()
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = nw.Monitor(model, LOSS, optimizer=adam, every=1, measures=["smoothness"])
    monitor.step(batches(1)[0])
    adam.param_groups[0]["lr"] = 5e-4
    monitor.step(batches(1)[0])
    assert [(row["lr"], row["threshold"]) for row in monitor.history.rows()] == [(1e-3, None), (5e-4, None)]


def test_what_cannot_be_measured_is_told_once_and_stops_nothing() -> None:
    model = network()
    model[4].weight.data.fill_(float("nan"))
    monitor = nw.Monitor(model, LOSS, every=1, measures=["sharpness"])
    with pytest.warns(UserWarning, match="^sharpness cannot be measured at step 0: a Hessian-vector product is"):
        monitor.step(batches(1)[0])
    monitor.step(batches(1)[0])
    assert [list(snapshot.failed) for snapshot in monitor.history.snapshots] == [["sharpness"]] * 2


def test_there_is_no_smoothness_along_no_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    monitor = nw.Monitor(model, LOSS, optimizer=optimizer, measures=["smoothness"])
    text = "smoothness cannot be measured at step 0: the learning rate is 0, as a warm-up begins: there is no step to l"
    with pytest.warns(UserWarning, match=text):
        monitor.step(batches(1)[0])


def test_an_error_of_torch_or_of_the_model_stops_nothing() -> None:
    class Checkpointed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(4, 1))
    monitor = nw.Monitor(model, LOSS, measures=["sharpness"])
    with pytest.warns(UserWarning, match="^sharpness cannot be measured at step 0: RuntimeError: When use_reentrant="):
        monitor.step(batches(1)[0])
    assert monitor.history.snapshots[0].results == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"measures": ["sharpnes"]},
            "no measure named 'sharpnes'; there are smoothness, sharpness, activations, gap",
        ),
        ({"measures": "sharpness"}, "measures='sharpness': give a list of names, as ['sharpness']"),
        ({"every": 0}, "every=0: measure at every step (1), or at fewer"),
    ],
)
def test_what_it_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        nw.Monitor(network(), LOSS, **options)  # type: ignore[arg-type]
    assert str(caught.value) == text


def test_before_the_first_step() -> None:
    monitor = nw.Monitor(network(), LOSS, every=5, measures=["gap"])
    assert repr(monitor.history) == "History: nothing was measured yet"
    assert repr(monitor) == "Monitor of gap at every 5. step; nothing was measured yet"
