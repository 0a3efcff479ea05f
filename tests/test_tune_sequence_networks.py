"""The built-in networks of sequences: what they read, and what a normalization is in them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.errors import StudyError
from normwise.tuning.control import Kept
from normwise.tuning.models import find, lstm, transformer
from normwise.tuning.norms import NormChoice
from normwise.tuning.sequence_networks import Attention, Head, Reader, Recurrent, Residual
from normwise.tuning.training import accuracy

NONE = NormChoice("none", "none")
WORDS = ("none", "rms", "layer", "group", "group:4", "batch")
TOKENS = torch.randint(9, (6, 12), generator=torch.Generator().manual_seed(0))


def choice(word: str) -> NormChoice:
    return NormChoice(word, word)


# -------------------------------------------------------------------------------------------------------- both networks


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize("shape", [(64,), (13,), (30,), (1, 28, 28), (3, 8, 10), (32, 4)])
def test_all_that_is_numbers_is_read_as_a_sequence(name: str, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(5, *shape)
    model = find(name, inputs, 4).build(choice("layer"))
    output = model(inputs)
    assert output.shape == (5, 4)
    output.backward(torch.randn(output.shape))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    one, numbers = inputs[:1], inputs[0].numel()
    nudged = model(one + 0.5 * torch.eye(numbers).view(numbers, *shape))
    assert ((nudged - model(one)).abs().amax(dim=1) > 0).all()  # no number is overlooked


def test_images_are_read_by_row() -> None:
    images = torch.randn(2, 3, 4, 5)
    reader = Reader(4, 15, None, 15)
    nn.init.eye_(reader.embed.weight), nn.init.zeros_(reader.embed.bias)  # type: ignore[arg-type]
    read = reader(images)
    for row in range(4):
        torch.testing.assert_close(read[:, row], images[:, :, row].flatten(1))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_no_place_sees_what_comes_after_it(name: str, word: str) -> None:
    """In evaluation; and in training unless the batch is normalized over."""
    model = find(name, TOKENS, 9).build(choice(word))
    other = TOKENS.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 9
    model(TOKENS)
    for mode in (False, True)[: 1 if word == "batch" else 2]:
        model.train(mode)
        before, after = model(TOKENS), model(other)
        torch.testing.assert_close(before[..., :7], after[..., :7], atol=1e-6, rtol=0)
        assert (before[..., 7:] - after[..., 7:]).abs().amax(dim=(0, 1)).min() > 1e-3


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_tokens_are_predicted_at_every_place(name: str) -> None:
    model = find(name, TOKENS, 9).build(choice("layer"))
    targets = TOKENS.roll(-1, dims=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TOKENS), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    outputs = model(TOKENS)
    assert outputs.shape == (6, 9, 12)
    assert accuracy(outputs[..., 1:-1], targets[:, 1:-1]) > 90


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_the_vocabulary_is_that_of_inputs_and_targets(name: str) -> None:
    assert find(name, TOKENS, 20).build(NONE)(TOKENS).shape == (6, 20, 12)
    assert find(name, TOKENS, 2).build(NONE)(TOKENS).shape == (6, 2, 12)
    facts = find(name, TOKENS, 20).facts
    assert "12 of 20 tokens, 20 outputs" in facts["model"]
    with pytest.raises(StudyError) as caught:
        find(name, TOKENS.view(2, 3, 12), 9)
    assert str(caught.value) == "tokens stand in rows, (examples, places), and these examples have shape (3, 12)"


def test_an_instance_normalization_of_a_single_place_is_refused() -> None:
    def message(name: str, inputs: Tensor) -> str:
        with pytest.raises(StudyError) as caught:
            find(name, inputs, 9).build(choice("instance"))
        return str(caught.value)

    why = (
        "normalizes every place by itself, where instance normalization has one value a channel, and one value has no "
        "variance; use layer or group"
    )
    assert message("transformer", TOKENS) == f"a transformer over tokens {why}"
    assert message("lstm", TOKENS) == f"a lstm {why}"
    x = torch.randn(3, 32, 4)
    assert find("transformer", x, 2).build(choice("instance"))(x).shape == (3, 2)


# ---------------------------------------------------------------------------------------------------------- transformer


@pytest.mark.parametrize("placement", ["pre", "post", "inside"])
def test_a_residual_is_its_formula(placement: str) -> None:
    inner, norm, x = nn.Linear(4, 4), nn.LayerNorm(4), torch.randn(2, 3, 4) + 1
    formulas = {
        "pre": lambda: x + inner(norm(x)),
        "post": lambda: norm(x + inner(x)),
        "inside": lambda: x + norm(inner(x)),
    }
    assert Residual(inner, norm, placement)(x).equal(formulas[placement]())  # type: ignore[arg-type]


@pytest.mark.parametrize(("placement", "count"), [("pre", 5), ("post", 4), ("inside", 5)])
def test_the_transformer_offers_placements(placement: str, count: int) -> None:
    found = find("transformer", None, 10)
    assert found.placements == ("pre", "post", "inside")
    model = found.build(choice("layer"), placement=placement)
    assert sum(isinstance(m, nw.LayerNorm) for m in model.modules()) == count
    assert {m.placement for m in model.modules() if isinstance(m, Residual)} == {placement}


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torchs(causal: bool) -> None:
    own, x = Attention(8, 2, causal=causal), torch.randn(3, 5, 8)
    other = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(own.qkv.weight), other.in_proj_bias.copy_(own.qkv.bias)
        other.out_proj.load_state_dict(own.out.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    torch.testing.assert_close(own(x), other(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_the_transformer_has_second_derivatives() -> None:
    model, x = transformer(choice("layer"), (6, 3), 2), torch.randn(2, 6, 3)
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in second if g is not None) > 0


# ----------------------------------------------------------------------------------------------------------------- lstm


def by_hand(lstm: nw.LSTM, x: Tensor, norms: dict[str, object]) -> Tensor:
    """Ba et al.'s and Cooijmans et al.'s cell, with the three normalizations as functions of (n, features)."""
    h = c = x.new_zeros(len(x), lstm.hidden_size)
    outputs = []
    for step in x.unbind(1):
        gates = norms["ih_l0"](step @ lstm.weight_ih_l0.T) + norms["hh_l0"](h @ lstm.weight_hh_l0.T)  # type: ignore[operator]
        i, f, g, o = (gates + lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norms["cell_l0"](c).tanh()  # type: ignore[operator]
        outputs.append(h)
    return torch.stack(outputs, 1)


def layer(place: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], place.weight, place.bias)  # type: ignore[arg-type]


def batch(place: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, place.weight, place.bias, training=True)  # type: ignore[arg-type]


def groups(place: nn.Module, x: Tensor) -> Tensor:
    return F.group_norm(x, 8, place.weight, place.bias)  # type: ignore[arg-type]


def rms(place: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[1:], place.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "function"),
    [("layer", layer), ("batch", batch), ("group", groups), ("rms", rms), ("... [c]", layer), ("[n] t c", batch)],
)
def test_a_word_is_the_papers_cell(word: str, function: object) -> None:
    made, x = Recurrent(choice(word), 16), torch.randn(7, 5, 16)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norms" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
    norms = {name: partial(function, place) for name, place in made.lstm.norms.items()}  # type: ignore[operator,union-attr,arg-type]
    expected = by_hand(made.lstm, x, norms)
    torch.testing.assert_close(made(x), expected, atol=2e-6, rtol=2e-5)
    plain = by_hand(made.lstm, x, dict.fromkeys(norms, lambda values: values))
    assert (expected - plain).abs().max() > 0.05


def test_none_is_torchs_own_layer() -> None:
    made, x = Recurrent(NONE, 16), torch.randn(3, 5, 16)
    assert made.lstm.norms is None
    other = nn.LSTM(16, 16, batch_first=True)
    other.load_state_dict(made.lstm.state_dict())
    assert made(x).equal(other(x)[0])


def test_batch_statistics_are_shared_over_time_or_kept_for_every_step() -> None:
    x = torch.randn(7, 5, 16)
    shapes = {}
    for word in ("batch", "[n] t c"):
        made = Recurrent(choice(word), 16)
        made(x)
        shapes[word] = tuple(made.lstm.norms["hh_l0"].running_mean.shape)  # type: ignore[index]
        assert (made.lstm.norms["hh_l0"].weight == 0.1).all()  # type: ignore[index]
        assert made.eval()(torch.randn(2, 9, 16)).isfinite().all()  # longer than any seen
    assert shapes == {"batch": (64,), "[n] t c": (5, 64)}


def test_the_layers_that_were_asked_for_share_the_networks_parameters() -> None:
    kept = Kept(choice("batch"))
    model = lstm(kept, (5, 3), 2)
    own = {id(parameter) for parameter in model.parameters()}
    assert len(kept.made) == 3
    assert all(id(made.weight) in own for made in kept.made)
    assert id(kept.made[2].bias) in own
    for made in kept.made:
        made.requires_grad_(False)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [
        f"1.lstm.norms.{name}" for name in ("ih_l0.weight", "hh_l0.weight", "cell_l0.weight", "cell_l0.bias")
    ]


def test_a_layer_of_another_library_is_refused() -> None:
    with pytest.raises(StudyError, match=r"^model 'lstm' normalizes with normwise's own layers, not a LayerNorm$"):
        lstm(lambda features, axis: nn.LayerNorm(features), (5, 3), 2)


def test_the_head_pools_vectors_and_not_tokens() -> None:
    x = torch.randn(2, 5, 4)
    head = Head(4, 3, pooled=True)
    torch.testing.assert_close(head(x), head.linear(x).mean(dim=1))
    head = Head(4, 3, pooled=False)
    torch.testing.assert_close(head(x)[:, :, 2], head.linear(x[:, 2]))
