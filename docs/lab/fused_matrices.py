"""Trains small models under Muon whose fused matrices are orthogonalised as one matrix, one by one, and stored apart.

    python docs/lab/fused_matrices.py TOKENIZER [STEPS]

TOKENIZER is the ``tokenizer`` folder of a run of the quickstart with ``data.vocab_size=1024``. Prints the held-out loss
of each kind and seed. muon.md has the table.
"""

import gzip
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import qgalore
from qgalore.lowrank.layers.linear import LowRankLinear

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH, RATE, SCALE, WARM = 128, 8, 0.128, 1 / 16, 20
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 1024, "tie_word_embeddings": True, "max_position_embeddings": 2048}
SHAPE |= {"rms_norm_eps": 1e-6, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
KINDS = {"phi3, one matrix": "phi3", "phi3, one by one": "phi3", "llama": "llama"}


def tokens(name: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Those of all novels of a part, in pieces of 20,000 characters."""
    with gzip.open(ROOT / f"configs/quickstart_data/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    pieces = [text[at : at + 20_000] for text in texts for at in range(0, len(text), 20_000)]
    return torch.tensor([i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]])


def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def run(kind: str, seed: int, train: torch.Tensor, valid: torch.Tensor, steps: int) -> float:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(KINDS[kind], **SHAPE)).float()
    qgalore.convert(model, rank=None)
    optimizer = qgalore.optimizer(model, lr=RATE, rule="muon", scale=SCALE, stepping="fused", seed=seed)
    if kind == "phi3, one matrix":
        for layer in model.modules():
            if isinstance(layer, LowRankLinear):
                layer.row_parts = None

    def rate(step: int) -> float:
        half_turn = math.pi * max(0, step - WARM) / (steps - WARM)
        return min((step + 1) / WARM, 1.0) * (0.1 + 0.45 * (1.0 + math.cos(half_turn)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draws = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        starts = torch.randint(len(train) - LENGTH - 1, (BATCH, 1), generator=draws)
        loss(model.train(), train[starts + torch.arange(LENGTH + 1)]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(float(loss(model.eval(), rows)) for rows in valid.split(32)) / len(valid.split(32))


def main() -> None:
    tokenizer, steps = PreTrainedTokenizerFast.from_pretrained(sys.argv[1]), int([*sys.argv, "200"][2])
    train, valid = (tokens(name, tokenizer) for name in ("train", "valid"))
    held_out = valid[: 192 * LENGTH].reshape(-1, LENGTH)
    for seed in range(3):
        for kind in KINDS:
            print(f"{kind}, seed {seed}: {run(kind, seed, train, held_out, steps):.4f}", flush=True)


if __name__ == "__main__":
    main()
