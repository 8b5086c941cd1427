"""The command line: `sanm train`, `sanm demo`, `sanm ablate`."""

from __future__ import annotations

import argparse
import sys
import typing
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

EXTRA = "sanm needs scikit-learn, matplotlib and rich: pip install 'sanm-kernels[train]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        print(f"sanm: error: {EXTRA} ({error})", file=sys.stderr)
        return 1
    from .config import ConfigError

    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        return int(options.command(options))
    except (ConfigError, FileExistsError, OSError) as error:
        print(f"sanm: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"sanm: error: training failed: {error}; try a smaller --lr", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sanm", description="Training with wrong labels: SANM (Tu et al., CVPR 2023)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train one recipe on one data set")
    train.set_defaults(command=_train)
    train.add_argument("--out", type=Path, required=True, help="folder for metrics and labels")
    train.add_argument("--overwrite", action="store_true", help="replace a run already in --out")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_settings(train)

    demo = commands.add_parser("demo", help="ce against sanm-dividemix on noisy digits")
    demo.set_defaults(command=_demo)
    demo.add_argument("--out", type=Path, default=Path("sanm-demo"), help="folder (%(default)s)")
    demo.add_argument("--epochs", type=int, help="epochs of both runs")
    demo.add_argument("--limit", type=int, default=0, help="use only the first N training samples")
    demo.add_argument("--seed", type=int, default=0)

    ablate = commands.add_parser("ablate", help="table of sanm-dividemix without each of its parts")
    ablate.set_defaults(command=_ablate)
    ablate.add_argument("--out", type=Path, default=Path("sanm-ablate"), help="(%(default)s)")
    ablate.add_argument("--seeds", type=int, default=3, help="seeds 0 … N−1 (%(default)s)")
    _add_settings(ablate, without=("recipe", "seed", "views", "box", "modulate", "reconstruct"))
    return parser


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """One option for each field of TrainConfig; only those given end up in the namespace."""
    from .config import TrainConfig

    types = typing.get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if entry.name in without:
            continue
        kind = types[entry.name]
        name, text = "--" + entry.name.replace("_", "-"), entry.metadata["help"]
        shown = "" if entry.default in (None, "") else f" (default: {entry.default})"
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + shown}
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **extra)
        else:
            plain = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))
            parser.add_argument(name, type=plain, metavar=plain.__name__.upper(), **extra)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from .config import TrainConfig

    names = {entry.name for entry in fields(TrainConfig)}
    return {name: value for name, value in vars(options).items() if name in names}


def _train(options: argparse.Namespace) -> int:
    from .config import TrainConfig
    from .report import print_table, write_label_quality
    from .train import METRICS, train

    config = TrainConfig(**_settings(options))
    if (options.out / METRICS).exists() and not options.overwrite:
        raise FileExistsError(f"out: {options.out} holds a run already; --overwrite replaces it")
    result = train(config, options.out, progress=not options.quiet)
    if result.history:
        write_label_quality(options.out / "label_quality.csv", result)
        print_table([result])
    if result.interrupted:
        print(f"interrupted after {len(result.history)} of {config.epochs} epochs", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    settings = {"seed": options.seed, "limit": options.limit}
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    return demo(options.out, **settings)


def _ablate(options: argparse.Namespace) -> int:
    from .ablation import ablate
    from .config import ConfigError

    if options.seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {options.seeds}")
    return ablate(options.out, range(options.seeds), **_settings(options))


def _show_warning(message: Any, *where: Any, **more: Any) -> None:
    print(f"sanm: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
