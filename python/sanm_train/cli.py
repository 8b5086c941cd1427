"""The command line; `sanm --help` lists its commands."""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import sys
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig, preset_names, read_preset, sources
from .errors import ConfigError, check_choice, nearest
from .extra import MissingPackage
from .files import first_line, printable
from .recipes import RECIPES
from .registry import REGISTRIES
from .settings import groups, import_modules, owners, read_yaml, settings_of

SETTING = "setting "  # before the names of what goes into the configuration


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # in ASCII or Latin-1 too
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # for modules of a user's, as python -m has it
        words = sys.argv[1:] if arguments is None else list(arguments)
        parser = _parser(words)
        options, unknown = parser.parse_known_args(words)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_advice(options, unknown)}")
        import_modules(_settings(options).get("imports", ()))
        status = int(options.command(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, OSError) as error:
        _complain(f"error: {error}")
        return 2
    except MissingPackage as error:
        _complain(f"error: {error}")
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        _complain(f"error: not enough memory: {first_line(error)}")
        return 1
    except FloatingPointError as error:
        hint = "try a smaller --lr, with --resume from the last checkpoint if there is one"
        _complain(f"error: training failed: {error}; {hint}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, which for some commands depends on the recipe, data set and network chosen."""
    from .reports.comparison import NOISES

    parser = argparse.ArgumentParser(
        prog="sanm", description="Training with wrong labels: SANM (Tu et al., CVPR 2023)."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, name: str, help: str, out: str | None = None, **more: Any) -> Any:
        added = commands.add_parser(name, help=help, **more)
        added.set_defaults(command=function)
        if out is not None:
            default = Path(out) if out else None
            shown = f"folder for the results (default: {out})" if out else "folder of the run"
            added.add_argument("--out", type=_path, default=default, required=not out, help=shown)
        return added

    here = words[0] if words else ""
    train = command(_train, "train", "train one recipe on one data set", "")
    _add_source(train)
    train.add_argument("--overwrite", action="store_true", help="replace a run already in --out")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    if here == "train":
        options = _early(words)
        said = sources(_file(options), options.preset, _settings(options))
        _, config = TrainConfig.layers(said)
        _add_settings(train, [config])
        train.set_defaults(chosen=config)

    command(_list, "list", "recipes, data sets, networks, augmentations and presets")

    demo = command(_demo, "demo", "ce against sanm-dividemix on noisy digits", "sanm-demo")
    demo.add_argument("--epochs", type=int, help="epochs of both runs")
    demo.add_argument("--limit", type=int, default=0, help="use only the first N training samples")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace runs already in --out")

    for function, name, help in (
        (_inspect, "inspect", "label quality of every sample, figures and a report of a run"),
        (_eval, "eval", "test accuracy of a run, by class"),
    ):
        added = command(function, name, help)
        added.add_argument("run", type=_path, help="folder of a run")
        _add_import(added)
        added.add_argument("--device", default="auto", help="torch device (%(default)s)")
        if function is _inspect:
            added.add_argument("--out", type=_path, help="folder (default: RUN/inspect)")
            text = "a mixture for each class instead of one for all"
            added.add_argument("--per-class", action="store_true", help=text)

    trained = command(_predict, "predict", "class of images by a trained network, as CSV")
    trained.add_argument("run", type=_path, help="folder of a run")
    _add_import(trained)
    trained.add_argument("images", nargs="+", type=_path, help="image files, and folders of them")
    trained.add_argument("--out", type=_path, help="CSV file (default: standard output)")
    trained.add_argument("--device", default="auto", help="torch device (%(default)s)")
    trained.add_argument("--workers", type=int, default=0, help="processes that read images")
    exported = command(_export, "export", "a trained network for use without sanm_train")
    exported.add_argument("run", type=_path, help="folder of a run")
    _add_import(exported)
    exported.add_argument("--out", type=_path, help="folder (default: RUN/export)")

    table = command(_compare, "compare", "table of recipes on kinds of noise", "sanm-compare")
    table.add_argument("--recipes", nargs="+", help="default: all")
    table.add_argument("--noises", nargs="+", default=NOISES, help="default: " + " ".join(NOISES))
    text = "recipe that all rows are held against (default: with SANM against without)"
    table.add_argument("--base", metavar="RECIPE", help=text)
    ablate = command(_ablate, "ablate", "table of SANM without each of its parts", "sanm-ablate")
    default = ["sanm-ce", "sanm-dividemix"]
    text = f"default: {' '.join(default)}"
    ablate.add_argument("--recipes", nargs="+", default=default, help=text)
    for added in (table, ablate):
        added.add_argument("--seeds", type=int, default=3, help="seeds 0 … N−1 (%(default)s)")
        _add_import(added)
    if here in ("compare", "ablate"):
        settings = _settings(_early(words))
        import_modules(settings.get("imports", ()))  # which may bring recipes
        configs = [TrainConfig.chosen({**settings, "recipe": recipe}) for recipe in RECIPES]
        _add_settings(table, configs, ("recipe", "seed", "noise", "rate"))
        without = ("recipe", "seed", "views", "box", "modulate", "reconstruct")
        _add_settings(ablate, configs, without)
    return parser


def _version() -> str:
    import sanm_kernels

    python = platform.python_version()
    return f"sanm {sanm_kernels.__version__} (torch {torch.__version__}, Python {python})"


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest=SETTING + "imports",
        action="append",
        default=argparse.SUPPRESS,
        metavar="MODULE",
        help="module that registers recipes, data sets or networks; may be repeated",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say which other ones there are."""
    _add_import(parser)
    parser.add_argument("--preset", help="published settings to start from (see sanm list)")
    parser.add_argument("--config", type=Path, help="YAML file of settings, over the preset")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")


def _early(words: Sequence[str]) -> argparse.Namespace:
    """The options that choose settings, which are options in turn."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_source(parser)
    parser.add_argument("--out", type=Path, default=Path())
    for name in TrainConfig.choices:
        parser.add_argument(f"--{name}", dest=SETTING + name, default=argparse.SUPPRESS)
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError:  # which the real parser will name
        return parser.parse_args([])


def _file(options: argparse.Namespace) -> Path | None:
    """The file of settings: of a run to be resumed, unless others are named, its own."""
    from .train import CONFIG

    kept: Path = options.out / CONFIG
    named = options.config is not None or options.preset is not None
    return options.config if named or not options.resume or not kept.exists() else kept


def _add_settings(
    parser: argparse.ArgumentParser,
    configs: Sequence[type[TrainConfig]],
    without: Sequence[str] = (),
) -> None:
    """One option for each setting of `configs`; only those given end up in the namespace."""
    done = {"imports", *without}
    for config in configs:
        types = typing.get_type_hints(config)
        for title, entries in groups(config):
            new = [entry for entry in entries if entry.name not in done]
            group = parser.add_argument_group(title) if new else None
            for entry in new:
                done.add(entry.name)
                _add_setting(group, entry, types[entry.name])


def _add_setting(group: Any, entry: Any, kind: Any) -> None:
    plain = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))
    text = entry.metadata.get("help", "")
    if entry.default not in (None, "", ()):
        text += f" (default: {entry.default})"
    names = {
        "dest": SETTING + entry.name,
        "default": argparse.SUPPRESS,
        "help": text.strip().replace("%", "%%"),
    }
    option = "--" + entry.name.replace("_", "-")
    registry = REGISTRIES.get(entry.name)
    known = registry.names() if registry else entry.metadata.get("choices")
    if plain is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **names)
    else:
        shown = "{" + ",".join(known) + "}" if known else plain.__name__.upper()
        group.add_argument(option, type=plain, metavar=shown, **names)


def _advice(options: argparse.Namespace, unknown: Sequence[str]) -> str:
    """What is said of the first unknown option: whose it is, or which known one is nearest."""
    names = [w.partition("=")[0][2:].replace("-", "_") for w in unknown if w.startswith("--")]
    if not names or not hasattr(options, "chosen"):
        return ""
    whose = owners(names[0])
    if whose:
        return f"; --{names[0].replace('_', '-')} is a setting of {', '.join(whose)} only"
    known = (name.replace("_", "-") for name in settings_of(options.chosen))
    return nearest(names[0].replace("_", "-"), known)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name.removeprefix(SETTING): value
        for name, value in vars(options).items()
        if name.startswith(SETTING)
    }


def _train(options: argparse.Namespace) -> int:
    from .reports.report import print_table
    from .train import check_free, train

    if options.resume and options.overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    if not (options.resume or options.overwrite):
        check_free(options.out, "--resume continues, --overwrite replaces it")
    file, settings = _file(options), _settings(options)
    if file is not None and file != options.config:  # of the run, with settings of its choices
        for name in settings.keys() & set(TrainConfig.choices):
            before = read_yaml(file).get(name)
            if before != settings[name]:
                raise ConfigError(
                    f"resume: {name} was {before!r} when the run began and is "
                    f"{settings[name]!r} now"
                )
    config = TrainConfig.read(file, options.preset, **settings)
    if config.folds and not config.fold:
        from .reports.folds import train_folds

        shown = {"overwrite": options.overwrite, "progress": not options.quiet}
        return train_folds(config, options.out, **shown)
    result = train(config, options.out, progress=not options.quiet, resume=options.resume)
    if result.interrupted:
        done = f"{len(result.history)} of {config.epochs} epochs"
        print(f"interrupted after {done}; --resume continues", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print_table([result])
    return 0


def _list(options: argparse.Namespace) -> int:
    for title, registry in REGISTRIES.items():
        print(f"--{title}")
        for name in registry.names():
            about = (registry.get(name).__doc__ or "") if callable(registry.get(name)) else ""
            sentence = " ".join(about.split()).partition(". ")[0].rstrip(".")
            print(f"  {name:<26} {sentence}".rstrip())
    print("--preset")
    for name in preset_names():
        print(f"  {name:<26} {_published(read_preset(name))}")
    return 0


def _published(preset: Mapping[str, Any]) -> str:
    """A preset in one line: recipe, data set, noise, and how it is trained."""
    noise = preset.get("noise_set") or preset.get("noise", "")
    noise += f" {preset['rate']:.0%}" if noise in ("symmetric", "asymmetric") else ""
    what = f"{preset.get('recipe', TrainConfig.recipe)} on {preset['dataset']}, {noise}"
    if "lr" not in preset:
        return what.rstrip(", ")
    drop, epochs = preset["lr_drop"] * preset["epochs"], preset["epochs"]
    return (
        f"{what}: {preset.get('optimizer', TrainConfig.optimizer)}, rate {preset['lr']}, a tenth "
        f"from epoch {math.ceil(drop)} of {epochs}, weight decay {preset['weight_decay']}, "
        f"batches of {preset['batch_size']}, warm-up {preset['warmup']}"
    )


def _demo(options: argparse.Namespace) -> int:
    from .reports.demo import demo

    settings = {"seed": options.seed, "limit": options.limit}
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    return demo(options.out, overwrite=options.overwrite, **settings)


def _inspect(options: argparse.Namespace) -> int:
    from .reports.inspection import inspect

    inspect(options.run, options.out, device=options.device, per_class=options.per_class)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from .reports.inspection import evaluate

    evaluate(options.run, device=options.device)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from .trained import write_predictions

    write_predictions(options.run, options.images, options.out, options.device, options.workers)
    return 0


def _export(options: argparse.Namespace) -> int:
    from .trained import export

    print(f"The trained network: {export(options.run, options.out)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .reports.comparison import compare, recipe_table

    variants, bases = recipe_table(_recipes(options))
    if options.base:
        check_choice("base", options.base, variants)
        bases = {name: [options.base] for name in variants if name != options.base}
    seeds = _seeds(options)
    return compare(options.out, seeds, options.noises, variants, bases, **_settings(options))


def _ablate(options: argparse.Namespace) -> int:
    from .reports.comparison import ablation_table, compare

    settings = _settings(options)
    noise = f"{settings.pop('noise', 'symmetric')}:{settings.pop('rate', 0.5)}"
    variants, bases = ablation_table(_recipes(options))
    return compare(options.out, _seeds(options), [noise], variants, bases, **settings)


def _recipes(options: argparse.Namespace) -> list[str]:
    names = options.recipes or list(RECIPES)
    for name in names:
        check_choice("recipes", name, RECIPES)
    return names


def _seeds(options: argparse.Namespace) -> range:
    if options.seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {options.seeds}")
    return range(options.seeds)


def _path(text: str) -> Path:
    """A path of the command line; an empty one, of an unset variable, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def _show_warning(message: Any, *where: Any, **more: Any) -> None:
    _complain(f"warning: {message}")


def _complain(text: str) -> None:
    """On one line of the terminal, to which names of files can't send control characters."""
    print(f"sanm: {printable(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
