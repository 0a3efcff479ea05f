"""A monitor in the loops of Hugging Face's Trainer and of Lightning, which are imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from normwise.errors import DiagnosisError

if TYPE_CHECKING:
    from normwise.diagnose.monitor import Monitor


def hugging_face(monitor: Monitor) -> Any:
    """See `Monitor.hugging_face`."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise DiagnosisError("hugging_face() needs transformers: pip install transformers") from error

    class MonitorCallback(TrainerCallback):
        """Follows the steps of a Trainer.

        Its callbacks are not given the batch, so that it is caught where the model is called; with accumulation that is
        the first micro-batch of a step.
        """

        def __init__(self) -> None:
            self._caught = _Caught(monitor.model)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if monitor.optimizer is None:
                monitor.optimizer = _torchs(given.get("optimizer"))

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._caught.wait(wanted=monitor.due)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            call = self._caught.taken()
            monitor.step(call, forward=_called)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._caught.wait(wanted=False)

    return MonitorCallback()


def lightning(monitor: Monitor) -> Any:
    """See `Monitor.lightning`."""
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError as error:
        raise DiagnosisError("lightning() needs lightning: pip install lightning") from error

    class MonitorCallback(Callback):
        """Follows the steps of a Lightning Trainer."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if monitor.optimizer is None and trainer.optimizers:
                monitor.optimizer = trainer.optimizers[0]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if monitor.loss is not None:
                monitor.step(batch)
                return
            with _unlogged(pl_module):
                monitor.step(batch, forward=lambda _, given: _training_step(pl_module, given, batch_idx))

    return MonitorCallback()


class _Caught:
    """The arguments of a model's next call."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def wait(self, *, wanted: bool) -> None:
        """Forget the last call, and catch the next one if it is wanted."""
        self._call = None
        self._let_go()
        if wanted:
            self._handle = self._model.register_forward_pre_hook(self._catch, with_kwargs=True)

    def taken(self) -> Any:
        """The call that was caught, None where none was."""
        self._let_go()
        call, self._call = self._call, None
        return call

    def _catch(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._call = args, dict(keywords)
        self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _called(model: nn.Module, call: Any) -> Any:
    if call is None:
        raise DiagnosisError("the model was not called in this step: give the monitor the one that the Trainer trains")
    args, keywords = call
    return model(*args, **keywords)


def _training_step(module: Any, batch: Any, batch_idx: int) -> Any:
    if not module.automatic_optimization:
        raise DiagnosisError("training_step takes the optimizer's steps itself: give the monitor a loss")
    return module.training_step(batch, batch_idx)


def _torchs(optimizer: Any) -> Any:
    """The optimizer that one of accelerate's wraps."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _unlogged(module: Any) -> Iterator[None]:
    """What `training_step` logs goes nowhere: it is no step of the training."""
    for name in ("log", "log_dict"):
        module.__dict__[name] = _nothing
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]


def _nothing(*_: Any, **__: Any) -> None:
    """Keep nothing."""
