"""What counts: masks and lengths over named axes, seen through a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from normwise.errors import PatternError, ShapeError
from normwise.pattern import ELLIPSIS, Pattern, check_known, parse
from normwise.plan import Plan
from normwise.transforms import being_traced

Lengths: TypeAlias = Mapping[str, Tensor | Sequence[int]]


def valid_view(
    pattern: Pattern,
    plan: Plan,
    valid: Tensor | None,
    valid_axes: str | None,
    lengths: Lengths | None,
    device: torch.device,
) -> Tensor | None:
    """One mask that broadcasts against the plan's view, True where an element counts; None: everything does.

    Args:
        pattern: Names the axes.
        plan: Of the input.
        valid: A bool mask over `valid_axes`.
        valid_axes: For example "n t" or "n ..."; None: the leading dimensions of the input.
        lengths: For each named axis how many places count, over the leading dimensions beside it.
        device: Of the input.

    Raises:
        TypeError: a mask that is not bool, lengths that are not whole numbers.
        ShapeError: a mask or lengths that do not fit.
        PatternError: an axis that is not in the pattern.
    """
    if lengths is not None and not isinstance(lengths, Mapping):
        raise TypeError(f"lengths is {lengths!r}, and says for each axis how many places count: {{'t': [5, 3]}}")
    masks = [] if valid is None else [_mask(pattern, plan, valid, valid_axes)]
    for name, counts in (lengths or {}).items():
        masks.append(_up_to(pattern, plan, name, torch.as_tensor(counts, device=device)))
    if valid is None and valid_axes is not None:
        raise PatternError(f"valid_axes='{valid_axes}' says which axes `valid` covers, and there is no `valid`")
    if not masks:
        return None
    combined = masks[0]
    for mask in masks[1:]:
        combined = combined & mask
    return combined


def masked_axes(mask: Tensor, plan: Plan) -> set[str]:
    """The names of the axes along which a mask may differ."""
    return {name for name, size in zip(plan.names, mask.shape, strict=True) if size != 1}


def used(mask: Tensor, name: str, plan: Plan) -> Tensor:
    """At which places of an axis anything counts."""
    own = plan.names.index(name)
    for dim in range(mask.dim()):
        if dim != own:
            mask = mask.any(dim, keepdim=True)
    return mask.reshape(-1).expand(plan.view[own])


def _mask(pattern: Pattern, plan: Plan, valid: Tensor, valid_axes: str | None) -> Tensor:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        kind = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(
            f"valid is {kind}, and a mask of what counts is a bool tensor: attention_mask.bool(), or ~key_padding_mask"
        )
    if valid_axes is None:
        hint = f"; valid_axes= names the axes that a mask covers, of '{' '.join(pattern.names)}'"
        return _leading(plan, valid, "valid", hint)
    if not isinstance(valid_axes, str):
        raise TypeError(f"valid_axes is {valid_axes!r}, and names axes in one text, as 'n t'")
    dims = _dims_named(pattern, plan, valid_axes)
    sizes = tuple(math.prod([plan.view[dim] for dim in group]) for group in dims)
    if tuple(valid.shape) != sizes:
        raise ShapeError(f"valid has shape {tuple(valid.shape)}, but axes '{valid_axes}' have {sizes}: {plan.shape}")
    flat = [dim for group in dims for dim in group]
    order = sorted(range(len(flat)), key=flat.__getitem__)
    valid = valid.reshape([plan.view[dim] for dim in flat]).permute(order)
    return valid.reshape([size if dim in flat else 1 for dim, size in enumerate(plan.view)])


def _dims_named(pattern: Pattern, plan: Plan, text: str) -> list[list[int]]:
    """For each dimension of a mask the view's dimensions that it covers; '...' is as many as in the input."""
    dims: list[list[int]] = []
    for axes in parse(text).dims:
        names = [axis.name for axis in axes]
        check_known(pattern, names, "valid_axes")
        found = [dim for dim, name in enumerate(plan.names) if name in names]
        dims += [[dim] for dim in found] if names == [ELLIPSIS] else [[plan.names.index(name) for name in names]]
    return dims


def _up_to(pattern: Pattern, plan: Plan, name: str, counts: Tensor) -> Tensor:
    """The first places of an axis, as many as `counts` says for each example."""
    check_known(pattern, [name], "lengths")
    if plan.names.count(name) > 1:
        raise PatternError(f"lengths names '...', which is {plan.names.count(name)} dimensions here", pattern.text)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"lengths of axis '{name}' are {counts.dtype}, and lengths are whole numbers")
    size = plan.size(name)
    here = _beside(plan, counts, name)
    if not being_traced() and counts.device.type == "cpu" and counts.numel():
        least, most = (int(bound) for bound in counts.aminmax())
        if least < 0 or most > size:
            wrong = least if least < 0 else most
            raise ShapeError(f"a length of {wrong} along axis '{name}', which has {size}: shape {plan.shape}")
    dim = plan.names.index(name)
    places = torch.arange(size, device=counts.device)
    return places.reshape([size if d == dim else 1 for d in range(len(plan.view))]) < here


def _beside(plan: Plan, counts: Tensor, name: str) -> Tensor:
    """Lengths of an axis, over the leading dimensions beside it, shaped to broadcast against the view."""
    own = plan.names.index(name)
    dims = [dim for dim in range(len(plan.view)) if dim != own][: counts.dim()]
    sizes = tuple(plan.view[dim] for dim in dims)
    if tuple(counts.shape) != sizes:
        raise ShapeError(
            f"lengths of axis '{name}': shape {tuple(counts.shape)}, but the input has {sizes} beside it: {plan.shape}"
        )
    return counts.reshape([size if dim in dims else 1 for dim, size in enumerate(plan.view)])


def _leading(plan: Plan, tensor: Tensor, what: str, hint: str) -> Tensor:
    """A tensor over the leading dimensions of the input, shaped to broadcast against the view."""
    rank = tensor.dim()
    leading = plan.shape[:rank]
    if tuple(tensor.shape) != leading:
        raise ShapeError(
            f"{what}: shape {tuple(tensor.shape)}, but the input begins with {leading}: {plan.shape}{hint}"
        )
    dims = sum(plan.parts[:rank])
    return tensor.reshape([*plan.view[:dims], *([1] * (len(plan.view) - dims))])
