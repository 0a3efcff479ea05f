"""Parameter groups: every parameter in exactly one of them, and in the right one."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normwise as nw
from normwise import Affine, Moving, Norm
from normwise.surgery.groups import ParameterGroups, param_groups

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
HEADS = {"num_attention_heads": 2, "intermediate_size": 24}


def roles(model: nn.Module) -> dict[str, str]:
    """What every parameter is, by its first name; the groups are checked on the way."""
    groups = param_groups(model, 0.1)
    check_union(groups, model)
    return {parameter.name: parameter.role for parameter in groups.parameters}


def check_union(groups: ParameterGroups, model: nn.Module) -> None:
    """Every parameter once, in the model's order, under the name that is given for it."""
    named = dict(model.named_parameters())
    given = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, named.values()))
    assert [parameter.name for parameter in groups.parameters] == list(named)
    for group in groups:
        assert [id(named[name]) for name in groups.names[group["name"]]] == list(map(id, group["params"]))
        assert group["weight_decay"] == (0.1 if group["name"] == "decay" else 0.0)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((4, 5)),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "nw.BatchNorm": lambda: nw.BatchNorm(4),
    "nw.LayerNorm of three dimensions": lambda: nw.LayerNorm((4, 5, 2)),
    "nw.Norm with a matrix": lambda: Norm("[n] t c", recovery=Affine("t c"), t=3, c=2),
    "a declared scale and offset": lambda: Norm("... [d]", recovery=nw.OffsetScale("d"), d=3),
    "a subclass that does more": lambda: type("Twice", (nn.LayerNorm,), {"forward": lambda self, x: 2 * x})((4, 5)),
    "Hugging Face's": lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(4),
    "another library's": lambda: _Foreign(),
    "a parametrized one": lambda: parametrize_weight(nn.LayerNorm((4, 5)), nn.Identity()),
}


class _Foreign(nn.Module):
    """A `GlobalResponseNorm`, of which nothing is known but its name."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))


_Foreign.__name__ = "GlobalResponseNorm"


def parametrize_weight(layer: nn.Module, by: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", by)
    return layer


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_no_parameter_of_a_normalization_decays(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    found = roles(model)
    assert len(found) == 2 + len(list(model[1].parameters())) > 2
    assert {name: role for name, role in found.items() if role != "normalization"} == {
        "0.weight": "weight",
        "0.bias": "bias",
    }
    assert param_groups(model[1], 0.1).unknown == ()


def test_what_stands_within_a_normalization_is_not_the_normalizations() -> None:
    class RmsNormAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6
            self.drop, self.act = nn.Identity(), nn.Sequential(nn.PReLU(4), nn.Linear(4, 4))

    RmsNormAct.__module__ = "timm.layers.norm_act"
    assert roles(nn.Sequential(RmsNormAct())) == {
        "0.weight": "normalization",
        "0.act.0.weight": "unknown",
        "0.act.1.weight": "weight",
        "0.act.1.bias": "bias",
    }


class Experts(nn.Module):
    """Parameters that are a module's own, of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.gate_up_bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5))
        self.cls, self.logit_scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.tensor(1.0))
        self.position = nn.Parameter(torch.randn(1, 7, 4))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.biases = nn.Parameter(torch.randn(4, 4))


def test_biases_go_by_their_names_and_weights_by_their_dimensions() -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    parts = {"attention": attention, "rnn": nn.GRU(4, 3, bidirectional=True), "both": nn.Bilinear(2, 3, 4)}
    model = nn.ModuleDict({**parts, "table": nn.Embedding(9, 4), "experts": Experts()})
    found = roles(model)
    biases = {name for name, role in found.items() if role == "bias"}
    assert biases == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "attention.bias_k",
        "attention.bias_v",
        *(f"rnn.bias_{part}_l0{suffix}" for part in ("ih", "hh") for suffix in ("", "_reverse")),
        "both.bias",
        "experts.gate_up_bias",
    }
    assert param_groups(model, 0.1).unknown == ("experts.cls", "experts.logit_scale")
    weights = {name for name, role in found.items() if role == "weight"}
    assert weights == found.keys() - biases - {"experts.cls", "experts.logit_scale"}
    assert {"table.weight", "experts.frozen", "experts.position", "experts.biases", "rnn.weight_hh_l0"} < weights


RECURRENT = {
    "layer norm": Norm("... [c]", recovery=Affine("c")),
    "batch norm": Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"})),
}


@pytest.mark.parametrize("norm", RECURRENT.values(), ids=RECURRENT)
def test_the_normalizations_in_a_recurrent_layer(norm: Norm) -> None:
    model = nw.LSTM(4, 3, norm=norm)
    found = roles(model)
    assert {name for name, role in found.items() if role == "normalization"} == {
        "norms.ih_l0.weight",
        "norms.hh_l0.weight",
        "norms.cell_l0.weight",
        "norms.cell_l0.bias",
    }
    assert {name for name, role in found.items() if role == "weight"} == {"weight_ih_l0", "weight_hh_l0"}
    assert {name for name, role in found.items() if role == "bias"} == {"bias_ih_l0", "bias_hh_l0"}


def test_both_factors_of_a_weight_decay_and_those_of_a_norm_do_not() -> None:
    scalar = parametrizations.weight_norm(nn.Linear(4, 4), dim=None)  # a magnitude of no dimension
    model = nn.ModuleDict(
        {
            "scalar": scalar,
            "conv": parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
            "norm": parametrizations.weight_norm(nn.BatchNorm1d(4)),
            "spectral": parametrizations.spectral_norm(nn.Linear(4, 4)),
        }
    )
    assert roles(model) == {
        "scalar.bias": "bias",
        "scalar.parametrizations.weight.original0": "weight",
        "scalar.parametrizations.weight.original1": "weight",
        "conv.bias": "bias",
        "conv.parametrizations.weight.original0": "weight",
        "conv.parametrizations.weight.original1": "weight",
        "norm.bias": "normalization",
        "norm.parametrizations.weight.original0": "normalization",
        "norm.parametrizations.weight.original1": "normalization",
        "spectral.bias": "bias",
        "spectral.parametrizations.weight.original": "weight",
    }


def test_a_parametrized_bias_is_a_bias_and_what_parametrizes_has_its_own() -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    parametrize.register_parametrization(layer, "weight", nn.Linear(4, 4))
    assert roles(layer) == {
        "parametrizations.bias.original": "bias",
        "parametrizations.weight.original": "weight",
        "parametrizations.weight.0.weight": "weight",
        "parametrizations.weight.0.bias": "bias",
    }


def test_decay_of_both_factors_is_decay_of_the_weight() -> None:
    """The reason why the magnitude decays: the direction's length does not matter to the weight."""
    layer, plain = parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(4, 3)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    for model in (layer, plain):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(param_groups(model, 0.3), lr=0.5).step()
    torch.testing.assert_close(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


class Declaring(nn.Module):
    """As timm's and Swin's models: names relative to the module, some of which are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.other = nn.Parameter(torch.randn(1, 7, 4)), nn.Parameter(torch.randn(2, 4))
        self.blocks = nn.ModuleList([nn.ParameterDict({"relative_position_bias_table": torch.randn(5, 2)})])

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "dist_token"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"relative_position_bias_table"}


def test_what_a_model_declares() -> None:
    inner = Declaring()
    marked = nn.Linear(4, 4, bias=False)
    marked.weight._no_weight_decay = True  # type: ignore[attr-defined]  # as Mamba's models do
    other = nn.Linear(4, 4, bias=False)
    other.weight.no_weight_decay = True  # type: ignore[attr-defined]
    usual = nn.Linear(4, 4, bias=False)
    usual.weight._no_weight_decay = False  # type: ignore[attr-defined]
    model = nn.ModuleDict({"encoder": inner, "marked": marked, "other": other, "usual": usual})
    assert roles(model) == {
        "encoder.pos_embed": "declared by the model",
        "encoder.other": "weight",
        "encoder.blocks.0.relative_position_bias_table": "declared by the model",
        "marked.weight": "declared by the model",
        "other.weight": "declared by the model",
        "usual.weight": "weight",
    }


def test_shared_parameters_are_there_once_and_do_not_decay_where_one_use_does_not() -> None:
    norm, shared = nn.LayerNorm(4), nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"first": shared, "norm": norm, "again": shared, "gain": nn.Module(), "head": nn.Linear(4, 9)}
    )
    model["gain"].scale = norm.weight
    model["table"] = nn.Embedding(9, 4)
    model["table"].weight = model["head"].weight
    matrix = nn.LayerNorm((4, 4))
    model["square"], model["gain"].matrix = matrix, matrix.weight
    groups = param_groups(model, 0.1)
    check_union(groups, model)
    found = {parameter.name: (parameter.role, parameter.also) for parameter in groups.parameters}
    assert found == {
        "first.weight": ("weight", ("again.weight",)),
        "first.bias": ("bias", ("again.bias",)),
        "norm.weight": ("normalization", ("gain.scale",)),
        "norm.bias": ("normalization", ()),
        "gain.matrix": ("normalization", ("square.weight",)),
        "head.weight": ("weight", ("table.weight",)),
        "head.bias": ("bias", ()),
        "square.bias": ("normalization", ()),
    }


def test_a_matrix_in_what_only_its_name_makes_a_normalization_is_reported() -> None:
    class NormedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

    groups = param_groups(NormedLinear(), 0.1)
    assert (groups.names, groups.unknown) == ({"decay": (), "no_decay": ("weight", "scale")}, ("weight",))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **HEADS))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, **HEADS, num_key_value_heads=2, tie_word_embeddings=True)
    )


def mamba() -> nn.Module:
    return transformers.MambaModel(transformers.MambaConfig(**TINY, state_size=4))


FACES: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[str, ...]]] = {  # normalizations, biases, unknown
    "BERT": (bert, 8, 8, ()),
    "Llama": (llama, 3, 0, ()),
    "Mamba": (mamba, 2, 2, ("layers.0.mixer.D",)),
}


@pytest.mark.parametrize(("make", "norms", "biases", "unknown"), FACES.values(), ids=FACES)
def test_models_of_hugging_face(
    make: Callable[[], nn.Module], norms: int, biases: int, unknown: tuple[str, ...]
) -> None:
    model = make()
    found = list(roles(model).values())
    assert (found.count("normalization"), found.count("bias")) == (norms, biases)
    groups = param_groups(model, 0.1)
    assert groups.unknown == unknown
    assert all(p.dim() > 1 for p in groups[0]["params"])
    adopted = param_groups(nw.adopt(model).model, 0.1)
    assert [list(map(id, group["params"])) for group in adopted] == [list(map(id, group["params"])) for group in groups]


def test_tied_embeddings_decay_once() -> None:
    model = llama()
    groups = param_groups(model, 0.1)
    tied = next(p for p in groups.parameters if p.name == "model.embed_tokens.weight")
    assert (tied.also, tied.group) == (("lm_head.weight",), "decay")
    weight = model.lm_head.weight
    assert sum(parameter is weight for group in groups for parameter in group["params"]) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_an_optimizer_takes_the_groups(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """With gradients of zero nothing moves but what decays, and that by its weight decay."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made = optimizer(param_groups(model, 0.5), lr=0.1)
    assert [(group["name"], group["weight_decay"]) for group in made.param_groups] == [
        ("decay", 0.5),
        ("no_decay", 0.0),
    ]
    made.step()
    for name, parameter in model.named_parameters():
        decays = name in ("0.weight", "2.weight")
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0))
    state = made.state_dict()
    again = optimizer(param_groups(model, 0.5), lr=0.3)
    again.load_state_dict(state)
    assert again.param_groups[1]["lr"] == 0.1


def test_an_empty_group_is_left_out() -> None:
    assert [group["name"] for group in param_groups(nn.LayerNorm(3), 0.1)] == ["no_decay"]
    assert [group["name"] for group in param_groups(nn.Linear(3, 3, bias=False), 0)] == ["decay"]
    assert param_groups(nn.LayerNorm(3), 0.1).names == {"decay": (), "no_decay": ("weight", "bias")}


def test_the_table_and_plain_data() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), Experts())
    groups = param_groups(model, 0.05)
    assert str(groups) == (
        "group     weight decay  what           parameters  the first\n"
        "decay     0.05          weight         5           0.weight\n"
        "no_decay  0.0           unknown        2           2.cls\n"
        "no_decay  0.0           bias           2           0.bias\n"
        "no_decay  0.0           normalization  2           1.weight\n"
        "\n"
        "nothing says what these are, and they get no decay: 2.cls, 2.logit_scale"
    )
    given = json.loads(json.dumps(groups.to_dict()))
    assert given["weight_decay"] == {"decay": 0.05, "no_decay": 0.0}
    assert given["parameters"][2] == {
        "name": "1.weight",
        "shape": [6],
        "group": "no_decay",
        "role": "normalization",
        "also": [],
    }
    assert [parameter["name"] for parameter in given["parameters"]] == [name for name, _ in model.named_parameters()]
    assert str(param_groups(nn.Linear(2, 2, bias=False), 1)) == (
        "group  weight decay  what    parameters  the first\ndecay  1.0           weight  1           weight"
    )


def test_nothing_of_the_model_changes() -> None:
    model = bert().eval()
    before = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    param_groups(model, 0.1)
    assert {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()} == before
    assert torch.equal(torch.random.get_rng_state(), state)
