"""PyTorch Lightning: the optimizer takes the adapter's groups, and a checkpoint need not hold the base.

python examples/lightning_module.py [model] [folder]          pip install lightning
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import attunement as at

path, folder = (*sys.argv[1:], *("sentence-transformers/all-MiniLM-L6-v2", "runs/lightning")[len(sys.argv) - 1 :])


KINDS = ("trained", "fixed", "running")  # the last are statistics that a schedule goes on from


class Adapted(lightning.LightningModule):
    strict_loading = False  # a checkpoint holds the adapter alone

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).train()
        self.adapter = at.adapt(self.model, at.LoRA(rank=8, lora_plus=4.0))

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = self.model(**batch).loss + self.adapter.penalty()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.adapter.total_steps = int(self.trainer.estimated_stepping_batches)
        return torch.optim.AdamW(self.adapter.groups(lr=1e-2))

    def on_train_start(self) -> None:
        self.adapter.step = self.trainer.global_step  # not zero where a run is resumed
        self.adapter.begin()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.adapter.before_step()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["state_dict"] = self.adapter.state(KINDS)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.adapter.load_state(checkpoint["state_dict"], KINDS)


tokenizer = AutoTokenizer.from_pretrained(path)
texts, labels = ["a good film", "a bad plot", "very great", "very awful"] * 8, [1, 0, 1, 0] * 8
inputs = tokenizer(texts, padding=True, return_tensors="pt")
rows = [{**{key: value[i] for key, value in inputs.items()}, "labels": label} for i, label in enumerate(labels)]

module = Adapted()
trainer = lightning.Trainer(max_epochs=5, default_root_dir=folder, accelerator="auto", devices=1, log_every_n_steps=1)
trainer.fit(module, DataLoader(rows, batch_size=8, shuffle=True))
module.adapter.save(f"{folder}/adapter")
