"""A message names the layer's path in the model that runs, however it runs; a layer alone has its class's name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normwise import BatchNorm, Moving, NonFiniteError, Norm, NormwiseError, ShapeError, TooFewSamplesError
from normwise.whereabouts import Whereabouts, path_of

ONE_ROW = torch.ones(1, 3)


class Body(nn.Module):
    """Layers in containers, called one by one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"left": nn.ModuleList([nn.Identity(), norm])})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.branches["left"]:
            x = layer(x)
        return x


class Hidden(nn.Module):
    """A layer in a plain list, of which torch knows nothing."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = [norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Trainer:
    """Not a module, though it stands on the stack as `self`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x: Tensor) -> Tensor:
        return self.model(x)


def _functional(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    model = nn.Sequential(nn.Identity(), Body(norm))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return lambda x: torch.func.functional_call(model, state, (x,))


def _checkpointed(reentrant: bool) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def make(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        model = nn.Sequential(nn.Identity(), Body(norm))
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    return make


def _twice(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ModuleDict({"spare": nn.Identity()})["spare"], nn.Sequential(Body(norm)), Body(norm))


STANDS: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Tensor]], str]] = {
    "alone": (lambda norm: norm, ""),
    "called by itself out of a model": (lambda norm: nn.Sequential(norm)[0], ""),
    "sequential": (lambda norm: nn.Sequential(nn.Identity(), norm), "1"),
    "nested": (lambda norm: nn.Sequential(nn.Identity(), nn.Sequential(nn.Sequential(norm))), "1.0.0"),
    "dictionary and list": (lambda norm: Body(norm), "branches.left.1"),
    "inner model called by itself": (lambda norm: nn.Sequential(Body(norm))[0], "branches.left.1"),
    "trainer": (lambda norm: Trainer(nn.Sequential(Body(norm))).run, "0.branches.left.1"),
    "functional_call": (_functional, "1.branches.left.1"),
    "reentrant checkpoint": (_checkpointed(True), "1.branches.left.1"),
    "checkpoint": (_checkpointed(False), "1.branches.left.1"),
    "under two names": (_twice, "1.0.branches.left.1"),
    "hidden from torch": (lambda norm: nn.Sequential(Hidden(norm)), ""),
    "hidden in a model that knows it": (lambda norm: nn.ModuleList([Hidden(norm), norm])[0], ""),
    "a wrapper": (lambda norm: torch.nn.DataParallel(nn.Sequential(norm)), "module.0"),
}
everywhere = pytest.mark.parametrize(("place", "path"), STANDS.values(), ids=STANDS)


@everywhere
def test_an_error_names_the_path(place: Callable[[nn.Module], Callable[[Tensor], Tensor]], path: str) -> None:
    call = place(BatchNorm(3))
    with pytest.raises(TooFewSamplesError) as caught:
        call(ONE_ROW.clone())
    assert str(caught.value).startswith(f"{path}: shape (1, 3) leaves" if path else "shape (1, 3) leaves")
    with pytest.raises(ShapeError) as caught:
        call(torch.randn(4, 5))
    assert str(caught.value).startswith(f"{path}: axis 'c' has size 3" if path else "axis 'c' has size 3")


@everywhere
def test_a_warning_and_the_error_that_replaces_it_name_the_path_once(
    place: Callable[[nn.Module], Callable[[Tensor], Tensor]], path: str
) -> None:
    with pytest.warns(UserWarning, match="not finite") as warned:
        place(BatchNorm(3))(torch.full((4, 3), torch.nan))
    assert [str(warning.message) for warning in warned] == [
        f"{path or 'BatchNorm'}: the batch's statistics are not finite: it does not enter the memory; "
        "skipped_batches counts such batches"
    ]
    with pytest.raises(NonFiniteError) as caught:
        place(Norm("[n] c", memory=Moving("c", decay=0.9, nonfinite="raise")))(torch.full((4, 3), torch.nan))
    assert str(caught.value) == (
        f"{path or 'Norm'}: the batch's statistics are not finite, and nothing of it has entered the memory"
    )


def test_two_layers_of_a_model_warn_once_each() -> None:
    model = nn.Sequential(BatchNorm(3), nn.Sequential(BatchNorm(3)))
    spoilt = torch.full((4, 3), torch.inf)
    with pytest.warns(UserWarning, match="not finite") as warned:
        model(spoilt)
    model(spoilt), model(spoilt)  # a second warning would be an error
    assert [str(warning.message).split(":")[0] for warning in warned] == ["0", "1.0"]
    assert [model[0].skipped_batches.item(), model[1][0].skipped_batches.item()] == [3, 3]


def test_the_words_for_a_layer_that_does_not_run() -> None:
    layer = BatchNorm(3)
    assert path_of(layer) == ""
    assert str(Whereabouts(layer)) == "BatchNorm"


@pytest.mark.parametrize(("name", "x"), [("shape", ONE_ROW), ("a", torch.ones(4, 5))])
def test_a_path_that_the_message_happens_to_begin_with_is_still_named(name: str, x: Tensor) -> None:
    model = nn.Sequential(OrderedDict({name: BatchNorm(3)}))
    with pytest.raises(NormwiseError) as alone:
        model[0](x)
    with pytest.raises(NormwiseError) as caught:
        model(x)
    assert str(caught.value) == f"{name}: {alone.value}"
