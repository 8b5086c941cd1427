"""Pre-trained weights from a file, as C2D (Zheltonozhskii et al., 2022) starts DivideMix with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .files import first_line
from .models import classifier

SHOWN = 5  # keys a message lists of each kind; a wrong network differs in hundreds


def load_pretrained(path: str, models: Sequence[nn.Module]) -> None:
    """Start every one of `models` from the weights in `path`; warns once if that leaves out the
    classifier.

    Raises:
        ConfigError: as `read_weights` and `load_weights`.
    """
    state = read_weights(path)
    if not all([load_weights(model, state, path) for model in models]):
        warnings.warn(
            f"pretrained: the classifier of {path} is missing or of another shape; "
            "it starts from fresh weights",
            stacklevel=2,
        )


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in `path`, loaded without running any code of the file.

    It may be wrapped, as training scripts do, under "state_dict" or "model", and its keys may
    begin with the "module." of DataParallel.

    Raises:
        ConfigError: the file cannot be read, or holds no state dict.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it breaks
        raise ConfigError(f"pretrained: {path} cannot be loaded: {first_line(error)}") from None
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"pretrained: {path} must hold a state dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str) -> bool:
    """Load `state` into `model`; returns False where the classifier keeps its own fresh weights.

    It does if the file has none, or one of another shape: pre-training without labels, or on
    other classes. All the rest must fit exactly, but for batch norm's counters, which older files
    do not have.

    Raises:
        ConfigError: names the keys that are missing, not the model's, or of another shape.
    """
    own, head = model.state_dict(), classifier(model)
    names = {name for name, module in model.named_modules() if module is head}
    of_head = {f"{name}.{key}" for name in names for key in head.state_dict()}
    counters = {key: own[key] for key in own if key.endswith(".num_batches_tracked")}
    state = {**counters, **state}
    fits = all(key in state and state[key].shape == own[key].shape for key in of_head)
    skipped = set() if fits else of_head
    faults = {
        "missing": [key for key in own if key not in state and key not in skipped],
        "not in the network": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and key not in skipped and state[key].shape != own[key].shape
        ],
    }
    found = [f"{kind}: {_list(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise ConfigError(f"pretrained: {path} does not fit the network; {'; '.join(found)}")
    model.load_state_dict({key: own[key] if key in skipped else state[key] for key in own})
    return fits


def _list(keys: list[str]) -> str:
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest
