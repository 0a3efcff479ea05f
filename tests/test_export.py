"""A model leaves Python after surgery: torch.export, ONNX in onnxruntime, and the compiler, with the same numbers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import normwise as nw
from normwise.batches import feed, tensors_in
from normwise.places import all_modules
from normwise.surgery.activated import ACTIVATED
from tests import tolerances
from tests.architectures import ARCHITECTURES, disturb
from tests.catalogue import randomize
from tests.tolerances import COMPILED, MEMORY, MODEL_GRADIENTS, MODEL_OUTPUTS, VALUES, Tolerance, check

pytestmark = pytest.mark.filterwarnings(  # torch's exporter to ONNX asks for a class by a name that torch has replaced
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
ROWS = Dim("rows", min=2, max=64)


class Net(nn.Module):
    """Something to do for every operation: a batch norm after a convolution, a layer norm before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.batch = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.layer = nn.LayerNorm(12)
        self.third = nn.Linear(12, 6)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(torch.relu_(self.batch(self.first(images))))
        return self.third(self.layer(features.mean((2, 3))))


def net(seed: int = 0) -> Net:
    """In evaluation, with numbers as after some training."""
    torch.manual_seed(seed)
    model = Net().eval()
    disturb(model)
    return model


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, 8)


def released(model: nn.Module, x: Any) -> nw.Record:
    nw.adopt(model, x)
    return nw.release(model, x)


def swapped(what: str, to: str) -> Callable[[nn.Module, Any], nw.Record]:
    def operate(model: nn.Module, x: Any) -> nw.Record:
        with pytest.warns(UserWarning, match="train the model before you use it"):
            return nw.swap(model, what, to, batch=x)

    return operate


def recalibrated(model: nn.Module, x: Tensor) -> nw.Record:
    nw.adopt(model, x)
    return nw.recalibrate(model, [x, 3 * x + 1])


OPERATIONS: dict[str, Callable[[nn.Module, Any], nw.Record]] = {
    "adopt": nw.adopt,
    "release": released,
    "fold": nw.fold,
    "batch to group": swapped("batch", "group"),
    "layer to rms": swapped("layer", "rms"),
    "recalibrate": recalibrated,
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def operated(operation: Callable[[nn.Module, Any], nw.Record]) -> Net:
    model = net()
    assert operation(model, batch()).changed
    return model


def traces(model: nn.Module) -> dict[str, Any]:
    """All that an export must leave as it is: modes, and every parameter and buffer, bit for bit."""
    modes = {f"{path}, training": (type(module), module.training) for path, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return modes | {name: (id(value), value.numpy(force=True).tobytes()) for name, value in tensors.items()}


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: Tolerance = MODEL_OUTPUTS) -> None:
    """Relative to the largest number where that is above 1."""
    assert expected
    for one, other in zip(actual, expected, strict=True):
        scale = other.detach().abs().max().clamp_min(1.0)
        check(one.detach() / scale, other.detach() / scale, tolerance)


def to_onnx(file: Path, model: Any, example: Tensor | None = None, shapes: Any = None) -> Callable[..., list[Tensor]]:
    """A model or an exported program as ONNX in a file that the checker passes; a function runs it in onnxruntime."""
    import onnx
    import onnxruntime

    args = () if example is None else (example,)
    torch.onnx.export(model, args, file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [declared.name for declared in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


# --------------------------------------------------------------------------------------------------- after surgery


STRICTLY = {f"{name}, strictly": (OPERATIONS[name], True) for name in ("adopt", "fold")}
TRACED = {name: (operation, False) for name, operation in OPERATIONS.items()}


@pytest.mark.parametrize(("operation", "strict"), [*TRACED.values(), *STRICTLY.values()], ids=[*TRACED, *STRICTLY])
def test_an_exported_program_computes_the_same(operation: Callable[..., nw.Record], strict: bool) -> None:
    model = operated(operation)
    before = traces(model)
    program = torch.export.export(model, (batch(),), strict=strict, dynamic_shapes=({0: ROWS},)).module()
    assert traces(model) == before
    for rows in (4, 7):
        x = batch(rows)
        assert_close([program(x)], [model(x)])


@every_operation
def test_onnxruntime_computes_the_same(operation: Callable[..., nw.Record], tmp_path: Path) -> None:
    model = operated(operation)
    before = traces(model)
    run = to_onnx(tmp_path / "net.onnx", model, batch(), ({0: "rows"},))
    assert traces(model) == before
    for rows in (4, 1, 7):
        x = batch(rows)
        assert_close(run(x), [model(x)])


ON_ARCHITECTURES = [("ResNet", nw.adopt), ("ResNet", nw.fold), ("Llama", nw.adopt)]


@pytest.mark.parametrize(("name", "operation"), ON_ARCHITECTURES, ids=lambda value: getattr(value, "__name__", value))
def test_real_architectures_compute_the_same(name: str, operation: Callable[..., nw.Record], tmp_path: Path) -> None:
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    model, x = architecture.model(), dict(architecture.batch())
    model.config.use_cache = False  # type: ignore[union-attr]  # a cache is no tensor, and cannot come out of a program
    assert operation(model, x).changed
    before = traces(model)
    exported = torch.export.export(model, (), x, strict=False)
    assert traces(model) == before
    run, program = to_onnx(tmp_path / "model.onnx", exported), exported.module()
    for more in (x, {key: value.flip(-1) for key, value in x.items()}):
        expected = list(tensors_in(feed(model, more)))
        assert_close(list(tensors_in(program(**more))), expected)
        assert_close(run(*more.values()), expected)


# ------------------------------------------------------------------------------------------------------ every layer

IMAGES, SEQUENCES = (3, 6, 4, 5), (3, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm": (partial(nw.BatchNorm, 6), IMAGES),
    "LayerNorm": (partial(nw.LayerNorm, 6), SEQUENCES),
    "RMSNorm": (partial(nw.RMSNorm, 6), SEQUENCES),
    "GroupNorm": (partial(nw.GroupNorm, 2, 6), IMAGES),
    "InstanceNorm": (partial(nw.InstanceNorm, 6, affine=True), IMAGES),
    "LayerNorm2d": (partial(nw.LayerNorm2d, 6), IMAGES),
    "RMSNorm2d": (partial(nw.RMSNorm2d, 6), IMAGES),
    "by pattern": (lambda: nw.Norm("n (g [k]) [h] w", nw.RMS(1e-3), nw.Scale("w"), g=3, k=2, w=5), IMAGES),
    "per step": (
        lambda: nw.Norm("[n] t c", memory=nw.Moving("t c", decay=0.9, beyond={"t": "last"}), t=4, c=6),
        SEQUENCES,
    ),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_every_layer_by_itself(make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    layer = make().eval()
    randomize(layer)
    run = to_onnx(tmp_path / "layer.onnx", layer, torch.randn(shape))
    constant = torch.randn(shape[:1] + (1,) * (len(shape) - 1)).expand(shape)
    for x in (torch.randn(shape), torch.randn(shape) * 3e-4, torch.randn(shape) * 1e20, constant.contiguous()):
        assert_close(run(x), [layer(x)], VALUES)
    x = torch.randn(shape) + 1e4
    assert_close(run(x), [layer(x)], COMPILED)


class Side(nn.Module):
    """Layers side by side on one input: one export for all of them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def activated(layer: type[nn.Module]) -> nn.Module:
    made: Any = layer(2, 6) if layer is ACTIVATED[nw.GroupNorm] else layer(6)
    made.drop, made.act = nn.Dropout(0.5), nn.ReLU(inplace=True)
    return made


def test_layers_with_an_activation(tmp_path: Path) -> None:
    side = Side([activated(layer) for layer in ACTIVATED.values()]).eval()
    randomize(side)
    run = to_onnx(tmp_path / "activated.onnx", side, torch.randn(3, 6, 4, 6))
    x = torch.randn(3, 6, 4, 6)
    expected = side(x)
    assert all((output == 0).any() and (output > 0).any() for output in expected)
    assert_close(run(x), expected, VALUES)


def test_half_precision(tmp_path: Path) -> None:
    side = Side([make() for make, shape in LAYERS.values() if shape == IMAGES]).eval()
    randomize(side)
    side.half()
    run = to_onnx(tmp_path / "half.onnx", side, torch.randn(IMAGES).half())
    x = (torch.randn(IMAGES) * 4 + 3).half()
    exact = copy.deepcopy(side).double()(x.double())
    for output, eager, truth in zip(run(x), side(x), exact, strict=True):
        assert output.dtype == torch.float16
        error, allowed = ((one.double() - truth).abs().max() for one in (output, eager))
        assert error <= tolerances.LOW_PRECISION_FACTOR * allowed


# ------------------------------------------------------------------------------------------------- in training mode


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_program_exported_in_training_goes_on_training(strict: bool) -> None:
    model = net()
    nw.adopt(model, batch())
    start, before = copy.deepcopy(model.train()), traces(model)
    exported = torch.export.export(model, (batch(),), strict=strict, dynamic_shapes=({0: ROWS},))
    assert traces(model) == before
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported.module(), torch.export.load(file).module()):  # the first one shares the model's buffers
        eager = copy.deepcopy(start)
        for rows in (4, 7, 2):
            x = batch(rows)
            assert_close([program(x)], [eager(x)])
        for name, buffer in eager.named_buffers():
            assert not torch.equal(buffer, start.get_buffer(name))
            check(program.get_buffer(name), buffer, MEMORY)


def test_an_exported_program_skips_a_batch_that_is_not_finite() -> None:
    layer = nw.BatchNorm(3)
    program = torch.export.export(layer, (torch.randn(4, 3),), strict=False).module()
    program(torch.randn(4, 3))
    memory = {name: buffer.clone() for name, buffer in program.named_buffers()}
    with pytest.warns(UserWarning, match="^BatchNorm: the batch's statistics are not finite: it does not enter"):
        program(torch.tensor([[torch.nan, 1.0, 2.0]]).expand(4, 3))
    for name, buffer in program.named_buffers():
        assert torch.equal(buffer, memory[name])


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")  # here it is meant
def test_in_training_onnx_normalizes_by_the_batch(tmp_path: Path) -> None:
    renormalized = nw.Norm("[n] c ...", memory=nw.Moving("c", decay=0.9, renorm=nw.Renorm(2, 1, 0, 0, 0)), c=6)
    side = Side([nw.BatchNorm(6), nw.InstanceNorm(6, affine=True, track_running_stats=True), renormalized])
    side(torch.randn(IMAGES) * 2 + 1)
    before = traces(side)
    run = to_onnx(tmp_path / "training.onnx", side, torch.randn(IMAGES))
    assert traces(side) == before
    x = torch.randn(IMAGES) * 3 + 2
    output, in_training = run(x), copy.deepcopy(side)(x)
    assert_close(output, in_training)
    for trained, evaluated in zip(in_training, side.eval()(x), strict=True):
        assert (trained - evaluated).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------- the compiler


@pytest.mark.parametrize("operation", [nw.adopt, nw.fold], ids=["adopt", "fold"])
def test_one_graph_in_the_compiler(operation: Callable[..., nw.Record]) -> None:
    model = operated(operation).train(operation is nw.adopt)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x, cotangent = batch(), torch.randn(4, 6)
    y, y_compiled = model(x), compiled(x)
    assert_close([y_compiled], [y])
    gradients = torch.autograd.grad(y, list(model.parameters()), cotangent)
    assert_close(torch.autograd.grad(y_compiled, list(twin.parameters()), cotangent), gradients, MODEL_GRADIENTS)
    for name, buffer in model.named_buffers():
        check(twin.get_buffer(name), buffer, MEMORY)


# ---------------------------------------------------------------------------------------------- copies, saved and not


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@every_operation
def test_a_copy_computes_the_same_by_itself(operation: Callable[..., nw.Record], copied: Callable[..., Any]) -> None:
    model, x = operated(operation), batch()
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    assert [(type(m), m.training) for m in twin.modules()] == [(type(m), m.training) for m in model.modules()]
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert torch.equal(model(x), expected)


class Holding(nn.Module):
    """Norms where `state_dict` does not see them: in a tuple in a dictionary in a list, and as a plain attribute."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner
        self.held = [{"norms": (nn.Identity(), nn.BatchNorm1d(6).eval())}]
        self.__dict__["last"] = nn.LayerNorm(6)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.held[0]["norms"][1](self.inner(images)))


def frozen(model: nn.Module, x: Tensor) -> nw.Record:
    nw.adopt(model, x)
    return nw.freeze(model)


def thawed(model: nn.Module, x: Tensor) -> nw.Record:
    frozen(model, x)
    return nw.unfreeze(model)


def described(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every layer, bit and setting that an operation changes; what stands in plain attributes included."""
    layers = [(type(module), module.training, getattr(module, "frozen", None)) for module in all_modules(model)]
    tensors = [t for module in all_modules(model) for t in (*module._parameters.values(), *module._buffers.values())]
    return layers + [(t.requires_grad, t.numpy(force=True).tobytes()) for t in tensors if t is not None]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("operation", [*OPERATIONS.values(), frozen, thawed], ids=[*OPERATIONS, "freeze", "unfreeze"])
def test_a_copied_record_undoes_its_own_model(operation: Callable[..., nw.Record], copied: Callable[..., Any]) -> None:
    x = batch()
    record = operation(Holding(net()), x)
    after = described(record.model)
    twin = copied(record)
    assert str(twin) == str(record)
    assert described(twin.model) == after
    before = described(twin.undo())
    assert before != after
    assert described(record.model) == after
    assert described(record.undo()) == before


def test_a_folded_models_state_fits_another_folded_one() -> None:
    one, other = net(0), net(1)
    for model in (one, other):
        nw.fold(model, batch())
    x = batch()
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))
