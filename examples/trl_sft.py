"""Q-GaLore under TRL's SFTTrainer: conversations, of which only the assistant's answers are learned.

pip install -e '.[integrations]'
python examples/trl_sft.py OUTPUT
"""

import argparse
from pathlib import Path

import tiny_chat
import torch
from datasets import Dataset
from transformers import get_cosine_schedule_with_warmup as cosine
from trl import SFTConfig, SFTTrainer

import qgalore

STEPS = 30


def main(output: Path) -> tuple[torch.nn.Module, list[float]]:
    """Fine-tune on the example conversations; returns the trained model and the loss of every step."""
    tokenizer = tiny_chat.tokenizer()
    model = tiny_chat.model(tokenizer)
    print(qgalore.convert(model, rank=8))  # before SFTTrainer sees the model
    optimizer = qgalore.optimizer(model, lr=1e-2, scale=1.0, update_proj_gap=10)
    arguments = SFTConfig(
        str(output / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        max_length=128,
        assistant_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(tiny_chat.conversations()),
        processing_class=tokenizer,
        optimizers=(optimizer, cosine(optimizer, 2, STEPS)),  # else SFTTrainer makes one that moves no int8 weight
        callbacks=[qgalore.TrainerGuard()],  # which refuses that, and whatever else would go wrong in silence
    )
    trainer.train()
    qgalore.save(model, output / "final", tokenizer)  # an ordinary folder: qgalore chat and from_pretrained load it
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    _, losses = main(parser.parse_args().output)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
