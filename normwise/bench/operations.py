"""The contenders of a case: who takes part, what a call of each is, and who was wrong and is left out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.bench import gate, layers
from normwise.bench.cases import Case
from normwise.bench.timing import Call
from normwise.errors import NormwiseError

OURS, TORCH, COPY = "normwise", "torch", "copy"
OURS_COMPILED, TORCH_COMPILED, ONEDNN = "normwise compiled", "torch compiled", "oneDNN"
CUDNN, LIGER, FLASH, QUACK = "cuDNN", "Liger", "flash-attn", "QuACK"  # on a GPU
CONTENDERS = (OURS, TORCH, OURS_COMPILED, TORCH_COMPILED, ONEDNN, CUDNN, LIGER, FLASH, QUACK)


class Prepared(NamedTuple):
    """What is to be timed, and what is to be said of it.

    Attributes:
        calls: By contender. There are none if normwise's layer is wrong.
        excluded: Why a contender is left out: it raised, or it is normwise's and wrong.
        inexact: By how much another's is wrong. It is timed all the same: it is what people run.
        reference: The contender whose time the others' are set beside.
    """

    calls: dict[str, Call]
    excluded: dict[str, str]
    inexact: dict[str, str]
    reference: str


class Entrant(NamedTuple):
    """A contender with its own layer and, where its layout is its own, its own inputs."""

    run: Callable[..., tuple[Tensor, ...]]
    layer: nn.Module  # with parameters and memory, below `norm`
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def prepare(case: Case) -> Prepared:
    """The calls of a case, each compared with the truth first."""
    inputs, gradients = layers.tensors(case)
    found = Prepared({}, {}, {}, COPY)
    state = state_of(layers.ours(case))
    gradients = gate.settled(case, inputs, gradients, state)
    true = gate.truth(case, inputs, gradients, state)
    for name, make in _entrants(case, inputs, gradients):
        try:
            entrant = make()
            reason = gate.fault(found_by(case, entrant), true)
        except (RuntimeError, ValueError, NormwiseError) as error:  # no compiler, no kernel for the dtype
            found.excluded[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            enter(found, name, call_of(case, entrant), reason)
        if OURS in found.excluded:
            return found
    found.calls[COPY] = copy_of(inputs)
    return found


def enter(found: Prepared, name: str, call: Call, reason: str | None) -> None:
    """Let a contender take part, unless it is normwise's and wrong."""
    if reason is not None and name in (OURS, OURS_COMPILED):
        found.excluded[name] = reason
        return
    found.calls[name] = call
    if reason is not None:
        found.inexact[name] = reason


def _entrants(
    case: Case, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> Iterator[tuple[str, Callable[[], Entrant]]]:
    """Who takes part, in turn; made when wanted."""

    def eager(make: Callable[[Case], Any]) -> Entrant:
        layer = make(case)
        return Entrant(layer, layer, inputs, gradients)

    def compiled(make: Callable[[Case], Any]) -> Entrant:
        layer = make(case)
        return Entrant(torch.compile(layer, dynamic=False), layer, inputs, gradients)

    yield OURS, lambda: eager(layers.ours)
    yield TORCH, lambda: eager(layers.torchs)
    if case.compiled:
        yield OURS_COMPILED, lambda: compiled(layers.ours)
        yield TORCH_COMPILED, lambda: compiled(layers.torchs)
    if _has_onednn_batch_norm(case):
        yield ONEDNN, lambda: _onednn_batch_norm(case, inputs, gradients)
    if _has_onednn_layer_norm(case):
        yield ONEDNN, lambda: _onednn_layer_norm(case, inputs)


def call_of(case: Case, entrant: Entrant) -> Call:
    """What is timed: the pass, and nothing else."""
    if not case.what.backward:
        return lambda: entrant.run(*entrant.inputs)
    wanted = [*entrant.inputs, *entrant.layer.parameters()]
    return lambda: torch.autograd.grad(entrant.run(*entrant.inputs), wanted, entrant.gradients)


def found_by(case: Case, entrant: Entrant) -> gate.Found:
    """What a contender gives, by name, after one step."""
    parameters = dict(entrant.layer.named_parameters())
    names = tuple(name.rpartition(".")[2] for name in parameters)
    outputs = entrant.run(*entrant.inputs)
    found = gate.named_outputs(outputs)
    if case.what.mode == "training":
        found |= {name: value for name, value in state_of(entrant.layer).items() if name.startswith("running")}
    if case.what.backward:
        wanted = [*entrant.inputs, *parameters.values()]
        found |= gate.named_gradients(torch.autograd.grad(outputs, wanted, entrant.gradients), names, case)
    return found


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and memory, by their last names."""
    return {name.rpartition(".")[2]: tensor.clone() for name, tensor in layer.state_dict().items()}


def copy_of(inputs: tuple[Tensor, ...]) -> Call:
    """The yardstick: each input copied to a fresh tensor."""
    plain = [x.detach() for x in inputs]

    def run() -> None:
        for x in plain:
            torch.empty_like(x).copy_(x)

    return run


# oneDNN. torch exposes its batch norm for tensors in oneDNN's own layout, and its layer norm through TorchScript's
# fuser, without gradients. For RMS, group and instance norm and for a fused residual it has none. In bfloat16 the
# batch norm damages the heap (torch 2.13: "free(): invalid next size"), so it is left alone there.


def _has_onednn_batch_norm(case: Case) -> bool:
    is_image = case.operation == "batch_norm" and len(case.shape) == 4 and case.layout == "contiguous"
    return is_image and case.dtype == "float32" and torch._C._has_mkldnn


def _has_onednn_layer_norm(case: Case) -> bool:
    is_forward = case.operation == "layer_norm" and case.what.mode == "evaluation"
    return is_forward and case.dtype == "float32" and torch._C._has_mkldnn


def _onednn_batch_norm(case: Case, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Entrant:
    """The tensors are in oneDNN's layout already: the conversion is not counted."""
    layer = layers.torchs(case)
    norm: Any = layer.norm

    def run(x: Tensor) -> tuple[Tensor, ...]:
        memory = norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
        return (torch.batch_norm(x, norm.weight, norm.bias, *memory, cudnn_enabled=False),)

    own = tuple(x.detach().to_mkldnn().requires_grad_(x.requires_grad) for x in inputs)
    return Entrant(run, layer, own, tuple(gradient.to_mkldnn() for gradient in gradients))


def _onednn_layer_norm(case: Case, inputs: tuple[Tensor, ...]) -> Entrant:
    layer = layers.torchs(case)
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript: this is the only way to that operator
        jit.enable_onednn_fusion(True)
        traced = jit.trace(copy.deepcopy(layer), inputs)
        for _ in range(3):  # it is fused when its shapes have been seen
            traced(*inputs)
        jit.enable_onednn_fusion(False)
    return Entrant(traced, layer, inputs, ())
