"""The monitor in Hugging Face's Trainer and in Lightning's: it follows the steps, and the training does not see it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw

STEPS = 6


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------ Hugging Face


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, attn_implementation="eager", attention_dropout=0.1, **sizes))


def hugging_faces(model: nn.Module, folder: Path, callbacks: list[Any]) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (2 * STEPS * 4, 8), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_faces_trainer(tmp_path: Path) -> None:
    model = language_model()
    twin = copy.deepcopy(model)
    monitor = nw.Monitor(model, every=3, measures=["smoothness", "sharpness"])
    hugging_faces(model, tmp_path, [monitor.hugging_face()])
    hugging_faces(twin, tmp_path, [])
    assert same(model, twin)
    rows = monitor.history.rows()
    assert [row["step"] for row in rows] == [0, 3]
    assert all(row["largest"] > 0 and row["loss"] > 1 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-2)
    assert rows[1]["lr"] < rows[0]["lr"]  # the schedule is linear


def test_a_model_that_the_trainer_does_not_call() -> None:
    callback = nw.Monitor(nn.Linear(1, 1)).hugging_face()
    callback.on_step_begin(None, None, None)
    with pytest.warns(
        UserWarning, match="the model was not called in this step: give the monitor the one that the Tra"
    ):
        callback.on_pre_optimizer_step(None, None, None)


def test_no_hook_stays_when_a_training_ends_with_an_exception() -> None:
    """The step's first call takes the hook away, so that there is none when its backward pass fails."""
    model = nn.Linear(1, 1)
    nw.Monitor(model).hugging_face().on_step_begin(None, None, None)
    assert model._forward_pre_hooks
    model(torch.ones(1, 1))
    assert not model._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------------- Lightning


def lightning_module() -> Any:
    import lightning.pytorch as lightning

    class Regression(lightning.LightningModule):
        """Logs, as people's do."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
            self.logged = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    return Regression()


def lightnings(module: Any, folder: Path, callbacks: list[Any]) -> dict[str, float]:
    """Train, and give what was logged."""
    import lightning.pytorch as lightning

    torch.manual_seed(1)
    x = torch.randn(STEPS * 8, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, loader)
    return {name: float(value) for name, value in trainer.logged_metrics.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("loss", [None, nn.functional.mse_loss])
def test_lightnings_trainer(tmp_path: Path, loss: Any) -> None:
    module = lightning_module()
    twin = copy.deepcopy(module)
    monitor = nw.Monitor(module, loss, every=4, measures=["sharpness", "activations"])
    assert lightnings(module, tmp_path, [monitor.lightning()]) == lightnings(twin, tmp_path, [])
    assert same(module, twin)
    rows = monitor.history.rows()
    assert [row["step"] for row in rows] == [0, 4]
    assert all(row["largest"] > 0 and row["threshold"] == pytest.approx(20) for row in rows)


def test_a_training_step_that_takes_the_optimizers_steps_itself_is_not_run() -> None:
    module = lightning_module()
    module.automatic_optimization = False
    monitor = nw.Monitor(module, measures=["sharpness"])
    with pytest.warns(UserWarning, match="training_step takes the optimizer's steps itself: give the monitor a loss"):
        monitor.lightning().on_train_batch_start(None, module, (torch.ones(2, 4), torch.ones(2, 1)), 0)
    assert monitor.history.snapshots[0].results == {}
