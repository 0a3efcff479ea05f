"""Run by `make wheel`: an installed wheel has the compiled kernels, and they run. Argument: the folder it is in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import normwise as nw


def main(folder: Path) -> None:
    assert folder in Path(nw.__file__).parents, f"{nw.__file__} is not in {folder}"
    assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang", "clang++")), (
        "there is a compiler"
    )
    cpu = {backend.name: backend for backend in nw.backends()}["cpu"]
    assert cpu.available, cpu.about
    x = torch.randn(64, 96)
    torch.testing.assert_close(nw.LayerNorm(96)(x), torch.nn.LayerNorm(96)(x))
    sys.stdout.write(f"{cpu}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
