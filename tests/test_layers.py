"""The named layers against their twins in torch, case by case."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normwise as nw
from tests.catalogue import CASES, LAYOUTS, REMEMBERING, Case, laid_out
from tests.memory_order import output_strides
from tests.tolerances import DOUBLE, GRADIENTS, LOW_PRECISION_FACTOR, MEMORY, VALUES, Tolerance, check

every_case = pytest.mark.parametrize("case", CASES, ids=str)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def outcome(layer: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of every parameter; `x` keeps its layout."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return y.detach(), list(torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent))


def assert_equals_twin(ours: nn.Module, twin: nn.Module, x: Tensor, values: Tolerance, gradients: Tolerance) -> None:
    cotangent = torch.randn(x.shape, dtype=x.dtype)
    (y, grads), (y_twin, grads_twin) = outcome(ours, x, cotangent), outcome(twin, x, cotangent)
    check(y, y_twin, values)
    assert len(grads) == len(grads_twin)
    for grad, grad_twin in zip(grads, grads_twin, strict=True):
        check(grad, grad_twin, gradients)
    for buffer, buffer_twin in zip(ours.buffers(), twin.buffers(), strict=True):
        check(buffer, buffer_twin, values)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@either_mode
@every_case
def test_float32_equals_torch_in_every_layout(case: Case, training: bool, layout: str) -> None:
    ours, twin = (layer.train(training) for layer in case.pair())
    assert_equals_twin(ours, twin, laid_out(case, layout), VALUES, GRADIENTS)


@either_mode
@every_case
def test_float64_equals_torch(case: Case, training: bool) -> None:
    ours, twin = (layer.train(training) for layer in case.pair(torch.float64))
    assert_equals_twin(ours, twin, laid_out(case, "contiguous", torch.float64), DOUBLE, DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@either_mode
@every_case
def test_half_precision_errs_at_most_twice_as_much_as_torch(case: Case, training: bool, dtype: torch.dtype) -> None:
    ours, twin = (layer.train(training) for layer in case.pair(dtype))
    exact = case.twin(dtype=torch.float64).train(training)
    exact.load_state_dict(twin.state_dict())
    ours.load_state_dict(twin.state_dict())  # all three start from numbers that the low precision can hold
    if getattr(exact, "eps", 0.0) is None:
        exact.eps = torch.finfo(dtype).eps  # RMSNorm's default is the epsilon of the input's dtype
    x, cotangent = (torch.randn(case.shape).to(dtype) for _ in range(2))
    (y, grads), (y_twin, grads_twin) = outcome(ours, x, cotangent), outcome(twin, x, cotangent)
    y_exact, grads_exact = outcome(exact, x.double(), cotangent.double())
    for result, result_twin, truth in zip((y, *grads), (y_twin, *grads_twin), (y_exact, *grads_exact), strict=True):
        assert result.dtype == dtype
        error, error_twin = ((r.double() - truth).abs().max() for r in (result, result_twin))
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert error <= max(LOW_PRECISION_FACTOR * error_twin, rounding)


@pytest.mark.parametrize("case", REMEMBERING, ids=str)
def test_memory_equals_torch_after_ten_batches(case: Case) -> None:
    ours, twin = case.pair()
    for batch in range(10):
        x = torch.randn(case.shape) * (1 + batch) + batch
        ours(x), twin(x)
    assert list(ours.state_dict()) == list(twin.state_dict())
    for name, value in twin.state_dict().items():
        check(ours.state_dict()[name], value, MEMORY)
    ours.reset_running_stats(), twin.reset_running_stats()
    for name, value in twin.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("case", REMEMBERING, ids=str)
def test_memory_in_float64_equals_torch(case: Case) -> None:
    ours, twin = case.pair(torch.float64)
    for batch in range(10):
        x = torch.randn(case.shape, dtype=torch.float64) * (1 + batch) + batch
        ours(x), twin(x)
    for name, value in twin.state_dict().items():
        check(ours.state_dict()[name], value, DOUBLE)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@every_case
def test_output_lies_in_memory_as_promised(case: Case, layout: str) -> None:
    x = laid_out(case, layout)
    layer = case.ours()
    assert layer(x).stride() == output_strides(layer, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_case
def test_output_has_the_inputs_dtype_whatever_the_parameters_are(case: Case, dtype: torch.dtype) -> None:
    layer = case.ours(dtype=torch.float32)
    y = layer(torch.randn(case.shape).to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 9), (2, 5, 0), (0, 5, 3, 3)], ids=str)
@either_mode
@pytest.mark.parametrize(
    "make",
    [
        lambda: nw.BatchNorm(5),
        lambda: nw.BatchNorm(5, momentum=None),
        lambda: nw.InstanceNorm(5, affine=True, track_running_stats=True),
        lambda: nw.GroupNorm(5, 5),
        lambda: nw.LayerNorm2d(5),
        lambda: nw.RMSNorm2d(5),
    ],
    ids=["batch", "batch average", "instance", "group", "layer2d", "rms2d"],
)
def test_empty_input_leaves_no_trace(make: type, shape: tuple[int, ...], training: bool) -> None:
    _check_empty(make().train(training), torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("make", [lambda: nw.LayerNorm(5), lambda: nw.RMSNorm(5)], ids=["layer", "rms"])
def test_empty_input_of_row_norms(make: type, shape: tuple[int, ...]) -> None:
    _check_empty(make(), torch.randn(shape))


def _check_empty(layer: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    leaf = x.requires_grad_()
    y = layer(leaf)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert leaf.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@either_mode
@every_case
def test_first_and_second_derivatives(case: Case, training: bool) -> None:
    layer, _ = case.pair(torch.float64)
    layer.train(training)
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]
    memory = {name: value.clone() for name, value in layer.named_buffers()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        fresh = {name: value.clone() for name, value in memory.items()}
        return torch.func.functional_call(layer, (dict(zip(names, values, strict=True)), fresh), (x,))

    assert gradcheck(run, (x, *parameters), fast_mode=True)
    assert gradgradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: nw.BatchNorm(3, track_running_stats=False, **o),
        lambda **o: nw.LayerNorm(3, **o),
        lambda **o: nw.RMSNorm(3, **o),
    ],
    ids=["batch", "layer", "rms"],
)
def test_third_derivatives(make: type) -> None:
    layer = make(dtype=torch.float64)
    x, direction = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))

    def slope(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((layer(x) * direction).sum(), x, create_graph=True)
        return first

    assert gradgradcheck(slope, (x.requires_grad_(),))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize(
    "make", [lambda **o: nw.LayerNorm(3, **o), lambda **o: nw.BatchNorm(3, track_running_stats=False, **o)]
)
def test_forward_mode_twice_equals_reverse_mode_twice(make: type) -> None:
    layer = make(dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    forward = torch.func.jacfwd(torch.func.jacfwd(layer))(x)
    reverse = torch.func.jacrev(torch.func.jacrev(layer))(x)
    assert reverse.abs().max() > 0.1
    check(forward.detach(), reverse.detach(), DOUBLE)


SAME_SIGNATURE = [
    (nw.BatchNorm, nn.BatchNorm2d),
    (nw.InstanceNorm, nn.InstanceNorm2d),
    (nw.LayerNorm, nn.LayerNorm),
    (nw.RMSNorm, nn.RMSNorm),
    (nw.GroupNorm, nn.GroupNorm),
]


@pytest.mark.parametrize(("ours", "twin"), SAME_SIGNATURE)
def test_constructors_have_torchs_order_and_defaults(ours: type, twin: type) -> None:
    more = inspect.Parameter.KEYWORD_ONLY  # options of ours come after torch's, and only by name
    taken = {name: p for name, p in inspect.signature(ours).parameters.items() if p.kind != more}
    wanted = inspect.signature(twin).parameters
    optional = {"bias"} - set(taken)  # later torch versions may add an option
    assert [name for name in wanted if name not in optional] == list(taken)
    assert {name: taken[name].default for name in taken} == {name: wanted[name].default for name in taken}


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            nw.BatchNorm(64),
            "BatchNorm(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True; "
            "moving = 0.9 * moving + 0.1 * batch, unbiased variance)",
        ),
        (
            nw.BatchNorm(4, momentum=None),
            "BatchNorm(4, eps=1e-05, momentum=None, affine=True, track_running_stats=True; "
            "average of all batches, unbiased variance)",
        ),
        (nw.InstanceNorm(3), "InstanceNorm(3, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False)"),
        (nw.LayerNorm((4, 6)), "LayerNorm((4, 6), eps=1e-05, elementwise_affine=True)"),
        (nw.RMSNorm(768), "RMSNorm((768,), eps=None, elementwise_affine=True)"),
        (nw.GroupNorm(2, 6), "GroupNorm(2, 6, eps=1e-05, affine=True)"),
        (nw.LayerNorm2d(96), "LayerNorm2d((96,), eps=1e-05, elementwise_affine=True)"),
        (nw.RMSNorm2d(96, 1e-6), "RMSNorm2d((96,), eps=1e-06, elementwise_affine=True)"),
    ],
)
def test_repr_is_torchs_and_the_memorys_formula(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


@pytest.mark.parametrize("case", [case for case in CASES if hasattr(case.ours(), "eps")], ids=str)
def test_eps_is_writable(case: Case) -> None:
    ours, twin = case.pair()
    x = torch.randn(case.shape)
    before = ours(x)
    twin.eps = ours.eps = 0.5
    assert ours.eps == 0.5
    assert (ours(x) - before).abs().max() > 0.01
    check(ours(x), twin(x), VALUES)


@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0, None], ids=str)
def test_batch_norm_momentum_is_writable(momentum: float | None) -> None:
    ours, twin = nw.BatchNorm(6), nn.BatchNorm1d(6)
    for _ in range(2):
        x = torch.randn(8, 6) * 3 + 1
        ours(x), twin(x)
    ours.momentum = twin.momentum = momentum
    assert ours.momentum == momentum
    for _ in range(3):
        x = torch.randn(8, 6) * 3 + 1
        ours(x), twin(x)
    for name, value in twin.state_dict().items():
        check(ours.state_dict()[name], value, MEMORY)


@pytest.mark.parametrize("momentum", [0, 1])
def test_momentum_may_be_a_whole_number(momentum: int) -> None:
    ours, twin = nw.BatchNorm(6, momentum=momentum), nn.BatchNorm1d(6, momentum=momentum)
    x = torch.randn(8, 6) * 3 + 1
    ours(x), twin(x)
    check(ours.running_var, twin.running_var, VALUES)


@pytest.mark.parametrize("make", [nw.BatchNorm, nw.InstanceNorm])
def test_momentum_is_writable_without_memory(make: type) -> None:
    layer = make(6, track_running_stats=False)
    layer.momentum = 0.5
    assert layer.momentum == 0.5
    assert layer.spec.memory is None


@either_mode
@pytest.mark.parametrize("tracked", [True, False], ids=["was tracked", "was not"])
def test_batch_norm_track_running_stats_is_writable(tracked: bool, training: bool) -> None:
    ours = nw.BatchNorm(6, track_running_stats=tracked)
    twin = nn.BatchNorm1d(6, track_running_stats=tracked)
    ours.track_running_stats = twin.track_running_stats = not tracked
    ours.train(training), twin.train(training)
    x = torch.randn(8, 6) * 3 + 1
    check(ours(x), twin(x), VALUES)
    for name, value in twin.state_dict().items():
        check(ours.state_dict()[name], value, VALUES)


@either_mode
def test_instance_norm_track_running_stats_is_writable(training: bool) -> None:
    ours, twin = nw.InstanceNorm(6, track_running_stats=True), nn.InstanceNorm1d(6, track_running_stats=True)
    ours.track_running_stats = twin.track_running_stats = False
    ours.train(training), twin.train(training)
    x = torch.randn(4, 6, 8) * 3 + 1
    before = {name: value.clone() for name, value in ours.named_buffers()}
    check(ours(x), twin(x), VALUES)
    for name, value in ours.named_buffers():
        assert torch.equal(value, before[name])  # torch moves them in evaluation, against the attribute's meaning


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("BatchNorm", "LayerNorm", "GroupNorm")], ids=str
)
def test_a_parameter_can_be_taken_away(case: Case, name: str) -> None:
    ours, twin = case.pair()
    setattr(ours, name, None)
    setattr(twin, name, None)
    x = torch.randn(case.shape)
    check(ours(x), twin(x), VALUES)


@pytest.mark.parametrize("make", [nw.BatchNorm, nw.LayerNorm, nw.LayerNorm2d])
def test_sizes_may_be_numpys_integers(make: type) -> None:
    numpy = pytest.importorskip("numpy")
    assert make(numpy.int64(5)).weight.shape == (5,)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_set_to_none_switch_the_memory_off_as_in_torch(training: bool) -> None:
    ours, twin = nw.BatchNorm(3).train(training), nn.BatchNorm1d(3).train(training)
    for layer in (ours, twin):
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    x = torch.randn(5, 3) + 4
    check(ours(x), twin(x), VALUES)


@pytest.mark.parametrize("make", [nw.BatchNorm, lambda c: nw.InstanceNorm(c, track_running_stats=True)])
def test_a_reset_forgets_the_batches_a_checkpoint_had_counted(make: Callable[[int], nn.Module]) -> None:
    layer = make(3)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(7)})
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
