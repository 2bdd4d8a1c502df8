"""Tiny models of many architectures, batches for them, and the step that the walk is compared with."""

import torch
import transformers as tf

from qgalore.models.classify import classification_loss
from qgalore.models.loss import summed_loss
from qgalore.quant.counter import derive_key

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
OLD |= {"max_position_embeddings": 64, "pad_token_id": 0}
NEOX = {**OLD, "intermediate_size": 64, "hidden_dropout": 0.1, "attention_dropout": 0.1}
OPT = {**OLD, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MIXTRAL = {**SHAPE, **ROUTED, "num_local_experts": 4, "attention_dropout": 0.1}
QWEN_MOE = {**SHAPE, **ROUTED, "num_experts": 4, "moe_intermediate_size": 16, "attention_dropout": 0.1}
DROPPED = {**SHAPE, "attention_dropout": 0.1}
PHI = {**DROPPED, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
WINDOW = {**DROPPED, "sliding_window": 8}
CAUSAL = {
    "llama": ("Llama", DROPPED),
    "llama tied": ("Llama", {**DROPPED, "tie_word_embeddings": True}),
    "llama of one block": ("Llama", {**DROPPED, "num_hidden_layers": 1}),
    "mistral": ("Mistral", WINDOW),
    "qwen2": ("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("Qwen3", DROPPED),
    "gemma": ("Gemma", DROPPED),
    "gemma2": ("Gemma2", WINDOW),
    "gemma3": ("Gemma3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", PHI),
    "gpt_neox": ("GPTNeoX", NEOX),
    "opt": ("OPT", OPT),
    "gpt2": ("GPT2", GPT2),
    "mixtral": ("Mixtral", MIXTRAL),
    "qwen2_moe": ("Qwen2Moe", {**QWEN_MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE),
}
CLASSIFIERS = {
    "bert classifier": ("Bert", {**OLD, "intermediate_size": 64}),
    "roberta classifier": ("Roberta", {**OLD, "intermediate_size": 64}),
}
NAMES = [*CAUSAL, *CLASSIFIERS]
TIED = {"llama tied", "gemma", "gemma2", "gemma3", "gpt2", "opt"}


def build(name: str):
    """The model, in training mode, with its dropout on, and its loss (model, batch) → a sum over the targets."""
    torch.manual_seed(3)
    kind, shape = (CAUSAL | CLASSIFIERS)[name]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(tf, config_name)(**shape)
    if name in CLASSIFIERS:
        return getattr(tf, f"{kind}ForSequenceClassification")(config).train(), classification_loss
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(tf, f"{kind}{suffix}")(config).train(), summed_loss


def batches(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Packed rows of two documents, or labelled rows for a classifier."""
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(100 + number)
        ids = torch.randint(3, 96, (2, 16), generator=generator)
        if name in CLASSIFIERS:
            labels = torch.randint(0, 2, (2,), generator=generator)
            found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
            continue
        positions = torch.cat((torch.arange(7), torch.arange(9))).expand(2, -1)
        found.append({"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions})
    return found


def seed(step: int, number: int, part: int) -> None:
    """The seed of one part of one micro-batch, written down once more. The run's seed is 5."""
    torch.manual_seed(derive_key(5, step, number, part)[0] & 0x7FFFFFFF)


def batch_major(model, blocks, micro_batches, loss, step=0) -> list[float]:
    """Ordinary accumulation, with the same random numbers in every block."""
    now = {}
    handles = []
    for place, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda *_, p=place: seed(step, now["number"], p + 1)))
    handles.append(blocks[-1].register_forward_hook(lambda *_: seed(step, now["number"], len(blocks) + 1)))
    losses = []
    try:
        for number, batch in enumerate(micro_batches):
            now["number"] = number
            seed(step, number, 0)
            part = loss(model, batch) / 50
            part.backward()
            losses.append(float(part.detach()))
    finally:
        for handle in handles:
            handle.remove()
    return losses


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def everything(model, optimizer):
    """All tensors of a model and of its optimizer, by name."""
    found = dict(model.state_dict())

    def add(prefix, value):
        if torch.is_tensor(value):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}", inner)

    add("optimizer", optimizer.state_dict())
    return found
