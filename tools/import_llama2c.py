"""llama2.c's format as a Hugging Face folder: ``python tools/import_llama2c.py stories260K.bin tok512.bin OUT``."""

import argparse
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.files import atomic

HEADER = struct.Struct("<7i")  # dim, hidden, layers, heads, kv heads, vocabulary (negative: untied head), positions
UNKNOWN, BOS, EOS = 0, 1, 2  # of every llama2.c tokenizer
BYTES = 3  # the ids of the 256 bytes follow


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Convert a llama2.c model (version 0, float32) and its tokenizer.")
    parser.add_argument("checkpoint", type=Path, help="the model, such as stories260K.bin")
    parser.add_argument("tokenizer", type=Path, help="its vocabulary as llama2.c writes it, such as tok512.bin")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet, or is empty")
    options = parser.parse_args(arguments)
    return door.leave(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    kinds.fresh_folder(options.out, "OUT")
    model = read_model(options.checkpoint)
    tokenizer = read_tokenizer(options.tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
    explained = atomic.explained(f"the folder {options.out}", "free space or choose another place")
    with explained, atomic.replacing_folder(options.out) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens: {options.out}")


def read_model(path: Path):
    """The LlamaForCausalLM (fp32) in a llama2.c file of version 0.

    Header, then float32 tensors in this order, those of layers stacked: embedding, attention norms, wq, wk, wv, wo,
    feed-forward norms, w1 (gate), w2 (down), w3 (up), last norm, two tables of rotations (not needed), and the head
    where it is not the embedding. Source: karpathy/llama2.c, ``memory_map_weights`` in run.c.
    Raises ConfigError for a file of another size than its header says.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qgalore.errors import ConfigError

    raw = path.read_bytes()
    config, shapes = _layout(raw, path)
    values = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=HEADER.size).copy())
    parts = dict(zip(shapes, values.split([_size(shape) for shape in shapes.values()]), strict=True))
    parts = {name: part.view(shapes[name]) for name, part in parts.items()}
    if bad := [name for name, part in parts.items() if name != "rotations" and not torch.isfinite(part).all()]:
        raise ConfigError(f"{path}: {bad[0]} holds NaN or infinity; the file is damaged, or the model diverged")
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    names = {
        "input_layernorm": "attention_norm", "self_attn.q_proj": "wq", "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv", "self_attn.o_proj": "wo", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "w1", "mlp.down_proj": "w2", "mlp.up_proj": "w3",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": parts["embedding"], "model.norm.weight": parts["norm"]}
    state["lm_head.weight"] = parts.get("head", parts["embedding"])
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            part = parts[ours][layer]
            part = halves(part, heads[ours]) if ours in heads else part
            state[f"model.layers.{layer}.{theirs}.weight"] = part
    model.load_state_dict(state)
    return model


def halves(weight, heads: int):
    """``weight`` (heads · size, in) with each head's rows in transformers' order: llama2.c turns neighbours (2i,
    2i + 1) by one angle, transformers the rows (i, i + size / 2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for part in shape:
        total *= part
    return total


def _layout(raw: bytes, path: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """Arguments of LlamaConfig, and the shapes of the tensors in the order of the file."""
    from qgalore.errors import ConfigError

    if len(raw) < HEADER.size:
        raise ConfigError(f"{path} has {len(raw)} bytes, less than the header of a llama2.c model")
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = HEADER.unpack_from(raw)
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    if min(dim, hidden, layers, heads, kv_heads, vocabulary, positions) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise ConfigError(f"{path} is no llama2.c model of version 0: its header is {HEADER.unpack_from(raw)}")
    kv = dim // heads * kv_heads
    shapes = {
        "embedding": (vocabulary, dim), "attention_norm": (layers, dim), "wq": (layers, dim, dim),
        "wk": (layers, kv, dim), "wv": (layers, kv, dim), "wo": (layers, dim, dim), "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim), "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "norm": (dim,),
        "rotations": (2, positions, dim // heads // 2), **({} if tied else {"head": (vocabulary, dim)}),
    }  # fmt: skip
    expected = HEADER.size + 4 * sum(map(_size, shapes.values()))
    if expected != len(raw):
        raise ConfigError(f"{path} has {len(raw):,} bytes where its header asks for {expected:,}; get the whole file")
    config = {
        "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    return config, shapes


def read_pieces(path: Path, vocabulary: int) -> list[tuple[str, float]]:
    """(piece, score) of every token of a llama2.c tokenizer: int32 longest, then float32 score, int32 size, bytes."""
    from qgalore.errors import ConfigError

    raw, place, pieces = path.read_bytes(), 4, []
    try:
        for _ in range(vocabulary):
            score, size = struct.unpack_from("<fi", raw, place)
            place += 8 + size
            pieces.append((raw[place - size : place].decode("utf-8"), score))
    except (struct.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no llama2.c tokenizer of {vocabulary} tokens ({error}); give tokNNN.bin"
        ) from error
    if place != len(raw) or [text for text, _ in pieces[BYTES : BYTES + 2]] != ["<0x00>", "<0x01>"]:
        raise ConfigError(f"{path} is no llama2.c tokenizer of {vocabulary} tokens; give the one of this model")
    return pieces


def read_tokenizer(path: Path, vocabulary: int, positions: int):
    """The tokenizer in a llama2.c file: SentencePiece BPE, which merges the pair whose piece has the highest score,
    begins a text with a space, and spells what it does not know in bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from qgalore.errors import ConfigError

    pieces = read_pieces(path, vocabulary)
    names = ["<unk>", "<s>", "</s>", *(text.replace(" ", "▁") for text, _ in pieces[BYTES:])]
    ids = {name: place for place, name in enumerate(names)}
    if len(ids) < len(names):
        twice = next(name for place, name in enumerate(names) if ids[name] != place)
        raise ConfigError(f"{path} has the piece {twice!r} twice; a token of it could not be told from the other")
    ranked = sorted(range(BYTES + 256, vocabulary), key=lambda place: -pieces[place][1])
    merges = []
    for place in ranked:
        piece = names[place]
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in cuts if left in ids and right in ids]
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:BYTES]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=positions
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
