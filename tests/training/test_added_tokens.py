"""A pretrained model that gets rows for more tokens: those there were stay, and the new ones begin as their mean."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PhiConfig

from qgalore.data.tokenizer import add_tokens, load_tokenizer, train_tokenizer
from qgalore.errors import ConfigError
from qgalore.models import loading, streaming
from qgalore.models.growing import mean_row
from tests.helpers import assert_same, final_state, rows, stored_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "untied": LlamaConfig(**SMALL, vocab_size=300, max_position_embeddings=64),
    "tied": LlamaConfig(**SMALL, vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True),
    "bias": PhiConfig(**SMALL, vocab_size=300),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0),
}
GROWS = {
    "untied": ["model.embed_tokens.weight", "lm_head.weight"],
    "tied": ["model.embed_tokens.weight"],
    "bias": ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"],
    "gpt2": ["transformer.wte.weight"],
}
MARKS = ["<|im_start|>", "<|im_end|>"]
ADDED = "data.added_tokens=['<|im_start|>', '<|im_end|>']"


def with_bias(model):
    """``model`` with values in the bias of its head, if it has one: transformers starts it at zero."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A function kind → the folder of such a small model of 300 rows, with a tokenizer of 270 entries."""
    return partial(stored_model, tmp_path_factory.mktemp("models"), KINDS, finish=with_bias)


@pytest.fixture
def continued(tiny_run, stored):
    """A function (overrides…, kind=…) → what ``train.py`` gives that continues such a model. Its tokenizer has as many
    entries as the model has rows."""
    chats = [{"prompt": f"the sea {n}", "completion": "is wide " * 3} for n in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    tokenizer = train_tokenizer(["the sea"] * 3, vocab_size=270, report=lambda line: None)
    tokenizer.add_tokens([f"w{n}" for n in range(300 - len(tokenizer))])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained("words")
    data = ("data.task=instruct", "data.train=rows.jsonl", "data.tokenizer=words", "data.sequence_length=64")
    quick = ("train.max_steps=2", "train.eval_every=2", "lowrank.rank=4", "model.config=null", "model.overrides={}")
    quick += ("sample.max_new_tokens=0",)
    return lambda *more, kind="untied": tiny_run(*data, *quick, f"model.path={stored(kind)}", *more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_and_old_ones_stay(stored, kind, dtype, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", 64 * 32)  # several tiles, one of which has old rows and new ones
    folder = stored(kind)
    before = loading.pretrained(str(folder), dtype=dtype, report=lambda line: None)
    skeleton = loading.pretrained_skeleton(folder, dtype=dtype)
    model, names = loading.grown(skeleton, 317)
    assert names == GROWS[kind]
    source = loading.stored_source(folder, model, report=lambda line: None)
    streaming.allocate(model, torch.device("cpu"))
    streaming.fill(model, source, "model")
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    after, old = dict(model.named_parameters()), dict(before.named_parameters())
    assert after.keys() == old.keys()
    for name, value in after.items():
        assert torch.equal(value[: len(old[name])], old[name]), name
        new = value[len(old[name]) :]
        assert len(new) == (17 if name in names else 0)
        if name in names:
            mean = wanted[name].detach().double().mean(0)
            assert torch.equal(new, mean.float().to(dtype).expand_as(new)), name
    assert loading.rows_of(model.config) == model.get_input_embeddings().num_embeddings == 317


def test_the_mean_is_of_all_rows_whatever_the_tiles(monkeypatch):
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", 40)
    values = torch.randn(50, 8)
    torch.testing.assert_close(mean_row(lambda a, b: values[a:b], values.shape), values.mean(0))


def test_what_else_would_grow_is_refused(stored):
    """A tensor that follows the vocabulary in another way has no rows to take a mean of."""
    before = loading.pretrained_skeleton(stored("untied"), dtype=torch.float32)
    before.register_buffer("final_logits_bias", torch.zeros(1, 300))
    with pytest.raises(ConfigError, match=r"cannot grow: final_logits_bias \(1, 300\) would be gone"):
        loading.grown(before, 301)


@pytest.mark.slow
def test_an_exported_head_in_int8_grows_on_its_own_grid(continued):
    """Started from an int8 export with such a head, every integer stays, and the new ones are those of the mean."""
    code, _, err = continued("lowrank.embeddings=int8", "export.formats=[int8]")
    assert code == 0, err
    start = ("model.path=runs/tiny/export/int8", "run.name=next", "lowrank.embeddings=int8", "train.lr=1e-12")
    code, out, err = continued(*start, ADDED, "export.formats=[int8]")
    assert code == 0, err
    assert "quantized anew" not in out
    before, after = (load_file(f"runs/{name}/export/int8/model.safetensors") for name in ("tiny", "next"))
    for part in ("packed", "scale"):
        old, new = before[f"lm_head.weight_{part}"], after[f"lm_head.weight_{part}"]
        assert torch.equal(new[:300], old)
        assert len(new) == 302
        assert torch.equal(new[300], new[301])


@pytest.mark.parametrize("kind", ["untied", pytest.param("tied", marks=pytest.mark.slow)])
def test_a_run_with_added_tokens(continued, kind):
    """Planned, trained, resumed to the same bits, exported, and generating its new tokens in transformers."""
    said = "2 new rows (ids 300 to 301) for <|im_start|>, <|im_end|> in " + " and ".join(GROWS[kind])
    said += ": they begin as the mean of the 300 rows that there were"
    # In each of two ways: a head of its own in bf16, and an embedding in int8 that is the head too.
    int8 = () if kind == "untied" else ("lowrank.embeddings=int8",)
    arguments = (ADDED, "train.save_every=1", "export.formats=[hf,int8,gguf]", *int8)
    code, out, err = continued(*arguments, "--plan", kind=kind)
    assert (code, said in out) == (0, True), err
    code, out, err = continued(*arguments, "train.lr=0.03", kind=kind)
    assert (code, out.count(said)) == (0, 1), err
    assert "special tokens added: <|im_start|> (300), <|im_end|> (301)" in out
    state = final_state("runs/tiny", 2)

    first = Path("runs/tiny/checkpoints/step-00000001")
    code, _, err = continued(*arguments, "train.lr=0.03", "run.name=again", "--resume", str(first), kind=kind)
    assert code == 0, err
    assert_same(state, final_state("runs/again", 2))
    code, _, err = continued("train.lr=0.03", "--resume", str(first), kind=kind)
    assert (code, "data.added_tokens" in err) == (2, True)

    model = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/export/hf")
    assert tokenizer.convert_tokens_to_ids(MARKS) == [300, 301]
    assert 301 in torch.tensor(model.generation_config.eos_token_id)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the sea"}], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert (int(ids.max()), logits.shape[-1]) == (301, 302)
    embedding = model.get_input_embeddings().weight
    assert not torch.equal(embedding[300], embedding[301])  # both were trained


def test_rows_that_the_model_has_already_stay(continued):
    """Of a tokenizer with fewer entries than the model has rows, as many are published."""
    smaller = train_tokenizer(["the sea"] * 3, vocab_size=270, report=lambda line: None)
    smaller.chat_template = load_tokenizer("words").chat_template
    smaller.save_pretrained("smaller")
    first = len(smaller)
    code, out, err = continued(ADDED, "data.tokenizer=smaller", "--plan")
    assert code == 0, err
    assert f"<|im_start|> ({first}), <|im_end|> ({first + 1}) of data.added_tokens: the model has rows for them" in out
    assert "new row" not in out


def test_a_wrong_tokenizer_never_grows_a_model(continued):
    larger = load_tokenizer("words")
    larger.add_tokens(["of another model", "of no text"])
    larger.save_pretrained("larger")
    Path("said.jsonl").write_text(json.dumps({"prompt": "of another model " * 90}) + "\n")
    other, grow = "data.tokenizer=larger", "model.grow_vocabulary=true"
    said = ("data.task=text", "data.text_key=prompt", "data.train=said.jsonl", "data.valid=said.jsonl")
    code, _, err = continued(other, *said, "run.name=a")
    assert (code, "model.grow_vocabulary=true gives them rows" in err) == (2, True), err
    code, _, err = continued(other, "run.name=b", ADDED)
    assert (code, "data.added_tokens: without these tokens the tokenizer has ids up to 301 already" in err) == (2, True)
    code, out, err = continued(other, *said, grow, ADDED, "run.name=c", "export.formats=[]", "train.max_steps=1")
    assert code == 0, err
    assert "4 new rows (ids 300 to 303) for <|im_start|>, <|im_end|> and 2 entries" in out
    code, out, err = continued(grow, "--plan")
    assert (code, "300 rows are enough for ids up to 299; none is added" in out) == (0, True), err


def test_a_classifier_gets_rows_too(tiny_run, stored):
    table = [json.dumps({"sentence": f"<topic> {n} the sea", "label": n % 2}) + "\n" for n in range(16)]
    Path("table.jsonl").write_text("".join(table))
    full = load_tokenizer(str(stored("tied")))
    full.add_tokens([f"w{n}" for n in range(300 - len(full))])
    full.save_pretrained("words")
    code, out, err = tiny_run(
        "data.task=classify", "data.train=table.jsonl", "data.valid=table.jsonl", f"model.path={stored('tied')}",
        "model.config=null", "model.overrides={}", "data.added_tokens=['<topic>']", "train.max_steps=1",
        "data.tokenizer=words", "lowrank.rank=4",
    )  # fmt: skip
    assert code == 0, err
    said = "1 new row (id 300) for <topic> in model.embed_tokens.weight: it begins as the mean of the 300 rows"
    assert said in out
    assert load_file("runs/tiny/export/hf/model.safetensors")["model.embed_tokens.weight"].shape == (301, 32)


def test_tokens_that_are_there_are_said_and_not_added():
    tokenizer = train_tokenizer(["the sea"] * 3, vocab_size=270, report=lambda line: None)
    size, said = len(tokenizer), []
    add_tokens(tokenizer, ["<|endoftext|>", "<x>"], said.append)
    assert said == [f"special tokens added: <x> ({size})", "entries already, and special tokens now: <|endoftext|> (0)"]
    assert (len(tokenizer), tokenizer("a<x>")["input_ids"][-1]) == (size + 1, size)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.added_tokens=['<x>', '<x>']", "data.added_tokens"),
        ("data.added_tokens=[' ']", "data.added_tokens"),
        ("model.grow_vocabulary=true", "model.grow_vocabulary: is for a pretrained model"),
    ],
)
def test_what_is_refused_at_once(tiny_run, given, said):
    code, _, err = tiny_run(given)
    assert (code, said in err) == (2, True), err
    assert not Path("runs").exists()


def test_a_fresh_model_has_rows_for_added_tokens(tiny_run):
    code, out, err = tiny_run("data.added_tokens=['<x>']", "train.max_steps=1", "export.formats=[]")
    assert code == 0, err
    assert "special tokens added: <x> (512)" in out
    assert "vocabulary 576 (tokenizer: 513)" in out
    assert [row for row in rows("runs/tiny/metrics.jsonl") if "eval_loss" in row]
    stated = ("data.added_tokens=['<x>', '<y>']", "model.overrides.vocab_size=513", "run.name=stated")
    code, _, err = tiny_run(*stated, "train.max_steps=1", "export.formats=[]")
    assert code == 2
    assert (
        "data.added_tokens: <y> (513) would have no row in a model of 513 rows. Set model.overrides.vocab_size" in err
    )
    assert "to 514 or more" in err


@pytest.mark.slow
def test_streamed_blocks_change_nothing(continued):
    """New rows lie outside of the blocks."""
    arguments = (ADDED, "export.formats=[]", "train.activation_checkpointing=true")
    assert continued(*arguments)[0] == 0
    code, _, err = continued(*arguments, "run.name=streamed", "memory.stream=weights")
    assert code == 0, err
    assert_same(final_state("runs/tiny", 2), final_state("runs/streamed", 2))
