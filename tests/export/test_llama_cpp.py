"""The GGUF export in a real llama.cpp, where the package llama-cpp-python is installed (it builds from source)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

PROMPTS = [
    "It was", "The man", "I have", "She said", "In the morning", "There is no", "The old house", "He looked at",
    "My dear", "And so they",
]  # fmt: skip


@pytest.mark.slow
def test_llama_cpp_says_what_the_bf16_export_says(tiny_run):
    """Ten prompts, greedy. llama.cpp rounds activations to 8 bits, so a near tie may fall the other way: what it picks
    must be transformers' choice, or lie within that rounding of it."""
    wide = "model.overrides={hidden_size: 128, intermediate_size: 352, num_hidden_layers: 2}"
    settings = ("train.max_steps=300", "train.eval_every=300", "train.save_every=null", "train.lr_schedule=linear")
    code, _, err = tiny_run(wide, *settings, "lowrank.rank=32", "export.formats=[hf, gguf]")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/export/hf")
    cpp = llama_cpp.Llama("runs/tiny/export/gguf/model.gguf", n_ctx=64, verbose=False, logits_all=False)
    agreed = total = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert cpp.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        for token in cpp.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert float(logits.max() - logits[token]) < 0.1, (prompt, ids, token)
            agreed += int(logits.argmax()) == token
            total += 1
            ids = [*ids, token]
            if len(ids) > 16:
                break
    print(f"\n{agreed} of {total} greedy tokens are transformers' own choice")
    assert agreed / total > 0.95
