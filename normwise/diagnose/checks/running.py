"""Whether the model and its loss run at all: a diagnosis of what does not would be empty, and look like health."""

from __future__ import annotations

from typing import Any

import torch

from normwise.batches import target_of
from normwise.diagnose.checks.case import Case
from normwise.diagnose.nonfinite import first_nonfinite
from normwise.diagnose.results import reason_of
from normwise.errors import DiagnosisError, NonFiniteError, TooFewSamplesError

_TORCH_HAS_TOO_FEW = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")


def require_run(case: Case) -> None:
    """Refuse a model, or a loss, that fails on the first batch for no reason that a check is there to explain.

    Raises:
        DiagnosisError: it does.
    """
    if case.loss is not None and not callable(case.loss):
        raise DiagnosisError(f"loss is a {type(case.loss).__name__}: give a function, called as loss(output, target)")
    error = _failure(case)
    if error is not None and not _is_explained(case, error):
        raise error


def _failure(case: Case) -> DiagnosisError | None:
    """What goes wrong on the first batch, in the modes that the model is in."""
    case.start()
    batch = case.batches[0]
    try:
        output = case.run(batch)
    except Exception as error:  # noqa: BLE001 - the user's model may raise anything
        return _wrong("the forward", error, "`forward=` says how the model is called with a batch")
    finally:
        case.start()
    if case.loss is None:
        return None
    try:
        case.loss_of(batch)
    except Exception as error:  # noqa: BLE001 - and so may the loss
        called = f"it is called as loss(output, target), here with {_kind(output)} and {_kind(target_of(batch))}"
        own = hasattr(output, "loss") or (isinstance(output, dict) and "loss" in output)
        return _wrong("the loss", error, called + "; without loss= the model's own is taken" * own)
    finally:
        case.start()
    return None


def _wrong(what: str, error: Exception, way_out: str) -> DiagnosisError:
    found = DiagnosisError(f"{what} fails on the first batch: {reason_of(error)}; {way_out}")
    found.__cause__ = error
    return found


def _is_explained(case: Case, error: DiagnosisError) -> bool:
    """Whether it is for too few samples in training mode, which is a finding, or for values that are not finite."""
    cause = error.__cause__
    if isinstance(cause, NonFiniteError):
        return True
    if isinstance(cause, TooFewSamplesError) or str(cause).startswith(_TORCH_HAS_TOO_FEW):
        return _runs_in_evaluation(case)
    try:
        return first_nonfinite(
            case.model, case.batches[:1], case.loss, mode="current", forward=case.forward, backward=False
        ).found
    except Exception:  # noqa: BLE001 - it fails in the same way
        return False


def _runs_in_evaluation(case: Case) -> bool:
    case.model.eval()
    try:
        case.run(case.batches[0])
    except Exception:  # noqa: BLE001 - the user's model may raise anything
        return False
    finally:
        case.start()
    return True


def _kind(value: Any) -> str:
    """What a loss is given, in words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
