"""The doctor: looks for what is known to go wrong with normalization and training, and says how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from normwise.batches import Forward, Loss, rows_of
from normwise.diagnose.checks.case import Case, Unchecked
from normwise.diagnose.checks.running import require_run
from normwise.diagnose.checks.table import CHECKS, Check
from normwise.diagnose.findings import Diagnosis, Finding
from normwise.diagnose.objective import Batches, measuring, read
from normwise.diagnose.results import reason_of
from normwise.errors import DiagnosisError


def doctor(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    forward: Forward | None = None,
    accumulation: int = 1,
    most: int = 8,
    progress: Callable[[str], object] | None = None,
) -> Diagnosis:
    """Examine a model as it is trained: what is wrong, where, the number that shows it, and code that mends it.

    The model runs forward and backward on the first batches, in training mode, and is left as it was, bit for bit. A
    check that cannot be made, because something is not given or fails, is listed with the reason. What is looked for,
    and where each limit is from, is in docs/doctor.md.

    Args:
        model: A model, in the mode and at the point of training that is in question. One that is wrapped for several
            processes is looked into: paths and fixes are those of its `.module`.
        batches: A batch, a list of batches or a loader, of the size that is trained with. A loader also tells how large
            its last batch is.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own,
            its output or the `loss` in it, if there is one.
        optimizer: The one that trains it: for weight decay, and the learning rate.
        lr: The learning rate, where it is not the optimizer's; without one, that of plain gradient descent.
        forward: `forward(model, batch)`, for models that are called otherwise.
        accumulation: Over how many batches gradients are accumulated before a step.
        most: Look at so many batches.
        progress: Called with what is looked at next.

    Returns:
        A diagnosis. `print` shows it, `findings` has what was found, the most harmful first, but the learning rate
            last: every other fix changes what rate is borne. In that order the fixes can be run one after another.

    Raises:
        DiagnosisError: there is no batch, a size is not known yet, an argument is out of its range; the forward or the
            loss fails on the first batch for no reason that a check is there to explain.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = doctor(model, (torch.randn(32, 4), torch.randint(2, (32,))), nn.functional.cross_entropy)
    >>> print(found.findings[0])
    bias-before-norm (minor, certain) in 0
      A bias is added that the normalization behind it takes out again with the mean.
      parameters without effect: 8, expected 0
      fix:
        nw.fold(model, batches, steps=["bias"])
    """
    if accumulation < 1 or most < 1:
        name, value = ("accumulation", accumulation) if accumulation < 1 else ("most", most)
        raise DiagnosisError(f"{name}={value}: it is 1 or more")
    _check_step(optimizer, lr)
    inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else model
    modes = {module: module.training for module in inner.modules()}
    with measuring(inner, "train", optimizer=optimizer, batches=batches):
        for module in inner.modules() if modes[inner] else ():
            module.training = modes[module]  # what is in evaluation mode while the model trains stays so
        given = _usual(read(batches, most))
        case = Case(inner, batches, given, modes, loss, forward, optimizer, lr, accumulation=accumulation)
        require_run(case)
        return _examined(case, progress)


def _check_step(optimizer: Any, lr: Any) -> None:
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        kind = type(optimizer).__name__
        raise DiagnosisError(f"optimizer is a {kind}: give a torch.optim.Optimizer; a learning rate alone is lr=")
    if lr is not None and not isinstance(lr, (int, float)):
        raise DiagnosisError(f"lr is a {type(lr).__name__}: give a number; an optimizer is optimizer=")
    if lr is not None and not lr > 0:
        raise DiagnosisError(f"lr={lr}: a learning rate is positive")


def _usual(batches: list[Any]) -> list[Any]:
    """The batches without a last one that is smaller: it says nothing of the others."""
    return batches[:-1] if len(batches) > 1 and rows_of(batches[-1]) < rows_of(batches[0]) else batches


def _examined(case: Case, progress: Callable[[str], object] | None) -> Diagnosis:
    findings: list[tuple[Check, Finding]] = []
    checked: list[str] = []
    unchecked: dict[str, str] = {}
    for check in CHECKS:
        if progress is not None:
            progress(check.name)
        try:
            findings += [(check, one) for one in _found(case, check)]
            checked.append(check.name)
        except Unchecked as reason:
            unchecked[check.name] = str(reason)
        except Exception as error:  # noqa: BLE001 - the user's model may raise anything, and the other checks go on
            unchecked[check.name] = reason_of(error)
    return Diagnosis(tuple(_in_turn(case, findings)), tuple(checked), unchecked)


def _in_turn(case: Case, findings: list[tuple[Check, Finding]]) -> Iterator[Finding]:
    """The findings in their order, each about the layers that the fixes before it leave as they are."""
    exchanged: set[str] = set()
    for check, one in sorted(findings, key=lambda pair: pair[1].rank):
        if not check.of_layers or exchanged.isdisjoint(one.where):
            again = [one]
        else:
            again = [other for other in _found(case.without(exchanged), check) if other.kind == one.kind]
        yield from again
        exchanged.update(path for other in again if other.exchanges for path in other.where)


def _found(case: Case, check: Check) -> list[Finding]:
    case.start()
    try:
        return list(check.run(case))
    finally:
        case.start()
