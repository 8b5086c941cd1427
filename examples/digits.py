"""What the examples share: scikit-learn's digits with half of the training labels wrong, a small
network, its test accuracy."""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import Dataset

import sanm_kernels as sk
from sanm_train.noise import add_noise

# The paper's ratios hide one to six of 64 pixels; digits bear more.
CONFIG = sk.MaskConfig.paper().replace(ratio_low=0.06, ratio_high=0.13, ratio_gamma=0.1)


class Digits(Dataset[tuple[Tensor, int]]):
    """Images (1, 8, 8), in training moved by up to a pixel each way, and their labels."""

    def __init__(self, images: Tensor, labels: Tensor, train: bool) -> None:
        self.images, self.labels, self.train = images, labels, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index], int(self.labels[index])
        if self.train:
            y, x = torch.randint(3, (2,)).tolist()
            image = pad(image, (1, 1, 1, 1), value=-1)[:, y : y + 8, x : x + 8]
        return image, label


def noisy_digits(seed: int = 0) -> tuple[Digits, Digits, Tensor]:
    """1,347 digits to train on, 450 for the test, and which of the former's labels are wrong: half
    of them, each replaced by one of the nine others, as `sanm train --seed` has them."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    parts = train_test_split(
        images, torch.tensor(digits.target), stratify=digits.target, random_state=0
    )
    images, test_images, labels, test_labels = parts
    noisy = add_noise(labels, "symmetric", 0.5, num_classes=10, seed=seed)
    return Digits(images, noisy, True), Digits(test_images, test_labels, False), noisy != labels


def small_cnn() -> nn.Module:
    """A classifier of 8×8 images. Its module "0" gives the last feature map (B, 64, 4, 4)."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(nn.Sequential(*layers), *head)


def sgd(
    model: nn.Module, epochs: int, steps: int = 1
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser, and a schedule that divides its rate by ten after three quarters of the
    epochs, of `steps` steps of the schedule each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    drop = max(1, round(0.75 * epochs * steps))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, drop)


def options(description: str | None, **more: int | str) -> argparse.Namespace:
    """The command line's --epochs and --seed, and `more` with their defaults; torch is seeded."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parsed = parser.parse_args()
    torch.manual_seed(parsed.seed)
    return parsed


def report(model: nn.Module, test: Digits, clean_prob: Tensor, wrong: Tensor) -> None:
    """Print the test accuracy, and the mean label quality of right and of wrong labels."""
    model.eval()
    with torch.no_grad():
        model.cpu()
        hits = model(test.images).argmax(1) == test.labels
    right, mistaken = clean_prob[~wrong].mean(), clean_prob[wrong].mean()
    print(f"label quality: right labels {right:.2f}, wrong labels {mistaken:.2f}")
    print(f"test accuracy: {hits.float().mean():.1%}")
