"""SANM in the Hugging Face Trainer. Lines that end with `# SANM` are added or changed."""

import tempfile
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from digits import CONFIG, Digits, noisy_digits, options, report, sgd, small_cnn
from sanm_train import SANM, Indexed, LabelQualityTracker  # SANM


class Pictures(Dataset[dict[str, Any]]):
    """Digits as Trainer has them: dictionaries."""

    def __init__(self, digits: Digits) -> None:
        self.digits = digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.digits[index]
        return {"pixel_values": image, "labels": label}


class Classifier(nn.Module):
    """A model as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"logits": logits} if labels is None else {
            "loss": F.cross_entropy(logits, labels), "logits": logits
        }  # fmt: skip


class NoisyClassifier(SANM):  # SANM
    def forward(self, pixel_values, labels, index=None):  # SANM
        if trainer.state.epoch >= quality.epochs + 1:  # SANM
            quality.refit()  # SANM
        losses = quality.losses(super().forward, pixel_values, labels, index)  # SANM
        return {"loss": losses.total, "logits": losses.logits}  # SANM


epochs, seed = vars(options(__doc__)).values()
train, test, wrong = noisy_digits(seed)
model = NoisyClassifier(Classifier(), "network.0", config=CONFIG, image_shape=(1, 8, 8))  # SANM
quality = LabelQualityTracker(len(train), warmup=10)  # SANM

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            use_cpu=True,
            seed=seed,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Indexed(Pictures(train)),  # SANM
        eval_dataset=Pictures(test),
        compute_metrics=lambda found: {"right": (found[0].argmax(1) == found[1]).mean()},
        optimizers=sgd(model, epochs, steps=-(-len(train) // 64)),
    )
    trainer.train()
    print(f"of the test digits {trainer.evaluate()['eval_right']:.1%} are right")

report(model.model.network, test, quality.clean_prob, wrong)
