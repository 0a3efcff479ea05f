"""Named layers are what their names say, on either axis; groups divide the features, or are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import normwise as nw
from normwise.errors import ShapeError, SurgeryError
from normwise.surgery.words import WORDS, Axis, check_word, group_count, grouped, groups_fit, named_layer
from tests.tolerances import DOUBLE, check

CHANNELS = 6
TRUTH: dict[str, Callable[[Tensor, float], Tensor]] = {  # channels first, in torch's words
    "none": lambda x, eps: x,
    "rms": lambda x, eps: F.rms_norm(x.movedim(1, -1), (CHANNELS,), eps=eps).movedim(-1, 1),
    "layer": lambda x, eps: F.layer_norm(x.movedim(1, -1), (CHANNELS,), eps=eps).movedim(-1, 1),
    "group": lambda x, eps: F.group_norm(x, 3, eps=eps),
    "group:2": lambda x, eps: F.group_norm(x, 2, eps=eps),
    "instance": lambda x, eps: F.instance_norm(x, eps=eps),
    "batch": lambda x, eps: F.batch_norm(x, None, None, training=True, eps=eps),
}


def test_every_word_has_a_truth() -> None:
    assert [word for word in TRUTH if word != "group:2"] == list(WORDS)


@pytest.mark.parametrize("word", TRUTH)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_a_named_layer_is_what_its_name_says(word: str, axis: Axis, affine: bool) -> None:
    layer = named_layer(word, CHANNELS, axis, affine=affine, eps=0.2).double()
    x = torch.randn(4, CHANNELS, 3, 5, dtype=torch.float64) * 2 + 1
    expected = TRUTH[word](x, 0.2)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter)
        wide = parameter.detach()[:, None, None]
        expected = expected * wide if name == "weight" else expected + wide
    names = [name for name, _ in layer.named_parameters()]
    wanted = {"none": [], "rms": ["weight"]}.get(word, ["weight", "bias"])
    assert names == (wanted if affine else [])
    assert all(parameter.shape == (CHANNELS,) for parameter in layer.parameters())
    y = layer(x) if axis == 1 else layer(x.movedim(1, -1)).movedim(-1, 1)
    check(y.detach(), expected, DOUBLE)


@pytest.mark.parametrize("axis", [1, -1])
def test_batch_remembers_on_either_axis_and_the_others_nothing(axis: Axis) -> None:
    layer = named_layer("batch", CHANNELS, axis)
    x = torch.randn(50, CHANNELS, 7) * 3 + 2
    layer(x if axis == 1 else x.mT)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2)))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var((0, 2)))
    assert not [word for word in WORDS if word != "batch" and list(named_layer(word, CHANNELS, axis).buffers())]


def test_eps_is_as_usual_where_none_is_given() -> None:
    layers = {word: [named_layer(word, CHANNELS, axis) for axis in (1, -1)] for word in WORDS if word != "none"}
    assert {word: [layer.spec.normalizer.eps for layer in pair] for word, pair in layers.items()} == {
        "rms": [None, None],
        "layer": [1e-5, 1e-5],
        "group": [1e-5, 1e-5],
        "instance": [1e-5, 1e-5],
        "batch": [1e-5, 1e-5],
    }


@pytest.mark.parametrize(
    ("features", "groups"), [(2, 1), (3, 1), (4, 2), (7, 1), (48, 24), (64, 32), (66, 22), (96, 32), (2048, 32)]
)
def test_group_counts_of_usual_widths(features: int, groups: int) -> None:
    assert group_count(features) == groups
    assert named_layer("group", features).num_groups == groups


@given(st.integers(2, 600), st.integers(1, 40))
def test_the_count_is_the_largest_that_divides_and_leaves_two(features: int, most: int) -> None:
    found = group_count(features, most)
    assert found <= most
    assert features % found == 0
    assert features // found >= 2
    assert not [g for g in range(found + 1, most + 1) if features % g == 0 and features // g >= 2]


def test_what_fits() -> None:
    assert [groups for groups in range(-1, 14) if groups_fit(groups, 12)] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("axis", [1, -1])
def test_groups_that_do_not_fit_are_refused(axis: Axis) -> None:
    with pytest.raises(ShapeError) as caught:
        named_layer("group:8", 12, axis)
    assert str(caught.value) == (
        "8 groups do not divide 12 features into two or more each; group counts that work: 1, 2, 3, 4, 6"
    )
    with pytest.raises(ShapeError, match=r"^12 groups do not divide 12 features into two or more each; "):
        named_layer("group:12", 12, axis)
    with pytest.raises(ShapeError, match=r"^1 groups do not divide 1 features .*; group counts that work: none$"):
        named_layer("group:1", 1, axis)
    with pytest.raises(ShapeError, match=r"^1 feature cannot be split into groups of two or more$"):
        named_layer("group", 1, axis)


def test_grouped_makes_groups_of_one_channel() -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    check(grouped(4, 1, 4, affine=False)(x), F.instance_norm(x), DOUBLE)
    check(grouped(4, -1, 4, affine=False)(x.movedim(1, -1)).movedim(-1, 1), F.instance_norm(x), DOUBLE)


@pytest.mark.parametrize(
    "word", ["bach", "", "group:", "group:0", "group:-1", "group:2.0", "batch:2", "Group", "group:8 "]
)
def test_a_word_that_names_no_layer_is_refused(word: str) -> None:
    for use in (check_word, lambda word: named_layer(word, 8)):
        with pytest.raises(SurgeryError) as caught:
            use(word)
        assert str(caught.value) == (
            f"no normalization is called {word!r}; say one of 'none', 'rms', 'layer', 'group', 'instance', 'batch', "
            "or 'group:G'"
        )


def test_channels_last_layers_keep_the_names_of_a_checkpoint() -> None:
    for word in ("layer", "rms", "group", "instance", "batch"):
        first, last = named_layer(word, 8), named_layer(word, 8, -1)
        assert list(first.state_dict()) == list(last.state_dict())
        assert [v.shape for v in first.state_dict().values()] == [v.shape for v in last.state_dict().values()]
    assert isinstance(named_layer("batch", 8), nw.BatchNorm)
