"""The public function that turns losses into label quality."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from sanm_kernels import distributed, validate
from sanm_kernels.backends import call, forced
from sanm_kernels.ops import internals
from sanm_kernels.reference import checks
from sanm_kernels.reference import fit_label_quality as reference

EPOCHS_AVERAGED = 5  # the current one included


class LabelQuality(NamedTuple):
    """What :func:`fit_label_quality` returns, all on the device of the losses.

    Attributes:
        clean_prob: (N,) probability that the label is right: the posterior of the component with
            the smaller mean; float32, or float64 for float64 losses.
        means, variances, weights: (2,) float64, the component with the smaller mean first.
        n_iter: () int64, EM iterations done.
        converged: () bool, whether EM met `tol` within `max_iter`.
        degenerate: () bool, whether the losses do not form two components; then every label is
            taken for right (`clean_prob` is 1), and the mixture is the one Gaussian of the data
            (means and variances alike, weights 1 and 0, n_iter 0).
    """

    clean_prob: Tensor
    means: Tensor
    variances: Tensor
    weights: Tensor
    n_iter: Tensor
    converged: Tensor
    degenerate: Tensor


@functools.lru_cache(maxsize=64)
def _draw(seed: int) -> tuple[float, ...]:
    return tuple(float(u) for u in numpy.random.RandomState(seed).random_sample(3))


@internals.constant
def _uniforms(seed: int) -> list[float]:
    """The numbers that scikit-learn's k-means++ draws with ``random_state=seed``."""
    return list(_draw(seed))


def _arguments(
    losses: Tensor,
    history: Tensor | None,
    seed: int,
    max_iter: int,
    tol: float,
    reg_covar: float,
    normalize: bool,
) -> tuple[Tensor, Tensor | None, list[float], int, float, float, bool]:
    """The operator's arguments; an error names the wrong one."""
    validate.floating(losses, "losses", 1, shape="(N,)")
    seed = validate.whole(seed, "seed", 0, 2**32)
    max_iter = validate.whole(max_iter, "max_iter", 1)
    tol = float(validate.number(tol, "tol", 0))
    reg_covar = float(validate.number(reg_covar, "reg_covar", 0))
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    if history is not None:
        validate.floating(history, "history", 2, shape="(E, N)")
        validate.same_device(history, "history", losses.device, "losses")
        if history.dtype != losses.dtype:
            raise TypeError(
                f"history: expected the dtype of losses, {losses.dtype}, got {history.dtype}"
            )
        if history.shape[1] != losses.shape[0]:
            raise ValueError(
                f"history: expected shape (E, {losses.shape[0]}), got {list(history.shape)}"
            )
        if _counted_twice(losses, history):
            raise ValueError(
                "history: expected the losses of earlier epochs only, got some that end with "
                "losses itself, which would count twice; pass history[:-1]"
            )
        history = history[max(0, history.shape[0] + 1 - EPOCHS_AVERAGED) :].detach()
    return losses.detach(), history, _uniforms(seed), max_iter, tol, reg_covar, normalize


def _counted_twice(losses: Tensor, history: Tensor) -> bool:
    """Whether the last row is this epoch's; False if values are unchecked or losses all equal."""
    if history.numel() == 0 or torch.compiler.is_compiling() or not checks.enabled(losses):
        return False
    return torch.equal(history[-1], losses) and bool((losses != losses[0]).any())


@validate.public
def fit_label_quality(
    losses: Tensor,
    *,
    seed: int = 0,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
    history: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LabelQuality:
    """Label quality by a two-component Gaussian mixture over per-sample losses (section 6).

    Computes what scikit-learn's ``GaussianMixture(2, max_iter=max_iter, tol=tol,
    reg_covar=reg_covar, random_state=seed)`` does on the normalised losses in float64: posterior
    within 1e-4 (the reference within about 1e-9), the same number of iterations. A loss exactly
    midway between the centres of the k-means start may fall on the other side.
    Deterministic. Nothing is differentiable; a gradient of `losses` is ignored.

    Args:
        losses: (N,) losses of the whole training set, any floating dtype and strides.
        seed: int in [0, 2³²), of the k-means++ start.
        max_iter: EM iterations at most, at least 1.
        tol: EM stops when the mean log-likelihood changes by less than this; ≥ 0.
        reg_covar: added to both variances; ≥ 0.
        history: (E, N) losses of earlier epochs, the oldest first, in the dtype of `losses`, and
            not `losses` itself. The mixture is fitted to the mean over the last five epochs, the
            current one included; older rows are not read.
        normalize: min–max normalise each epoch to [0, 1] first (all 0 where its losses are equal).
        backend: force a backend; see :func:`sanm_kernels.use_backend`. Over a process group it is
            ``"reference"``.
        process_group: None for the samples of this process alone, or the ``torch.distributed``
            group (``torch.distributed.group.WORLD`` for all processes) over whose ranks the samples
            are spread. Each rank then gives, at the same time, the losses and the history of its
            own samples (any number, 0 included; each sample on one rank), and the same other
            arguments. They are fitted as the concatenation in the order of the ranks, by plain
            torch in float64: a few sums per pass are exchanged, never the losses. Not under
            torch.compile.

    Returns:
        :class:`LabelQuality`. Degenerate, with a clean probability of 1, are fewer than two
        samples (N = 0 included), losses that are all equal, and fits in which one component holds
        less than half a sample, or its standard deviation or the distance between the means is
        below a millionth of the data's range.
        Over a process group `clean_prob` is that of the rank's own samples, and all else has the
        same bits on every rank.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values; NaN and
            infinite losses are named with their index (in ``history[-4:]``, the rows read). Over a
            process group every rank raises, and the message names the first rank with an error.
        RuntimeError: a backend is forced that cannot run here.
    """
    settings = (seed, max_iter, tol, reg_covar, normalize)
    if process_group is not None:
        return _over_ranks(process_group, backend, losses, history, *settings)
    arguments = _arguments(losses, history, *settings)
    return LabelQuality(*call("fit_label_quality", losses.device, backend, *arguments))


def _over_ranks(
    process_group: dist.ProcessGroup,
    backend: str | None,
    losses: Tensor,
    history: Tensor | None,
    seed: int,
    *settings: Any,
) -> LabelQuality:
    group = distributed.is_group(process_group, "process_group")

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = _arguments(losses, history, seed, *settings)
        name = forced(backend)
        if name not in (None, "reference"):
            raise RuntimeError(
                f"backend {name!r} cannot run fit_label_quality over a process group: "
                "there it is plain torch, the backend 'reference'"
            )
        reference.check(*arguments[:2])
        shared = {
            "losses": losses.device.type,
            "seed": int(seed),
            "history": 0 if arguments[1] is None else arguments[1].shape[0],
        }
        shared |= zip(("max_iter", "tol", "reg_covar", "normalize"), arguments[3:], strict=True)
        return arguments, {"size": losses.shape[0]} | shared

    arguments, all_shared = distributed.agree(group, prepare)
    sizes = [shared.pop("size") for shared in all_shared]
    what = {"losses": "type of device", "history": "number of rows"}
    for name in all_shared[0]:
        distributed.same(name, what.get(name, "value"), [shared[name] for shared in all_shared])
    return LabelQuality(*reference.quality(distributed.GroupRanks(group, sizes), *arguments))
