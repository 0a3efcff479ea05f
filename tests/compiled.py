"""Calls of the compiled kernels for the tests: drawn at random, made, and computed again in float64 by the formula."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normwise import L2, RMS, Affine, OffsetScale, Scale, Standardize
from normwise.kernels import run as running
from normwise.kernels.backends import extension
from normwise.kernels.choose import Choice, choose
from normwise.kernels.reference import Recalled, Steps
from normwise.moments import Moments
from normwise.normalizers import Normalizer
from normwise.pattern import parse, parse_names
from normwise.plan import Over, Plan, make_plan
from normwise.pointwise import Activation, Gate
from normwise.recoveries import Recovery
from tests.settings import changed
from tests.tolerances import KERNELS, KERNELS_GRADIENTS, KERNELS_MOMENTS, KERNELS_SUMS, Tolerance

needs_kernels = pytest.mark.skipif(extension is None, reason="`normwise backends` says why there are no kernels")
INSTRUCTION_SETS: list[str] = [] if extension is None else extension.instruction_sets()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATES: tuple[Gate, ...] = ("silu", "sigmoid", "gelu", "relu")
TAILS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 2049)
EPS = 0.01
NEAR_A_KINK = 1e-3  # where two right results may disagree on the side of it
LARGEST = 30_000  # elements of a drawn tensor


@dataclass(frozen=True)
class Word:
    """A pattern whose contiguous tensors have one word, and the axes that its parameters may be over."""

    word: str
    text: str
    overs: tuple[str, ...]
    fixed: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.word or 'one'} of {self.text}"


WORDS = (
    Word("KR", "n [d]", ("d", "n", "n d")),
    Word("KR", "n c [l]", ("c", "c l", "l", "n c")),
    Word("KR", "n g [k l]", ("g k", "k", "g", "k l", "g k l", "l", "n g")),
    Word("RK", "[n] c", ("c", "n")),
    Word("RK", "[n] t c", ("t c", "c", "n")),
    Word("RKR", "[n] c [l]", ("c", "l", "c l", "n", "n c", "n l", "n c l")),
    Word("KRK", "n [c] l", ("c", "l", "n", "n l", "n c")),
    Word("KRKR", "n [h] g [k]", ("g k", "g", "k", "n", "h", "n h", "n g k")),
    Word("K", "n c [d]", ("c", "n c", "d"), (("d", 1),)),
    Word("R", "[n d]", ("d", "n d", "n")),
    Word("", "[n]", ("n",), (("n", 1),)),
)


@dataclass(frozen=True)
class Call:
    """What is declared, and of what: everything that is known of a call but its numbers."""

    word: Word
    sizes: tuple[tuple[str, int], ...]
    dtype: torch.dtype = torch.float32
    normalizer: Normalizer = Standardize(EPS)  # noqa: RUF009 - frozen
    recovery: type[Recovery] | None = None
    over: str = ""
    activation: Activation | None = None
    masked: tuple[str, ...] | None = None  # the axes that a mask tells apart
    residual: bool = False
    recalls: bool = False  # whether remembered statistics are used instead of the batch's
    parameters: torch.dtype = torch.float32
    strided: bool = False  # whether parameters are not contiguous
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True)  # gradients of x, residual, weight, bias
    unused: str = ""  # "output" or "sum": the one that has no gradient
    seed: int = 0
    gate: Gate | None = None
    wants_gate: bool = True  # its gradient

    @property
    def plan(self) -> Plan:
        pattern = parse(self.word.text)
        return make_plan(pattern, tuple(dict(self.sizes)[name] for name in pattern.names))

    @property
    def parameter_over(self) -> Over:
        return parse_names(self.over) if self.over else ()

    @property
    def declared(self) -> Recovery | None:
        return None if self.recovery is None else self.recovery(self.over)  # type: ignore[call-arg]

    def choice(self) -> Choice:
        """What is chosen for a contiguous input."""
        strides = torch.empty(self.plan.shape, device="meta").stride()
        use = "instead" if self.recalls else None
        return choose(self.plan, strides, self.dtype, "cpu", self.normalizer, self.declared, self.parameter_over, use)  # type: ignore[arg-type]


def plain(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype) -> Call:
    """Standardized, with a weight and a bias over some axes, and nothing else."""
    return Call(Word("", text, (over,)), tuple(sizes.items()), dtype, Standardize(EPS), Affine, over)


class Numbers(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    residual: Tensor | None
    parameters: list[Tensor]
    valid: Tensor | None
    recalled: tuple[Tensor, ...]
    d_output: Tensor
    d_sum: Tensor
    gate: Tensor | None = None


class Found(NamedTuple):
    """The output, the sum, the moments, and the gradients of the inputs that wanted one."""

    output: Tensor
    total: Tensor | None
    moments: Moments | None
    gradients: list[Tensor]


def drawn(word: Word, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Random calls that a kernel takes, the same at every run."""
    random_ = random.Random(f"{word} {dtype}")
    while count:
        call = _draw(word, dtype, random_)
        if call.choice().kernel == "cpu":
            count -= 1
            yield call


def with_gates(calls: Iterator[Call]) -> Iterator[Call]:
    """The calls, half of them with a gate, for kernels that multiply by its function."""
    for call in calls:
        name = GATES[call.seed // 2 % len(GATES)]
        yield call if call.seed % 2 else replace(call, gate=name, wants_gate=call.seed % 3 > 0)


def _draw(word: Word, dtype: torch.dtype, random_: random.Random) -> Call:
    names = parse(word.text).names
    sizes = dict(word.fixed)
    for name in random_.sample(names, len(names)):
        room = LARGEST // math.prod(sizes.values())
        sizes.setdefault(name, random_.choice([size for size in TAILS if size <= max(room, 1)]))
    normalizer = random_.choice([Standardize(EPS), RMS(EPS), L2(EPS)])
    recovery = random_.choice([None, Scale, Affine, Affine, OffsetScale])
    wanted = random_.choice([(True,) * 4, tuple(random_.random() < 0.5 for _ in range(4))])
    return Call(
        word,
        tuple((name, sizes[name]) for name in names),
        dtype,
        normalizer,
        recovery,
        "" if recovery is None else random_.choice(word.overs),
        random_.choice([None, None, "relu", "silu", "gelu"]),
        random_.choice([None, tuple(name for name in names if random_.random() < 0.5)]),
        random_.random() < 0.4,
        type(normalizer) is not L2 and random_.random() < 0.3,
        random_.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        random_.random() < 0.3,
        wanted,  # type: ignore[arg-type]
        random_.choice(["", "", "output", "sum"]),
        random_.randrange(10**6),
    )


def numbers(call: Call) -> Numbers:
    """Random tensors for a call: about 1 with a spread of 2, with what is worst in the padding."""
    torch.manual_seed(call.seed)
    plan = call.plan
    x, d_output, d_sum = (torch.randn(plan.shape) for _ in range(3))
    x = (x * 2 + 1).to(call.dtype)
    residual = torch.randn(plan.shape).to(call.dtype) if call.residual else None
    parameters: list[Tensor] = []
    if call.recovery is not None:
        over = [plan.size(name) for names in call.parameter_over for name in names]
        for _ in call.recovery.parameters:
            parameter = ((torch.rand(over) + 0.5) * torch.randn(over).sign()).to(call.parameters)
            parameters.append(_strided(parameter) if call.strided else parameter)
    kept = [1 if dim in plan.reduced else size for dim, size in enumerate(plan.view)]
    recalled = tuple(torch.rand(kept) + 0.5 for _ in call.normalizer.remembers) if call.recalls else ()
    valid = None
    if call.masked is not None:
        shape = [size if plan.names[dim] in call.masked else 1 for dim, size in enumerate(plan.view)]
        valid = torch.rand(shape) < 0.7
        out = ~valid.expand(plan.view).reshape(plan.shape)
        x[out] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4])[torch.randint(4, (int(out.sum()),))].to(x.dtype)
        d_output[out] = torch.nan
    gate = None if call.gate is None else torch.randn(plan.shape).to(call.parameters)
    if gate is not None and valid is not None:
        gate[out] = torch.nan
    result = Numbers(x, residual, parameters, valid, recalled, d_output, d_sum)
    if call.activation == "relu":
        kinks = truth(replace(call, activation=None, gate=None), result).output.abs() < NEAR_A_KINK
        d_output[kinks.reshape(plan.shape)] = 0
    return result._replace(d_output=d_output.to(call.dtype), d_sum=d_sum.to(call.dtype), gate=gate)


def _strided(parameter: Tensor) -> Tensor:
    return torch.stack((parameter, torch.full_like(parameter, torch.nan)), -1)[..., 0]


@contextmanager
def only_compiled() -> Iterator[None]:
    """Nothing but the compiled kernels may run."""

    def refuse(*_: object) -> None:
        raise AssertionError("torch's operators ran instead of the compiled kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.closed_form, "run", refuse)
        yield


def instruction_set(name: str) -> AbstractContextManager[None]:
    """The kernels compiled for one that this processor has."""
    assert extension is not None
    return changed(extension.instruction_set, extension.use, name)


def compiled(call: Call, given: Numbers, *, alone: bool = True) -> Found:
    """The call, by the compiled kernel and nothing else; `alone`: no other thread makes calls meanwhile."""
    residual = given.residual
    inputs = [given.x, *([] if residual is None else [residual]), *given.parameters]
    wanted = [*call.wanted[: 1 if residual is None else 2], *call.wanted[2:]]
    leaves = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(inputs, wanted, strict=False)]
    parameters = leaves[len(leaves) - len(given.parameters) :]
    gate = None if given.gate is None else given.gate.detach().requires_grad_(call.wants_gate)
    leaves += [] if gate is None else [gate]
    steps = Steps(
        call.plan,
        call.normalizer,
        call.declared,
        given.valid,
        Recalled(given.recalled) if call.recalls else None,
        call.activation,
        call.gate,
    )
    with only_compiled() if alone else nullcontext():
        result, total = running.run(
            leaves[0],
            steps,
            parameters,
            call.parameter_over,
            None if residual is None else leaves[1],
            gate,
            remembers=not call.recalls,
        )
        outputs = {} if call.unused == "output" and total is not None else {result.output: given.d_output}
        if total is not None and call.unused != "sum":
            outputs[total] = given.d_sum
        outputs = {y: d_y for y, d_y in outputs.items() if y.requires_grad}
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        found = [torch.zeros_like(leaf) for leaf in chosen]
        if outputs and chosen:
            found = list(torch.autograd.grad(list(outputs), chosen, list(outputs.values()), materialize_grads=True))
    return Found(result.output.detach(), None if total is None else total.detach(), result.moments, found)


def truth(call: Call, given: Numbers) -> Found:
    """The same in float64: the formula as it is written, and what autograd makes of it; padding is taken out first."""
    plan = call.plan
    valid = torch.ones((), dtype=torch.bool) if given.valid is None else given.valid
    valid = valid.expand(plan.view)
    total = given.x if given.residual is None else given.x + given.residual
    leaf = total.double().reshape(plan.view).where(valid, 0.0).requires_grad_()
    view = leaf.where(valid, 0.0)
    parameters = [parameter.double().requires_grad_() for parameter in given.parameters]
    values, moments = _normalized(call, view, valid, given.recalled)
    z = _recovered(call, values, parameters)
    output = (z if call.activation is None else getattr(F, call.activation)(z)).where(valid, 0.0)
    gates = [] if given.gate is None else [given.gate.double().reshape(plan.view).where(valid, 0.0).requires_grad_()]
    for gate in gates:
        output = output * getattr(F, str(call.gate))(gate)
    unused = given.residual is not None and call.unused == "output"
    d_output = given.d_output.double().reshape(plan.view).where(valid, 0.0) * (not unused)
    d_view, *d_others = torch.autograd.grad(output, [leaf, *parameters, *gates], d_output)
    d_parameters, d_gates = d_others[: len(parameters)], [d.reshape(plan.shape) for d in d_others[len(parameters) :]]
    d_x = d_view.reshape(plan.shape)
    if given.residual is not None and call.unused != "sum":
        d_x = d_x + given.d_sum.double()
    inputs = zip((d_x, d_x), call.wanted[: 1 if given.residual is None else 2], strict=False)
    wanted = *inputs, *zip(d_parameters, call.wanted[2:], strict=False), *((d, call.wants_gate) for d in d_gates)
    return Found(output.detach().reshape(plan.shape), total, moments, [gradient for gradient, wants in wanted if wants])


def _normalized(call: Call, view: Tensor, valid: Tensor, recalled: Sequence[Tensor]) -> tuple[Tensor, Moments | None]:
    dims = call.plan.reduced
    if recalled:
        *mean, square = (statistic.double() for statistic in recalled)
        return (view - (mean[0] if mean else 0)) / (square + call.normalizer.eps).sqrt(), None  # type: ignore[attr-defined]
    count = valid.sum(dims, keepdim=True).clamp_min(1)
    centers = type(call.normalizer) is Standardize
    mean_now = view.sum(dims, keepdim=True) / count * centers
    m2 = (view - mean_now).where(valid, 0.0).square().sum(dims, keepdim=True)
    under_root = m2 / (1 if type(call.normalizer) is L2 else count) + call.normalizer.eps  # type: ignore[attr-defined]
    moments = Moments(valid.sum(dims, keepdim=True), mean_now.detach(), m2.detach())
    return (view - mean_now) / under_root.sqrt(), moments


def _recovered(call: Call, values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    plan = call.plan
    over = [name for names in call.parameter_over for name in names]
    assert [name for name in plan.names if name in over] == over  # in the pattern's order
    shape = [size if name in over else 1 for name, size in zip(plan.names, plan.view, strict=True)]
    weight, bias = [*(parameter.reshape(shape) for parameter in parameters), torch.zeros(()), torch.zeros(())][:2]
    if call.recovery is None:
        return values
    return values * (weight + 1 if call.recovery is OffsetScale else weight) + bias


def check_call(call: Call) -> None:
    """A call is right in all it returns, and has changed nothing that it was given."""
    given = numbers(call)
    before = _copied(given)
    found, expected = compiled(call, given), truth(call, given)
    for tensor, copy in zip(_tensors(given), before, strict=True):
        assert torch.equal(tensor.nan_to_num(nan=7.5), copy), f"{call} wrote into what it was given"
    _check(call, "output", found.output, expected.output, KERNELS)
    if found.total is not None and expected.total is not None:
        assert torch.equal(found.total.nan_to_num(nan=7.5), expected.total.nan_to_num(nan=7.5)), call
    for gradient, wants in zip(found.gradients, expected.gradients, strict=True):
        if wants.shape == found.output.shape:
            _check(call, "gradient", gradient, wants, KERNELS_GRADIENTS)
        else:
            summed = found.output.numel() / gradient.numel()
            _check(call, "parameter's gradient", gradient, wants, KERNELS_SUMS, math.sqrt(summed))
    if found.moments is not None and expected.moments is not None:
        _check_moments(call, found.moments, expected.moments)


def _check_moments(call: Call, found: Moments, expected: Moments) -> None:
    count = torch.as_tensor(found.count).expand(expected.mean.shape)
    assert torch.equal(count.long(), torch.as_tensor(expected.count).long()), call
    _check(call, "mean", found.mean.where(count > 0, 0.0), expected.mean, KERNELS_MOMENTS)  # of nothing there is none
    _check(call, "m2", found.m2, expected.m2, KERNELS_MOMENTS)


def _check(call: Call, name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance, scale: float = 1.0) -> None:
    """Within the tolerance, and rounded once to a low precision."""
    assert actual.shape == expected.shape, f"{name} of {call}"
    info = torch.finfo(actual.dtype)
    half = 0.0 if info.bits >= 32 else info.eps / 2
    bound = scale * tolerance.absolute + (tolerance.relative + half) * expected.abs() + info.smallest_normal * half
    error = ((actual.double() - expected).abs() / bound).nan_to_num(nan=math.inf).max()
    assert error <= 1, f"{name} of {call}: {float(error):.3g} times the tolerance"


def _tensors(given: Numbers) -> list[Tensor]:
    return [
        tensor
        for tensor in (
            given.x,
            given.residual,
            *given.parameters,
            given.valid,
            *given.recalled,
            given.d_output,
            given.d_sum,
            given.gate,
        )
        if tensor is not None
    ]


def _copied(given: Numbers) -> list[Tensor]:
    return [tensor.clone().nan_to_num(nan=7.5) for tensor in _tensors(given)]


def identity(x: Tensor, weight: float, *, lanes: bool) -> Tensor:
    """Numbers through a kernel that multiplies them by a weight, and does nothing else to them."""
    word = Word("RK", "[n] c", ("c",)) if lanes else Word("KR", "n [d]", ("d",))
    sizes = (("n", 1), ("c" if lanes else "d", len(x)))
    call = Call(word, sizes, x.dtype, RMS(0.0), Scale, word.overs[0], recalls=True)
    statistic = torch.ones(1, len(x) if lanes else 1)
    steps = Steps(call.plan, call.normalizer, call.declared, None, Recalled((statistic,)))
    weights = torch.full((len(x),), weight)
    with only_compiled():
        return running.run(x.reshape(1, -1), steps, [weights], call.parameter_over)[0].output.reshape(-1)
