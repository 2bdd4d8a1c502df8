"""The GGUF export in a real llama.cpp: every shape computes what transformers does, every tokenizer gives its ids."""

import random
import statistics

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import qgalore
from qgalore.errors import ConfigError
from qgalore.files import export_gguf, gguf_tokens

from .llama_server import LlamaServer

pytest.importorskip("xllamacpp", reason="needs the wheel xllamacpp: pip install xllamacpp")

WORDS = [
    "river",
    "house",
    "engine",
    "letter",
    "garden",
    "winter",
    "teacher",
    "window",
    "paper",
    "island",
    "doctor",
    "silver",
    "mountain",
]
MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def lines(count: int, seed: int = 0) -> list[str]:
    """Mixed text: words, numbers, runs of blanks, punctuation, code, contractions, several scripts, marks."""
    r = random.Random(seed)
    plain = ["don't", "I'LL", "3.14159", "2024", "1234567", "x==y", "\t\tdef f(a_b):", "(…)", "http://a.b/c?d=1", "'s"]
    blank = ["\n", "\n\n ", "   ", "  "]
    scripts = ["naïve", "straße", "日本語", "привет", "مرحبا", "🙂🙃", "ÀÉ", "e\u0301"]
    marks = ["<think>", "</think>", "a<b", "<|im_start|>user", "<|im_end|>", "[PAD7]"]
    odd = [*plain, *blank, *scripts, *marks]
    return [
        " ".join(r.choice(WORDS if r.random() < 0.5 else odd) for _ in range(r.randint(1, 9))) for _ in range(count)
    ]


def byte_level(
    splitter, *, post=None, whole_words=False, normalizer=None, bos="<s>", vocab=400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ``splitter``, trained on the lines' own words; <think> is added and not special."""
    inner = Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.pre_tokenizer, inner.decoder = splitter, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([line.replace("<", " ") for line in lines(300, seed=1)], trainer)
    inner.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    if post == "bos":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if post == "both":
        marks = [("<s>", 0), ("</s>", 1)]
        inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>")


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE of pieces with every byte, as transformers makes of a SentencePiece model: all merges of every piece."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    learnt.train_from_iterator([" ".join(WORDS), "the don't a naïve straße 2024 x==y"] * 20, trainer)
    pieces = [text for text, _ in sorted(learnt.get_vocab().items(), key=lambda item: item[1])]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", "▁▁", *pieces]:
        vocab.setdefault(piece, len(vocab))
    merges = [
        (p[:i], p[i:]) for p in vocab for i in range(1, len(p)) if p[0] != "<" and p[:i] in vocab and p[i:] in vocab
    ]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split(*patterns: str):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, BYTES])


def named(name: str) -> str:
    """The regular expression behind one of llama.cpp's names."""
    return next(key[0] for key, names in gguf_tokens.PRE_TOKENIZERS.items() if name in names and len(key) == 1)


TOKENIZERS = {
    "gpt-2": lambda: byte_level(GPT2),
    "gpt-2 in a sequence": lambda: byte_level(pre_tokenizers.Sequence([GPT2]), post="both"),
    "gpt-2 without bos": lambda: byte_level(GPT2, bos=None),
    "smollm": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "llama-bpe": lambda: byte_level(split(named("llama-bpe")), post="bos", whole_words=True),
    "smaug-bpe": lambda: byte_level(split(named("smaug-bpe"))),
    "qwen2": lambda: byte_level(split(named("qwen2"))),
    "gpt-4o": lambda: byte_level(split(named("gpt-4o"))),
    "tekken": lambda: byte_level(split(named("tekken")), whole_words=True),
    "sentencepiece": lambda: sentencepiece(prefix=True),
    "sentencepiece without a space": lambda: sentencepiece(prefix=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_tokenizers_ids(tiny_llama, tmp_path, name):
    """200 mixed lines, with the added tokens inside them, and the marks that the tokenizer puts around a text."""
    tokenizer = TOKENIZERS[name]()
    model = tiny_llama(vocab_size=len(tokenizer) + 9, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    export_gguf.save(model, tokenizer, tmp_path, lambda line: None)
    server = LlamaServer(tmp_path / "model.gguf")
    texts = lines(200)
    different = [text for text in texts if server.tokenize(text) != tokenizer(text)["input_ids"]]
    assert different == [], f"{len(different)} of 200, the first {server.tokenize(different[0])}"


SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0, 1.5, 2, 3, 4, 5, 6, 7],
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "original_max_position_embeddings": 64}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
SHAPES = {
    "llama": {"model_type": "llama"},
    "llama, biases, tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, linear": {"model_type": "llama", "rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {**PLAIN, "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3, partly rotated": {"model_type": "phi3", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    "phi3, long": {"model_type": "phi3", "rope_parameters": LONG},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(GPT2, vocab=300)


@pytest.mark.parametrize("case", SHAPES)
def test_llama_cpp_computes_every_shape_as_transformers_does(tokenizer, tmp_path, case):
    """A seeded model with norms, biases and logits far from their first values. 40 tokens are beyond the small windows
    and the old contexts."""
    torch.manual_seed(3)
    ends = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**{**SHAPE, **HEADS, **ends, **SHAPES[case], "attn_implementation": "eager"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0, 0.4 if value.ndim < 2 else 0.6 if "embed" in name or "lm_head" in name else 0.15)
            if name.endswith("norm.weight") and "gemma" not in config.model_type:
                value.add_(1)
            value.copy_(value.bfloat16())  # what the file holds, so that llama.cpp's own rounding is all that differs
    qgalore.convert(model, rank=4, weight_format="none")
    model.eval()
    export_gguf.save(model, tokenizer, tmp_path, lambda line: None)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(4, 300, (40,), generator=generator).tolist()
    said, probabilities = LlamaServer(tmp_path / "model.gguf", context=64 if "long" in case else 96).greedy(prompt, 16)
    assert_greedy(model, prompt, said, probabilities)


def assert_greedy(model, prompt: list[int], said: list[int], probabilities: dict[int, float]) -> None:
    """What llama.cpp ``said`` after ``prompt`` is what transformers' greedy decoding says, wherever its best logit
    leads by more than llama.cpp's rounding of activations can move it; and that is nearly everywhere."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said]), use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    best = logits.topk(2)
    sure = (best.values[:, 0] - best.values[:, 1]) > 0.3
    assert int(sure.sum()) >= 11
    assert torch.tensor(said)[sure].tolist() == best.indices[:, 0][sure].tolist()
    off = [abs(float(logits[i, said[i]]) - value) for i, value in probabilities.items()]
    assert len(off) >= 2
    assert statistics.median(off) < 0.1, off


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen2", "rope_parameters": {**LLAMA3}}, "rope_type is 'llama3'"),
        ({"model_type": "gpt2"}, "not gpt2"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tokenizer, changes, complaint):
    config = AutoConfig.for_model(**{**SHAPE, **HEADS, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=complaint):
        export_gguf.check(model, tokenizer)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: byte_level(GPT2, whole_words=True), "ignore_merges True"),
        (lambda: byte_level(split(r"\s+")), "no name for its pre-tokenizer"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lambda: byte_level(GPT2, normalizer=normalizers.Lowercase()), "normalizer is Lowercase"),
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), "WordLevel"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tiny_llama, make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        export_gguf.check(tiny_llama(vocab_size=420), make())
