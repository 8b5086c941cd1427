"""run.json: when, where and with which versions a run was started, which settings were changed for
it, and what its networks take. Networks are rebuilt from it without the data set."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sanm_kernels

from .config import TrainConfig
from .data import Dataset
from .errors import ConfigError
from .extra import PACKAGES
from .files import replacing
from .models import MODELS
from .settings import own_settings, settings_of

NAME = "run.json"
NETWORK = {
    *("model", "settings", "imports", "image_shape", "read_shape"),
    *("num_classes", "classes", "mean", "std"),
}
LIBRARIES = ("numpy", "triton", "datasets", *PACKAGES.values())


def write_record(
    folder: Path, config: TrainConfig, data: Dataset, device: str, resolved: Iterable[str] = ()
) -> None:
    """Record a start of the run in `folder`, beside those that it is a continuation of.

    config is as the user gave it; `resolved` are settings that a resumed run's has from its first
    start.
    """
    path = folder / NAME
    old = read_record(folder) if path.exists() else {"starts": [], "changed": {}}
    changed = _changed(config)
    if old["starts"]:
        changed = {n: x for n, x in changed.items() if n not in resolved or n in old["changed"]}
    record = {
        "starts": [*old["starts"], _start(device)],
        "changed": changed,
        "network": {
            "model": config.model,
            "settings": own_settings(config, MODELS.configs.get(config.model, TrainConfig)),
            "imports": list(config.imports),
            "image_shape": list(data.image_shape),
            "read_shape": list(data.images.shape),
            "num_classes": data.num_classes,
            "classes": None if data.classes is None else [str(name) for name in data.classes],
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
        },
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `write_record` has written.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"run must be a folder with a {NAME}, got {folder}")
    try:
        record = json.loads(path.read_text("utf-8"))
        known = {"starts", "changed", "network"} <= record.keys()
        known = known and record["network"].keys() >= NETWORK
    except AttributeError:  # something else than mappings
        known = False
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} cannot be read: {error}") from None
    if not known:
        raise OSError(f"{path} cannot be read: it is not the record of a run")
    return dict(record)


def versions() -> dict[str, str]:
    """Of this package, torch, Python and the libraries that are installed."""
    found = {
        "sanm_kernels": sanm_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _start(device: str) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    package = Path(__file__).resolve().parents[2]  # where this is a checkout
    commits = {
        "sanm_kernels": _commit(package) if (package / ".git").exists() else None,
        "working folder": _commit(Path.cwd()),
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commits": {name: commit for name, commit in commits.items() if commit},
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else device,
    }


def _commit(folder: Path) -> str | None:
    """The commit of the repository that `folder` is in, with -changed where files differ."""
    command = ("git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=-changed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _changed(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not those that would be without asking."""
    return {
        name: getattr(config, name)
        for name, entry in settings_of(type(config)).items()
        if getattr(config, name) != entry.default and _asked(config, name, entry.default)
    }


def _asked(config: TrainConfig, name: str, default: Any) -> bool:
    """Whether `config` has something else than what becomes of the default, as "auto" does."""
    try:
        without = dataclasses.replace(config, **{name: default})
    except ConfigError:  # it is needed
        return True
    return bool(getattr(without, name) != getattr(config, name))
