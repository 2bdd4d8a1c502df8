"""Q-GaLore in a loop of your own: accumulation, clipping and a scheduler work as with any torch optimizer.

python examples/own_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore

STEPS, ACCUMULATION = 60, 2


def main() -> list[float]:
    """Teach a tiny model to count; returns the loss of every step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))

    print(qgalore.convert(model, rank=16))  # int8 weights and int4 projections, in place
    optimizer = qgalore.optimizer(model, lr=5e-3, scale=1.0, update_proj_gap=20)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    losses = []
    for _ in range(STEPS):
        loss = 0.0
        for _ in range(ACCUMULATION):
            tokens = (torch.randint(0, 64, (8, 1)) + torch.arange(16)) % 64
            part = model(input_ids=tokens, labels=tokens).loss / ACCUMULATION
            part.backward()
            loss += part.item()
        optimizer.refresh()  # so that the norm below is that of projected gradients in every step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
