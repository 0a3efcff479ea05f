"""The same bits: in any company, with any number of threads' help, and every time.

A kernel belongs to an order of axes in memory, so another order of them gives the same to rounding; gaps change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from tests.catalogue import CASES, LAYOUTS, Case, Family, laid_out, randomize
from tests.memory_order import output_strides
from tests.settings import threads
from tests.tolerances import KERNELS_SUMS, LAYOUT
from tests.truth import EVERY

every_family = pytest.mark.parametrize("family", EVERY, ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ANY_LAYOUT = (*LAYOUTS, "expanded", "second half")
IN_PAIRS = ("GroupNorm", "Norm of time steps", "Norm, rms over the middle")  # families that need an even count


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


def lying(case: Case, layout: str, dtype: torch.dtype) -> Tensor:
    """As `laid_out`, or the second half of a longer tensor."""
    if layout != "second half":
        return laid_out(case, layout, dtype)
    x = laid_out(case, "contiguous", dtype)
    return torch.cat((torch.full_like(x, torch.nan), x), -1)[..., x.shape[-1] :]


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, the gradients of input and parameters, and the memory."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy), *layer.buffers()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Bit for bit, zeros' signs and all."""
    return all(
        torch.equal(one.flatten().contiguous().view(torch.uint8), other.flatten().contiguous().view(torch.uint8))
        for one, other in zip(ones, others, strict=True)
    )


def columns_of(family: Family, matrix: Tensor, cotangent: Tensor) -> list[Tensor]:
    """A fresh layer's output and gradient, as matrices of samples x columns."""
    x = matrix.clone().requires_grad_()
    y = family.run(x)
    return [y.detach(), *torch.autograd.grad(y, x, cotangent)]


def _check_company(family: Family, rows: int, counts: tuple[int, ...]) -> None:
    counts = tuple(count for count in counts if count % 2 == 0 or family.name not in IN_PAIRS)
    x, dy = torch.randn(2, max(counts), rows).transpose(1, 2) + 3
    whole = columns_of(family, x, dy)
    for count in counts:
        assert same(columns_of(family, x[:, :count], dy[:, :count]), [result[:, :count] for result in whole])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("rows", "counts"), [(12, (1, 2, 3, 17, 64)), (768, (1, 2, 255, 256, 257, 4096)), (65537, (1, 2, 3, 6))]
)
@every_family
def test_a_column_does_not_depend_on_how_many_there_are(family: Family, rows: int, counts: tuple[int, ...]) -> None:
    _check_company(family, rows, counts)


@pytest.mark.filterwarnings("ignore:BatchNorm:UserWarning", "ignore:Norm:UserWarning")  # of a batch that is not finite
@pytest.mark.parametrize("neighbor", [0.0, 1e30, -3e38, torch.inf, torch.nan])
@every_family
def test_a_column_does_not_depend_on_its_neighbors(family: Family, neighbor: float) -> None:
    x, dy = torch.randn(2, 37, 6) + 3
    x[:, 1] = 5.0  # a constant column among them
    alone = columns_of(family, x, dy)
    x[7, 4:] = neighbor
    assert same([result[:, :4] for result in columns_of(family, x, dy)], [result[:, :4] for result in alone])


def test_a_long_row_of_torch_depends_on_how_many_there_are() -> None:
    x = torch.randn(64, 65537) + 3
    with threads(2):
        alone, together = ((row - row.mean(1, keepdim=True)).square().sum(1)[0] for row in (x[:1], x))
    assert not torch.equal(alone, together)  # plain operators divide one long row among threads, and many by the row


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(1, 65, 40, 30), (3, 65, 9, 7), (300, 65)], ids=str)
def test_a_channel_does_not_depend_on_how_many_there_are(shape: tuple[int, ...], layout: str) -> None:
    x, dy = torch.randn(2, *shape) + 3
    layer = nw.BatchNorm(65)
    whole = results(layer, LAYOUTS[layout](x), dy)
    fewest = 2 if layout == "channels last" else 1  # one channel lies both ways, and counts as contiguous
    for count in range(fewest, 65):
        alone = results(nw.BatchNorm(count), LAYOUTS[layout](x[:, :count]), dy[:, :count])
        parts = [whole[0][:, :count], whole[1][:, :count], *(result[:count] for result in whole[2:-1]), whole[-1]]
        assert same(alone, parts)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_two_runs_agree_bit_for_bit(family: Family, dtype: torch.dtype) -> None:
    x, dy = ((torch.randn(4097, 66) + 100).to(dtype) for _ in range(2))
    assert same(columns_of(family, x, dy), columns_of(family, x.clone(), dy.clone()))


def alike(ones: list[Tensor], others: list[Tensor], parameters: int) -> bool:
    """As near as two orders of summation are; half precision rounds once more. In float64 nothing moves.

    Behind output and gradient of the input stand those of parameters, each a sum of n terms: see `KERNELS_SUMS`.
    """
    for place, (one, other) in enumerate(zip(ones, others, strict=True)):
        if one.dtype in (torch.float64, torch.long):
            if not same([one], [other]):
                return False
            continue
        unit = torch.finfo(one.dtype).eps if one.dtype != torch.float32 else 0.0
        absolute = LAYOUT.absolute
        if 2 <= place < 2 + parameters:
            absolute = max(absolute, KERNELS_SUMS.absolute * math.sqrt(others[0].numel() / one.numel()))
        bound = absolute + (LAYOUT.relative + unit) * other.double().abs()
        if not ((one.double() - other.double()).abs() <= bound).all():
            return False
    return True


def check_layouts(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """A layout gives the bits of a dense copy that lies likewise, and what a contiguous one gives, summed otherwise."""
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def fresh(x: Tensor, dy: Tensor) -> list[Tensor]:
        layer.load_state_dict(start)
        return [value.clone() for value in results(layer, x, dy)]

    before = [x.clone(), dy.clone()]
    found = fresh(x, dy)
    assert same([x, dy], before)  # nothing writes into what it was given
    assert same(found, fresh(torch.empty_like(x).copy_(x), dy.contiguous()))
    assert alike(found, fresh(x.contiguous(), dy.contiguous()), len(list(layer.parameters())))
    layer.load_state_dict(start)


@either_mode
@every_case
def test_any_layout_of_input_and_cotangent(case: Case, training: bool) -> None:
    layer = case.ours().train(training)
    randomize(layer)
    for layout, layout_dy in product(ANY_LAYOUT, repeat=2):
        check_layouts(layer, lying(case, layout, torch.float32), lying(case, layout_dy, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@either_mode
@every_case
def test_layouts_in_other_precisions(case: Case, training: bool, dtype: torch.dtype) -> None:
    layer = case.ours(dtype=torch.promote_types(dtype, torch.float32)).train(training)
    for layout, layout_dy in zip(ANY_LAYOUT, (*ANY_LAYOUT[2:], *ANY_LAYOUT[:2]), strict=True):
        check_layouts(layer, lying(case, layout, dtype), lying(case, layout_dy, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ANY_LAYOUT)
@every_case
def test_autocast_changes_neither_bits_nor_dtype_nor_memory_format(case: Case, layout: str, dtype: torch.dtype) -> None:
    layer = case.ours()
    x = lying(case, layout, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert y.stride() == output_strides(layer, x)
    assert same([y.detach()], [case.ours()(x).detach()])


def test_torchs_instance_norm_loses_the_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert not nn.InstanceNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)
    assert nw.InstanceNorm(3)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def _poison() -> Iterator[None]:
    """Fresh memory is NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poison")
@either_mode
@every_case
def test_every_element_is_written(case: Case, training: bool) -> None:
    layer = case.ours().train(training)
    for value in results(layer, laid_out(case, "transposed"), torch.randn(case.shape)):
        assert value.isfinite().all()
