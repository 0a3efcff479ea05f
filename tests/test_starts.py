"""Starting values: what is drawn, how, and what stays as it was."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import StudyError
from normwise.tuning.starts import restart

HE_LAYERS = {
    "Linear": (lambda: nn.Linear(200, 100), 200),
    "Conv2d": (lambda: nn.Conv2d(16, 64, 3), 144),
    "Conv2d in groups": (lambda: nn.Conv2d(32, 64, 3, groups=4), 72),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(64, 8, 3), 576),
    "ConvTranspose2d in groups": (lambda: nn.ConvTranspose2d(64, 32, 3, groups=4), 144),
}


def zero(parameter: torch.Tensor) -> bool:
    return bool((parameter == 0).all())


@pytest.mark.parametrize("name", HE_LAYERS)
def test_he_has_the_variance_of_the_fan_in_and_no_bias(name: str) -> None:
    make, fan_in = HE_LAYERS[name]
    layer = restart(make(), "he")
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
    assert abs(layer.weight.mean().item()) < 0.1 * math.sqrt(2 / fan_in)
    assert zero(layer.bias)


def test_he_keeps_the_size_of_a_rectified_signal() -> None:
    layers = [layer for _ in range(8) for layer in (nn.ConvTranspose2d(64, 64, 3, padding=1), nn.ReLU())]
    x = torch.randn(4, 64, 12, 12)
    ratio = restart(nn.Sequential(*layers), "he")(x).square().mean() / x.square().mean()
    assert 0.2 < ratio < 2  # the padding loses some


@pytest.mark.parametrize("layer", [nn.Linear(6, 12), nn.Conv1d(2, 12, 3), nn.Linear(12, 6)])
def test_orthogonal_has_gain_sqrt_two(layer: nn.Module) -> None:
    weight = restart(layer, "orthogonal").weight.flatten(1)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(singular, torch.full_like(singular, math.sqrt(2)))
    assert zero(layer.bias)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1), (nw.LSTM, 4)])
def test_every_gate_is_orthogonal_by_itself(kind: type[nn.RNNBase], gates: int) -> None:
    layer = restart(kind(5, 8, num_layers=2, bidirectional=True), "orthogonal")
    for name, weight in layer.named_parameters():
        if name.startswith("bias"):
            assert zero(weight)
            continue
        gain = 1.0 if name.startswith("weight_hh") else math.sqrt(2)
        for gate in weight.chunk(gates):
            singular = torch.linalg.svdvals(gate)
            torch.testing.assert_close(singular, torch.full_like(singular, gain), msg=name)


def test_recurrent_cells_and_attention() -> None:
    cell = restart(nn.GRUCell(64, 64), "he")
    assert cell.weight_hh.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert zero(cell.bias_ih)
    attention = restart(nn.MultiheadAttention(16, 2), "orthogonal")
    for part in attention.in_proj_weight.chunk(3):
        torch.testing.assert_close(part @ part.T, 2 * torch.eye(16), atol=1e-5, rtol=0)
    assert zero(attention.in_proj_bias)
    apart = restart(nn.MultiheadAttention(16, 2, kdim=64, vdim=64), "he")
    assert apart.k_proj_weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 3), nn.ConvTranspose1d(2, 3, 3)),
        lambda: nn.LSTM(3, 4, 2),
        lambda: nn.GRUCell(3, 4),
        lambda: nn.MultiheadAttention(8, 2),
    ],
)
def test_default_is_what_torch_draws(make: object) -> None:
    torch.manual_seed(1)
    fresh = make()  # type: ignore[operator]
    other = make()  # type: ignore[operator]
    torch.manual_seed(1)
    restart(other, "default")
    if isinstance(fresh, nn.MultiheadAttention):  # whose constructor draws some weights twice
        assert zero(other.out_proj.bias)
        assert other.in_proj_weight.abs().max() <= math.sqrt(6 / 32)
        return
    for mine, theirs in zip(other.parameters(), fresh.parameters(), strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("start", ["default", "he", "orthogonal"])
def test_normalizations_embeddings_and_what_is_tied_to_them_stay(start: str) -> None:
    embedding, tied = nn.Embedding(7, 4), nn.Linear(4, 7)
    tied.weight = embedding.weight
    lstm = nw.LSTM(4, 4, norm=nw.Norm("[n] t c", recovery=nw.Affine("c"), memory=nw.Moving("c", decay=0.9)))
    model = nn.ModuleList([embedding, tied, lstm, nn.BatchNorm1d(4), nw.LayerNorm(4), nn.Linear(4, 4)])
    kept = [embedding, tied, *(lstm.norms or {}).values(), model[3], model[4]]
    with torch.no_grad():
        for module in kept:
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    before = [[p.clone() for p in module.parameters()] for module in kept]
    drawn = [lstm.weight_hh_l0.clone(), model[5].weight.clone()]
    assert restart(model, start) is model
    after = [[*module.parameters()] for module in kept]
    assert all(a.equal(b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))
    assert not lstm.weight_hh_l0.equal(drawn[0])
    assert not model[5].weight.equal(drawn[1])


def test_the_global_generator_decides() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return restart(nn.Linear(4, 4), "he").weight

    layer = [weights(seed).clone() for seed in (3, 3, 4)]
    assert layer[0].equal(layer[1])
    assert not layer[0].equal(layer[2])


def test_what_cannot_be_restarted_is_refused() -> None:
    def message(model: nn.Module, start: str) -> str:
        with pytest.raises(StudyError) as caught:
            restart(model, start)
        return str(caught.value)

    assert message(nn.Linear(2, 2), "hee") == (
        "no start named 'hee'; there are default, he, orthogonal; did you mean 'he'?"
    )
    assert message(nn.Sequential(nn.LazyLinear(3)), "he") == (
        "start 'he': 0, a LazyLinear, has no sizes yet: run a batch through the model in its factory"
    )
    computed = "computes its weight from other parameters: leave start out"
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert message(normed, "he") == f"start 'he': the model, a ParametrizedLinear, {computed}"
