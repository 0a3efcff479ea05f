"""The parts of `make bench-gpu`: truth in pieces, rounds on a device, others' kernels, host times, floors."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_stubs import failed, outcome
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from benchmarks.gpu import cases, contenders, device, environment, host, others, output, run, truth
from benchmarks.gpu.floors import Floor, floors
from benchmarks.gpu.host import HostTime
from normwise.bench import gate, layers
from normwise.bench.cases import OPERATIONS, Case, Pass
from normwise.bench.operations import COPY, CUDNN, FLASH, LIGER, OURS, QUACK, TORCH, TORCH_COMPILED
from normwise.bench.results import Outcome, Timed
from normwise.bench.timing import Spread
from tests.gpu_stubs import EVALUATE, IMAGES, LEARN, ROWS, TRAIN, Fake, torchs_alone


@pytest.fixture
def fake() -> Fake:
    return Fake()


# ------------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("piece", [1, 70, 10**6])
def test_the_truth_in_pieces_is_the_whole(name: str, piece: int) -> None:
    is_rows = OPERATIONS[name].shapes[0][2:] == ()
    case = Case(
        name, (7, 24) if is_rows else (5, 6, 3, 4), "float32", "contiguous" if is_rows else "channels_last", LEARN
    )
    inputs, gradients = layers.tensors(case)
    layer = layers.ours(case)
    state = {key.rpartition(".")[2]: value.clone() for key, value in layer.state_dict().items()}
    settled = truth.settled(case, inputs, gradients, state, piece)
    assert [one.stride() for one in settled] == [one.stride() for one in gradients]
    whole = gate.truth(case, inputs, settled, state)
    found = truth.truth(case, inputs, settled, state, piece)
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-6, atol=1e-6)
    if name == "batch_norm_relu":  # one slice decides as the whole does, or keeps more
        (all_settled,) = gate.settled(case, inputs, gradients, state)
        assert 0 < all_settled.count_nonzero() <= settled[0].count_nonzero()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "the output is off by nan of its largest value"),
        (3.5, "the output is off by 0.5 of its largest value"),
    ],
)
def test_one_wrong_element_is_found_in_whatever_piece(
    value: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_PIECE", 7)
    true = torch.full((4, 5), 7.0)
    for at in range(20):
        actual = true.clone()
        actual.view(-1)[at] = value
        assert gate.fault({"output": actual}, {"output": true.double()}) == reason
        assert gate.fault({"output": actual.t().contiguous().t()}, {"output": true.double()}) == reason
    assert gate.fault({"output": true}, {"output": true.double()}) is None


# ----------------------------------------------------------------------------------------------------------- the rounds


def test_everyone_begins_a_round_in_turn_and_slow_copies_are_left_out(fake: Fake) -> None:
    slow = (1.0, 1.0, 9.0, 1.0)
    calls = {OURS: fake.work(OURS, 2, 3, 4, 5), TORCH: fake.work(TORCH, 6, 6, 6, 6), COPY: fake.work(COPY, *slow)}
    timing = run.measure(calls, fake, 4)
    assert [fake.order[at : at + 3] for at in range(0, 12, 3)] == [
        [OURS, TORCH, COPY],
        [TORCH, COPY, OURS],
        [COPY, OURS, TORCH],
        [OURS, TORCH, COPY],
    ]
    assert (len(timing.rounds), timing.dirty) == (3, 1)
    assert timing.seconds(OURS) == pytest.approx((2.5, 3, 4))
    assert timing.ratio(TORCH, OURS).median == pytest.approx(2)


class FakeEvent:
    """An event that notes when it is recorded."""

    def __init__(self, told: list[str], *, enable_timing: bool) -> None:
        assert enable_timing
        self.told, self.name = told, "begin" if "begin" not in told else "end"
        told.append(self.name)

    def record(self) -> None:
        self.told.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.told.append(f"wait for {self.name}")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert (self.name, end.name) == ("begin", "end")
        return 12.5


def test_a_call_is_timed_after_the_cache_is_emptied_and_while_the_device_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    properties = SimpleNamespace(
        name="Fake", major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9, L2_cache_size=50 * 10**3
    )
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda where: properties,
        Event=lambda enable_timing: FakeEvent(told, enable_timing=enable_timing),
        _sleep=lambda cycles: told.append(f"sleep {cycles}"),
        synchronize=lambda where: told.append("synchronize"),
        empty_cache=lambda: told.append("empty"),
    )
    fake_torch = SimpleNamespace(
        cuda=cuda,
        device=lambda kind, index: torch.device("cpu"),
        zeros=lambda size, device: torch.ones(() if size == () else 10),
        sum=lambda x, dim, out: (told.append("read"), torch.sum(x, dim, out=out)),
        version=SimpleNamespace(cuda="13.0"),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000)),
    )
    monkeypatch.setattr(device, "torch", fake_torch)
    found = device.Cuda()
    told.clear()
    assert found.seconds(lambda: told.append("call")) == pytest.approx(0.0125)
    assert told == ["read", f"sleep {2**21}", "record begin", "call", "record end", "wait for end"]
    told.clear()
    found.synchronize()
    found.release()
    assert told == ["synchronize", "empty"]
    assert found.facts()["gpu"] == found.name == "Fake"
    assert found.facts()["cuDNN"] == 91000
    assert found.now() <= found.now()


# ----------------------------------------------------------------------------------------------------------- the others


def theirs(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, is_rms: bool) -> Tensor:
    size = (x.shape[-1],)
    return F.rms_norm(x, size, weight, eps) if is_rms else F.layer_norm(x, size, weight, bias, eps)


class Theirs(nn.Module):
    """A layer of another's, with parameters of its own until it is given others."""

    def __init__(self, size: int, eps: float, in_place: bool = True, **_: object) -> None:
        super().__init__()
        assert not (type(self) is not TheirLayerNorm and in_place)
        self.weight, self.eps = nn.Parameter(torch.full((size,), torch.nan)), eps

    def forward(self, x: Tensor) -> Tensor:
        return theirs(x, self.weight, None, self.eps, is_rms=True)


class TheirLayerNorm(Theirs):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.full((size,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        return theirs(x, self.weight, self.bias, self.eps, is_rms=False)


class TheirSum(Theirs):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x + residual
        return super().forward(total), total


class TheirGroups(nn.GroupNorm):
    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(groups, channels, eps)


def flash(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    is_rms_norm: bool,
) -> Any:
    total = x if residual is None else x + residual
    found = theirs(total, weight, bias, eps, is_rms=is_rms_norm)
    return (found, total) if prenorm else found


def quack(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float, prenorm: bool) -> Any:
    return flash(x, weight, None, residual=residual, eps=eps, prenorm=prenorm, is_rms_norm=True)


def quack_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    assert weight.dtype is bias.dtype is torch.float32
    return theirs(x.float(), weight, bias, eps, is_rms=False).to(x.dtype)


MODULES = {
    "liger_kernel.transformers.layer_norm": {"LigerLayerNorm": TheirLayerNorm},
    "liger_kernel.transformers.rms_norm": {"LigerRMSNorm": Theirs},
    "liger_kernel.transformers.fused_add_rms_norm": {"LigerFusedAddRMSNorm": TheirSum},
    "liger_kernel.transformers.group_norm": {"LigerGroupNorm": TheirGroups},
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": flash},
    "quack.rmsnorm": {"rmsnorm": quack, "layernorm_fwd": quack_forward},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of others, with the names and arguments that theirs have."""

    def imported(name: str) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(MODULES[name])
        return module

    monkeypatch.setattr(others, "find_spec", lambda package: object())
    monkeypatch.setattr(others, "import_module", imported)
    torchs_alone(monkeypatch)


@pytest.mark.parametrize(
    ("name", "what", "who"),
    [
        ("rms_norm", LEARN, [LIGER, FLASH, QUACK]),
        ("layer_norm", LEARN, [LIGER, FLASH]),
        ("layer_norm", EVALUATE, [LIGER, FLASH, QUACK]),
        ("add_rms_norm", LEARN, [LIGER, FLASH, QUACK]),
        ("add_layer_norm", LEARN, [FLASH]),
        ("group_norm", EVALUATE, [LIGER]),
        ("group_norm", LEARN, []),
        ("instance_norm", LEARN, []),
    ],
)
def test_others_take_part_where_they_are_installed_and_are_right(
    name: str, what: Pass, who: list[str], fake: Fake, installed: None
) -> None:
    shape = (6, 32) if OPERATIONS[name].shapes[0][2:] == () else (2, 4, 3, 3)
    case = Case(name, shape, "float32", "contiguous", what)
    with torch.set_grad_enabled(what.mode == "training"):
        found = contenders.prepare(case, fake)
    assert (found.excluded, found.inexact) == ({}, {})
    assert list(found.calls) == [OURS, TORCH, *who, COPY]


def test_cudnn_is_asked_for_by_name(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch would choose, with float32 parameters."""
    torchs_alone(monkeypatch)
    asked: list[tuple[torch.dtype, ...]] = []

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, *memory: Any) -> tuple[Tensor, ...]:
        asked.append((x.dtype, weight.dtype, memory[0].dtype))
        mean, variance, training, momentum, eps = memory
        return (F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps),)

    monkeypatch.setattr(torch.ops.aten, "cudnn_batch_norm", batch_norm)
    for name in ("batch_norm", "batch_norm_relu"):
        found = contenders.prepare(replace(IMAGES, operation=name, what=LEARN), fake)
        assert (found.excluded, found.inexact) == ({}, {})
        assert CUDNN in found.calls
    assert set(asked) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_torch_is_compiled_where_it_is_asked_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    torchs_alone(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: layer)
    assert TORCH_COMPILED in contenders.prepare(replace(ROWS, compiled=True), fake).calls
    assert TORCH_COMPILED not in contenders.prepare(ROWS, fake).calls


# ------------------------------------------------------------------------------------------------ host times and floors


def test_host_times_are_of_one_call(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    torchs_alone(monkeypatch)
    monkeypatch.setattr(host, "SHAPES", ((4, 8),))

    def call_of(case: Case, entrant: Any) -> Callable[[], None]:
        seconds = 2e-5 if isinstance(entrant.layer.norm, nn.Identity) else 1e-5

        def call() -> None:
            fake.clock += seconds

        return call

    monkeypatch.setattr(host, "call_of", call_of)
    monkeypatch.setitem(layers._OURS, "layer_norm", lambda case: layers.Plain(nn.Identity()))
    found = host.host_times(fake, calls=1000, rounds=3)
    assert [(one.case.operation, one.case.what) for one in found] == list(host.WHAT)
    overhead = 1e-3 / 1000  # reading the clock moves it
    assert found[0].ours.median == pytest.approx(2e-5 + overhead)
    assert found[0].torchs.median == pytest.approx(1e-5 + overhead)
    assert found[0].ratio.median == pytest.approx((2e-5 + overhead) / (1e-5 + overhead))
    assert found[2].ratio == pytest.approx((1, 1, 1))


def timed(case: Case, **seconds: float) -> Outcome:
    """Results that nobody measured."""
    names = {"ours": OURS, "torch": TORCH, "cudnn": CUDNN, "copy": COPY}
    times = {names[key]: value for key, value in seconds.items()}

    def of(value: float) -> Spread:
        return Spread(value, value, value)

    found = {n: Timed(of(t), of(times[COPY] / t), of(t / times[OURS]), 0.0) for n, t in times.items()}
    return Outcome(case, found, {}, {}, 9, 0)


def test_floors_by_hand() -> None:
    row = Case("rms_norm", (64, 32768), "bfloat16", "contiguous", EVALUATE)
    long = replace(row, shape=(4, 65536))
    image = Case("batch_norm", (4, 8, 5, 5), "bfloat16", "contiguous", TRAIN)
    groups = replace(image, operation="group_norm", what=EVALUATE)
    hosts = [HostTime(row, *(Spread(t, t, t) for t in (3e-5, 2e-5, 1.5)))]
    found = floors(
        [
            timed(row, ours=1.0, torch=1.0, copy=0.89),
            timed(
                replace(row, what=LEARN), ours=3.0, copy=0.9
            ),  # 3 tensors in 2 s, where the copy takes 0.45 s for one
            timed(long, ours=1.0, copy=0.81),
            timed(image, ours=1.0, torch=1.2, cudnn=0.95, copy=0.79),
            timed(groups, ours=1.0, copy=0.85),
            timed(replace(row, dtype="float32"), ours=9.0, copy=1.0),
            failed(),
            outcome(),
        ],
        hosts,
    )
    assert found == [
        Floor(str(row), "90 % of the copy", "89 %", False),
        Floor(
            f"{str(row).replace('evaluation forward', 'training backward, by difference')}",
            "80 % of the copy",
            "68 %",
            False,
        ),
        Floor(str(long), "80 % of the copy", "81 %", True),
        Floor(str(image), "80 % of the copy", "79 %", False),
        Floor(str(image), "faster than torch", "1.20 times as fast", True),
        Floor(str(image), "faster than cuDNN", "0.95 times as fast", False),
        Floor(str(groups), "85 % of the copy", "85 %", True),
        Floor(f"host, {row}", "1.5 times torch's time", "1.50 times", True),
    ]


def test_a_long_error_is_cut() -> None:
    assert contenders.told(RuntimeError("x" * 500)) == f"RuntimeError: {'x' * 186} ..."


@pytest.mark.parametrize("module", [cases, contenders, environment, output])
def test_the_examples_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_file_of_a_device() -> None:
    assert output.file_name("launch", Fake()) == "launch-abacus-gpu-9000.json"
