"""Data and networks that are handed over in Python."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from sanm_train import TrainConfig, export, load_network, load_run, train
from sanm_train.cli import main
from sanm_train.errors import CheckpointError, ConfigError, DataError
from sanm_train.models import SmallCNN
from sanm_train.reports.inspection import inspect

IMAGES = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 4
DATA = {"train_data": (IMAGES, LABELS), "test_data": (IMAGES[:8], LABELS[:8])}


def settings(**more) -> TrainConfig:
    fixed = {"recipe": "ce", "epochs": 1, "warmup": 1, "batch_size": 10, "workers": 0}
    return TrainConfig(**{"dataset": "python", **fixed, **more})


def small(in_channels, num_classes):
    return SmallCNN(in_channels, num_classes, width=4)


def test_a_module_is_copied_for_each_network(tmp_path):
    module = small(3, 4)
    before = [x.clone() for x in module.parameters()]
    result = train(settings(recipe="dividemix", warmup=0), tmp_path, model=module, **DATA)
    assert all(map(torch.equal, before, module.parameters()))
    one, two = (network.model for network in result.recipe.networks)
    assert type(one) is SmallCNN and not torch.equal(one.linear.weight, two.linear.weight)
    assert len(result.accuracies) == 1 and (result.data.true_labels == -1).all()


def test_a_function_makes_each_network():
    asked = []

    def make(**settings):
        asked.append(settings)
        return small(**settings)

    train(settings(recipe="dividemix"), model=make, **DATA)
    assert asked == [{"in_channels": 3, "num_classes": 4}] * 2


def test_noise_that_is_added_makes_the_given_labels_true():
    result = train(settings(noise="symmetric", rate=0.5), model=small, **DATA)
    assert result.data.noise_rate == 0.5 and torch.equal(result.data.true_labels, LABELS)


def test_a_run_is_read_with_what_it_was_given(tmp_path, capsys):
    config = settings(recipe="sanm-ce", epochs=2)
    result = train(config, tmp_path, model=small, **DATA)
    again = load_run(tmp_path, model=small, **DATA)
    assert torch.equal(again.quality, result.quality)
    resumed = train(config, tmp_path, resume=True, model=small, **DATA)
    assert torch.equal(resumed.quality, result.quality)
    assert inspect(tmp_path, model=small, **DATA).exists()
    logits = load_network(tmp_path, model=small)(IMAGES[:2])
    assert logits.shape == (2, 4) and export(tmp_path, model=small).is_dir()
    other = {"train_data": (IMAGES, LABELS.roll(1))}
    with pytest.raises(CheckpointError, match="other labels, or in another order"):
        load_run(tmp_path, model=small, **other)
    with pytest.raises(ConfigError, match="dataset python is handed over in Python, as train_data"):
        load_run(tmp_path, model=small)
    with pytest.raises(ConfigError, match="model python is handed over in Python, as model"):
        load_network(tmp_path)
    capsys.readouterr()
    for command in ("inspect", "eval", "export"):
        assert main([command, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "python is handed over in Python" in error and error.count("\n") == 1
    assert main(["train", "--dataset", "python", "--out", str(tmp_path / "new")]) == 2
    assert "python is handed over in Python, as" in capsys.readouterr().err


def test_what_the_settings_do_not_ask_for_is_refused():
    with pytest.raises(ConfigError, match="train_data goes with dataset='python', got 'digits'"):
        train(TrainConfig(), train_data=DATA["train_data"])
    with pytest.raises(ConfigError, match="model goes with model='python', got 'small-cnn'"):
        train(TrainConfig(), model=small)
    with pytest.raises(ConfigError, match="as train_data"):
        train(settings(), model=small)
    with pytest.raises(ConfigError, match="as model"):
        train(settings(), **DATA)


def test_tensor_data_sets_are_held_in_memory():
    found = train(settings(), model=small, train_data=TensorDataset(IMAGES, LABELS)).data
    assert torch.equal(found.images.images, IMAGES)
    grey = (IMAGES[:, 0] * 255).byte()
    found = train(settings(), model=small, train_data=(grey.numpy(), LABELS.tolist())).data
    assert torch.equal(found.images.images, grey[:, None]) and found.image_shape == (1, 16, 16)


class Odd(torch.utils.data.Dataset):
    """Samples of what `image` gives for their number."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return self.image(i), int(LABELS[i])


FRAME = pandas.DataFrame({"path": ["a.png"] * 3, "label": [0, 1, None]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES * 2 - 1, LABELS), r"must be in \[0, 1\], got -1 to 1; the run normalises them"),
        ((IMAGES.mul(9).int(), LABELS), "images must be uint8 or floating, got torch.int32"),
        ((torch.full_like(IMAGES, torch.nan), LABELS), r"must be in \[0, 1\], got nan"),
        ((IMAGES[..., :3], LABELS), r"with fewer channels than columns, got \(40, 3, 16, 3\)"),
        ((IMAGES, LABELS[:7]), r"train_data: labels must be 40 whole numbers, got int64 \(7,\)"),
        ((IMAGES, LABELS - 1), "labels must be from 0, got -1 to 2"),
        ((IMAGES, LABELS * 2), "train_data: no image is of class 1"),
        (7, "must be a pair of arrays, a DataFrame or a torch data set with a length, got int"),
        (FRAME, "train_data: row 3 has no label"),
        (FRAME.rename(columns={"path": "file"}), "the columns label, and path or image, got file"),
        (Odd(lambda i: torch.rand(3, 8, 8)), "is not the same when it is read again"),
        (Odd(lambda i: torch.rand(8)), "images must be tensors .*got Tensor \\(8,\\)"),
        (
            Odd(lambda i: torch.zeros(1, 8, 8 + (i == 17))),
            r"train_data\[17\] cannot be read: it is",
        ),
        (Odd(lambda i: 1 / (i - 9) * torch.zeros(1, 8, 8)), r"train_data\[9\] cannot .* division"),
        (Odd(lambda i: np.full((8, 8, 3), 2.0)), r"must be in \[0, 1\], got 2 to 2"),
        (
            [{"image": Image.new("RGB", (8, 8))}] * 9,
            r"\[0\] must be a pair \(image, label\), got d",
        ),
    ],
)
def test_data_that_cannot_be_used(data, message):
    with pytest.raises(DataError, match=message):
        train(settings(), model=small, train_data=data)


@pytest.mark.parametrize(
    ("test_data", "message"),
    [
        ((IMAGES[:, :1], LABELS), "test_data must be as train_data, arrays of images"),
        (Odd(lambda i: IMAGES[i]), "test_data must be as train_data, arrays .* a torch data set"),
        ((IMAGES, LABELS + 4), "no training image is of class 4, but test images are"),
        ((IMAGES, np.array(["a"] * 40)), "test_data names classes, but train_data counts them"),
    ],
)
def test_test_data_are_like_the_training_set(test_data, message):
    with pytest.raises(DataError, match=message):
        train(settings(), model=small, train_data=(IMAGES, LABELS), test_data=test_data)


@pytest.mark.parametrize(
    ("model", "message"),
    [("resnet", "a module or a function that makes one"), (lambda **_: 3, "must make a module")],
)
def test_models_that_cannot_be_used(model, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(), model=model, **DATA)


def test_names_and_workers():
    """Labels by name; samples that worker processes read."""
    names = np.array(["cat", "dog", "emu", "fox"])[LABELS]
    pairs = [(image, name) for image, name in zip(IMAGES, names, strict=True)]
    result = train(settings(workers=2), model=small, train_data=pairs, test_data=pairs[:4])
    assert result.data.classes == ["cat", "dog", "emu", "fox"]
    assert torch.equal(result.data.labels, LABELS) and isinstance(result.accuracies[0], float)
    torch.testing.assert_close(result.data.mean, IMAGES.mean((0, 2, 3)))
    torch.testing.assert_close(result.data.std, IMAGES.std((0, 2, 3)), rtol=1e-3, atol=0)
