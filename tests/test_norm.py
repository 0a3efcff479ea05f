"""`Norm` itself: any declaration, lazy sizes, and life as a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import normwise as nw
from normwise import RMS, Affine, Average, BatchNorm, Frozen, Moving, Norm, Scale, ShapeError, Standardize
from tests.tolerances import DOUBLE, MEMORY, VALUES, check


def lazy() -> Norm:
    return Norm("[n] c [...]", recovery=Affine("c"), memory=Moving("c", decay=0.9))


def saved(thing: object) -> object:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


DECLARED_AND_NAMED = {
    "batch": (lambda: lazy(), lambda: nw.BatchNorm(6), (4, 6, 5)),
    "batch average": (
        lambda: Norm("[n] c", recovery=Affine("c"), memory=Average("c")),
        lambda: nw.BatchNorm(6, momentum=None),
        (4, 6),
    ),
    "layer": (lambda: Norm("... [d]", recovery=Affine("d")), lambda: nw.LayerNorm(6), (4, 5, 6)),
    "layer2d": (lambda: Norm("n [c] ...", recovery=Affine("c")), lambda: nw.LayerNorm2d(6), (4, 6, 3, 3)),
    "rms": (lambda: Norm("... [d]", RMS(), Scale("d")), lambda: nw.RMSNorm(6), (4, 5, 6)),
    "group": (
        lambda: Norm("n (g [k]) [...]", Standardize(1e-5), Affine("(g k)"), g=3),
        lambda: nw.GroupNorm(3, 6),
        (4, 6, 5),
    ),
    "instance": (lambda: Norm("n c [...]"), lambda: nw.InstanceNorm(6), (4, 6, 5)),
}


@pytest.mark.parametrize(("declare", "make", "shape"), DECLARED_AND_NAMED.values(), ids=DECLARED_AND_NAMED)
def test_a_declaration_is_the_named_layer_bit_for_bit(declare: type, make: type, shape: tuple[int, ...]) -> None:
    declared, named = declare(), make()
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        assert torch.equal(declared(x), named(x))
    assert torch.equal(declared.eval()(x), named.eval()(x))
    assert list(declared.state_dict()) == list(named.state_dict())
    named.load_state_dict(declared.state_dict(), strict=True)


def test_a_batch_norm_for_each_time_step() -> None:
    norm = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9))
    x = torch.randn(16, 5, 3) * 2 + 1
    y = norm(x)
    assert norm.running_mean.shape == (5, 3)
    assert norm.weight.shape == (3,)
    steps = [BatchNorm(3) for _ in range(5)]
    check(y, torch.stack([step(x[:, t]) for t, step in enumerate(steps)], 1), VALUES)
    check(norm.running_var, torch.stack([step.running_var for step in steps]), VALUES)


def test_a_batch_norm_shared_over_time() -> None:
    norm = Norm("[n t] c", memory=Moving("c", decay=0.9))
    x = torch.randn(16, 5, 3) * 2 + 1
    check(norm(x), F.batch_norm(x.reshape(-1, 3), None, None, training=True).reshape(x.shape), VALUES)


def test_weight_standardization() -> None:
    weight = torch.randn(8, 3, 5, 5) * 0.1 + 1
    flat = weight.reshape(8, -1)
    expected = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    check(Norm("o [i ...]")(weight), expected.reshape(weight.shape), VALUES)


def test_the_whole_example_as_in_the_textbook() -> None:
    x = torch.randn(4, 3, 5, 5) + 7
    check(Norm("n [...]")(x), F.layer_norm(x, (3, 5, 5)), VALUES)


def test_nothing_is_declared_by_default() -> None:
    norm = Norm("[n] c")
    assert norm.weight is norm.bias is norm.running_mean is norm.num_batches_tracked is None
    assert norm.state_dict() == {}
    assert not list(norm.parameters())
    x = torch.randn(4, 3)
    assert torch.equal(norm(x), norm.eval()(x))


def test_sizes_are_found_at_the_first_call_and_shown() -> None:
    norm = lazy()
    assert repr(norm) == (
        "Norm('[n] c [...]', Standardize(eps=1e-05), Affine(over='c'), "
        "Moving('c', update_rate=0.1); moving = 0.9 * moving + 0.1 * batch, unbiased variance)"
    )
    assert is_lazy(norm.weight)
    assert is_lazy(norm.running_mean)
    norm(torch.randn(4, 3))
    assert not is_lazy(norm.weight)
    assert norm.weight.shape == norm.running_mean.shape == (3,)
    assert "update_rate=0.1), c=3;" in repr(norm)
    assert type(norm.weight) is nn.Parameter
    with pytest.raises(ShapeError, match="axis 'c' has size 3, but dimension 1 has 5"):
        norm(torch.randn(4, 5))


def test_sizes_may_be_given_by_name_or_mapping() -> None:
    for norm in (
        Norm("n (g [k])", recovery=Affine("(g k)"), g=2, k=3),
        Norm("n (g [k])", recovery=Affine("(g k)"), sizes={"g": 2, "k": 3}),
        Norm("n (g [k])", recovery=Affine("(g k)"), sizes={"g": 2}, k=3),
    ):
        assert norm.weight.shape == (6,)


def test_axes_that_nothing_depends_on_may_change_from_call_to_call() -> None:
    norm = lazy()
    for shape in ((4, 3), (2, 3, 7), (2, 3, 5, 5), (9, 3)):
        assert norm(torch.randn(shape)).shape == shape
    assert norm.num_batches_tracked.item() == 4


def test_an_input_that_is_refused_leaves_a_lazy_layer_lazy() -> None:
    norm = Norm("n (g [k])", recovery=Affine("(g k)"))
    with pytest.raises(ShapeError):
        norm(torch.randn(4, 6))
    assert is_lazy(norm.weight)
    empty = lazy()
    with pytest.raises(ShapeError, match="cannot be found from an empty input"):
        empty(torch.randn(4, 0))
    empty(torch.randn(0, 3))
    assert empty.weight.shape == (3,)


@pytest.mark.parametrize("x", [torch.ones(4, 3, dtype=torch.int64), torch.ones(1, 3)], ids=["integers", "one row"])
def test_an_input_that_is_refused_gives_no_sizes(x: Tensor) -> None:
    norm = lazy()
    with pytest.raises((TypeError, ValueError)):
        norm(x)
    assert is_lazy(norm.weight)


def test_an_optimizer_made_after_the_first_call_trains_it() -> None:
    model = nn.Sequential(nn.Linear(2, 3), lazy(), nn.Linear(3, 1))
    x, target = torch.randn(32, 2), torch.randn(32, 1)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = None
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first
    assert (model[1].weight - 1).abs().max() > 1e-3
    assert model[1].bias.abs().max() > 1e-3


def test_an_optimizer_made_before_the_first_call_holds_the_same_parameters() -> None:
    norm = lazy()
    weight = norm.weight
    norm(torch.randn(4, 3))
    assert norm.weight is weight


def _assert_same(a: Norm, b: Norm, x: Tensor) -> None:
    assert a.spec == b.spec
    assert repr(a) == repr(b)
    assert torch.equal(a(x), b(x))
    assert torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("copier", [lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["pickle", "save"])
def test_copies_of_a_lazy_layer_are_lazy_layers(copier: type) -> None:
    again = copier(lazy())
    assert is_lazy(again.weight)
    _assert_same(again, lazy(), torch.randn(4, 3))


def test_a_deepcopy_of_a_lazy_layer_is_a_lazy_layer() -> None:
    again = copy.deepcopy(lazy())
    assert is_lazy(again.weight)
    _assert_same(again, lazy(), torch.randn(4, 3))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["copy", "pickle", "save"]
)
@pytest.mark.parametrize("make", [lazy, lambda: nw.BatchNorm(3), lambda: nw.InstanceNorm(3, affine=True)])
def test_copies_are_equal_and_independent(copier: type, make: type) -> None:
    norm = make()
    x = torch.randn(4, 3, 5)
    norm(x * 2 + 1)
    again = copier(norm)
    assert type(again) is type(norm)
    _assert_same(again, norm, x)
    again.weight.data.fill_(7.0)
    assert (norm.weight == 1).all()


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double], ids=["half", "double"])
def test_a_lazy_layer_can_be_converted_before_its_first_call(convert: type) -> None:
    norm = convert(lazy())
    dtype = norm.weight.dtype
    y = norm(torch.randn(4, 3, dtype=dtype))
    assert y.dtype == norm.weight.dtype == dtype
    assert norm.running_var.dtype == torch.promote_types(dtype, torch.float32)


def test_device_and_dtype_at_construction() -> None:
    norm = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), device="meta", dtype=torch.float16, c=3)
    assert norm.weight.is_meta
    assert norm.running_mean.is_meta
    assert norm.weight.dtype == torch.float16
    assert norm.running_mean.dtype == torch.float32
    assert norm(torch.empty(4, 3, device="meta", dtype=torch.float16)).shape == (4, 3)
    filled = norm.to_empty(device="cpu")
    filled.reset_parameters()
    assert (filled.weight == 1).all()
    assert (filled.running_var == 1).all()
    assert filled(torch.randn(4, 3).half()).isfinite().all()


def test_reset_parameters_starts_anew() -> None:
    norm = nw.BatchNorm(3)
    norm(torch.randn(4, 3))
    with torch.no_grad():
        norm.weight.fill_(3.0), norm.bias.fill_(3.0)
    norm.reset_parameters()
    fresh = nw.BatchNorm(3)
    for name, value in fresh.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)
    lazy().reset_parameters()  # nothing to reset yet, and nothing breaks


def test_float32_input_in_float64_memory_and_the_other_way() -> None:
    norm = nw.BatchNorm(3).double()
    assert norm(torch.randn(4, 3)).dtype == torch.float32
    assert norm.running_mean.dtype == torch.float64
    mixed = nw.BatchNorm(3)
    x = torch.randn(4, 3, dtype=torch.float64)
    check(mixed(x), F.batch_norm(x, None, None, training=True), DOUBLE)
    check(mixed.running_mean, (0.1 * x.mean(0)).float(), VALUES)


def test_autocast_reaches_it_and_keeps_statistics_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nw.BatchNorm(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(8, 4))
    assert y.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32
    assert y.float().mean(0).abs().max() < 0.01


def test_the_input_may_be_named() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(Norm("[n] c")(input=x), nw.BatchNorm(3)(input=x))


def test_spec_of_a_layer_builds_it_again() -> None:
    spec = nw.GroupNorm(2, 6).spec
    again = Norm(spec.text, spec.normalizer, spec.recovery, spec.memory, sizes=dict(spec.sizes))
    assert again.spec == spec


def test_hooks_and_parametrizations_see_an_ordinary_module() -> None:
    norm = nw.LayerNorm(4)
    nn.utils.parametrizations.weight_norm(norm, dim=None)
    y = norm(torch.randn(3, 4))
    y.square().sum().backward()
    assert norm.parametrizations.weight.original0.grad.abs().sum() > 0


def test_frozen_memory_of_a_lazy_layer() -> None:
    norm = Norm("[n] c", recovery=Affine("c"), memory=Frozen("c"))
    x = torch.randn(4, 3)
    check(norm(x).detach(), x / (1 + 1e-5) ** 0.5, VALUES)


class LectureModel(nn.Module):
    """A model whose normalization is used twice: both uses enter one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nw.BatchNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x) * 2)


def test_a_layer_used_twice_counts_two_batches() -> None:
    model, twin = LectureModel(), nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    y = model(x)
    check(y, twin(twin(x) * 2), VALUES)
    check(model.norm.running_var, twin.running_var, MEMORY)
    assert model.norm.num_batches_tracked.item() == 2


PARTS_AS_CLASSES = {
    "normalizer": lambda: Norm("[n] c", Standardize),  # type: ignore[arg-type]
    "recovery": lambda: Norm("[n] c", recovery=Affine),  # type: ignore[arg-type]
    "memory": lambda: Norm("[n] c", memory=Moving),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("part", PARTS_AS_CLASSES)
def test_a_part_given_as_a_class_is_refused_by_name(part: str) -> None:
    with pytest.raises(TypeError, match=f"^{part} is <class"):
        PARTS_AS_CLASSES[part]()


def test_a_pattern_that_is_no_text_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="pattern"):
        Norm(64)  # type: ignore[arg-type]
