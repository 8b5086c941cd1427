"""What loops of Lightning, transformers and Accelerate do with a SANM besides training it."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from inputs import extended
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import sanm_kernels as sk
from sanm_train import SANM, Batch, Indexed, LabelQualityTracker
from sanm_train.models import SmallCNN

N = 24
CONFIG = sk.MaskConfig.official_cifar().replace(views=("max",))


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, 1, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(10, (N,), generator=generator))


@extended
@needs("lightning")
@pytest.mark.filterwarnings("ignore")
def test_lightning_loads_what_it_saved(tmp_path):
    """`load_from_checkpoint`, with the masking among the hyperparameters and nothing unpickled."""
    import lightning as L

    class Classifier(L.LightningModule):
        def __init__(self, config: sk.MaskConfig, samples: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = SANM(SmallCNN(), config=config, image_shape=(1, 8, 8))
            self.quality = LabelQualityTracker(samples, warmup=1)

        def on_train_epoch_start(self) -> None:
            self.quality.refit()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.quality.losses(self.model, *batch).total

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["quality"] = self.quality.state_dict()

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            self.quality.load_state_dict(checkpoint["quality"])

    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Classifier(CONFIG, N)
    trainer.fit(model, DataLoader(Indexed(samples()), 8))
    path = trainer.checkpoint_callback.best_model_path
    again = Classifier.load_from_checkpoint(path, weights_only=True)
    assert again.hparams.config == CONFIG == again.model.mask_config
    for a, b in zip(model.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.quality.epochs == 2 and bool((again.quality.noted > -torch.inf).all())
    index = torch.arange(N)
    assert torch.equal(again.quality[index], model.quality[index])


@extended
@needs("transformers")
def test_the_trainer_evaluates(tmp_path):
    """With labels, after each epoch: loss and logits where nothing is hidden or noted."""
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> dict:
            return dict(zip(("pixel_values", "labels"), samples()[index], strict=True))

    class NoisyClassifier(SANM):
        def forward(self, pixel_values, labels, index=None):
            if trainer.state.epoch >= quality.epochs + 1:
                quality.refit()
            losses = quality.losses(super().forward, pixel_values, labels, index)
            seen.append(index is not None and losses.masked is not None)
            return {"loss": losses.total, "logits": losses.logits}

    seen: list[bool] = []
    quality = LabelQualityTracker(N, warmup=1)
    model = NoisyClassifier(SmallCNN(), config=CONFIG, image_shape=(1, 8, 8))
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path, num_train_epochs=3, per_device_train_batch_size=8, use_cpu=True,
            per_device_eval_batch_size=N, eval_strategy="epoch", save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=Indexed(Rows()),
        eval_dataset=Rows(),
        compute_metrics=lambda found: {"right": float((found[0].argmax(1) == found[1]).mean())},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert seen == 4 * [False] + 2 * (3 * [True] + [False])
    assert quality.epochs == 3  # the last one's by its evaluation
    found = trainer.evaluate()
    images, labels = samples().tensors
    model.eval()
    with torch.no_grad():
        losses = SANM.forward(model, Batch(images, labels, masked=False))
    right = (losses.logits.argmax(1) == labels).double().mean().item()
    assert found["eval_loss"] == pytest.approx(losses.total.item(), rel=1e-5)
    assert found["eval_right"] == pytest.approx(right)
    assert bool((quality.noted == -torch.inf).all())


@extended
@needs("transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", ["vit.layernorm", "vit.layers.1"])
def test_transformers_checkpoint_their_gradients(layer):
    """The map is a layer's inside of what is checkpointed, or comes after it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    net = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, num_labels=5, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    torch.nn.init.normal_(net.vit.layernorm.weight)  # or the mean over the channels is 0
    sanm = SANM(net, layer, image_shape=(3, 32, 32)).train()
    batch = Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.rand(4))
    gradients = []
    for _ in range(2):
        sanm.zero_grad()
        sanm(batch, generator=0).total.backward()
        gradients.append([p.grad.clone() for p in sanm.parameters() if p.grad is not None])
        net.gradient_checkpointing_enable()
    assert net.is_gradient_checkpointing and len(gradients[0]) > 20
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
