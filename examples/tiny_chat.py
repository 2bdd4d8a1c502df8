"""A tiny Llama, its tokenizer and conversations, for the recipes beside this file. Nothing is downloaded.

Yours would be ``AutoModelForCausalLM.from_pretrained(FOLDER)``, ``AutoTokenizer.from_pretrained(FOLDER)`` and
``datasets.load_dataset("json", data_files=FILE, split="train")``.
"""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qgalore.data.sources import rows
from qgalore.data.tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parent.parent / "configs" / "instruct_data" / "train.jsonl"
# ChatML. The generation block says what an assistant has to say, with the mark that ends it.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def conversations() -> list[dict]:
    """The rows ``{"messages": [...]}`` of the example data."""
    return [{"messages": row["messages"]} for row, _ in rows(str(DATA))]


def preferences() -> Dataset:
    """A question with its answer as it stands, ``chosen``, and with the answer in capitals, ``rejected``."""
    pairs = [row["messages"][-2:] for row in conversations()]
    loud = [{**answer, "content": answer["content"].upper()} for _, answer in pairs]
    made = zip(pairs, loud, strict=True)
    return Dataset.from_list([{"prompt": [q], "chosen": [a], "rejected": [other]} for (q, a), other in made])


def tokenizer() -> PreTrainedTokenizerBase:
    texts = [message["content"] for row in conversations() for message in row["messages"]]
    made = train_tokenizer(texts, vocab_size=512)
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The same weights for every call; generating ends at the tokenizer's end."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape, **ends))


def blocks(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """The tokens of all conversations, one after the other, in rows (n, length)."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations()]
    ids = torch.tensor(tokenizer("".join(texts))["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)
