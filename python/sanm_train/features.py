"""The last feature map of any classifier, and its logits: which layer, which layout, what kind of
output. What cannot be told is refused, by a message that says what was seen and what to do."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .layouts import LAYOUTS, layout_of, shape_text

#: Layers that an error proposes.
PROPOSED = 5
#: What `torch.compile` puts before the names of a model's modules.
COMPILED = "_orig_mod"


def what_came(x: Any) -> str:
    """`x` in a few words: shapes of tensors, names and lengths of what holds them."""
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} of {x.dtype}"
    if isinstance(x, Mapping):
        return f"{type(x).__name__} of {', '.join(map(repr, list(x)[:PROPOSED])) or 'nothing'}"
    if isinstance(x, (tuple, list)):
        parts = [tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__ for e in x]
        return f"{type(x).__name__} of {', '.join(map(str, parts[:PROPOSED])) or 'nothing'}"
    return type(x).__name__


def first_map(out: Any) -> Any:
    """The tensor of a layer's output: of several, what is named last_hidden_state or comes first
    (of feature pyramids, lists of maps, the last)."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        out = [out["last_hidden_state"]] if "last_hidden_state" in out else tuple(out.values())
    if isinstance(out, (tuple, list)):
        tensors = [x for x in out if isinstance(x, Tensor)]
        if tensors:
            return tensors[-1 if isinstance(out, list) else 0]
    return out


def default_logits(out: Any) -> Any:
    """The logits among what a model returns: `.logits`, "logits", or the first of several."""
    if isinstance(out, Mapping) and "logits" in out:
        return out["logits"]
    if hasattr(out, "logits"):
        return out.logits
    return out[0] if isinstance(out, (tuple, list)) and out else out


class Tap:
    """A forward hook that keeps a copy of its layer's output while it is on: a copy, since what
    follows may change the output in place. A compiled model has it in its graph, twice, on and
    off; so it stays on the layer, where copying and pickling find it empty. It computes
    nothing: gradient checkpointing would miss that when it runs the layer again, the hook off.

    Args:
        whole: keep the whole output, for `to_map`, not the tensor in it alone.
    """

    def __init__(self, whole: bool) -> None:
        self.whole, self.on = whole, False
        self.found: Any = None

    def __call__(self, module: nn.Module, inputs: Any, out: Any) -> None:
        if self.on:
            found = out if self.whole else first_map(out)
            known = self.whole or isinstance(found, Tensor)
            self.found = tree_map_only(Tensor, torch.clone, found) if known else what_came(out)


class Reader:
    """Runs a classifier, and reads its logits and its last feature map.

    Args: as `SANM` has them. `layer` may be None, until `propose` has found one.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None,
        layout: str,
        to_map: Callable[[Any], Tensor] | None,
        grid: Sequence[int] | None,
        logits: Callable[[Any], Tensor] | None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(
                f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}"
            )
        pair = isinstance(grid, (tuple, list)) and len(grid) == 2
        if grid is not None and not (pair and all(isinstance(n, int) and n > 0 for n in grid)):
            raise ValueError(f"grid: expected (h, w), two integers ≥ 1, got {grid!r}")
        for name, given in (("to_map", to_map), ("logits", logits)):
            if given is not None and not callable(given):
                raise TypeError(f"{name}: expected a callable or None, got {type(given).__name__}")
        self.layer, self.layout = layer_name(model, layer), layout
        self.grid = None if grid is None else (grid[0], grid[1])
        self.to_logits = default_logits if logits is None else logits
        self.to_map, self.tap = to_map, Tap(whole=to_map is not None)
        own = [logits] if isinstance(logits, nn.Module) else []
        self.heads = frozenset(head for part in (model, *own) for head in _heads(part))
        self.patch = _patch(model)
        inner = getattr(model, COMPILED, model)
        self.keyword = "pixel_values" in inspect.signature(inner.forward).parameters
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Put the tap on its layer, unless it is there: layers may be replaced."""
        if self.layer is not None:
            layer = model.get_submodule(self.layer)
            if not any(hook is self.tap for hook in layer._forward_hooks.values()):
                layer.register_forward_hook(self.tap)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, K) of `images` (B, C, H, W)."""
        out = model(pixel_values=images) if self.keyword else model(images)
        logits = self.to_logits(out)
        if (
            not isinstance(logits, Tensor)
            or logits.ndim != 2
            or not logits.is_floating_point()
            or logits.shape[0] != images.shape[0]
            or logits.shape[1] < 2
        ):
            raise ValueError(
                f"logits: expected floats (B, K) of B = {images.shape[0]} images and K ≥ 2 classes "
                f"from the model, which returned {what_came(out)}; give logits=, a callable that "
                f"takes them out of that"
            )
        return logits

    def __call__(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the last feature map (B, C, h, w) of one run of the model."""
        if not torch.compiler.is_compiling():
            self.attach(model)
        if images.ndim != 4:
            raise ValueError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
        if self.layer is None:
            self.propose(model, images)
        tap = self.tap
        tap.on = True
        try:
            logits = self.logits(model, images)
            found = tap.found
        finally:
            tap.on, tap.found = False, None
        if found is None:
            raise self._not_run(model, images)
        features = self._read(model, images, found, logits.shape[1])
        if logits.requires_grad and not features.requires_grad:
            self._check_gradient(model)
        return logits, features

    def _read(self, model: nn.Module, images: Tensor, found: Any, classes: int) -> Tensor:
        image = (images.shape[2], images.shape[3])
        gave = f"feature_layer {self.layer!r} gave"
        if self.to_map is not None:
            found, gave = self.to_map(found), f"to_map made of feature_layer {self.layer!r}"
        if not isinstance(found, Tensor):
            what = found if self.to_map is None else what_came(found)
            raise ValueError(f"{gave} {what}, not a tensor; give a to_map= that makes it one")
        given = self.to_map is not None and self.layout == "auto"
        try:
            layout = layout_of(
                found.shape,
                image,
                "BCHW" if given else self.layout,
                self.grid,
                widths(self.heads, classes),
                self.patch,
            )
        except ValueError as error:
            raise ValueError(
                f"{gave} {shape_text(found.shape)}, {error}{self.advice(model, images)}"
            ) from None
        return layout.read(found)

    def _check_gradient(self, model: nn.Module) -> None:
        """A frozen layer gives no gradient; one that is trained does, or reconstruction is idle."""
        assert self.layer is not None
        if any(p.requires_grad for p in model.get_submodule(self.layer).parameters()):
            raise RuntimeError(
                f"feature_layer {self.layer!r} gave a map without gradient: is it detached, or "
                "inside torch.utils.checkpoint(use_reentrant=True)? Checkpoint with "
                "use_reentrant=False"
            )

    def _not_run(self, model: nn.Module, images: Tensor) -> RuntimeError:
        return RuntimeError(
            f"feature_layer {self.layer!r} was not run by the model's forward, or the model was "
            "compiled and run before it was wrapped (then wrap it first, or call "
            f"torch.compiler.reset()){self.advice(model, images)}"
        )

    def advice(self, model: nn.Module, images: Tensor) -> str:
        """What to name instead: the last few layers that give a map, with their shapes."""
        try:
            maps = self.survey(model, images)
        except Exception:  # the reason for the error at hand is not that the model fails
            return ""
        last = {shape: name for name, shape in maps}  # of each shape
        listed = [f"{last.pop(s)!r} {shape_text(s)}" for _, s in maps[::-1] if s in last]
        return f". Layers with a map: {', '.join(listed[:PROPOSED])}" if listed else ""

    def map_shape(self, model: nn.Module, image_shape: Sequence[int]) -> torch.Size:
        """(C, h, w) of the feature map of images of `image_shape` (C, H, W)."""
        images = _empty(model, image_shape)
        if self.layer is None:
            self.propose(model, images)
        with quiet(model):
            features = self(model, images)[1]
        if features.mean(1).abs().amax() < 1e-5 * features.abs().amax():
            warnings.warn(
                f"feature_layer {self.layer!r} gave a map whose mean over the channels is 0 in "
                "every cell, as a LayerNorm does that has not been trained: its peak is rounding; "
                "name the layer before it",
                stacklevel=4,
            )
        return features.shape[1:]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def propose(self, model: nn.Module, images: Tensor) -> None:
        """Take the last layer that gives a map, and say so."""
        maps = self.survey(model, images)
        if not maps:
            shapes = [f"{n!r} {shape_text(s)}" for n, s in _outputs(self, model, images)[0]]
            last = ", ".join(shapes[: -PROPOSED - 1 : -1]) or "of neither three nor four dimensions"
            raise ValueError(
                "feature_layer: no layer gives a feature map of more than one cell in the aspect "
                f"of the image; the last outputs are {last}"
            )
        self.layer, shape = maps[-1]
        warnings.warn(
            f"feature_layer: taking {self.layer!r}, the last that gives a feature map, "
            f"{shape_text(shape)}; name it to be sure",
            stacklevel=4,
        )
        self.attach(model)

    def survey(self, model: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the outputs that are maps, in the order of a run on one image."""
        outputs, classes = _outputs(self, model, images)
        image, maps = (images.shape[2], images.shape[3]), []
        for name, shape in outputs:
            try:
                layout_of(
                    shape, image, self.layout, self.grid, widths(self.heads, classes), self.patch
                )
            except ValueError:
                continue
            maps.append((name, shape))
        return maps


def widths(heads: frozenset[tuple[int, int]], classes: int) -> frozenset[int]:
    """The input widths of the layers that may be the classifier of so many classes."""
    return frozenset(width for out, width in heads if out == classes)


def _heads(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(output, input) widths of linear layers and 1 × 1 convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.out_features, module.in_features
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            yield module.out_channels, module.in_channels


def _patch(model: nn.Module) -> int | None:
    """The side of the patches that tokens stand for, if one convolution alone cuts any."""
    sides = [
        module.stride[0]
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and (1, 1) != module.stride == module.kernel_size
    ]
    return sides[0] if len(sides) == 1 else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outputs(
    reader: Reader, model: nn.Module, images: Tensor
) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Names and shapes of the tensors that the modules give for an empty image, in the order of
    the run, and the number of classes. What a module passes on has the outer module's name."""
    found: dict[tuple[int, tuple[int, ...]], str] = {}
    kept: list[Tensor] = []  # so that no memory is used twice

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim in (3, 4):
                kept.append(out)
                found.pop(key := (out.data_ptr(), tuple(out.shape)), None)
                found[key] = name

        return note

    named = [(name, module) for name, module in model.named_modules() if name.strip(".")]
    named = [(name, module) for name, module in named if name != COMPILED]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        with quiet(model):
            classes = reader.logits(model, _empty(model, images.shape[1:])).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return [(name, shape) for (_, shape), name in found.items()], classes


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """A run of `model` that leaves no trace: in eval mode, in the parameters' own dtype, not
    compiled, and with tensors that later runs can use."""
    modes = [(module, module.training) for module in model.modules()]
    device = like_parameters(model).device.type
    model.eval()
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, training in modes:  # one by one: some layers may be frozen in eval mode
            module.training = training


def like_parameters(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype of the parameters."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _empty(model: nn.Module, image_shape: Sequence[int]) -> Tensor:
    return torch.zeros(
        1, *image_shape, dtype=like_parameters(model).dtype, device=like_parameters(model).device
    )


def layer_name(model: nn.Module, layer: str | nn.Module | None) -> str | None:
    """Dotted name of `layer` inside `model`, whose own is the empty one; None if none is named."""
    names = dict(model.named_modules())
    layer = getattr(model, "feature_layer", None) if layer is None else layer
    if isinstance(layer, nn.Module):
        found = [name for name, module in names.items() if module is layer]
        if not found:
            raise ValueError(f"feature_layer: this {type(layer).__name__} is not part of the model")
        return found[0]
    if layer is None or layer in names:
        return layer
    compiled = f"{COMPILED}.{layer}"  # the name before the model was compiled
    if compiled in names:
        return compiled
    near = difflib.get_close_matches(layer, names, 1) or list(names)[-1:]
    raise ValueError(f"feature_layer: the model has no module {layer!r}; nearest: {near[0]!r}")
