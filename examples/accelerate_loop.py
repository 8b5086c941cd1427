"""SANM in a loop of Hugging Face Accelerate, also on several processes: `accelerate launch --cpu`.
Lines that end with `# SANM` are added or changed."""

from accelerate import Accelerator
from torch.utils.data import DataLoader

from digits import CONFIG, noisy_digits, options, report, sgd, small_cnn
from sanm_train import SANM, Indexed, LabelQualityTracker  # SANM

epochs, seed = vars(options(__doc__)).values()
accelerator = Accelerator(cpu=True)
train, test, wrong = noisy_digits(seed)
loader = DataLoader(Indexed(train), 64 // accelerator.num_processes, shuffle=True)  # SANM
model = SANM(small_cnn(), "0", config=CONFIG, image_shape=(1, 8, 8))  # SANM
quality = LabelQualityTracker(len(train), warmup=10)  # SANM
optimizer, schedule = sgd(model, epochs)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(epochs):
    model.train()
    quality.refit()  # SANM
    for images, labels, index in loader:  # SANM
        losses = quality.losses(model, images, labels, index)  # SANM
        optimizer.zero_grad()
        accelerator.backward(losses.total)  # SANM
        optimizer.step()
    schedule.step()

if accelerator.is_main_process:
    report(accelerator.unwrap_model(model), test, quality.clean_prob, wrong)
