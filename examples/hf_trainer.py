"""Q-GaLore under Hugging Face's Trainer: accumulation, clipping (at 1.0), checkpoints, and resuming to the same bits.

pip install accelerate
python examples/hf_trainer.py OUTPUT [--resume]
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import qgalore

STEPS = 20


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token rows labelled by whether their first token is in the upper half of the vocabulary."""
    tokens = torch.randint(1, 64, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row[0] >= 32).long()} for row in tokens]


def build() -> torch.nn.Module:
    """The same model for every call. Dropout is on, and repeats on resume: Trainer saves the generators."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **shape))
    print(qgalore.convert(model, rank=8))  # before Trainer sees the model, and alike on resume
    return model


def main(output: Path, resume: bool = False) -> torch.nn.Module:
    """Train, or go on from the newest checkpoint in ``output``; returns the trained model."""
    model = build()
    optimizer = qgalore.optimizer(model, lr=5e-3, scale=1.0, update_proj_gap=4)
    arguments = TrainingArguments(
        str(output / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=STEPS // 4,
        warmup_steps=2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    pair, guard = (optimizer, None), qgalore.TrainerGuard()
    trainer = Trainer(model, arguments, train_dataset=rows(256, seed=1), optimizers=pair, callbacks=[guard])
    trainer.train(resume_from_checkpoint=resume)
    qgalore.save(model, output / "final")  # an ordinary folder: from_pretrained loads it
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--resume", action="store_true")
    main(**vars(parser.parse_args()))
