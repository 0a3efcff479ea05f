"""From the words of --norms to layers."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import StudyError
from normwise.surgery.words import WORDS
from normwise.tuning.norms import NormChoice, parse_norms


def message(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        parse_norms(text)
    return str(caught.value)


def test_names_aliases_and_patterns() -> None:
    choices = parse_norms("a=batch, b=batch,group:4,mine=[n] c [...],n (g [k]) [...]")
    assert [(choice.label, choice.declaration) for choice in choices] == [
        ("a", "batch"),
        ("b", "batch"),
        ("group:4", "group:4"),
        ("mine", "[n] c [...]"),
        ("n (g [k]) [...]", "n (g [k]) [...]"),
    ]
    assert parse_norms(["batch", "none"]) == parse_norms("batch,none")


TORCH = {
    "batch": lambda c: nn.BatchNorm2d(c),
    "group": lambda c: nn.GroupNorm(8, c),
    "group:4": lambda c: nn.GroupNorm(4, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "[n] c [...]": lambda c: nn.BatchNorm2d(c),
    "n (g [k]) [...]": lambda c: nn.GroupNorm(8, c),
    "none": lambda c: nn.Identity(),
}


@pytest.mark.parametrize("declaration", TORCH)
@pytest.mark.parametrize("training", [True, False])
def test_channels_first_is_torchs_layer(declaration: str, training: bool) -> None:
    mine, theirs = NormChoice("x", declaration)(16), TORCH[declaration](16)
    for step in range(3):
        x = torch.randn(6, 16, 4, 5, generator=torch.Generator().manual_seed(step)) * 3 + 1
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    mine.train(training), theirs.train(training)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("declaration", [*WORDS, "group:2"])
def test_channels_last_is_channels_first_with_the_axes_moved(declaration: str) -> None:
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    first, last = NormChoice("x", declaration)(16), NormChoice("x", declaration)(16, axis=-1)
    for training in (True, False):
        first.train(training), last.train(training)
        torch.testing.assert_close(last(x), first(x.mT).mT, rtol=1e-5, atol=1e-5)


def test_layer_and_rms_normalize_features_at_each_position() -> None:
    x = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0)) + 5
    torch.testing.assert_close(NormChoice("x", "layer")(8)(x), nn.LayerNorm(8)(x.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(NormChoice("x", "rms")(8)(x), nn.RMSNorm(8)(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize(("features", "groups"), [(64, 8), (6, 3), (7, 1), (20, 5), (2, 1), (1, 1), (512, 8)])
@pytest.mark.parametrize("axis", [1, -1])
def test_groups_leave_two_values_each(features: int, groups: int, axis: int) -> None:
    layer = NormChoice("group", "group")(features, axis)  # type: ignore[arg-type]
    assert dict(layer.spec.sizes) == {"g": groups, "k": features // groups}  # type: ignore[union-attr,arg-type]
    assert isinstance(layer, nw.GroupNorm) == (axis == 1)


def test_as_many_groups_as_features_are_made_if_asked_for() -> None:
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(NormChoice("x", "group:8")(8)(x), nn.GroupNorm(8, 8)(x), rtol=1e-5, atol=1e-5)


def test_a_pattern_over_the_batch_remembers_and_another_does_not() -> None:
    over_batch, over_features = NormChoice("x", "[n] c [...]")(4), NormChoice("x", "n [c] [...]")(4)
    assert [name for name, _ in over_batch.named_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(over_features.buffers()) == []
    assert over_batch.spec.memory == nw.Moving("c", update_rate=0.1)


def test_simplicity_orders_the_choices() -> None:
    ranks = [NormChoice("x", declaration).simplicity for declaration in (*WORDS, "[n] c")]
    assert ranks == [0, 1, 2, 3, 4, 5, 5]
    assert NormChoice("x", "group:4").simplicity == NormChoice("x", "n (g [k])").simplicity == 3


def test_what_cannot_be_read_is_refused() -> None:
    assert message("bach") == (
        "no normalization named 'bach'; there are none, rms, layer, group, instance, batch, group:G, and patterns as "
        "'[n] c [...]'; did you mean 'batch'?"
    )
    assert message(" , ") == (
        "no normalization to try: name some of none, rms, layer, group, instance, batch, or a pattern"
    )
    assert message("batch,batch") == ("two normalizations are called 'batch': give one another name, as in mine=batch")
    assert message("group:x") == "'group:x': the number of groups is a whole number from 1, as in group:8"
    assert (
        message("a b=batch") == "'a b' in 'a b=batch' is no label: letters, digits and _ . : + - after a first letter"
    )
    assert message("[n] d") == (
        "pattern '[n] d' has no channel axis: call it c, or split it in two as (g [k]), for example '[n] c [...]' or "
        "'n (g [k]) [...]'"
    )
    assert message("[n c ...]") == (
        "pattern '[n c ...]' normalizes over the batch and keeps no named axis, so that nothing can be remembered for "
        "evaluation: keep the channels, as in '[n] c [...]'"
    )
    assert message("[n & c") == "normalization '[n & c': unknown character '&'\n  [n & c\n     ^"


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(StudyError, match=r"^group:3 cannot split 16 features into 3 equal groups$"):
        NormChoice("x", "group:3")(16)
    with pytest.raises(StudyError, match=r"knows axis 1 \(channels first\) and -1 \(last\), not 2$"):
        NormChoice("x", "batch")(16, axis=2)  # type: ignore[arg-type]
