"""`sanm demo`: plain training against SANM on digits with half of the labels wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..files import prepare_folder
from ..train import check_free, train
from .figure import save_figure
from .inspection import inspect
from .report import print_table


def demo(out: str | Path, overwrite: bool = False, **settings: Any) -> int:
    """Train `ce` and `sanm-dividemix`, print a table, write masking.png and a report.

    Returns the exit status, 130 when interrupted.

    Raises:
        FileExistsError: one of the two has been trained into `out` already, and not `overwrite`.
    """
    folder = prepare_folder(out)
    configs = [TrainConfig(recipe=recipe, **settings) for recipe in ("ce", "sanm-dividemix")]
    if not overwrite:
        for config in configs:
            check_free(folder / config.recipe, "--overwrite replaces it")
    results = []
    for config in configs:
        result = train(config, folder / config.recipe, progress=True)
        if result.interrupted:
            return 130
        results.append(result)
    print_table(results)
    save_figure(folder / "masking.png", results[-1])
    print(f"What was masked, and why: {folder / 'masking.png'}")
    inspect(folder / configs[-1].recipe)
    return 0
