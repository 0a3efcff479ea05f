"""Whatever happens to a layer between two calls is seen by the second, although it takes the short way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import normwise as nw
from normwise import Norm
from tests.short_calls import Call, assert_same, made, needs_kernels, outcome, the_long_way
from tests.test_memory import bits
from tests.tolerances import VALUES, check

pytestmark = needs_kernels
Change = Callable[[Norm], Call | None]


def _eps(layer: Norm) -> None:
    layer.eps = 0.5


def _requires_no_grad(layer: Norm) -> None:
    layer.requires_grad_(False)


def _half(layer: Norm) -> Call:
    layer.half()
    return lambda x: layer(x.half())


def _double(layer: Norm) -> Call:
    layer.double()
    return lambda x: layer(x.double())


def _double_parameters(layer: Norm) -> None:
    layer.double()


def _swapped(layer: Norm) -> Call:
    swapped = {name: parameter.detach() * 2 + 1 for name, parameter in layer.named_parameters()}
    return lambda x: torch.func.functional_call(layer, swapped, (x,))


def _strided(layer: Norm) -> None:
    for name, parameter in list(layer.named_parameters()):
        wide = parameter.detach().repeat_interleave(2, -1)
        setattr(layer, name, nn.Parameter(wide[..., ::2]))


def _without_bias(layer: Norm) -> None:
    layer.bias = None


def _without_weight(layer: Norm) -> None:
    layer.weight = None


def _assigned(layer: Norm) -> None:
    given = {
        name: value.double() + 1 if value.is_floating_point() else value for name, value in layer.state_dict().items()
    }
    layer.load_state_dict(given, assign=True)


def _loaded(layer: Norm) -> None:
    layer.load_state_dict({name: value + 2 for name, value in layer.state_dict().items()})


def _frozen(layer: Norm) -> None:
    nw.freeze(layer)


def _thawed(layer: Norm) -> Call:
    def call(x: Tensor) -> Tensor:
        with nw.freeze(layer):
            layer(x)
        return layer(x)

    return call


def _inferred(layer: Norm) -> Call:
    def call(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return layer(x).clone()

    return call


def _without_grad(layer: Norm) -> Call:
    return torch.no_grad()(layer)


def _hooked(layer: Norm) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: output + 1)


def _pruned(layer: Norm) -> None:
    prune.random_unstructured(layer, "weight", 3)


def _pruned_bias(layer: Norm) -> None:
    prune.random_unstructured(layer, "bias", 3)


def _parametrized(layer: Norm) -> None:
    parametrizations.weight_norm(layer, "weight", dim=None)


ANY: dict[str, Change] = {
    "requires no grad": _requires_no_grad,
    "half": _half,
    "double": _double,
    "double parameters": _double_parameters,
    "functional_call": _swapped,
    "a state_dict assigned": _assigned,
    "a state_dict loaded": _loaded,
    "frozen": _frozen,
    "thawed": _thawed,
    "inference mode": _inferred,
    "no_grad": _without_grad,
    "hooks": _hooked,
}
WITH_WEIGHT: dict[str, Change] = {
    "eps": _eps,
    "strided parameters": _strided,
    "no bias": _without_bias,
    "no weight": _without_weight,
    "pruned": _pruned,
    "pruned bias": _pruned_bias,
    "parametrized": _parametrized,
}


def _domain(layer: Norm) -> Call:
    def call(x: Tensor) -> Tensor:
        with nw.domain(layer, "night"):
            return layer(x)

    return call


def _accumulated(layer: Norm) -> Call:
    def call(x: Tensor) -> Tensor:
        with nw.accumulate(layer, 2):
            return layer(x) + layer(x + 3) + layer(x * 2)

    return call


def _not_updated(layer: Norm) -> Call:
    def call(x: Tensor) -> Tensor:
        with nw.no_update(layer):
            return layer(x)

    return call


def _untracked(layer: Norm) -> None:
    layer.running_mean = layer.running_var = None


def _not_tracking(layer: Norm) -> None:
    layer.track_running_stats = False


def _momentum(layer: Norm) -> None:
    layer.momentum = 0.7


def _average(layer: Norm) -> None:
    layer.momentum = None


def _uncounted(layer: Norm) -> None:
    layer.num_batches_tracked = None


def _wide_memory(layer: Norm) -> None:
    layer.running_var = layer.running_var.double()
    layer.running_mean = layer.running_mean.double()


def _strided_memory(layer: Norm) -> None:
    layer.running_var = layer.running_var.repeat_interleave(2)[::2]


def _keeping(layer: Norm) -> Call:
    layer.nonfinite = "keep"
    return lambda x: layer(x * 1e30) * 0 + layer(x)


def _reset(layer: Norm) -> None:
    layer.reset_running_stats()


WITH_MEMORY: dict[str, Change] = {
    "a domain": _domain,
    "accumulate": _accumulated,
    "no_update": _not_updated,
    "memory None": _untracked,
    "not tracking": _not_tracking,
    "momentum": _momentum,
    "momentum None": _average,
    "no counter": _uncounted,
    "memory in float64": _wide_memory,
    "strided memory": _strided_memory,
    "keep": _keeping,
    "reset": _reset,
}
CASES = [
    *((name, what, change) for name in ("LayerNorm", "GroupNorm", "BatchNorm") for what, change in ANY.items()),
    *((name, what, change) for name in ("LayerNorm", "BatchNorm of images") for what, change in WITH_WEIGHT.items()),
    *((name, what, change) for name in ("BatchNorm", "BatchNorm of images") for what, change in WITH_MEMORY.items()),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "what", "change"), CASES, ids=[f"{name}, {what}" for name, what, _ in CASES])
def test_what_happens_to_a_layer_is_seen(name: str, what: str, change: Change, training: bool) -> None:
    layer, x = made(name)
    for mode in (training, not training, training):
        layer.train(mode)(x)
    twin = copy.deepcopy(layer)
    if what == "a domain" and not training:
        for each in (layer, twin):
            with nw.domain(each.train(), "night"):
                each(x + 2)
            each.eval()
    torch.manual_seed(7)
    found = outcome(layer, x, change(layer))
    with the_long_way():
        torch.manual_seed(7)
        expected = outcome(twin, x, change(twin))
    assert_same(found, expected)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_negative_view_is_read_as_what_it_means(which: str) -> None:
    layer, x = made("LayerNorm")
    layer(x)
    conjugate = torch.complex(torch.zeros(16), torch.rand(16) + 1).conj()
    setattr(layer, which, nn.Parameter(conjugate.imag))
    assert getattr(layer, which).is_neg()
    found = layer(x)
    setattr(layer, which, nn.Parameter(conjugate.imag.resolve_neg()))
    check(found, layer(x), VALUES)


def test_a_parametrization_is_computed_once_a_call() -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight * 2

    layer, x = made("LayerNorm")
    layer(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
    calls.clear()
    for _ in range(3):
        layer(x)
    assert len(calls) == 3


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_batch_that_is_not_finite_is_up_to_the_policy(nonfinite: str) -> None:
    layer = nw.BatchNorm(6, nonfinite=nonfinite)
    x = torch.randn(8, 6)
    layer(x)
    before, version = bits(layer), layer.running_var._version
    bad = x.clone()
    bad[3, 2] = torch.inf
    with pytest.raises(nw.NonFiniteError) if nonfinite == "raise" else pytest.warns(UserWarning, match="not finite"):
        layer(bad)
    assert bits(layer) == before
    if nonfinite == "raise":
        assert layer.running_var._version == version


def test_another_size_is_refused_in_the_same_words() -> None:
    layer, x = made("BatchNorm")
    layer(x)
    messages = []
    for each in (layer, nw.BatchNorm(6)):
        for wrong in (torch.randn(8, 5), torch.randn(1, 6), torch.ones(8, 6, dtype=torch.long), torch.randn(6)):
            with pytest.raises((nw.NormwiseError, TypeError)) as caught:
                each(wrong)
            messages.append(f"{type(caught.value).__name__}: {caught.value}")
    assert messages[:4] == messages[4:]
    assert messages[1].startswith("TooFewSamplesError: shape (1, 6) leaves 1 sample a column of '[n] c [...]'")


def test_a_parameter_of_another_size_is_not_read() -> None:
    layer, x = made("LayerNorm")
    layer(x)
    layer.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="shape"):
        layer(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_input_is_refused_as_ever() -> None:
    layer, x = made("LayerNorm")
    layer(x)
    with pytest.raises(RuntimeError):
        layer(x.to_sparse_csr())
