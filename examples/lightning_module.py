"""SANM in a `lightning.LightningModule`, on one device or with DDP.

Lines that end with `# SANM` are added or changed.
"""

import warnings

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from digits import CONFIG, noisy_digits, options, report, sgd, small_cnn
from sanm_train import SANM, Indexed, LabelQualityTracker  # SANM


class Classifier(L.LightningModule):
    """A classifier of digits whose training batches are (images, labels, index)."""

    def __init__(self, samples: int, epochs: int) -> None:
        super().__init__()
        self.model = SANM(small_cnn(), "0", config=CONFIG, image_shape=(1, 8, 8))  # SANM
        self.quality = LabelQualityTracker(samples, warmup=10)  # SANM
        self.epochs = epochs

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        optimizer, schedule = sgd(self, self.epochs)
        return [optimizer], [schedule]

    def on_train_epoch_start(self) -> None:  # SANM
        self.quality.refit()  # SANM

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch  # SANM
        return self.quality.losses(self.model, images, labels, index).total  # SANM


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")  # on workers and devices
    parsed = options(__doc__, devices=1, precision="32-true")
    train, test, wrong = noisy_digits(parsed.seed)
    trainer = L.Trainer(
        max_epochs=parsed.epochs,
        accelerator="cpu",
        devices=parsed.devices,
        precision=parsed.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(len(train), parsed.epochs)
    loader = DataLoader(Indexed(train), 64 // parsed.devices, shuffle=True)  # SANM
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        report(model, test, model.quality.clean_prob, wrong)


if __name__ == "__main__":
    main()
