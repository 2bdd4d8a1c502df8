"""Q-GaLore in a LightningModule: automatic optimization with accumulation, clipping, a schedule and checkpoints.

pip install -e '.[integrations]'
python examples/lightning_module.py OUTPUT
"""

import argparse
from pathlib import Path

import lightning
import tiny_chat
import torch
from torch.utils.data import DataLoader

import qgalore

STEPS = 30


class ChatModule(lightning.LightningModule):
    """A converted model, and the optimizer that goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.tokenizer = tiny_chat.tokenizer()
        self.model = tiny_chat.model(self.tokenizer)
        print(qgalore.convert(self.model, rank=8))  # alike before a checkpoint is loaded

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = qgalore.optimizer(self.model, lr=1e-2, scale=1.0, update_proj_gap=10)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(output: Path) -> ChatModule:
    """Train on the example conversations; returns the trained module."""
    lightning.seed_everything(0, verbose=False)
    module = ChatModule()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "devices": 1}
    trainer = lightning.Trainer(max_steps=STEPS, default_root_dir=output, logger=False, **settings)
    rows = DataLoader(tiny_chat.blocks(module.tokenizer, length=64), batch_size=4, shuffle=True)
    trainer.fit(module, rows)
    qgalore.save(module.model, output / "final", module.tokenizer)  # an ordinary folder: from_pretrained loads it
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    losses = main(parser.parse_args().output).losses
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
