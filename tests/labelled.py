"""Tables with labels that a small encoder can learn, and pretrained bodies without a head for them."""

import random

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qgalore.data.tokenizer import train_tokenizer

WORDS = ("red", "green", "blue", "warm", "cold", "day", "night", "sun", "moon", "sea")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_table(path, rows, seed, number=False):
    """Two texts a row; the label, yes or no, 2.5 or 0, says whether "warm" is in the first."""
    generator = random.Random(seed)
    lines = ["id\tone\ttwo\tlabel"]
    for row in range(rows):
        first, second = (generator.choices(WORDS, k=generator.randint(3, 8)) for _ in range(2))
        label = (2.5, 0) if number else ("yes", "no")
        label = label["warm" not in first]
        lines.append(f"{row}\t{' '.join(first)}\t{' '.join(second)}\t{label}")
    path.write_text("\n".join(lines) + "\n")


def write_body(folder, kind):
    """A pretrained folder whose model has no classification head, with a tokenizer."""
    tokenizer = train_tokenizer([" ".join(WORDS), *WORDS] * 3, vocab_size=300)
    torch.manual_seed(0)
    sizes = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 96}
    if kind == "encoder":
        model = BertModel(BertConfig(**sizes, pad_token_id=tokenizer.pad_token_id))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
