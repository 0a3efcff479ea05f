"""torch.nn.functional's normalizations, signature for signature, by normwise's four steps.

Each equals its namesake in torch, with normwise's statistics: right for large means and magnitudes, exactly 0 for a
constant column. `momentum` is torch's: the weight of the new batch. A batch that is not finite does not move the
running statistics; a warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from normwise.commit import Store, commit, entry
from normwise.errors import ShapeError
from normwise.kernels.reference import Recalled, Result, Steps, wide_dtype
from normwise.kernels.run import run
from normwise.memory import Moving
from normwise.normalizers import RMS, Normalizer, Standardize
from normwise.pattern import Pattern, parse
from normwise.plan import Over, Plan, Sizes, over_shape, place, plan_for
from normwise.recoveries import Affine, Recovery
from normwise.spec import check_samples, checked_sizes

_BATCH, _INSTANCE, _GROUP = parse("[n] c [...]"), parse("n c [...]"), parse("n (g [k]) [...]")
_TRAILING = tuple(parse(f"... [{' '.join(f'd{dim}' for dim in range(rank))}]") for rank in range(1, 9))
_CHANNEL: Over = (("c",),)
_AFFINE = Affine("c")  # the axes are given where it is used


def batch_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`: (n, c, ...), statistics of each channel; updates the running ones in training.

    Raises:
        ValueError: evaluation without running statistics.
        TooFewSamplesError: training with one value a channel.

    >>> x = torch.randn(8, 3)
    >>> batch_norm(x, torch.zeros(3), torch.ones(3), training=True).mean(0).abs().max().item() < 1e-6
    True
    """
    return _with_memory(_BATCH, input, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`: (n, c, ...), statistics of each channel of each example.

    Raises:
        ValueError: `use_input_stats=False` without running statistics.
        TooFewSamplesError: one value a channel and example.

    >>> instance_norm(torch.randn(2, 3, 5)).mean(2).abs().max().item() < 1e-6
    True
    """
    return _with_memory(_INSTANCE, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`: over the last dimensions, which must be `normalized_shape`.

    >>> layer_norm(torch.randn(2, 5), (5,)).mean(1).abs().max().item() < 1e-6
    True
    """
    pattern, over, sizes = _trailing(normalized_shape)
    plan = plan_for(pattern, input.shape, sizes)
    return _run(input, plan, Standardize(eps), weight, bias, over).output


def rms_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`torch.nn.functional.rms_norm`: over the last dimensions, which must be `normalized_shape`.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,))
    tensor([[0.8485, 1.1314]])
    """
    pattern, over, sizes = _trailing(normalized_shape)
    plan = plan_for(pattern, input.shape, sizes)
    return _run(input, plan, RMS(eps), weight, None, over).output


def group_norm(
    input: Tensor,  # noqa: A002 - torch's name
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm`: (n, c, ...), over the channels of each group and all positions.

    Raises:
        ShapeError: the channels cannot be split into so many groups.
        TooFewSamplesError: one value a group.

    >>> group_norm(torch.randn(2, 6, 4), 3).shape
    torch.Size([2, 6, 4])
    """
    plan = plan_for(_GROUP, input.shape, checked_sizes((("g", num_groups),)))
    if input.numel() > 0:
        check_samples(_GROUP, plan, remembers=False)
    return _run(input, plan, Standardize(eps), weight, bias, (("g", "k"),)).output


def _with_memory(
    pattern: Pattern,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    measure: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    plan = plan_for(pattern, x.shape, ())
    normalizer = Standardize(eps)
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    for name, statistic in {"running_mean": running_mean, "running_var": running_var}.items():
        if statistic is None and (running_mean is not running_var or not measure):
            raise ValueError(f"{name} is None: remembered statistics are running_mean and running_var, both")
        _check_shape(name, statistic, _CHANNEL, plan)
    if not measure:
        return _run(x, plan, normalizer, weight, bias, _CHANNEL, running).output
    if x.numel() > 0:
        check_samples(pattern, plan, remembers=True)
    output, moments, *_ = _run(x, plan, normalizer, weight, bias, _CHANNEL, remembers=running is not None)
    if moments is not None and running is not None:
        batch = entry(moments, _CHANNEL, plan, unbiased=True, least=2)
        memory = Moving("c", update_rate=momentum)
        commit(memory, normalizer.remembers, Store(running), batch, least=2, owner="normwise.functional")
    return output


def _run(
    x: Tensor,
    plan: Plan,
    normalizer: Normalizer,
    weight: Tensor | None,
    bias: Tensor | None,
    over: Over,
    running: tuple[Tensor, ...] | None = None,
    *,
    remembers: bool = False,
) -> Result:
    recovery = _recovery(weight, bias, over, plan)
    wide = wide_dtype(x)
    recalled = None if running is None else Recalled(tuple(place(s.to(wide), _CHANNEL, plan) for s in running))
    parameters = [] if recovery is None else [weight, bias]
    return run(x, Steps(plan, normalizer, recovery, None, recalled), parameters, over, remembers=remembers)[0]


def _recovery(weight: Tensor | None, bias: Tensor | None, over: Over, plan: Plan) -> Recovery | None:
    _check_shape("weight", weight, over, plan)
    _check_shape("bias", bias, over, plan)
    return None if weight is None and bias is None else _AFFINE


def _check_shape(name: str, given: Tensor | None, over: Over, plan: Plan) -> None:
    wanted = over_shape(over, {axis: plan.size(axis) for dim in over for axis in dim})
    if given is not None and given.shape != wanted:
        raise ShapeError(f"{name} has shape {tuple(given.shape)}, the input wants {wanted}: shape {plan.shape}")


def _trailing(normalized_shape: Sequence[int]) -> tuple[Pattern, Over, Sizes]:
    rank = len(normalized_shape)
    if not 1 <= rank <= len(_TRAILING):
        raise ShapeError(
            f"normalized_shape has 1 to {len(_TRAILING)} dimensions, not {rank}: {tuple(normalized_shape)}"
        )
    names = [f"d{dim}" for dim in range(rank)]
    return _TRAILING[rank - 1], tuple((name,) for name in names), tuple(zip(names, normalized_shape, strict=True))
