"""`sanm inspect` and `sanm eval`: tables against recomputation, the report, cleanlab."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import more
from matplotlib.image import imread
from pyarrow import parquet

import sanm_train.reports.figure
from sanm_train import RECIPES, TrainConfig, train
from sanm_train.checkpoint import NAME
from sanm_train.datasets import DATASETS, DigitsConfig, load_digits
from sanm_train.errors import CheckpointError
from sanm_train.images import TensorImages
from sanm_train.reports import report
from sanm_train.reports.figure import draw_history
from sanm_train.reports.inspection import evaluate, inspect
from sanm_train.reports.split import quality_by_class
from sanm_train.train import load_run

CLASSES = ["null", 'a, "b"', "<b>bold</b>", "[red]é", "日本\n語", "&amp;", "'", "true", "NaN", ""]


class NamedImages(TensorImages):
    """Images that seem to come from files."""

    def __init__(self, images, paths):
        super().__init__(images)
        self.paths = paths

    def select(self, index):
        return NamedImages(self.images[index], [self.paths[i] for i in index.tolist()])


def load_odd(config: TrainConfig):
    """200 of the digits, with the names above; of a third the truth is known."""
    data = load_digits(config)
    paths = [f'{i},"ä"\n<script>alert({i})</script>/nan.png' for i in range(len(data))]
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(7))[:200]
    known = torch.where(torch.arange(len(data)) % 3 == 0, data.true_labels, -1)
    named = replace(
        data,
        images=NamedImages(data.images.images, paths),
        classes=CLASSES,
        true_labels=known,
    )
    return named.select(chosen.sort().values)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder of a short run on `load_odd`, inspected."""
    folder = tmp_path_factory.mktemp("odd") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "odd", load_odd)
        patch.setitem(DATASETS.configs, "odd", DigitsConfig)
        settings = {"noise": "symmetric", "rate": 0.4, "warmup": 1, "batch_size": 32}
        train(TrainConfig(dataset="odd", epochs=3, lr=0.05, eval_batch_size=64, **settings), folder)
        assert inspect(folder) == folder / "inspect" / "report.html"
        yield folder


def columns(folder):
    """The columns of both tables, which hold the same; CSV's are strings."""
    table = parquet.read_table(folder / "samples.parquet")
    with (folder / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = table.to_pydict()
    assert list(rows[0]) == list(found) and len(rows) == len(table)
    for name, values in found.items():
        for row, value in zip(rows, values, strict=True):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            same = row[name] == ("" if value is None else text)
            assert same or float(row[name]) == pytest.approx(value, rel=1e-6)
    return {name: np.array(values) for name, values in found.items()}


def test_files_and_columns(odd):
    names = {"samples.csv", "samples.parquet", "pred_probs.npy", "relabel.csv", "report.html"}
    assert {path.name for path in (odd / "inspect").iterdir()} == names  # no temporary file is left
    found = columns(odd / "inspect")
    assert list(found) == [
        *("index", "path", "given_label", "true_label", "proposed_label"),
        *("given_class", "true_class", "proposed_class"),
        *("clean_prob", "clean_prob_1", "clean_prob_2", "loss", "given_prob"),
        *(f"activation_{name}" for name in ("max", "min", "mean", "std", "entropy")),
        *("peak_y", "peak_x", "trough_y", "trough_x"),
    ]


def test_rows_belong_to_their_images(odd):
    """index, path and labels against the whole data set."""
    found, config = columns(odd / "inspect"), load_run(odd).config
    digits = load_digits(config).true_labels[found["index"]].numpy()
    assert len(set(found["index"])) == 200 and found["index"].max() > 1000
    for index, path in zip(found["index"], found["path"], strict=True):
        assert path == f'{index},"ä"\n<script>alert({index})</script>/nan.png'
    known = found["index"] % 3 == 0
    assert (found["true_label"] == np.where(known, digits, -1)).all()
    assert 0.25 < (found["given_label"] != digits).mean() < 0.55
    for kind in ("given", "proposed", "true"):
        expected = [CLASSES[k] if k >= 0 else None for k in found[f"{kind}_label"]]
        assert found[f"{kind}_class"].tolist() == expected


def test_values(odd):
    result, found = load_run(odd), columns(odd / "inspect")
    recipe, labels = result.recipe, result.data.labels
    logits = torch.stack([recipe.evaluate(net, result.data.images) for net in recipe.networks])
    mean = logits.softmax(2).mean(0)
    predictions = np.load(odd / "inspect" / "pred_probs.npy")
    assert predictions.dtype == np.float32 and predictions.shape == (200, 10)
    np.testing.assert_allclose(predictions, mean, atol=1e-6)
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    features = recipe.networks[0].forward_features(recipe.augment.plain(result.data.images.images))
    energy = features[1].square().sum(1)
    share = energy.flatten(1) / energy.sum((1, 2))[:, None]
    large = F.interpolate(energy[:, None], (8, 8), mode="bilinear", align_corners=False).flatten(1)
    expected = {
        "given_label": labels,
        "proposed_label": mean.argmax(1),
        "given_prob": mean[torch.arange(200), labels],
        "clean_prob": result.quality.mean(0),
        "clean_prob_1": result.quality[0],
        "clean_prob_2": result.quality[1],
        "loss": losses.mean(0),
        "activation_max": energy.amax((1, 2)),
        "activation_min": energy.amin((1, 2)),
        "activation_mean": energy.mean((1, 2)),
        "activation_std": energy.flatten(1).std(1, correction=0),
        "activation_entropy": -(share * share.log()).sum(1) / np.log(share.shape[1]),
        "peak_y": large.argmax(1) // 8,
        "peak_x": large.argmax(1) % 8,
        "trough_y": large.argmin(1) // 8,
        "trough_x": large.argmin(1) % 8,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.detach(), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["loss"], result.losses.mean(0), rtol=1e-3, atol=1e-4)


def test_cleanlab_takes_the_predictions(tmp_path):
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    settings = {"noise": "symmetric", "rate": 0.2, "limit": 600, "epochs": 6, "batch_size": 32}
    train(TrainConfig(recipe="ce", lr=0.05, **settings), tmp_path / "run")
    inspect(tmp_path / "run", tmp_path)
    found = columns(tmp_path)
    predictions = np.load(tmp_path / "pred_probs.npy", mmap_mode="r")
    wrong = found["given_label"] != found["true_label"]
    issues = find_label_issues(found["given_label"], predictions)
    assert wrong[issues].mean() > 0.7 and issues[wrong].mean() > 0.6
    assert wrong.mean() == pytest.approx(0.2, abs=0.05)
    scores = get_label_quality_scores(found["given_label"], predictions)
    np.testing.assert_allclose(scores, found["given_prob"], atol=1e-5)  # self-confidence
    assert "clean_prob_1" not in found and not np.isnan(found["clean_prob"]).any()


class Page(HTMLParser):
    """Fails at tags that are not closed in their order; gathers texts, addresses and headings."""

    EMPTY = ("meta", "br", "img", "input")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.texts, self.addresses, self.ids = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for name, v in attributes if name in ("href", "src", "srcset", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.texts.append(data)


TEMPLATE = Path(sanm_train.reports.figure.__file__).with_name("report.html").read_text("utf-8")
SCRIPT = TEMPLATE[TEMPLATE.index("<script>") : TEMPLATE.index("</script>")]
assert "{{" not in SCRIPT and "{%" not in SCRIPT and "innerHTML" not in SCRIPT


def check_page(path) -> Page:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and not set(page.tags) & {"link", "iframe"}
    assert page.tags.count("script") == 1 and SCRIPT in html  # which no run has a part in
    assert page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    outside = re.sub(r"data:image/[\w+]+;base64,[\w+/=]+", "", html)
    assert not re.search(r"https?://|//\w|url\(|@import", outside)
    return page


def unlearnt(found):
    """Whether each sample's given class is one of which nearly all labels have a low clean
    probability and hardly any image is predicted to be."""
    given = found["given_label"]
    low, size = found["clean_prob"] <= 0.5, np.bincount(given, minlength=10)
    predicted = np.bincount(found["proposed_label"], minlength=10)
    return ((np.bincount(given[low], minlength=10) / size >= 0.85) & (predicted <= size / 10))[
        given
    ]


def most_suspicious(found):
    """The first 24 rows by the report's order."""
    return np.lexsort((found["given_prob"], found["clean_prob"], unlearnt(found)))[:24]


def test_report(odd):
    page = check_page(odd / "inspect" / "report.html")
    text = "".join(page.texts)
    for name in CLASSES:  # "NaN" and "nan.png" are names here
        assert name in text
    assert not re.search(r"\bnan\b", text.replace("nan.png", "").replace("NaN", ""))
    assert "b" not in page.tags and "<b>bold</b>" in text and "<script>alert(" in text
    found = columns(odd / "inspect")
    first = most_suspicious(found)
    for row in first:
        assert f"sample {found['index'][row]}" in text and found["path"][row] in text
    order = [int(i) for i in re.findall(r"sample (\d+)", text)]
    assert order == found["index"][first].tolist()
    assert page.addresses[6:8] != page.addresses[8:10]  # six panels, then the first image
    for given, count in zip(*np.unique(found["given_label"], return_counts=True), strict=True):
        rows = found["given_label"] == given
        share = f"{(found['clean_prob'][rows] <= 0.5).mean():.1%}"
        suspected = "not learnt" if unlearnt(found)[rows].any() else share
        predicted = (found["proposed_label"] == given).sum()
        assert f"{CLASSES[given]}{count}{predicted}{suspected}" in text
    for setting in ("lr0.05", "epochs3", "rate0.4", "batch_size32"):  # what is not the default
        assert text.count(setting) == 2
    assert text.count("momentum0.9") == text.count("small-cnn") == 1
    record = json.loads((odd / "run.json").read_text())["starts"][0]
    date, time = record["date"].removesuffix("+00:00").split("T")
    assert f"Trained {date} {time} UTC;" in text and "seed 0." in text
    assert f"torch {record['versions']['torch']}, Python" in text and "pillow" in text


def test_pictures_show_the_samples(odd):
    import base64

    page, found = check_page(odd / "inspect" / "report.html"), columns(odd / "inspect")
    row = most_suspicious(found)[0]
    png = base64.b64decode(page.addresses[6].partition(",")[2])
    shown = imread(io.BytesIO(png))[:, :, 0]
    image = load_run(odd).data.images.images[int(row), 0]
    np.testing.assert_allclose(shown, image, atol=1 / 255 + 1e-6)
    small = base64.b64decode(page.addresses[6 + 48].partition(",")[2])  # the table's first
    np.testing.assert_allclose(imread(io.BytesIO(small))[:, :, 0], image, atol=1 / 255 + 1e-6)
    assert len(page.addresses) == 6 + 48 + 200


def test_same_run_same_report(odd, tmp_path):
    inspect(odd, tmp_path)
    for name in ("samples.csv", "pred_probs.npy", "relabel.csv", "report.html"):
        assert (tmp_path / name).read_bytes() == (odd / "inspect" / name).read_bytes()


@pytest.mark.parametrize("finished", [0, 2])
def test_interrupted_in_the_warmup(tiny, tmp_path, monkeypatch, finished):
    """No label quality has been fitted, and perhaps no epoch finished."""
    whole = RECIPES["sanm-dividemix"].loss

    def loss(self, network, batch, epoch):
        if epoch >= finished + 0.5:
            raise KeyboardInterrupt
        return whole(self, network, batch, epoch)

    monkeypatch.setattr(RECIPES["sanm-dividemix"], "loss", loss)
    config = tiny(epochs=9, warmup=5, checkpoint_steps=1)
    assert len(train(config, tmp_path / "run").history) == finished
    text = "".join(check_page(inspect(tmp_path / "run")).texts)
    assert "has not yet fitted a label quality" in text and "nan" not in text.lower()
    assert f"{finished} of 9 epochs" in text
    assert ("No epoch has been finished" in text) == (finished == 0)
    found = columns(tmp_path / "run" / "inspect")
    assert all(value is None for value in found["clean_prob"])
    order = [int(i) for i in re.findall(r"sample (\d+)", text)]
    moved = found["given_label"] != found["proposed_label"]
    last = unlearnt({**found, "clean_prob": np.where(moved, 0.0, 1.0)})
    assert order == np.lexsort((found["given_prob"], last))[:24].tolist()


@pytest.mark.parametrize(
    "settings",
    [{"recipe": "ce", "noise": "none"}, *more({"recipe": "sanm-onepass"}, {"views": "min"})],
    ids=str,
)
def test_other_recipes(tiny, tmp_path, settings):
    train(tiny(epochs=1, warmup=0, **settings), tmp_path)
    page = check_page(inspect(tmp_path))
    assert "nan" not in "".join(page.texts).lower()
    boxes = (tmp_path / "inspect" / "report.html").read_text().count("<rect")
    assert boxes == (48 if "views" in settings else 96)


def test_unreadable_images_are_marked(odd, tmp_path, monkeypatch):
    def load(config):
        data = load_odd(config)
        data.images.corrupt.update({3, 50})
        return data

    monkeypatch.setitem(DATASETS, "odd", load)
    page = check_page(inspect(odd, tmp_path))
    assert "images that cannot be read2" in "".join(page.texts).replace("\n", "")
    assert columns(tmp_path)["corrupt"].nonzero()[0].tolist() == [3, 50]


def test_evaluate(odd, capsys):
    found = evaluate(odd)
    printed = capsys.readouterr().out
    result = load_run(odd)
    recipe, data = result.recipe, result.data
    logits = torch.stack([recipe.evaluate(net, data.test_images) for net in recipe.networks])
    predicted = logits.mean(0).argmax(1)
    right = predicted == data.test_labels
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    assert found["accuracy"] == pytest.approx(result.last_accuracy)
    for k, accuracy in enumerate(found["networks"]):
        each = (logits[k].argmax(1) == data.test_labels).double().mean()
        assert accuracy == pytest.approx(each.item())
    for k, accuracy in enumerate(found["classes"]):
        assert accuracy == pytest.approx(right[data.test_labels == k].double().mean().item())
    with (odd / "confusion.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == CLASSES and [row[0] for row in rows] == CLASSES
    pairs = zip(data.test_labels.tolist(), predicted.tolist(), strict=True)
    counts = np.zeros((10, 10), int)
    for true, guess in pairs:
        counts[true, guess] += 1
    assert (np.array([row[1:] for row in rows], int) == counts).all()
    assert "[red]é" in printed and f"accuracy {found['accuracy']:.2%}" in printed


def test_errors(odd, tmp_path):
    for use in (inspect, evaluate):
        with pytest.raises(CheckpointError, match=r"run must be a folder with a checkpoint, got "):
            use(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    shutil.copytree(odd, tmp_path / "broken")
    whole = (odd / NAME).read_bytes()
    (tmp_path / "broken" / NAME).write_bytes(whole[: len(whole) // 2])
    for use in (inspect, evaluate):
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
            use(tmp_path / "broken")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="out must be a writable folder"):
        inspect(odd, tmp_path / "file")


def test_what_fails_leaves_the_old_report(odd, tmp_path, monkeypatch):
    inspect(odd, tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def fail(*arguments):
        raise RuntimeError("no figure")

    monkeypatch.setattr(sanm_train.reports.figure, "draw_history", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        inspect(odd, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("averaged", [False, True])
def test_mixtures_are_drawn_over_the_losses_they_were_fitted_to(odd, tiny, averaged):
    """The area below both curves is that of the histogram, and the bars are the losses'."""
    settings = {"average_losses": True, "epochs": 4, "warmup": 1}
    result = train(tiny(**settings)) if averaged else load_run(odd)
    recipe = result.recipe
    figure = sanm_train.reports.figure.draw_mixtures(result)
    for k, axis in enumerate(figure.axes):
        epochs = recipe.history[:, k] if averaged else recipe.losses[k][None]
        assert len(epochs) == (4 if averaged else 1)
        epochs = [((x - x.min()) / (x.max() - x.min())).numpy() for x in epochs.double()]
        x = np.mean(epochs, axis=0)
        bars = np.zeros(60)
        for bar in axis.patches:
            bars[round(bar.get_x() * 60)] += bar.get_height()
        assert (bars == np.histogram(x, np.linspace(0, 1, 61))[0]).all()
        means = recipe.mixtures[k, 0].tolist()
        for line, mean in zip(axis.lines, means, strict=True):
            at, curve = line.get_data()
            assert at[curve.argmax()] == pytest.approx(mean, abs=0.002)
        area = sum(line.get_ydata().sum() for line in axis.lines) / 599  # of 600 points in [0, 1]
        assert area == pytest.approx(len(x) / 60, rel=0.25)  # the tails beyond 0 and 1 are cut off


def test_a_run_with_synchronised_statistics_is_read_without_a_gpu(odd, tmp_path):
    """The setting is for training: one process has nothing to synchronise."""
    shutil.copytree(odd, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / NAME, weights_only=False)
    saved["config"]["sync_batchnorm"] = True
    torch.save(saved, tmp_path / "run" / NAME)
    assert not load_run(tmp_path / "run").config.sync_batchnorm


def test_relabelling_holds_the_suspected_labels(odd):
    found = columns(odd / "inspect")
    with (odd / "inspect/relabel.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("index", "path", "given_label", "given_class", "proposed_label", "proposed_class"),
        "clean_prob",
    ]
    suspect = (found["clean_prob"] <= 0.5) & ~unlearnt(found)
    assert suspect.any() and not suspect.all() and unlearnt(found).any()
    assert {int(row["index"]) for row in rows} == set(found["index"][suspect])
    probabilities = [float(row["clean_prob"]) for row in rows]
    assert probabilities == sorted(probabilities)
    place = {index: row for row, index in enumerate(found["index"])}
    for row in rows:
        at = place[int(row["index"])]
        assert row["path"] == found["path"][at]
        assert int(row["given_label"]) == found["given_label"][at]
        assert row["proposed_class"] == CLASSES[found["proposed_label"][at]]


def test_two_epochs_are_warned_of_and_twelve_are_not(tmp_path, recwarn):
    for epochs in (2, 12):
        folder = tmp_path / str(epochs)
        train(TrainConfig(recipe="ce", rate=0.2, epochs=epochs), folder)
        text = "".join(check_page(inspect(folder)).texts)
        warned = " ".join(str(recwarn.pop().message) for _ in range(len(recwarn)))
        for where in (text, warned):
            assert ("The split is not to be trusted" in where) == (epochs == 2)
        found = columns(folder / "inspect")
        suspect = found["clean_prob"] <= 0.5
        wrong = found["given_label"] != found["true_label"]
        assert (wrong[suspect].mean() > 0.8) == (epochs == 12)  # the warning is right


def test_a_mixture_for_each_class(odd, tmp_path):
    import sanm_kernels as sk

    page = check_page(inspect(odd, tmp_path, per_class=True))
    result, found = load_run(odd), columns(tmp_path)
    labels = result.data.labels
    quality, overlaps = quality_by_class(result)
    fitted = (~np.isnan(overlaps)).nonzero()[0]
    assert len(fitted) >= 1
    for k in range(10):
        rows = labels == k
        for n, losses in enumerate(result.losses):
            fit = sk.fit_label_quality(losses[rows], seed=0, backend="reference")
            expected = fit.clean_prob if k in fitted else result.quality[n, rows]
            np.testing.assert_allclose(quality[n, rows], expected, atol=1e-6)
            np.testing.assert_allclose(
                found[f"clean_prob_{n + 1}"][rows], expected, rtol=1e-5, atol=1e-6
            )
    assert not torch.allclose(quality, result.quality, atol=1e-3)
    assert "on the wrong side" in "".join(page.texts)
    assert f"{overlaps[fitted[0]]:.1%}" in "".join(page.texts)


def test_panels_are_cut_where_the_axes_are(monkeypatch):
    """Writing one panel laid the figure out anew, and the next was cut beside its labels."""
    rows = [{"epoch": e, "train_loss": 2.3, "test_accuracy": 0.5} for e in range(60)]
    drawn, places, whole = draw_history(rows, warmup=10), [], report._svg

    def write(*arguments):
        written = whole(*arguments)
        places.append([axis.get_position().bounds for axis in drawn.axes])
        return written

    monkeypatch.setattr(report, "_svg", write)
    assert len(report._panels(drawn)) == 2
    measured = [axis.get_tightbbox().width for axis in drawn.axes]
    drawn.draw_without_rendering()
    assert places[0] == places[1] == [axis.get_position().bounds for axis in drawn.axes]
    assert measured == [axis.get_tightbbox().width for axis in drawn.axes]
