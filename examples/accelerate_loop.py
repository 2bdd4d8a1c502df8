"""Q-GaLore under Hugging Face's accelerate, in one process: accumulation, saving the state, and resuming from it.

pip install accelerate
python examples/accelerate_loop.py OUTPUT [--resume]
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore

STEPS, ACCUMULATION = 20, 2


def batch(number: int) -> torch.Tensor:
    """Rows (8, 16) that count upwards, of the micro-batch ``number``."""
    starts = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(number))
    return (starts + torch.arange(16)) % 64


def main(output: Path, resume: bool = False) -> torch.nn.Module:
    """Train, and keep the state of the middle in ``output``; or go on from that state. Returns the trained model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    print(qgalore.convert(model, rank=8))  # before accelerate sees the model, and alike on resume
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATION)
    optimizer = qgalore.optimizer(model.to(accelerator.device), lr=5e-3, scale=1.0, update_proj_gap=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if resume:
        accelerator.load_state(str(output / "state"))
    for number in range(STEPS // 2 * ACCUMULATION if resume else 0, STEPS * ACCUMULATION):
        if number == STEPS // 2 * ACCUMULATION and not resume:
            accelerator.save_state(str(output / "state"))
        tokens = batch(number).to(accelerator.device)
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    main(options.output, options.resume)
