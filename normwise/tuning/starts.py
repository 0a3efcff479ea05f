"""Starting values of a network's weights, as a study may ask for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.errors import StudyError
from normwise.tuning.axes import STARTS, known

Recurrent = nn.RNNBase | nn.RNNCellBase
Weighted = nn.Linear | nn.modules.conv._ConvNd

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@torch.no_grad()
def restart(model: nn.Module, start: str) -> nn.Module:
    """Draw the weights of linear, convolution, attention and recurrent layers anew, in place, and return the model.

    ============ ========================================================================================
    default      as torch does: the layer's own reset_parameters
    he           normal with std sqrt(2 / fan in), biases 0 (He et al., arXiv:1502.01852)
    orthogonal   orthogonal with gain sqrt(2), biases 0 (Saxe et al., arXiv:1312.6120)
    ============ ========================================================================================

    Of a recurrent layer, every gate's matrix is drawn by itself; orthogonal ones that act on the hidden state have
    gain 1, because they act at every step. Normalizations, embeddings, weights shared with an embedding, and parameters
    of other modules stay as they are. torch's global generator is drawn from, layer by layer in the order of
    `model.modules()`, inner ones first.

    Raises:
        StudyError: an unknown start; a layer whose weight has no size yet or is computed from others.

    >>> layer = restart(nn.Linear(4, 4), "orthogonal")
    >>> torch.allclose(layer.weight @ layer.weight.T, 2 * torch.eye(4), atol=1e-5)
    True
    """
    known("start", start, STARTS)
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding | nn.EmbeddingBag)}
    paths = {id(module): path for path, module in model.named_modules()}

    def restarted(module: nn.Module) -> None:
        if isinstance(module, Weighted | Recurrent | nn.MultiheadAttention):
            _check(module, paths[id(module)], start)
            if id(getattr(module, "weight", None)) not in embeddings:
                _default(module) if start == "default" else _draw(module, start)

    return model.apply(restarted)


def _check(module: nn.Module, path: str, start: str) -> None:
    who = f"start {start!r}: {path or 'the model'}, a {type(module).__name__},"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise StudyError(f"{who} has no sizes yet: run a batch through the model in its factory")
    computed = not all(isinstance(weight, nn.Parameter) for weight, _, _ in _matrices(module))
    if computed or hasattr(module, "parametrizations"):
        raise StudyError(f"{who} computes its weight from other parameters: leave start out")


def _default(module: nn.Module) -> None:
    if isinstance(module, nn.MultiheadAttention):
        module._reset_parameters()
    elif isinstance(module, Recurrent):  # whose own reset_parameters takes a normalization's parameters for weights
        bound = 1 / math.sqrt(module.hidden_size)
        for parameter in module.parameters(recurse=False):
            parameter.uniform_(-bound, bound)
    else:
        module.reset_parameters()  # type: ignore[operator]


def _draw(module: nn.Module, start: str) -> None:
    """He's or orthogonal weights, and zeros in place of all other parameters of the module itself."""
    weights = list(_matrices(module))
    drawn = {id(weight) for weight, _, _ in weights}
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in drawn:
            parameter.zero_()
    for weight, parts, recurs in weights:
        for part in weight.chunk(parts):
            if start == "he":
                part.normal_(0, math.sqrt(2.0) / math.sqrt(_fan_in(module, part)))
            else:
                nn.init.orthogonal_(part, 1.0 if recurs else math.sqrt(2.0))


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, int, bool]]:
    """A layer's weights; in how many matrices one above the other; and whether they act on the hidden state."""
    if isinstance(module, nn.MultiheadAttention):
        given = ((name, getattr(module, name)) for name in _ATTENTION)
        yield from ((weight, 3 if name == _ATTENTION[0] else 1, False) for name, weight in given if weight is not None)
    elif isinstance(module, Recurrent):
        names = getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))
        for name in (name for name in names if name.startswith("weight")):
            weight = getattr(module, name)
            yield weight, max(1, len(weight) // module.hidden_size), name.startswith("weight_hh")
    elif isinstance(module, Weighted):
        yield module.weight, 1, False


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    """How many inputs an output is made of; of a transposed convolution, with stride 1."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.in_channels // module.groups * math.prod(module.kernel_size)
    return math.prod(weight.shape[1:])
