"""A layer's parameters and buffers: how they are made, sized, grown, moved, copied, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from normwise.commit import Store
from normwise.errors import NormwiseError, ShapeError
from normwise.holder import POOL, START, Holder, Slot, UnsizedBuffer, buffers_of
from normwise.memory import Memory
from normwise.plan import Over, Plan, over_shape
from normwise.spec import NormSpec


class Stateful(Holder):
    """The state of a declared normalization; `Norm` adds what is done with it."""

    spec: NormSpec
    _freezes: int  # how often it is frozen
    _froze: dict[str, Tensor | None]  # parameters that took gradients until they were frozen, and what waited there
    _held: int  # within how many `no_update`
    _domain: str | None  # within `domain`
    _window: int  # batches of `accumulate`; 0: none

    def _register(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Names for everything; what is not declared is there as None, as in torch's layers."""
        self._freezes, self._froze, self._held, self._domain, self._window = 0, {}, 0, None, 0
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in dict.fromkeys(("weight", "bias", *self._starts())):
            self.register_parameter(name, self._new_parameter(options) if name in self._starts() else None)
        memory = self.spec.memory
        for name in (*(f"running_{name}" for name in self.spec.normalizer.remembers), "num_batches_tracked"):
            self.register_buffer(name, None)
        if memory is not None:
            self._remember(self, memory, device, dtype)
        self._start()

    def reset_parameters(self) -> None:
        """Start anew: parameters at their first values, memory empty. A frozen layer stays as it is."""
        if not self.frozen:
            self._start()

    def reset_running_stats(self) -> None:
        """Forget all batches, of every domain: mean 0, variance 1, none counted. A frozen layer stays as it is."""
        if not self.frozen:
            self._forget()

    @torch.no_grad()
    def _start(self) -> None:
        self._forget()
        for name, start in self._starts().items():
            parameter = self._parameters.get(name)
            if parameter is not None and not is_lazy(parameter):
                parameter.fill_(start)

    def _forget(self) -> None:
        for holder in self._holders():
            for name, buffer in holder._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    buffer.fill_(START.get(name, 0.0))
            if holder._skips is not None:
                holder._skips.zero_()

    def train(self, mode: bool = True) -> Any:
        """As any module; on leaving training, say that batches were skipped where the host could not see it."""
        if self.training and not mode:
            for holder in self._holders():
                holder._tell()
        return super().train(mode)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the memories beside the layer's own."""
        held = self._modules.get("_domains")
        return () if held is None else tuple(held._modules)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not within the context that the original happens to be in; it stays frozen, though."""
        return {**super().__getstate__(), "_held": 0, "_domain": None, "_window": 0}

    def _starts(self) -> Mapping[str, float]:
        return {} if self.spec.recovery is None else self.spec.recovery.parameters

    def _parameters_of_recovery(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in self._starts()]

    def _holder(self) -> Holder:
        """The module with the memory in use: the layer itself, or that of a domain."""
        return self if self._domain is None else self._held_by(self._domain)

    def _holders(self) -> Iterator[Holder]:
        yield self
        for name in self.domains:
            yield self._held_by(name)

    def _held_by(self, domain: str) -> Holder:
        return cast("Holder", cast("nn.Module", self._modules["_domains"])._modules[domain])

    def _store(self) -> Store:
        """The buffers in use."""
        holder, remembers = self._holder(), self.spec.normalizer.remembers
        buffers = holder._buffers
        seen: tuple[Any, ...] = ()
        if "_seen_batch" in buffers:
            names = ("_seen_batch", *(f"_seen_{name}" for name in remembers), "_seen_batches", "_seen_waiting")
            seen = tuple(self._along_memory(buffers[name]) for name in names)
        return Store(
            tuple(buffers[f"running_{name}"] for name in remembers),  # type: ignore[misc]  # the caller saw them there
            self._along_memory(buffers["num_batches_tracked"]),
            holder._skips,
            buffers.get("batch_samples"),
            tuple(buffers[name] for name in POOL) if self._window else (),  # type: ignore[misc]
            seen,
        )

    def _along_memory(self, counter: Tensor | None) -> Tensor | None:
        """A counter along the elastic axis, shaped to broadcast against the memory; any other buffer as it is."""
        dim = self._elastic_dim
        if counter is None or dim is None or counter.dim() != 1:
            return counter
        return counter.reshape([-1 if d == dim else 1 for d in range(len(self.spec.memory_over))])

    @property
    def _elastic_dim(self) -> int | None:
        """The dimension of the memory that is its elastic axis."""
        return None if self.spec.elastic is None else self.spec.memory_over.index((self.spec.elastic,))

    @property
    def frozen(self) -> bool:
        """Whether the layer is frozen: `normwise.freeze`."""
        return self._freezes > 0

    def _freeze(self, *, parameters: bool) -> None:
        """Freeze once more; what waits in the gradients of the parameters is put aside, out of an optimizer's way."""
        self._freezes += 1
        for name, parameter in self._own_parameters():
            if parameters and parameter.requires_grad:
                self._froze[name] = parameter.grad
                parameter.requires_grad, parameter.grad = False, None

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The layer's parameters and what stands for them in a parametrization; not those of an activation in it."""
        yield from self.named_parameters(recurse=False)
        parametrized = self._modules.get("parametrizations")
        if parametrized is not None:
            yield from parametrized.named_parameters(prefix="parametrizations")

    def _thaw(self) -> None:
        """Undo one freezing; the last one gives the parameters back what they had."""
        self._freezes = max(self._freezes - 1, 0)
        if self._freezes > 0:
            return
        for name, parameter in self._own_parameters():
            if name in self._froze:
                parameter.requires_grad = True
                parameter.grad = self._froze[name] if parameter.grad is None else parameter.grad
        self._froze = {}

    def _add_domain(self, name: str) -> None:
        """A memory more, empty."""
        held = self._modules.get("_domains")
        if held is None:
            held = nn.Module()
            self.add_module("_domains", held)
        if self.spec.memory is not None and name not in held._modules:
            like = self._buffers["num_batches_tracked"]
            holder = Holder()
            kept = self._buffers[f"running_{self.spec.normalizer.remembers[0]}"]
            if like is None or kept is None:
                raise ValueError(f"domain '{name}' of a layer whose buffers are None")
            self._remember(holder, self.spec.memory, like.device, kept.dtype)
            holder.train(self.training)
            held._modules[name] = holder  # add_module refuses "train" and the like
            if self._window:
                self._pool_in(holder)

    def _drop_domain(self, name: str) -> None:
        """Forget a memory that no batch has entered."""
        if name in self.domains and not self._held_by(name)._is_fed():
            del cast("nn.Module", self._modules["_domains"])._modules[name]

    def _add_pool(self, window: int) -> None:
        for holder in self._holders():
            self._pool_in(holder)
        self._window = window

    def _pool_in(self, holder: Holder) -> None:
        pool = [Slot(POOL[0], "single", persistent=False)]
        pool += [Slot(name, "memory", persistent=False) for name in POOL[1:]]
        kept = holder._buffers[f"running_{self.spec.normalizer.remembers[0]}"]
        if kept is not None:
            self._fill(holder, pool, kept.device, kept.dtype if kept.device.type == "mps" else torch.float64)

    def _drop_pool(self) -> None:
        for holder in self._holders():
            for name in POOL:
                holder._buffers.pop(name, None)
                holder._non_persistent_buffers_set.discard(name)
        self._window = 0

    @torch.inference_mode(False)
    def _remember(self, holder: Holder, memory: Memory, device: Any, dtype: torch.dtype | None) -> None:
        """Give a module an empty memory."""
        self._fill(holder, buffers_of(self.spec.normalizer, memory), device, dtype)
        if memory.updates:
            holder._skips = torch.zeros(2, dtype=torch.long, device=device)

    def _exchange_memory(self, memory: Memory) -> None:
        """Declare another memory of the same statistics over the same axes, and make the buffers it needs more."""
        if self.spec.memory is None:
            return
        self.spec = replace(self.spec, memory=memory)
        for holder in self._holders():
            kept = holder._buffers[f"running_{self.spec.normalizer.remembers[0]}"]
            missing = [slot for slot in buffers_of(self.spec.normalizer, memory) if slot.name not in holder._buffers]
            if kept is not None:
                self._fill(holder, missing, kept.device, kept.dtype)

    @torch.inference_mode(False)
    def _fill(self, holder: Holder, buffers: list[Slot], device: Any, dtype: torch.dtype | None) -> None:
        """Register buffers at their start."""
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for buffer in buffers:
            options = {"device": device, "dtype": torch.long if buffer.whole else wide}
            if self.spec.unknown and buffer.shape == "memory":
                tensor: Tensor = UnsizedBuffer(**options)
            else:
                shape = self._memory_shape() if buffer.shape == "memory" else ()
                shape = (self._length(),) if buffer.shape == "counter" else shape
                tensor = torch.full(shape, START.get(buffer.name, 0.0), **options)
            holder.register_buffer(buffer.name, tensor, persistent=buffer.persistent)

    def _new_parameter(self, options: dict[str, Any]) -> Any:
        if self.spec.unknown:
            return UninitializedParameter(**options)
        return nn.Parameter(torch.empty(over_shape(self.spec.parameter_over, dict(self.spec.sizes)), **options))

    def _length(self) -> int:
        """How many places of the elastic axis are remembered: as many as there are, declared, or none yet."""
        kept = self._buffers.get("num_batches_tracked")
        if kept is not None and kept.dim() == 1:
            return kept.shape[0]
        return dict(self.spec.sizes).get(self.spec.elastic or "", 0)

    def _memory_shape(self, length: int | None = None) -> tuple[int, ...]:
        sizes = dict(self.spec.sizes)
        if self.spec.elastic is not None:
            sizes[self.spec.elastic] = self._length() if length is None else length
        return over_shape(self.spec.memory_over, sizes)

    def _materialize_for(self, plan: Plan) -> None:
        sizes = {name: plan.size(name) for name in self.spec.unknown}
        if 0 in sizes.values():
            empty = next(name for name, size in sizes.items() if size == 0)
            raise ShapeError(f"the size of axis '{empty}' cannot be found from an empty input of shape {plan.shape}")
        self._materialize(sizes)

    @torch.inference_mode(False)
    def _materialize(self, sizes: Mapping[str, int]) -> None:
        self.spec = self.spec.with_sizes(sizes)
        for name in self._starts():
            getattr(self, name).materialize(over_shape(self.spec.parameter_over, dict(self.spec.sizes)))
        for holder in self._holders():
            for buffer in holder._buffers.values():
                if isinstance(buffer, UninitializedBuffer):
                    buffer.materialize(self._memory_shape())
        self._start()

    @torch.inference_mode(False)
    def _resize(self, length: int) -> None:
        """Remember another number of places of the elastic axis, in the same buffers; what is remembered stays."""
        dim = self._elastic_dim
        for holder in self._holders():
            for name, buffer in holder._buffers.items():
                if buffer is None or dim is None or buffer.dim() == 0 or is_lazy(buffer):
                    continue
                at = 0 if buffer.dim() == 1 and buffer.dtype == torch.long else dim
                if buffer.shape[at] == length:
                    continue
                shape = [length if d == at else size for d, size in enumerate(buffer.shape)]
                resized = buffer.new_full(shape, START.get(name, 0.0))
                both = min(length, buffer.shape[at])
                resized.narrow(at, 0, both).copy_(buffer.narrow(at, 0, both))
                buffer.set_(resized)  # type: ignore[call-overload]  # its stubs know storages only

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As `Module` does it, but what has no size yet is saved as it is, because it cannot be detached."""
        super()._save_to_state_dict(destination, prefix, keep_vars=True)
        for name in (*self._parameters, *self._buffers):
            tensor = destination.get(prefix + name)
            if tensor is not None and not keep_vars and not is_lazy(tensor):
                destination[prefix + name] = tensor.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load, after taking sizes, lengths and domains that are not known yet from the checkpoint."""
        errors: list[str] = args[-1]
        name = prefix.rstrip(".") or type(self).__name__
        try:
            refusal = self._make_room(state_dict, prefix)
        except NormwiseError as error:
            refusal = str(error)
        for holder in self._holders():  # the loader goes on to the domains
            holder._refuses = bool(refusal)
        if refusal:
            errors.append(f"{name}: {refusal}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _make_room(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Sizes, domains and lengths as in the checkpoint; what speaks against loading it, or nothing."""
        spec = self.spec
        remembered = {f"running_{name}": spec.memory_over for name in spec.normalizer.remembers}
        refusal = _refusal(state_dict, prefix, remembered)
        if refusal:
            return refusal
        if spec.unknown:
            overs = {**dict.fromkeys(self._starts(), spec.parameter_over), **remembered}
            found = [(overs[name], state_dict.get(prefix + name)) for name in overs]
            shapes = [(over, tensor.shape) for over, tensor in found if tensor is not None and not is_lazy(tensor)]
            sizes = spec.sizes_from(shapes)
            missing = set(spec.unknown) - set(sizes)
            if shapes and missing:
                return f"the checkpoint does not give the size of axis '{min(missing)}'"
            if not missing:
                self._materialize(sizes)
        if spec.memory is None:
            return ""
        saved = prefix + "_domains."
        for key in state_dict:
            if key.startswith(saved):
                self._add_domain(key.removeprefix(saved).split(".")[0])
        holders = [prefix, *(f"{saved}{name}." for name in self.domains)]
        kept = [(part + name, state_dict.get(part + name)) for part in holders for name in remembered]
        tensors = {key: tensor for key, tensor in kept if tensor is not None and not is_lazy(tensor)}
        lengths = {t.shape[self._elastic_dim] for t in tensors.values()} if self._elastic_dim is not None else set()
        if len(lengths) == 1:
            self._resize(length := lengths.pop())
            if spec.elastic in dict(spec.sizes):
                self.spec = self.spec.with_sizes({spec.elastic: length})
        return ""


def _refusal(state_dict: Mapping[str, Any], prefix: str, remembered: Mapping[str, Over]) -> str:
    """Why a checkpoint's statistics cannot be used, those of its domains included, or nothing."""
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (name in remembered or name.startswith("_domains.")):
            unusable = _unusable(name, tensor)
            if unusable:
                return unusable
    return ""


def _unusable(key: str, tensor: Tensor) -> str:
    """Why a remembered statistic cannot be used, or nothing."""
    if "running_" not in key or tensor.is_meta or is_lazy(tensor):
        return ""
    wrong = ~tensor.isfinite() if key.endswith("running_mean") else ~(tensor.isfinite() & (tensor >= 0))
    if not wrong.any():
        return ""
    place = wrong.nonzero()[0].tolist()
    at = place[0] if len(place) == 1 else tuple(place)
    value = tensor[tuple(place)].item()
    return f"{key} is {'negative' if value < 0 and value > -math.inf else 'not finite'} in channel {at}: {value:g}"
