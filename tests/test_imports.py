"""What `import normwise` costs and loads, and that the layers need nothing but torch."""

from __future__ import annotations

import re
import subprocess
import sys

OPTIONAL = (
    "cloudpickle",
    "jinja2",
    "loky",
    "optuna",
    "pandas",
    "plotly",
    "rich",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "typer",
)
MOST_ADDED = 0.1  # 80 ms where torch takes a second


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


def checked(code: str) -> str:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_import_adds_less_than_a_tenth_to_torchs() -> None:
    torchs, ours = zip(*(_microseconds() for _ in range(3)), strict=True)
    assert min(ours) < MOST_ADDED * min(torchs)  # other processes only ever add


def _microseconds() -> tuple[int, int]:
    """The times of `import torch` and of `import normwise` after it, by the interpreter's own clock."""
    lines = run("import torch; import normwise", "-X", "importtime").stderr.splitlines()
    (torchs,), (ours,) = ([line for line in lines if re.search(rf"\| {name}$", line)] for name in ("torch", "normwise"))
    return int(torchs.split("|")[1]), int(ours.split("|")[1])


def test_import_loads_no_optional_package() -> None:
    loaded = checked(
        f"import sys, normwise; print(*sorted({{m.partition('.')[0] for m in sys.modules}} & set({OPTIONAL!r})))"
    )
    assert loaded.strip() == ""


def test_surgery_is_loaded_when_it_is_asked_for() -> None:
    asked = "import sys, normwise as nw; before = 'normwise.surgery' in sys.modules; nw.fold; "
    assert checked(asked + "print(before, 'normwise.surgery.fold' in sys.modules)").split() == ["False", "True"]


def test_the_layers_work_with_nothing_but_torch() -> None:
    code = """
import copy, torch, normwise as nw
torch.manual_seed(0)
x = torch.randn(4, 6, 5, 5, requires_grad=True)
layers = [nw.BatchNorm(6), nw.InstanceNorm(6), nw.GroupNorm(2, 6), nw.LayerNorm(5), nw.LayerNorm2d(6), nw.RMSNorm(5),
          nw.RMSNorm2d(6), nw.Norm("[n] c [...]", recovery=nw.Affine("c"), memory=nw.Moving("c", decay=0.9))]
for layer in layers:
    y = layer(x)
    y.square().sum().backward()
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    layer.eval()(x)
    str(layer.explain(x))
nw.functional.layer_norm(x, (5,))
nw.textbook.batch_norm(torch.randn(4, 3), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), 1e-5, 0.9)
print("ok")
"""
    assert checked(BLOCK + code).strip() == "ok"


def test_a_missing_extra_is_one_sentence_with_the_command() -> None:
    code = """
import normwise
for name in ("tune", "Study"):
    try:
        getattr(normwise, name)
    except normwise.MissingExtraError as error:
        print(error)
"""
    assert checked(BLOCK + code).splitlines() == [
        f"normwise.{name} needs packages that are not installed: pip install 'normwise[tune]'"
        for name in ("tune", "Study")
    ]
