"""The GGUF export in a real llama.cpp, where the package llama-cpp-python is installed (it builds from source)."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

TEXT = Path(__file__).resolve().parents[2] / "configs/quickstart_data/valid.jsonl.gz"
PROMPTS, NEW_TOKENS = 10, 20
LENGTH = 640  # all sentences (but the last few) in one row: none is cut, each is seen from its own position 0


def sentences(count: int) -> list[str]:
    """Sentences of the held-out novels of a like length, each with other first two words."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["text"] for line in file)
    found: dict[str, str] = {}
    for sentence in re.findall(r"(?<=[.!?] )[A-Z][a-z]+ [a-z][^.!?\n]{90,140}\.", text):
        found.setdefault(" ".join(sentence.split()[:2]), sentence)
    return list(found.values())[:count]


def greedy_by_transformers(model, ids: list[int], count: int) -> tuple[list[int], float]:
    """``count`` greedy tokens after ``ids``, and the least lead of the best logit over the second in any of them."""
    tokens, lead = list(ids), float("inf")
    for _ in range(count):
        with torch.no_grad():
            best = model(torch.tensor([tokens])).logits[0, -1].float().topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(ids) :], lead


@pytest.mark.slow
def test_llama_cpp_says_what_the_bf16_export_says(tiny_run):
    """Ten prompts, greedy, every token equal to transformers' on the bf16 export, computed in bf16 and in fp32.

    llama.cpp rounds activations to 8 bits, so only a model without near ties can agree in every token: this one has
    learnt twenty sentences by heart (its held-out text is the same text), and a prompt is the beginning of one.
    """
    texts = sentences(20)
    Path("learnt.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, out, err = tiny_run(
        "model.overrides={hidden_size: 128, intermediate_size: 352, num_hidden_layers: 2}",
        *("data.train=learnt.jsonl", "data.valid=learnt.jsonl", f"data.sequence_length={LENGTH}"),
        *("train.max_steps=150", "train.micro_batch_size=1", "train.warmup_steps=10", "train.lr_schedule=linear"),
        *("train.eval_every=150", "train.save_every=null", "lowrank.rank=32", "export.formats=[hf, gguf]"),
    )
    assert code == 0, err
    assert ", 1 samples of" in out, out
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/export/hf")
    cpp = llama_cpp.Llama("runs/tiny/export/gguf/model.gguf", n_ctx=64, verbose=False, logits_all=False)
    least, compared = float("inf"), 0
    for text in texts[:PROMPTS]:
        prompt = " ".join(text.split()[:2])
        ids, whole = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
        assert whole[: len(ids)] == ids
        count = min(NEW_TOKENS, len(whole) - len(ids))
        assert count >= 16
        assert cpp.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        wanted, lead = greedy_by_transformers(exact, ids, count)
        assert wanted == whole[len(ids) :][:count], f"{prompt!r} was not learnt by heart"
        assert greedy_by_transformers(rounded, ids, count)[0] == wanted
        generation = cpp.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(generation) for _ in range(count)] == wanted, prompt
        least, compared = min(least, lead), compared + count
    print(f"\n{compared} greedy tokens agree; the least lead of one's logit over the second best is {least:.2f}")
