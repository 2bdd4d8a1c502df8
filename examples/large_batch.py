"""Q-GaLore with large batches: all micro-batches of a step in the memory of one, block by block.

python examples/large_batch.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore

STEPS, MICRO_BATCHES = 60, 4


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of a micro-batch."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def main() -> list[float]:
    """Teach a tiny model to count; returns the loss of every step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).train()

    print(qgalore.convert(model, rank=16))  # int8 weights and int4 projections, in place
    optimizer = qgalore.optimizer(model, lr=5e-3, scale=1.0, update_proj_gap=20, stepping="manual")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    losses = []
    for _ in range(STEPS):
        micro_batches = [(torch.randint(0, 64, (4, 1)) + torch.arange(16)) % 64 for _ in range(MICRO_BATCHES)]
        # Forward, backward and update in one call: each block's gradients are gone before the next block's come.
        taken = qgalore.step(model, optimizer, micro_batches, loss=loss)
        scheduler.step()
        losses.append(taken.loss)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}, through {taken.blocks} blocks")
    return losses


if __name__ == "__main__":
    main()
