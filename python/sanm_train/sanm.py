"""`SANM`: any torch classifier with masked views, their targets and reconstruction."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import sanm_kernels as sk

from .models import Decoder


class Batch(NamedTuple):
    """One batch of training samples.

    images (B, C, H, W); targets: class indices (B,) or soft (B, K); clean_prob (B,) in [0, 1],
    None for 1 everywhere; sample_index (B,) int64, positions in the training set; row (B,) int64,
    positions in the part of it that this process has.
    """

    images: Tensor
    targets: Tensor
    clean_prob: Tensor | None = None
    sample_index: Tensor | None = None
    row: Tensor | None = None


class SANMLosses(NamedTuple):
    """`total` = `classification` + config.reconstruction_weight · `reconstruction`, 0-d tensors.

    logits (B, K) are those of the unmasked images; masked is what `SANM.mask` returned.
    """

    total: Tensor
    classification: Tensor
    reconstruction: Tensor
    logits: Tensor
    masked: sk.MaskedForward[Tensor]


class SANM(nn.Module):
    """Wraps a classifier so that it can be trained by adversarial noisy masking.

    Called as a module it is the plain model. The feature map is read by a forward hook that lives
    only during the call, so copying, pickling and `state_dict` see no trace of it.

    Args:
        model: maps images (B, C, H, W) to logits (B, K).
        feature_layer: the module whose output is the last feature map (B, C, h, w), or its dotted
            name; default `model.feature_layer`.
        decoder: maps feature maps to images (B, C, H, W); None builds a `Decoder`.
        config: the masking.
        image_shape: (C, H, W). With it the decoder is built at once, and its parameters exist
            before an optimiser is made; without it the first batch decides.
        random_box: hide a random place instead of the peak and the trough (an ablation).
        modulate: False leaves the masked views' targets as they are (an ablation).

    Raises:
        ValueError: no such layer; when the model runs, its output is not a (B, C, h, w) tensor.
        RuntimeError: when the model runs, the layer was not run.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_layer: str | nn.Module | None = None,
        decoder: nn.Module | None = None,
        config: sk.MaskConfig | None = None,
        image_shape: Sequence[int] | None = None,
        *,
        random_box: bool = False,
        modulate: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.random_box, self.modulate = random_box, modulate
        self.config = sk.MaskConfig.paper() if config is None else config
        self.feature_layer = _layer_name(model, feature_layer)
        self._found: list[Tensor] = []
        self._compiled = False
        self.decoder = decoder
        if decoder is None and image_shape is not None:
            self._build_decoder(image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the plain model; under autocast in float32, as losses want them."""
        logits: Tensor = self.model(images)
        self._found.clear()
        return logits.float() if torch.is_autocast_enabled(images.device.type) else logits

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the last feature map (B, C, h, w) of one run of the model."""
        self._found.clear()
        handle = None if self._compiled else self._hook()
        try:
            logits = self.model(images)
            found = list(self._found)
        finally:
            self._found.clear()
            if handle is not None:
                handle.remove()
        name = f"feature_layer {self.feature_layer!r}"
        if not found:
            raise RuntimeError(f"{name} was not run by the model's forward")
        features = found[-1]
        if not isinstance(features, Tensor) or features.ndim != 4:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name} must give a feature map (B, C, h, w), got {got}")
        if torch.is_autocast_enabled(images.device.type):
            logits = logits.float()
        return logits, features

    def compile_model(self) -> None:
        """`torch.compile` the model in place. The hook then stays, for it has to be compiled too:
        a compiled model is not copied or pickled any more."""
        self._hook()
        self._compiled = True
        self.model.compile()

    def _hook(self) -> RemovableHandle:
        layer = self.model.get_submodule(self.feature_layer)
        return layer.register_forward_hook(lambda module, inputs, out: self._found.append(out))

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

        features are computed when not given. clean_prob None stands for 1, "surely right".
        generator and options go to `sk.masked_forward`: num_classes, sample_index, draws, ...
        """
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
            config=self.config,
            generator=generator,
            **options,
        )

    def reconstruct(self, features: Tensor, image_shape: Sequence[int]) -> Tensor:
        """Images (B, …), each of `image_shape`, rebuilt from feature maps (B, C, h, w)."""
        if self.decoder is None:
            self._add_decoder(features, image_shape)
        assert self.decoder is not None
        rebuilt: Tensor = self.decoder(features)
        return rebuilt

    def _add_decoder(self, features: Tensor, image_shape: Sequence[int]) -> None:
        decoder = Decoder(features.shape[1:], image_shape)
        self.decoder = decoder.to(features.device, features.dtype)

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
        self, batch: Batch | tuple[Tensor, ...], generator: torch.Generator | int | None = None
    ) -> SANMLosses:
        """Classification loss over the images and their masked views, and the reconstruction loss.

        Masked views carry the modulated targets. Two runs of the model: the images, then the
        views together. `batch` is a `Batch` or a tuple in its order.
        """
        images, targets, clean_prob, sample_index, _ = Batch(*batch)
        logits, features = self.forward_features(images)
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
        ratios = self.view_ratios(masked)
        if targets.ndim == 1:
            targets = F.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
        classification = sk.masked_loss(
            torch.cat([logits, view_logits]),
            targets.expand(1 + len(ratios), *targets.shape),
            ratio=torch.cat([logits.new_zeros(len(logits)), *ratios]),
            drop=self.config.drop,
        ).total
        total = classification + self.config.reconstruction_weight * reconstruction
        return SANMLosses(total, classification, reconstruction, logits, masked)

    @torch.no_grad()
    def _build_decoder(self, image_shape: Sequence[int]) -> None:
        """Build the decoder by running the model once, in eval mode, on an empty image."""
        like = next(self.model.parameters())
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            features = self.forward_features(like.new_zeros(1, *image_shape))[1]
            self._add_decoder(features, image_shape)
        finally:
            for module, training in modes:  # one by one: some layers may be frozen in eval mode
                module.training = training


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


def _layer_name(model: nn.Module, layer: str | nn.Module | None) -> str:
    """Dotted name of `layer` inside `model`."""
    names = {name: module for name, module in model.named_modules() if name}
    layer = getattr(model, "feature_layer", None) if layer is None else layer
    if layer is None:
        raise ValueError(
            "feature_layer: name the module that gives the last feature map, "
            f"one of {', '.join(names)}"
        )
    if isinstance(layer, nn.Module):
        found = [name for name, module in names.items() if module is layer]
        if not found:
            raise ValueError(f"feature_layer: this {type(layer).__name__} is no part of the model")
        layer = found[0]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, 1) or list(names)[-1:]
        raise ValueError(f"feature_layer: the model has no module {layer!r}; nearest: {near[0]!r}")
    return str(layer)
