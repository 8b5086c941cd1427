"""`SANM`: any torch classifier with masked views, their targets and reconstruction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import sanm_kernels as sk

from . import distributed
from .decoders import Decoder
from .features import Reader, like_parameters

#: What goes around SANM, not into it.
WRAPPERS = (DataParallel, DistributedDataParallel)


#: Losses (B,) of logits (B, K) on soft targets (B, K), given rows (B,), `Batch.row` or positions in
#: the batch, and which view the logits are of: "image", "max" (the peak is hidden), "min", "plain",
#: a control's further view of the images (`--box none`).
Criterion = Callable[[Tensor, Tensor, Tensor, str], Tensor]


class Batch(NamedTuple):
    """One batch of training samples.

    images (B, C, H, W); targets: class indices (B,) or soft (B, K); clean_prob (B,) in [0, 1],
    None for 1 everywhere; sample_index (B,) int64, positions in the training set; row (B,) int64,
    positions in the part of it that this process has. masked False hides nothing, as in a warm-up.
    """

    images: Tensor
    targets: Tensor
    clean_prob: Tensor | None = None
    sample_index: Tensor | None = None
    row: Tensor | None = None
    masked: bool = True


class SANMLosses(NamedTuple):
    """`total` = `classification` + mask_config.reconstruction_weight · `reconstruction`, 0-d.

    logits (B, K) are those of the unmasked images, sample_loss (B,) their cross-entropies, without
    gradient, which the label quality is fitted to; masked is what `SANM.mask` returned, None where
    nothing is hidden.
    """

    total: Tensor
    classification: Tensor
    reconstruction: Tensor
    logits: Tensor
    sample_loss: Tensor
    masked: sk.MaskedForward[Tensor] | None


class SANM(nn.Module):
    """Wraps a classifier so that it can be trained by adversarial noisy masking.

    Called with images it is the plain model, called with a `Batch` it returns the losses: so
    DistributedDataParallel and all else that wraps a module's forward see the training step. The
    feature map is read by a forward hook that keeps nothing once the call is over.

    Args:
        model: maps images (B, C, H, W) to logits (B, K), or to something with logits in it.
        feature_layer: the module whose output is the last feature map, or its dotted name; default
            `model.feature_layer`, else the last layer that gives one, with a warning that names it.
        decoder: maps feature maps (B, C, h, w) to images (B, C, H, W), or makes such a module of
            (C, h, w) and (C, H, W), as the classes `Decoder`, the default, and `LinearDecoder` do.
        config: the masking; kept as `mask_config`.
        image_shape: (C, H, W). With it the decoder is built at once, and its parameters exist
            before an optimiser is made; without it the first batch decides.
        layout: of the layer's output, "BCHW", "BHWC" (channels last, as Swin has it) or "BNC"
            (tokens, as ViT has it, class and register tokens first); "auto" decides by the width of
            the classifier and the image's aspect, and refuses where it cannot tell.
        to_map: makes (B, C, h, w) of the layer's output where `layout` does not say how.
        grid: (h, w) of tokens; default by the image's aspect.
        logits: takes the logits out of what the model returns. By default it is the tensor itself,
            `.logits` or "logits", or the first of a tuple or list. A module is trained as well.
        random_box: hide a random place instead of the peak and the trough (an ablation).
        modulate: False leaves the masked views' targets as they are (an ablation).

    Raises:
        ValueError: no such layer; when the model runs, no logits, or no feature map on which a
            peak can be found. The message says what came, and which layers give a map.
        RuntimeError: when the model runs, the layer was not run.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_layer: str | nn.Module | None = None,
        decoder: nn.Module | Callable[[Sequence[int], Sequence[int]], nn.Module] | None = None,
        config: sk.MaskConfig | None = None,
        image_shape: Sequence[int] | None = None,
        *,
        layout: str = "auto",
        to_map: Callable[[Any], Tensor] | None = None,
        grid: Sequence[int] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        random_box: bool = False,
        modulate: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, WRAPPERS):
            raise ValueError(
                f"model: {type(model).__name__} would see neither decoder nor losses; wrap the "
                "other way round, DistributedDataParallel(SANM(model, …))"
            )
        self.model = model
        self.random_box, self.modulate = random_box, modulate
        self.mask_config = sk.MaskConfig.paper() if config is None else config
        self.reader = Reader(model, feature_layer, layout, to_map, grid, logits)
        self.head = logits if isinstance(logits, nn.Module) else None
        self.decoder = decoder if isinstance(decoder, nn.Module) else None
        self._make_decoder = Decoder if decoder is None or self.decoder is not None else decoder
        if self.decoder is None and image_shape is not None:
            self._add_decoder(self.reader.map_shape(model, image_shape), image_shape)
        elif self.reader.layer is None and image_shape is not None:
            self.reader.map_shape(model, image_shape)

    @property
    def feature_layer(self) -> str | None:
        """The name of the layer that is read; None until one is found by a run."""
        return self.reader.layer

    @overload
    def forward(self, batch: Tensor) -> Tensor: ...
    @overload
    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | int | Tensor | None = None,
        criterion: Criterion | None = None,
    ) -> SANMLosses: ...
    def forward(
        self,
        batch: Tensor | Batch,
        generator: torch.Generator | int | Tensor | None = None,
        criterion: Criterion | None = None,
    ) -> Tensor | SANMLosses:
        """Of images, logits (B, K) of the plain model, under autocast in float32, as losses want
        them; of a `Batch`, `losses`."""
        if not isinstance(batch, Tensor):
            return self.losses(batch, generator, criterion)
        return _full(self.reader.logits(self.model, batch))

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the last feature map (B, C, h, w) of one run of the model."""
        logits, features = self.reader(self.model, images)
        return _full(logits), features

    def _replicate_for_data_parallel(self) -> SANM:
        raise RuntimeError(
            "DataParallel: SANM's losses are not the mean over its replicas; use "
            "torch.nn.parallel.DistributedDataParallel, a process for each device"
        )

    @torch.no_grad()
    def mask(
        self,
        images: Tensor,
        targets: Tensor,
        clean_prob: Tensor | None = None,
        *,
        features: Tensor | None = None,
        generator: torch.Generator | int | Tensor | None = None,
        **options: Any,
    ) -> sk.MaskedForward[Tensor]:
        """Statistics, boxes, masked views and modulated targets of `images` (sections 1–4).

        features are computed when not given. clean_prob None means 1, "surely right".
        generator and options go to `sk.masked_forward`: num_classes, sample_index, draws, ...
        """
        _check_targets(targets)
        if self.random_box:  # noise of the image's own size: any pixel may be the peak
            features = _noise(images, generator)
        elif features is None:
            features = self.forward_features(images)[1]
        if clean_prob is None:
            clean_prob = torch.ones(len(images), device=images.device)
        return sk.masked_forward(
            features,
            targets,
            clean_prob,
            images=images,
            config=self.mask_config,
            generator=generator,
            **options,
        )

    def reconstruct(self, features: Tensor, image_shape: Sequence[int]) -> Tensor:
        """Images (B, …), each of `image_shape`, rebuilt from feature maps (B, C, h, w)."""
        if self.decoder is None:
            if distributed.size() > 1:
                raise RuntimeError(
                    "image_shape: SANM needs it where several processes train, to build the "
                    "decoder before the model is wrapped; got None"
                )
            self._add_decoder(features.shape[1:], image_shape)
            if self.training and torch.is_grad_enabled():
                warnings.warn(
                    "the decoder was built by the first batch: an optimiser made before does not "
                    "train it; give image_shape=, or call losses() once under torch.no_grad()",
                    stacklevel=4,
                )
        assert self.decoder is not None
        like = next(self.decoder.parameters(), features)
        rebuilt: Tensor = self.decoder(features.to(like.dtype))
        return rebuilt

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add_decoder(self, map_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        """In the dtype and on the device of the model's parameters."""
        like = like_parameters(self.model)
        with torch.inference_mode(False):
            decoder = self._make_decoder(map_shape, image_shape).to(like.device, like.dtype)
        self.decoder = decoder.train(self.training)

    def reconstruction_loss(
        self, masked: sk.MaskedForward[Tensor], images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_r of section 5 and the masked views' logits (V·B, K), views in the order max, min."""
        logits, features = self.forward_features(masked.images_masked)
        rebuilt = self.reconstruct(features, images.shape[1:])
        return sk.reconstruction_loss(rebuilt, images), logits

    def view_ratios(self, masked: sk.MaskedForward) -> list[Tensor]:
        """What each masked view, max then min, takes off its target's largest class: (B,) each."""
        ratios = [r for r in (masked.ratio_max, masked.ratio_min) if r is not None]
        return ratios if self.modulate else [torch.zeros_like(r) for r in ratios]

    def losses(
        self,
        batch: Batch | tuple[Tensor, ...],
        generator: torch.Generator | int | Tensor | None = None,
        criterion: Criterion | None = None,
    ) -> SANMLosses:
        """Classification loss over the images and their masked views, and the reconstruction loss.

        Masked views carry the modulated targets. Two runs of the model: the images, then the
        views together. `batch` is a `Batch` or a tuple in its order. Where nothing is hidden, the
        losses are those of the images and of their own reconstruction: every parameter has a
        gradient, as DistributedDataParallel requires.

        Args:
            criterion: called once for each view, the images first, for its loss (B,) per sample or
                0-d; the classification loss is the mean over all views. None: cross-entropy, fused.
                A criterion that is robust to wrong labels has to train the masked views as well:
                their targets are as often wrong as the images'.
        """
        images, targets, clean_prob, sample_index, row, hide = Batch(*batch)
        if not torch.compiler.is_compiling():
            self._check_wrapped()
        logits, features = self.forward_features(images)
        masked = None
        if hide:
            masked = self.mask(
                images,
                targets,
                clean_prob,
                features=features.detach(),
                num_classes=logits.shape[1],
                generator=generator,
                sample_index=sample_index,
            )
            reconstruction, view_logits = self.reconstruction_loss(masked, images)
        else:
            _check_targets(targets)
            view_logits = logits[:0]
            rebuilt = self.reconstruct(features, images.shape[1:])
            reconstruction = sk.reconstruction_loss(rebuilt, images)
        if targets.ndim == 1:
            targets = F.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
        if criterion is None:
            ratios = [] if masked is None else self.view_ratios(masked)
            found = sk.masked_loss(
                torch.cat([logits, view_logits]),
                targets.expand(1 + len(ratios), *targets.shape),
                ratio=torch.cat([logits.new_zeros(len(logits)), *ratios]),
                drop=self.mask_config.drop,
            )
            classification = found.total
            sample_loss = found.per_sample[: len(logits)].detach()
        else:
            rows = torch.arange(len(images), device=images.device) if row is None else row
            views = {"image": targets}
            if masked is not None:
                hidden = {"max": masked.targets_max, "min": masked.targets_min}.items()
                views |= {v: t if self.modulate else targets for v, t in hidden if t is not None}
            parts = torch.cat([logits, view_logits]).chunk(len(views))
            losses = [
                criterion(z, t, rows, view).mean()
                for z, (view, t) in zip(parts, views.items(), strict=True)
            ]
            classification = torch.stack(losses).mean()
            sample_loss = F.cross_entropy(logits.detach(), targets, reduction="none")
        return SANMLosses(
            classification + self.mask_config.reconstruction_weight * reconstruction,
            classification,
            reconstruction,
            logits,
            sample_loss,
            masked,
        )

    def _check_wrapped(self) -> None:
        """Warn where gradients of several processes would not be averaged."""
        if distributed.size() == 1 or not (self.training and torch.is_grad_enabled()):
            return
        inside = DistributedDataParallel._get_active_ddp_module() is not None
        if not inside and not any(hasattr(module, "_get_fsdp_state") for module in self.modules()):
            warnings.warn(
                "SANM: losses() outside of the forward of DistributedDataParallel, whose gradients "
                "it then does not average over the processes; call the wrapped module itself, "
                "ddp(batch), not ddp.module.losses(batch)",
                stacklevel=4,
            )


def _full(logits: Tensor) -> Tensor:
    """Logits as losses want them: in float32 under autocast."""
    return logits.float() if torch.is_autocast_enabled(logits.device.type) else logits


def _check_targets(targets: Tensor) -> None:
    """Soft targets (B, K) are distributions. Only on the CPU: elsewhere a look would wait."""
    if targets.ndim != 2 or targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sums = targets.sum(1, dtype=torch.float64)
    bad = ((sums - 1).abs() > 1e-2) | (targets < 0).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        several = bool(((targets == 0) | (targets == 1)).all())
        raise ValueError(
            f"targets: expected rows of probabilities that sum to 1, got a sum of {sums[row]:g} "
            f"in row {row}"
            + (
                ": these look like multi-hot targets of a multi-label problem, which SANM is not "
                "for: it takes one class per image, as indices (B,) or probabilities (B, K)"
                if several
                else "; divide each row by its sum, or apply softmax to logits"
            )
        )


def _noise(images: Tensor, generator: torch.Generator | int | Tensor | None) -> Tensor:
    """U[0, 1) of the shape (B, 1, H, W), drawn from `generator` on its own device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        generator = torch.Generator(images.device).manual_seed(int(generator))
    device = images.device if generator is None else generator.device
    shape = (len(images), 1, *images.shape[2:])
    return torch.rand(shape, generator=generator, device=device).to(images.device)


def masked_views(masked: sk.MaskedForward) -> list[Tensor]:
    """The masked images that are there, in the order max, min."""
    return [view for view in (masked.images_max, masked.images_min) if view is not None]
