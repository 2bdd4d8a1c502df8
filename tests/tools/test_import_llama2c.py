"""llama2.c models and tokenizers against llama2.c's own algorithms, written here in NumPy and Python."""

import importlib.util
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "import_llama2c.py"
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 16, 24, 2, 4, 2, 32
CORPUS = "the cat sat on the mat and the other cat sat on that hat "


@pytest.fixture
def convert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("import_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def pieces():
    """A SentencePiece-like vocabulary: specials, bytes, the pairs of CORPUS met most, merged in turn, characters."""
    merged = list(CORPUS)
    learnt = []
    for _ in range(24):
        pairs = {}
        for pair in itertools.pairwise(merged):
            pairs[pair] = pairs.get(pair, 0) + ("".join(pair) not in learnt and not pair[0].endswith(" "))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learnt.append("".join(best))
        merged = join(merged, learnt[-1])
    characters = sorted(set(CORPUS) | set("xyz"))
    found = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{n:02X}>", 0.0) for n in range(256))]
    found += [(piece, -float(rank)) for rank, piece in enumerate(learnt)]
    return found + [(piece, -float(len(learnt) + rank)) for rank, piece in enumerate(characters)]


def join(parts, piece):
    out = []
    for part in parts:
        if out and out[-1] + part == piece:
            out[-1] = piece
        else:
            out.append(part)
    return out


def encode(text, vocabulary):
    """run.c: a space before, characters or bytes, then again and again the pair whose piece scores highest."""
    ids = {piece: place for place, (piece, _) in enumerate(vocabulary)}
    found = []
    for character in " " + text:
        found += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best = (-1e10, -1, -1)
        for place in range(len(found) - 1):
            both = ids.get(vocabulary[found[place]][0] + vocabulary[found[place + 1]][0])
            if both is not None and vocabulary[both][1] > best[0]:
                best = (vocabulary[both][1], both, place)
        if best[1] < 0:
            return found
        found[best[2] : best[2] + 2] = [best[1]]


def write_tokenizer(path, vocabulary):
    data = struct.pack("<i", max(len(piece.encode()) for piece, _ in vocabulary))
    for piece, score in vocabulary:
        data += struct.pack("<fi", score, len(piece.encode())) + piece.encode()
    path.write_bytes(data)


def write_model(path, vocab, tied):
    """A random model in llama2.c's format; its tensors by llama2.c's names."""
    random = np.random.default_rng(3)
    kv = DIM // HEADS * KV_HEADS
    shapes = {
        "emb": (vocab, DIM), "an": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv, DIM),
        "wv": (LAYERS, kv, DIM), "wo": (LAYERS, DIM, DIM), "fn": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,),
        "tables": (2, POSITIONS, DIM // HEADS // 2), **({} if tied else {"head": (vocab, DIM)}),
    }  # fmt: skip
    tensors = {name: random.normal(0, 0.4, shape).astype("<f4") for name, shape in shapes.items()}
    header = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab if tied else -vocab, POSITIONS)
    path.write_bytes(struct.pack("<7i", *header) + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def forward(t, ids):
    """run.c's forward pass, all positions at once, in float64; the pair (2i, 2i + 1) turns by
    position · 10000^(-2i/size)."""

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    def turn(x):
        size = x.shape[-1]
        angle = np.arange(len(ids))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = np.empty_like(x)
        out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
        return out

    x = t["emb"][ids]
    for layer in range(LAYERS):
        h = norm(x, t["an"][layer])
        q, k, v = ((h @ t[name][layer].T).reshape(len(ids), -1, DIM // HEADS) for name in ("wq", "wk", "wv"))
        q, k = turn(q), turn(k)
        k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(DIM // HEADS)
        scores += np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", weights, v).reshape(len(ids), DIM) @ t["wo"][layer].T
        h = norm(x, t["fn"][layer])
        gate = h @ t["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ t["w3"][layer].T)) @ t["w2"][layer].T
    return norm(x, t["norm"]) @ t.get("head", t["emb"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_model_and_tokenizer_are_llama2cs(convert, tmp_path, tied):
    vocabulary = pieces()
    write_tokenizer(tmp_path / "tok.bin", vocabulary)
    tensors = write_model(tmp_path / "m.bin", len(vocabulary), tied)
    assert convert(["m.bin", "tok.bin", "out"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert model.config.tie_word_embeddings == tied
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, len(vocabulary))
    texts = ["the cat sat on that hat", "other mats, the 🐈", "  two  spaces", "xx\nthe xyz\tcat", CORPUS * 2]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode(text, vocabulary)
        assert tokenizer.decode(ids) == text
    assert max(tokenizer(CORPUS, add_special_tokens=False)["input_ids"]) >= 259, "the test wants merged pieces"
    ids = [1, *tokenizer(texts[0], add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    expected = forward(tensors, ids)
    # fp32 against fp64 through two layers: a few hundred roundings of 2⁻²⁴ each; another rope would be off by order 1.
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_bad_files_are_named(convert, tmp_path, capfd):
    vocabulary = pieces()
    write_tokenizer(tmp_path / "tok.bin", vocabulary)
    write_model(tmp_path / "m.bin", len(vocabulary), True)
    (tmp_path / "short.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-4])
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "zero.bin").write_bytes(bytes(200))
    write_tokenizer(tmp_path / "other.bin", vocabulary[:-1])
    write_tokenizer(tmp_path / "more.bin", [*vocabulary, ("q", -99.0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for arguments, message in [
        (["short.bin", "tok.bin", "out"], "get the whole file"),
        (["empty.bin", "tok.bin", "out"], "less than the header"),
        (["zero.bin", "tok.bin", "out"], "its header is"),
        (["nowhere.bin", "tok.bin", "out"], "nowhere.bin"),
        (["m.bin", "other.bin", "out"], "no llama2.c tokenizer of"),
        (["m.bin", "more.bin", "out"], "no llama2.c tokenizer of"),
        (["m.bin", "tok.bin", "full"], "not an empty folder"),
    ]:
        assert convert(arguments) == 2
        assert message in capfd.readouterr().err
