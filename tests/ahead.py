"""The kernels for GPUs, compiled for one that need not be there: what of it the compiler took, and how wide they read.

`python -m tests.ahead` prints a table of every case; `python -m tests.ahead --help` says how to choose some.

Layers are called on tensors without numbers, forward and backward, and whatever they would launch is compiled instead.
Registers, stack and widths are those of the machine code; which tensor an access is of stands in Triton's PTX only.
Triton must not interpret its kernels: TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import normwise as nw
from normwise import Norm
from normwise.kernels import prepare
from normwise.kernels import run as running
from normwise.kernels.gpu import kernel as gpu
from normwise.kernels.launch import Device

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = {80: Device(108, 40 * 2**20), 90: Device(132, 50 * 2**20), 100: Device(148, 126 * 2**20)}  # A100, H100, B200
OF_ELEMENTS = ("x", "residual", "total", "gate", "y", "d_y", "d_total", "d_x", "d_gate")
REGISTERS, THREADS, PROGRAMS = 2**16, 2048, 32  # of a processor, at most


@dataclass(frozen=True)
class Case:
    """A layer, its input, and how many of that's elements lie side by side: of a run, or of neighbouring columns."""

    make: Callable[[], Norm]
    shape: tuple[int, ...]
    side_by_side: int
    channels_last: bool = False
    residual: bool = False
    gated: bool = False
    masked: bool = False
    evaluates: bool = False


WIDTHS = (64, 768, 1024, 4096, 8192, 16384, 32768, 131072, 262144)
IMAGES = ((256, 64, 56), (256, 256, 14), (64, 256, 56))  # how many, channels, height and width
GROUPS = 8
LAYERS_OF_ROWS: dict[str, tuple[Callable[[int], Norm], dict[str, bool]]] = {
    "LayerNorm": (nw.LayerNorm, {}),
    "RMSNorm": (nw.RMSNorm, {}),
    "LayerNorm, silu": (lambda d: nw.LayerNorm(d, activation="silu"), {}),
    "LayerNorm, masked": (nw.LayerNorm, {"masked": True}),
    "RMSNorm, added": (nw.RMSNorm, {"residual": True}),
    "RMSNorm, gated": (lambda d: nw.RMSNorm(d, gate="silu"), {"gated": True}),
}
LAYERS_OF_IMAGES: dict[str, tuple[Callable[[int], Norm], dict[str, bool]]] = {
    "BatchNorm": (nw.BatchNorm, {}),
    "GroupNorm": (lambda c: nw.GroupNorm(GROUPS, c), {}),
    "InstanceNorm": (nw.InstanceNorm, {}),
    "LayerNorm2d": (nw.LayerNorm2d, {}),
    "BatchNorm, silu": (lambda c: nw.BatchNorm(c, activation="silu"), {}),
    "BatchNorm, masked": (nw.BatchNorm, {"masked": True}),
    "BatchNorm, added": (nw.BatchNorm, {"residual": True}),
    "BatchNorm, remembered": (nw.BatchNorm, {"evaluates": True}),
}


def _rows(name: str, d: int) -> tuple[str, Case]:
    make, options = LAYERS_OF_ROWS[name]
    return f"{name}: {d}", Case(lambda: make(d), (max(2**25 // d, 64), d), d, **options)


def _images(name: str, n: int, c: int, h: int, *, channels_last: bool) -> tuple[str, Case]:
    make, options = LAYERS_OF_IMAGES[name]
    side_by_side = h * h
    if channels_last:
        side_by_side = c // GROUPS if name == "GroupNorm" else c
    case = Case(lambda: make(c), (n, c, h, h), side_by_side, channels_last, **options)
    return f"{name}: {n}x{c}x{h}x{h}{' channels last' * channels_last}", case


def _cases() -> Iterator[tuple[str, Case]]:
    for name in LAYERS_OF_ROWS:
        for d in (4096, 32768) if "," in name else WIDTHS:
            yield _rows(name, d)
    for name in LAYERS_OF_IMAGES:
        for image in IMAGES[:1] if "," in name else IMAGES:
            for channels_last in (False, True):
                yield _images(name, *image, channels_last=channels_last)
    yield "BatchNorm: 8192x512", Case(lambda: nw.BatchNorm(512), (8192, 512), 512)


CASES = dict(_cases())


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel: registers and stack of a thread, bytes of shared memory, and bits of each access."""

    case: str
    dtype: str
    processor: int
    side_by_side: int
    kernel: str
    tile: tuple[int, int, int]
    parts: int
    warps: int
    registers: int
    stack: int
    shared: int
    widths: dict[str, int]  # of the narrowest access to the elements of each tensor, in bits
    in_ptx: list[int]  # the widths of all accesses to memory
    in_sass: list[int]
    spills: int  # accesses to the stack

    @property
    def taken(self) -> int:
        """Registers of a program, which come by eights."""
        return -(-self.registers // 8) * 8 * 32 * self.warps

    @property
    def programs(self) -> int:
        """How many run on a processor at a time, as far as registers and threads go."""
        return min(REGISTERS // self.taken, THREADS // (32 * self.warps), PROGRAMS)

    def __str__(self) -> str:
        widths = " ".join(f"{name}:{bits}" for name, bits in self.widths.items())
        tile = "x".join(map(str, self.tile))
        return (
            f"{self.case:<45} {self.dtype} sm_{self.processor:<3} {self.kernel:<16} {tile:>12} {self.parts:>3} parts "
            f"{self.warps:>2} warps {self.registers:>3} registers {self.stack:>3} stack {self.shared:>5} shared "
            f"{self.programs:>2} programs  {widths}"
        )


class _Absent:
    """A GPU to compile for: what Triton asks its driver before it compiles."""

    def __init__(self, processor: int) -> None:
        self.processor = processor

    def get_current_device(self) -> int:
        return self.processor  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.processor, 32)


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any], Any]  # kernel, arguments, what it is told, compiled


@contextmanager
def only_compiling(processor: int) -> Iterator[list[Launch]]:
    """Calls on tensors without numbers reach the kernels, which are compiled instead of launched, and listed."""
    launches: list[Launch] = []
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **told: Any) -> None:
        launches.append((self, args, told, launch(self, *args, grid=grid, warmup=True, **told)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(driver, "_active", _Absent(processor))
        patch.setattr(gpu, "_device", lambda _: DEVICES[processor])
        patch.setattr(prepare, "compiled", lambda: {"meta": "triton"})
        patch.setattr(prepare, "requested", lambda: "triton")
        patch.setattr(running, "requested", lambda: "triton")
        patch.setattr(running, "fits", lambda *_: True)
        yield launches


def step(case: Case, dtype: torch.dtype) -> None:
    """A forward and a backward on tensors without numbers."""
    with torch.device("meta"):
        layer = case.make().train(not case.evaluates)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        x, residual, gate = (torch.empty(case.shape, dtype=dtype).to(memory_format=layout) for _ in range(3))
        options: dict[str, Tensor] = {"residual": residual} if case.residual else {}
        if case.gated:
            options["gate"] = gate.requires_grad_()
        if case.masked:
            options["valid"] = torch.empty(case.shape, dtype=torch.bool)
        outputs = layer(x.requires_grad_(), **options)
    outputs = outputs if case.residual else (outputs,)
    inputs = [x, *([gate] if case.gated else []), *layer.parameters()]
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def compile_case(name: str, dtype: str, processor: int) -> list[Compiled]:
    """All kernels of a forward and a backward."""
    with only_compiling(processor) as launches:
        step(CASES[name], DTYPES[dtype])
    return [_described(name, dtype, processor, *launch) for launch in launches]


def _described(
    name: str, dtype: str, processor: int, kernel: JITFunction, args: tuple[Any, ...], told: dict[str, Any], made: Any
) -> Compiled:
    tensors = {field: value for field, value in args[0]._asdict().items() if isinstance(value, Tensor)}
    tile, warps = (told["R"], told["K"], told["S"]), told["num_warps"]
    of_tile = math.prod(tile) * DTYPES[dtype].itemsize * 8 // (32 * warps)
    accesses = accesses_in_ptx(made.asm["ptx"], list(tensors))
    usage, sass = disassembled(made.asm["cubin"])
    return Compiled(
        case=name,
        dtype=dtype,
        processor=processor,
        side_by_side=CASES[name].side_by_side,
        kernel=f"{kernel.__module__.rpartition('.')[2].partition('_')[0]} {kernel.__name__}",
        tile=tile,
        parts=told.get("PARTS", 1),
        warps=warps,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=made.metadata.shared,
        widths={field: _width(bits, of_tile) for field, bits in accesses.items() if field in OF_ELEMENTS},
        in_ptx=sorted({bits for found in accesses.values() for bits in found}),
        in_sass=sorted(widths_in_sass(sass)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )


def _width(bits: list[int], of_tile: int) -> int:
    """The narrowest access to a tile, of which a thread has `of_tile` bits.

    All accesses to a tile are of one width. What is less than a tile is one element of each column, which is measured
    about it.
    """
    return min(width for width in set(bits) if width * bits.count(width) >= of_tile)


def accesses_in_ptx(ptx: str, tensors: list[str]) -> dict[str, list[int]]:
    """The bits of each load and store of each tensor: those whose address comes from its pointer."""
    pointers = dict(zip(re.findall(r"\.ptr \S+ \S+ \d+ (\w+)", ptx), tensors, strict=False))  # and two of Triton's own
    sources: dict[str, set[str]] = {}
    addresses: set[tuple[str, int]] = set()  # threads read twice where a number is the same for many of their elements
    for operation, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE):
        access = re.fullmatch(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", operation)
        if access:
            (address,) = re.findall(r"\[\s*(%rd\d+)", operands)
            addresses.add((address, int(access[1] or 1) * int(access[2])))
        elif not operation.startswith("atom"):  # a number from memory is no part of an address
            result, *used = re.findall(r"%rd\d+|\w+_param_\d+", operands) or [""]
            sources.setdefault(result, set()).update(used)
    found: dict[str, list[int]] = {}
    for address, bits in addresses:
        (pointer,) = _reached(address, sources) & pointers.keys()
        found.setdefault(pointers[pointer], []).append(bits)
    return found


def _reached(start: str, sources: dict[str, set[str]]) -> set[str]:
    """Everything that a register is computed from."""
    found, left = set(), {start}
    while left:
        found |= left
        left = {source for register in left for source in sources.get(register, ())} - found
    return found


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """What a kernel uses, by cuobjdump's names, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}, sass


def widths_in_sass(sass: str) -> set[int]:
    """The bits of the loads and stores of global memory; 32 where an instruction names none."""
    found = set()
    for suffixes in re.findall(r"\b(?:LDG|STG)((?:\.\w+)+)", sass):
        named = [re.fullmatch(r"[US]?(8|16|64|128|256)", suffix) for suffix in suffixes.split(".")]
        found.add(next((int(match[1]) for match in named if match), 32))
    return found


def main() -> None:
    options = _options()
    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and Triton compiles nothing that it interprets: unset it")
    chosen = itertools.product(options.cases, options.dtypes, options.processors)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for kernels in pool.map(_compile_one, chosen) if options.workers > 1 else map(_compile_one, chosen):
            for kernel in kernels:
                sys.stdout.write(f"{json.dumps(asdict(kernel)) if options.json else kernel}\n")
                sys.stdout.flush()


def _compile_one(chosen: tuple[str, str, int]) -> list[Compiled]:
    return compile_case(*chosen)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.ahead", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--processors", nargs="+", type=int, choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--workers", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--json", action="store_true", help="one object a line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
