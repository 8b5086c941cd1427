"""What a run says of every training sample, as tables and a report, and its test by class."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sanm_kernels as sk

from ..errors import ConfigError
from ..extra import extra
from ..files import RUNS, prepare_folder, replacing, reserve, write_csv
from ..record import read_record
from ..train import CONFIG, Result, load_run
from .report import print_rows, share, write_report
from .split import quality_by_class, split

with extra():
    import pyarrow as pa
    import pyarrow.compute as pc
    import yaml
    from pyarrow import csv, parquet
    from rich.console import Console
    from rich.progress import track

PRINTED = 30  # classes in the table on the terminal
Array = np.ndarray[Any, Any]


def inspect(
    run: str | Path,
    out: str | Path | None = None,
    device: str = "cpu",
    *,
    per_class: bool = False,
    **given: Any,
) -> Path:
    """Write what the last checkpoint of `run` says of its training samples; one pass over them.

    Into `out` (default: the folder inspect in `run`):

    - samples.csv, samples.parquet: one row per sample, see `sample_table`.
    - pred_probs.npy: the predictions (N, K), float32, a row per row of the table. With its column
      given_label they are what `cleanlab.filter.find_label_issues` takes. They are in-sample: the
      networks have been trained on these images, and may have memorised some wrong labels.
    - relabel.csv: of the suspected labels alone, what is given and what is proposed.
    - report.html: figures, the most suspicious images and numbers by class, in one file.

    With per_class, clean probabilities come from a mixture for each class of given labels, fitted
    to the losses of the last epoch: a class that is harder than others is then not suspected as a
    whole. Prints where the files are, warns where they should not be trusted, and returns the
    report's path.

    Raises:
        OSError: there is no checkpoint, it cannot be read, or `out` cannot be written.
        ConfigError: the run's data set is not where it was.
    """
    result = load_run(run, device, **given)
    folder = prepare_folder(Path(run) / "inspect" if out is None else out)
    shape = (len(result.data), result.data.num_classes)
    with replacing(folder / "pred_probs.npy") as temporary:
        predictions = np.lib.format.open_memmap(temporary, "w+", np.dtype("float32"), shape)
        reserve(temporary)
        quality, overlaps = quality_by_class(result) if per_class else (result.quality, None)
        table = sample_table(result, predictions, quality)
        predictions.flush()
    columns = numbers_of(table)
    found = split(result, columns, overlaps)
    write_tables(folder, table, found.suspect)
    settings = dataclasses.asdict(result.config)
    written = Path(run) / CONFIG  # what `load_run` needs to be otherwise is here as it was
    if written.exists():
        settings |= yaml.safe_load(written.read_text(encoding="utf-8"))
    report = folder / "report.html"
    write_report(report, result, table, columns, found, settings, read_record(run))
    print(f"Report: {report}")
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    return report


def write_tables(folder: Path, table: pa.Table, suspect: Array) -> None:
    """A `sample_table` as CSV and Parquet, and relabel.csv of the rows of `suspect` (N,)."""
    with replacing(folder / "samples.csv") as temporary:
        csv.write_csv(_inert(table), temporary)
    with replacing(folder / "samples.parquet") as temporary:
        parquet.write_table(table, temporary)
    with replacing(folder / "relabel.csv") as temporary:
        csv.write_csv(_inert(relabelling(table, suspect)), temporary)
    print(f"Label quality of every training sample: {folder / 'samples.csv'}")
    print(f"{suspect.sum()} suspected labels: {folder / 'relabel.csv'}")


def numbers_of(table: pa.Table) -> dict[str, Array]:
    """The columns of a `sample_table` that are numbers."""
    numeric = [name for name in table.column_names if name != "path" and name[-6:] != "_class"]
    return {name: table[name].to_numpy() for name in numeric}


def sample_table(result: Result, predictions: Array, quality: Tensor) -> pa.Table:
    """One row per training sample, its clean probabilities those of `quality` (networks, N); the
    predictions' mean over the networks goes to (N, K).

    index; path (where images are files); given_label; true_label (where any is known, else −1);
    proposed_label, the most probable one; the same as given_class, … (where classes have names);
    clean_prob, the mean over the networks, of two clean_prob_1 and clean_prob_2 as well, empty if
    no label quality has been fitted yet; loss, the networks' mean cross-entropy of the given label;
    given_prob, the predicted probability of the given label; of the first network's last feature
    map activation_max, …, and in pixels of the image as the network sees it peak_y, peak_x,
    trough_y, trough_x (see `sanm_kernels.activation_stats`); corrupt (where any is), for images
    that could not be read.
    """
    data, recipe = result.data, result.recipe
    found = _predict(result, predictions)
    columns: dict[str, Any] = {"index": data.index.cpu()}
    if data.images.paths is not None:
        columns["path"] = pa.array([str(p) for p in data.images.paths], pa.large_string())
    labels = {"given": data.labels.cpu(), "true": data.true_labels.cpu()}
    if bool((labels["true"] < 0).all()):
        del labels["true"]
    labels["proposed"] = found.pop("proposed")
    columns |= {f"{kind}_label": values for kind, values in labels.items()}
    if data.classes is not None:
        names = pa.array(map(str, data.classes))
        for kind, values in labels.items():
            columns[f"{kind}_class"] = names.take(pa.array(values.numpy(), mask=values.numpy() < 0))
    quality = torch.where(recipe.mixtures[:, 0, 0].isnan()[:, None], torch.nan, quality)
    columns["clean_prob"] = quality.mean(0)
    if len(quality) > 1:
        columns |= {f"clean_prob_{k + 1}": row for k, row in enumerate(quality)}
    columns |= found
    if data.images.corrupt:
        columns["corrupt"] = torch.zeros(len(data), dtype=torch.bool)
        columns["corrupt"][sorted(data.images.corrupt)] = True
    return pa.table(
        {
            name: pa.array(x.numpy(), from_pandas=True) if isinstance(x, Tensor) else x
            for name, x in columns.items()
        }
    )


def relabelling(table: pa.Table, suspect: Array) -> pa.Table:
    """Of a `sample_table` the rows of `suspect` (N,), the least probable labels first."""
    wanted = ("index", "path", "given_label", "given_class", "proposed_label", "proposed_class")
    names = [name for name in (*wanted, "clean_prob") if name in table.column_names]
    ranked = [("clean_prob", "ascending"), ("given_prob", "ascending"), ("index", "ascending")]
    return table.filter(pa.array(suspect)).sort_by(ranked).select(names)


def _inert(table: Any) -> Any:
    """An Arrow table in which no text is one that a spreadsheet would run: an apostrophe in front
    makes it text."""
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            column = table[i]
            quoted = pc.binary_join_element_wise(
                pa.scalar("'", field.type), column, pa.scalar("", field.type)
            )
            runs = pc.match_substring_regex(column, RUNS)
            table = table.set_column(i, field, pc.if_else(runs, quoted, column))
    return table


@torch.no_grad()
def _predict(result: Result, predictions: Array) -> dict[str, Tensor]:
    """The columns (N,) that come from the networks' outputs."""
    data, recipe = result.data, result.recipe
    first, *others = [network.eval() for network in recipe.tested]
    parts = recipe.eval_batches(data.images)
    images = data.images.stream(parts)
    columns: dict[str, list[Tensor]] = {}
    for part in track(parts, "predictions", console=Console(stderr=True), transient=True):
        labels = data.labels[part.to(data.labels.device)]
        with result.config.autocast():
            views = recipe.augment.plain(next(images))
            logits, features = first.forward_features(views)
            all_logits = torch.stack([logits, *(network(views) for network in others)]).float()
        stats = sk.activation_stats(features, data.image_size, config=first.mask_config)
        mean = all_logits.softmax(2).mean(0)
        predictions[part.numpy()] = mean.cpu().numpy()
        found = {
            "proposed": mean.argmax(1),
            "loss": torch.stack([sk.sample_loss(z, labels) for z in all_logits]).mean(0),
            "given_prob": mean.gather(1, labels[:, None])[:, 0],
        }
        for name, values in stats._asdict().items():
            if name in ("peak", "trough"):
                found |= {f"{name}_y": values[:, 0], f"{name}_x": values[:, 1]}
            else:
                found[f"activation_{name}"] = values
        for name, values in found.items():
            columns.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in columns.items()}


def evaluate(run: str | Path, device: str = "cpu", **given: Any) -> dict[str, Any]:
    """Test the last checkpoint of `run`: print a table by class, write confusion.csv into `run`.

    confusion.csv has a row per true and a column per predicted class. Returned are the accuracy of
    all networks together (of their mean logits, as in metrics.csv), that of each of the "networks",
    of each of the "classes" (NaN without test images), and the "confusion" (K, K).

    Raises:
        OSError: there is no checkpoint, it cannot be read, or `run` cannot be written.
        ConfigError: the run's data set is not where it was, or has no test images.
    """
    result = load_run(run, device, **given)
    data, recipe = result.data, result.recipe
    if not len(data.test_labels):
        raise ConfigError(
            f"{run}: there are no test images to evaluate it on; training with --validation 0.1 "
            "keeps a share of the training set apart"
        )
    logits = torch.stack([recipe.evaluate(net, data.test_images) for net in recipe.tested]).cpu()
    labels, size = data.test_labels.cpu(), data.num_classes
    predicted = logits.mean(0).argmax(1)
    confusion = torch.bincount(labels * size + predicted, minlength=size**2).view(size, size)
    names = [str(name) for name in data.classes or range(size)]
    table = [
        {"true/predicted": names[k], **dict(zip(names, row, strict=True))}
        for k, row in enumerate(confusion.tolist())
    ]
    write_csv(Path(run) / "confusion.csv", table)
    right, total = confusion.diag(), confusion.sum(1)
    by_class, mistaken = right.double() / total, confusion - right.diag()
    worst = by_class.nan_to_num(2).argsort(stable=True)[:PRINTED].tolist()
    rows = [
        {
            "class": names[k],
            "test images": str(int(total[k])),
            "accuracy": share(int(right[k]), int(total[k])),
            "most often taken for": names[int(mistaken[k].argmax())] if mistaken[k].any() else "–",
        }
        for k in worst
    ]
    accuracy = (predicted == labels).double().mean().item()
    networks = (logits.argmax(2) == labels).double().mean(1).tolist()
    few = f", the worst {PRINTED} of {size} classes" if size > PRINTED else ""
    kind = "validation images with noisy labels" if data.test_noisy else "test images"
    print_rows(f"{data.name}, {len(labels)} {kind}{few}", rows)
    print(f"accuracy {accuracy:.2%}; of each network: {', '.join(f'{x:.2%}' for x in networks)}")
    return {
        "accuracy": accuracy,
        "networks": networks,
        "classes": by_class.tolist(),
        "confusion": confusion,
    }
