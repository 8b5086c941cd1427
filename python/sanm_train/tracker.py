"""Label quality in any training loop: losses by global sample index, one mixture over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

import sanm_kernels as sk

from . import distributed
from .sanm import Batch, SANMLosses

EPOCHS_AVERAGED = 5  # as DivideMix does at 90 % noise, the current one included
UNSEEN = -torch.inf  # what a maximum over the processes leaves where any of them has a loss
STATE = ("epochs", "clean_prob", "noted", "history")


class Indexed(Dataset[Any]):
    """`dataset` with each sample's position at its end: (image, label, index), or of samples that
    are dictionaries the entry "index"."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # one without has no positions

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return {**sample, "index": index} if isinstance(sample, Mapping) else (*sample, index)


class LabelQualityTracker:
    """The probability that each training sample's label is right, refitted every epoch.

    ::

        quality = LabelQualityTracker(len(train_set))
        for epoch in range(epochs):
            quality.refit()
            for images, labels, index in loader:  # of Indexed(train_set)
                losses = quality.losses(model, images, labels, index)

    A sample is its position in the whole training set, whichever process, batch or epoch it comes
    in: what a sampler pads with is counted once, and a sample that an epoch leaves out keeps its
    last loss. Losses are merged over all processes by `refit`, which every process calls; then all
    have the same label quality, and `state_dict` is whole.

    Args:
        num_samples: of the training set, on all processes together.
        warmup: epochs of plain cross-entropy first, in which every label counts as right and
            `losses` hides nothing; then the first mixture is fitted.
        average_losses: average the losses over five epochs, for noise of about 90 %.
        seed: of the mixture's start.

    Raises:
        TypeError, ValueError: not a positive number of samples; in `update`, indices or losses of
            the wrong kind.
        FloatingPointError: in `refit`, on every process: a loss that is not finite.
    """

    def __init__(
        self, num_samples: int, *, warmup: int = 3, average_losses: bool = False, seed: int = 0
    ) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(
                f"num_samples: expected the length of the training set, got {num_samples!r}"
            )
        self.warmup, self.seed = warmup, seed
        self.kept = EPOCHS_AVERAGED if average_losses else 1
        self.epochs = 0  # that were merged
        self.clean_prob = torch.ones(num_samples)
        self.history = torch.empty(0, num_samples)  # of whole epochs, the last one last
        self.noted = torch.full((num_samples,), UNSEEN)  # this process's in the present epoch

    def __len__(self) -> int:
        return len(self.clean_prob)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The clean probability (B,) of the samples at `index` (B,)."""
        self._follow(index.device)
        return self.clean_prob[index]

    def losses(
        self,
        model: Callable[[Batch], SANMLosses],
        images: Tensor,
        targets: Tensor,
        index: Tensor | None,
    ) -> SANMLosses:
        """The losses of `model`, a SANM or what wraps one, with the label quality of the samples at
        `index` (B,), which are then updated. None is for samples that are not trained on: nothing
        is hidden or noted."""
        if index is None:
            return model(Batch(images, targets, masked=False))
        hide = self.epochs >= self.warmup
        losses = model(Batch(images, targets, self[index], index, masked=hide))
        self.update(index, losses.sample_loss)
        return losses

    def update(self, index: Tensor, loss: Tensor) -> None:
        """Note the losses (B,), `SANMLosses.sample_loss`, of the samples at `index` (B,)."""
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"index: expected a tensor of integers (B,), got {_kind(index)}")
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"loss: expected a tensor of floats (B,), got {_kind(loss)}")
        if loss.shape != index.shape or loss.ndim != 1:
            raise ValueError(
                f"loss: expected the loss of each sample, {tuple(index.shape)} as index, got "
                f"{tuple(loss.shape)}; pass SANMLosses.sample_loss, or losses with reduction='none'"
            )
        least, most = (int(x) for x in index.aminmax()) if self._on_cpu(index) else (0, 0)
        if not 0 <= least <= most < len(self):
            raise ValueError(
                f"index: expected positions in the training set of {len(self)} samples, got "
                f"{least} to {most}"
            )
        self._follow(loss.device)
        loss = loss.detach().float().nan_to_num(torch.inf, torch.inf, torch.inf)
        self.noted[index.to(loss.device)] = loss

    def refit(self) -> None:
        """Merge the epoch's losses, of all processes, and refit the label quality to them.

        Without a loss since the last time nothing changes, so that it may begin every epoch.
        """
        merged = self.noted
        if distributed.size() > 1:
            dist.all_reduce(merged, dist.ReduceOp.MAX)
        seen = merged > UNSEEN
        if not bool(seen.any()):
            return
        if bool((merged == torch.inf).any()):
            first = int((merged == torch.inf).nonzero()[0])
            raise FloatingPointError(f"the loss of sample {first} is not finite")
        before = self.history[-1] if len(self.history) else torch.nan
        epoch = torch.where(seen, merged, before)
        self.history = torch.cat([self.history, epoch[None]])[-self.kept :]
        self.noted = torch.full_like(merged, UNSEEN)
        self.epochs += 1
        if self.epochs >= self.warmup:
            self._fit()

    def _fit(self) -> None:
        known = ~self.history[-1].isnan()  # all, but in a first epoch that left some out
        current = self.history[-1, known]
        past = self.history[:-1, known]
        past = torch.where(past.isnan(), current, past)
        fit = sk.fit_label_quality(current, seed=self.seed, history=past if len(past) else None)
        self.clean_prob = torch.ones_like(self.clean_prob)
        if bool(fit.degenerate):
            warnings.warn(
                "the losses do not fall into two groups; all labels count as clean for now",
                stacklevel=3,
            )
        self.clean_prob[known] = fit.clean_prob.to(self.clean_prob)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and numbers; whole right after `refit`."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, of a training set of the same size."""
        size = len(state["clean_prob"])
        if size != len(self):
            raise ValueError(f"state: expected that of {len(self)} samples, got {size}")
        for name in STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def _follow(self, device: torch.device) -> None:
        """Be where losses and indices are, so that no step waits for a copy."""
        if device.type != "cpu" and self.noted.device != device:
            self.clean_prob, self.noted, self.history = (
                x.to(device) for x in (self.clean_prob, self.noted, self.history)
            )

    @staticmethod
    def _on_cpu(index: Tensor) -> bool:
        return index.device.type == "cpu" and len(index) > 0


def _kind(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
