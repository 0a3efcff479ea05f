"""Weight files: read into a model strictly, written in whole or not at all, and never over another file unasked."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.errors import MissingExtraError, SurgeryError

SAFETENSORS = ".safetensors"
TORCHS = (".pt", ".pth", ".bin")
NOTE = "normwise"  # the entry of a file's metadata that says what was done to its weights
_NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the model, the most specific first
_SHOWN = 3  # names in an error

State = Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        path: The file.
        state: Tensors by name.
        entry: The entry of a larger checkpoint that they were taken from; None: the file holds nothing else.
        metadata: What else a safetensors file says of itself.
    """

    path: Path
    state: State
    entry: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Weights:
    """The tensors of a file: `.safetensors`, or `.pt`, `.pth`, `.bin` with a state_dict, alone or in a checkpoint.

    Nothing but tensors is unpickled.

    Raises:
        SurgeryError: there is no such file, it is one part of several, or it cannot be read.
        MissingExtraError: safetensors is not installed.
    """
    if path.name.endswith(".index.json"):
        raise SurgeryError(f"{path} lists the files that the weights are spread over; {_WHOLE}")
    part = re.search(r"-\d+-of-0*(\d+)$", path.stem)
    if part and int(part[1]) > 1:
        raise SurgeryError(f"{path} is one of {part[1]} files that the weights are spread over; {_WHOLE}")
    _check_ending(path)
    if not path.is_file():
        raise SurgeryError(f"{path} is a folder, not a file" if path.is_dir() else f"there is no file {path}")
    return _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torchs(path)


_WHOLE = "save them in one file, or let the factory load them"


def _read_safetensors(path: Path) -> Weights:
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return Weights(path, state, metadata=file.metadata() or {})
    except (OSError, library.SafetensorError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}") from error


def _read_torchs(path: Path) -> Weights:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SurgeryError(
            f"{path} holds more than tensors, or is no file of torch's, and is not opened, because that could run "
            "code: save the model's state_dict()"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise SurgeryError(f"{path} cannot be read: {_first_line(error)}") from error
    if _is_state(loaded):
        return Weights(path, loaded)
    for entry in _NESTED:
        if isinstance(loaded, Mapping) and _is_state(loaded.get(entry)):
            return Weights(path, loaded[entry], entry)
    raise SurgeryError(f"{path} holds no tensors by name, and neither do its entries {', '.join(_NESTED)}")


def _is_state(value: Any) -> bool:
    """Whether this is a state_dict: tensors by name, besides what modules call their extra state."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(tensor, Tensor) for tensor in value.values())
        and all(isinstance(tensor, Tensor) or str(name).endswith("_extra_state") for name, tensor in value.items())
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load(model: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Give a model the weights of a file, all of them and nothing else; what there is to know of it.

    A tensor that the model has under several names may have one of them in the file.

    Raises:
        SurgeryError: names that are missing or not expected, other shapes, tied names with different values. The model
            may have got a part of the weights by then.

    >>> linear = nn.Linear(2, 3)
    >>> load(linear, Weights(Path("w.pt"), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "model"))
    ("the weights are the entry 'model' of w.pt",)
    """
    own = model.state_dict(keep_vars=True)
    state = _with_tied(own, weights)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        mismatches = [line.strip() for line in str(error).splitlines()[1:]] or [_first_line(error)]
        raise _misfit(model, weights, [_few(mismatches, "; ")]) from error
    if missing or unexpected:
        kinds = (("misses", missing), ("has what the model does not:", unexpected))
        raise _misfit(model, weights, [f"it {what} {_few(names)}" for what, names in kinds if names])
    notes = [] if weights.entry is None else [f"the weights are the entry {weights.entry!r} of {weights.path}"]
    return (*notes, *_conversions(own, weights))


def _with_tied(own: Mapping[str, Tensor], weights: Weights) -> State:
    """The state, completed where the model has one tensor under several names."""
    state = copy.copy(weights.state)  # its class and attributes stay: torch looks for versions in them
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        there = [name for name in names if name in weights.state]
        for name in there[1:]:
            if not _equal(state[there[0]], state[name]):
                raise SurgeryError(
                    f"{weights.path}: {there[0]} and {name} are one tensor in the model, and differ in the file"
                )
        if there:
            state.update({name: state[there[0]] for name in names if name not in there})  # type: ignore[attr-defined]
    return state


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _misfit(model: nn.Module, weights: Weights, reasons: list[str]) -> SurgeryError:
    text = f"{weights.path} does not fit {type(model).__name__}: {'; '.join(reasons)}"
    if NOTE in weights.metadata:
        text += f"; normwise wrote it for another model{_model_of(weights.metadata[NOTE])}"
    return SurgeryError(text)


def _model_of(note: str) -> str:
    """The Python that makes the model that a file was written for, in one line, where the file says it."""
    try:
        python = str(json.loads(note)["python"])
    except (ValueError, TypeError, KeyError):
        return ""
    return f": {'; '.join(python.splitlines())}" if python else ""


def _few(names: list[str], comma: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return comma.join(names[:_SHOWN]) + more


def _conversions(own: Mapping[str, Tensor], weights: Weights) -> list[str]:
    """Which dtypes became others."""
    pairs = {
        (str(tensor.dtype), str(own[name].dtype)): name
        for name, tensor in weights.state.items()
        if isinstance(tensor, Tensor) and name in own and tensor.dtype != own[name].dtype
    }
    return [f"{there} in the file became {here}, as the model has it: {name}" for (there, here), name in pairs.items()]


# --------------------------------------------------------------------------------------------------------- writing


def check_out(out: Path, source: Path | None, *, force: bool) -> None:
    """Refuse what cannot or should not be written, before any work.

    Args:
        out: The file to write.
        source: The file that the weights come from, which is never written over.
        force: Whether another file that is there may be replaced.

    Raises:
        SurgeryError: an ending that is no format, a folder that does not exist, a file that exists.
        MissingExtraError: safetensors is not installed.
    """
    _check_ending(out)
    if out.suffix == SAFETENSORS:
        _safetensors()
    if not out.parent.is_dir():
        raise SurgeryError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.is_dir():
        raise SurgeryError(f"{out} is a folder, not a file")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise SurgeryError(f"{out} is the file that the weights are read from: --out names another file")
    if os.path.lexists(out) and not force:  # a link to nowhere counts
        raise SurgeryError(f"{out} exists already: --force replaces it, --out names another file")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise SurgeryError(f"{out} cannot be written: no permission in {out.parent}")


def write(state: State, out: Path, metadata: Mapping[str, str]) -> None:
    """Write a state_dict so that the file is there in whole or not at all, whatever interrupts it.

    A safetensors file holds tied tensors under each of their names, so that it loads strictly, and the metadata.

    Raises:
        SurgeryError: a tensor that the format cannot hold, or an error of the disk.
    """
    for name, tensor in state.items():
        _check_tensor(name, tensor, out)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            part = Path(folder, out.name)
            part.touch()
            mode = part.stat().st_mode  # as the user's mask has it; safetensors' files are for their owner alone
            _save(state, part, metadata)
            part.chmod(mode)
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a name must not reach the disk before what it stands for
            part.replace(out)
    except (OSError, RuntimeError) as error:
        raise SurgeryError(f"{out} cannot be written: {_first_line(error)}") from error


def _save(state: State, part: Path, metadata: Mapping[str, str]) -> None:
    if part.suffix != SAFETENSORS:
        torch.save(dict(state), part)
        return
    library = _safetensors()
    try:
        library.torch.save_file(_apart(state), part, metadata={"format": "pt", **metadata})
    except library.SafetensorError as error:
        raise OSError(str(error)) from error


def _apart(state: State) -> dict[str, Tensor]:
    """The tensors, no two of them in the same memory."""
    seen, apart = set(), {}
    for name, tensor in state.items():
        dense = tensor.detach().contiguous()
        memory = dense.untyped_storage().data_ptr()
        apart[name] = dense.clone() if memory in seen else dense
        seen.add(memory)
    return apart


def _check_tensor(name: str, tensor: Any, out: Path) -> None:
    if isinstance(tensor, Tensor) and is_lazy(tensor):
        raise SurgeryError(f"{name} has no size yet: let the factory run a batch through the model")
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise SurgeryError(f"{name} is on the meta device and has no values: let the factory make it on the CPU")
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
    if out.suffix == SAFETENSORS and not dense:
        what = f"{str(tensor.layout)[6:]} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise SurgeryError(f"safetensors holds dense tensors only, and {name} is a {what}: write a .pt file")


def _check_ending(path: Path) -> None:
    if path.suffix not in (SAFETENSORS, *TORCHS):
        raise SurgeryError(f"{path}: the name of a weight file ends in {SAFETENSORS}, {', '.join(TORCHS)}")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("a .safetensors file", "tune") from error
    return safetensors
