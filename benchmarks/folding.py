"""How long a ResNet-50 evaluates before and after its batch normalizations are folded, and where folding leaves it.

The two take turns, so that what else the machine does meets both; printed are medians in milliseconds and the median of
the ratios of neighbouring runs. Beside them stands a ResNet-50 whose normalizations were swapped for nothing at all:
folding cannot be faster. First the folded model is checked against the original.

    python benchmarks/folding.py --out benchmarks/results/folding.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.resnet import ResNetConfig, ResNetModel

import normwise as nw

SHAPES = ((1, 224), (8, 224), (32, 64))  # batch, side
ROUNDS = 15


def resnet() -> nn.Module:
    """A ResNet-50 with statistics and affine values as training leaves them, and not those that it starts from."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Medians in milliseconds, and the median ratio of the first to the second."""
    for model in models.values():
        model(x)
    rounds = [{name: seconds(lambda m=model: m(x)) for name, model in models.items()} for _ in range(ROUNDS)]
    medians = {name: 1e3 * statistics.median(r[name] for r in rounds) for name in models}
    first, second, *_ = models
    return {**medians, "ratio": statistics.median(r[first] / r[second] for r in rounds)}


def main() -> None:
    """Measure and print; with --out, write as well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    out = parser.parse_args().out
    original, none = resnet(), nw.swap(resnet(), "batch", nn.Identity).model
    record = nw.fold(original, torch.randn(2, 3, 224, 224), copy=True)
    if any(isinstance(layer, nn.BatchNorm2d) for layer in record.model.modules()):
        raise SystemExit(f"not everything was folded:\n{record}")
    models = {"original": original, "folded": record.model, "no normalization": none}
    results = {"threads": torch.get_num_threads(), "torch": torch.__version__, "difference": record.largest_difference}
    print(f"{len(record.changed)} folded; largest difference of outputs {record.largest_difference:.1e}")
    print(f"{'batch':>5} {'side':>5} {'original':>10} {'folded':>10} {'no norm':>10} {'ratio':>7}")
    for batch, side in SHAPES:
        row = compare(models, torch.randn(batch, 3, side, side))
        results[f"{batch}x{side}"] = row
        original_ms, folded_ms, none_ms, ratio = row.values()
        print(f"{batch:>5} {side:>5} {original_ms:>10.1f} {folded_ms:>10.1f} {none_ms:>10.1f} {ratio:>7.2f}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
