"""Q-GaLore under TRL's DPOTrainer: answers that are preferred to others, beside a reference model that stays as it is.

pip install -e '.[integrations]'
python examples/trl_dpo.py OUTPUT
"""

import argparse
import copy
from pathlib import Path

import tiny_chat
import torch
from trl import DPOConfig, DPOTrainer

import qgalore

STEPS = 20


def main(output: Path) -> tuple[torch.nn.Module, torch.nn.Module, list[float]]:
    """Train on the example preferences; returns the trained model, the reference and the margin of every step."""
    tokenizer = tiny_chat.tokenizer()
    model = tiny_chat.model(tokenizer)
    print(qgalore.convert(model, rank=8))  # before DPOTrainer sees the model
    # A copy of the converted model: in int8 too, and with the same values, so that all margins begin at zero.
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = qgalore.optimizer(model, lr=3e-3, scale=1.0, update_proj_gap=10)
    arguments = DPOConfig(
        str(output / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        max_length=128,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = DPOTrainer(
        model,
        reference,  # without it DPOTrainer would load the model's folder again, in floating point
        arguments,
        train_dataset=tiny_chat.preferences(),
        processing_class=tokenizer,
        optimizers=(optimizer, None),  # else DPOTrainer makes one that moves no int8 weight
        callbacks=[qgalore.TrainerGuard()],  # which refuses that, and whatever else would go wrong in silence
    )
    trainer.train()
    qgalore.save(model, output / "final", tokenizer)  # an ordinary folder: qgalore chat and from_pretrained load it
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    return model, reference, margins


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    _, _, margins = main(parser.parse_args().output)
    print(f"margin of the preferred answers {margins[0]:.3f} → {margins[-1]:.3f}")
