"""Others' kernels, where they are installed: each with the parameters of torch's layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional as F

from normwise.bench.cases import Case
from normwise.bench.layers import EPS, Outputs, groups
from normwise.bench.operations import CUDNN, FLASH, LIGER, QUACK

Run = Callable[..., Outputs]

_ROWS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")


def who(case: Case) -> list[str]:
    """Those who are there, and have something for a case."""
    return [name for name, (package, has) in _PACKAGES.items() if has(case) and (not package or find_spec(package))]


def run(name: str, case: Case, norm: Any) -> Run:
    """What one of them makes of the parameters of torch's layer."""
    return _RUNS[name](case, norm)


def _cudnn(case: Case, norm: Any) -> Run:
    """cuDNN, whatever torch would choose."""

    def batch_norm(x: torch.Tensor) -> Outputs:
        memory = norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
        output = torch.ops.aten.cudnn_batch_norm(x, norm.weight, norm.bias, *memory)[0]
        return (F.relu(output, inplace=True) if case.operation == "batch_norm_relu" else output,)

    return batch_norm


def _liger(case: Case, norm: Any) -> Run:
    if case.operation == "layer_norm":
        layer = _from("liger_kernel.transformers.layer_norm", "LigerLayerNorm")(case.shape[-1], EPS)
    elif case.operation == "group_norm":
        made = _from("liger_kernel.transformers.group_norm", "LigerGroupNorm")
        layer = made(case.shape[1], groups(case.shape[1]), eps=EPS)
    elif case.adds:
        made = _from("liger_kernel.transformers.fused_add_rms_norm", "LigerFusedAddRMSNorm")
        layer = made(case.shape[-1], EPS, in_place=False)
    else:  # in place, its backward would write into the gradient that it is given, which others are given as well
        layer = _from("liger_kernel.transformers.rms_norm", "LigerRMSNorm")(case.shape[-1], EPS, in_place=False)
    for name, parameter in norm.named_parameters():
        setattr(layer, name, parameter)
    return layer if case.adds else lambda x: (layer(x),)


def _flash(case: Case, norm: Any) -> Run:
    function = _from("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    is_rms = "rms" in case.operation

    def normalize(x: torch.Tensor, residual: torch.Tensor | None = None) -> Outputs:
        bias = getattr(norm, "bias", None)
        found = function(
            x, norm.weight, bias, residual=residual, eps=EPS, prenorm=residual is not None, is_rms_norm=is_rms
        )
        return found if case.adds else (found,)

    return normalize


def _quack(case: Case, norm: Any) -> Run:
    if case.operation == "layer_norm":
        forward = _from("quack.rmsnorm", "layernorm_fwd")
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()  # it takes no others
        return lambda x: (forward(x, weight, bias, eps=EPS),)
    function = _from("quack.rmsnorm", "rmsnorm")

    def normalize(x: torch.Tensor, residual: torch.Tensor | None = None) -> Outputs:
        found = function(x, norm.weight, residual=residual, eps=EPS, prenorm=residual is not None)
        return found if case.adds else (found,)

    return normalize


def _from(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


_RUNS: Mapping[str, Callable[[Case, Any], Run]] = MappingProxyType(
    {CUDNN: _cudnn, LIGER: _liger, FLASH: _flash, QUACK: _quack}
)


def _has_liger(case: Case) -> bool:
    """The backward of its group norm writes outside its tensors, and so is left alone."""
    if case.operation == "group_norm":
        return not case.what.backward and case.layout == "contiguous"
    return case.operation in _ROWS and case.operation != "add_layer_norm"


def _has_quack(case: Case) -> bool:
    """Of layer norm it has the forward alone."""
    return "rms" in case.operation or (case.operation == "layer_norm" and not case.what.backward)


_PACKAGES: Mapping[str, tuple[str, Callable[[Case], bool]]] = MappingProxyType(
    {
        CUDNN: ("", lambda case: case.operation.startswith("batch_norm")),
        LIGER: ("liger_kernel", _has_liger),
        FLASH: ("flash_attn", lambda case: case.operation in _ROWS),
        QUACK: ("quack", _has_quack),
    }
)
