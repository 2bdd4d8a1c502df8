"""Which files of a folder are read: what transformers reads, or a refusal that says why."""

import json
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qgalore.errors import ConfigError
from qgalore.files.headers import entries
from qgalore.models import loading

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama(initializer_range=0.1).save_pretrained(tmp_path)
    return tmp_path


def change(path, edit, to=None) -> None:
    """Save the tensors of ``path``, edited in place, to ``to`` or back."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, to or path, metadata={"format": "pt"})


def doubled(tensors) -> None:
    tensors[NAME] = tensors[NAME] * 2


def edit_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read(folder, lines=None):
    return loading.pretrained(str(folder), dtype=torch.float32, report=(lines if lines is not None else []).append)


def assert_as_transformers(folder, lines=None) -> None:
    mine, theirs = read(folder, lines), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = theirs.state_dict()
    assert set(mine.state_dict()) == set(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in mine.state_dict().items())


def index(folder, mapping) -> None:
    text = json.dumps({"metadata": {}, "weight_map": mapping})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_single_file_beside_the_index_of_files_that_are_gone(folder):
    index(folder, {NAME: "model-00001-of-00002.safetensors"})
    lines = []
    assert_as_transformers(folder, lines)
    assert any("names files that are not there" in line for line in lines)


def test_a_single_file_and_shards_that_disagree(folder):
    change(folder / "model.safetensors", lambda tensors: None, folder / "model-00001-of-00001.safetensors")
    index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"))
    assert_as_transformers(folder)
    change(folder / "model.safetensors", doubled, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ConfigError, match=f"hold different weights, for example {NAME}"):
        read(folder)


def test_one_tensor_in_two_shards(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    extra = {NAME: load_file(folder / "a.safetensors")[NAME]}
    save_file(extra, folder / "b.safetensors", metadata={"format": "pt"})
    index(folder, {**dict.fromkeys(names, "a.safetensors"), NAME: "b.safetensors"})
    assert_as_transformers(folder)
    change(folder / "b.safetensors", doubled)
    with pytest.raises(ConfigError, match=rf"{NAME} has other values in b\.safetensors than in a\.safetensors"):
        read(folder)


def test_one_parameter_under_two_names(folder):
    change(folder / "model.safetensors", lambda t: t.update({NAME.removeprefix("model."): t[NAME] * 2}))
    with pytest.raises(ConfigError, match="would both do, and hold different values"):
        read(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.fp16.safetensors"], "a variant that transformers does not read"),
        (["model-00001-of-00002.safetensors"], r"have no model\.safetensors\.index\.json"),
        (["consolidated.safetensors"], r"transformers does not read consolidated\.safetensors"),
        (["pytorch_model.bin"], r"pytorch_model\.bin is a pickle"),
        (["model.Q8_0.gguf"], "GGUF"),
        ([], "Copy the weights into it"),
    ],
)
def test_folders_without_what_transformers_reads(folder, names, message):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_files_beside_the_read_ones_are_named(folder):
    change(folder / "model.safetensors", doubled, folder / "model.fp16.safetensors")
    lines = []
    assert_as_transformers(folder, lines)
    assert any("not read, for example model.fp16.safetensors" in line for line in lines)


def test_the_file_that_config_json_names(folder):
    change(folder / "model.safetensors", doubled, folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    assert_as_transformers(folder)
    for name, message in (("../x.safetensors", "no file in this folder"), ("x.safetensors", "missing")):
        edit_config(folder, transformers_weights=name)
        with pytest.raises(ConfigError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({NAME: "../model.safetensors"}, "no file in this folder"),
        ({NAME: "/etc/passwd"}, "no file in this folder"),
        ({NAME: 3}, "names 3"),
        ({NAME: "model.bin"}, r"only \.safetensors files are read"),
        ({NAME: "gone.safetensors"}, r"the shard gone\.safetensors is missing"),
        ({}, "no weight_map"),
        ([NAME], "no weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed(folder, mapping, message):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index(folder, mapping)
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_a_head_in_the_files_is_kept_though_config_json_ties_it(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    lines = []
    assert_as_transformers(tmp_path, lines)
    assert any("lm_head.weight: the head is kept as it is, untied" in line for line in lines)
    model = loading.pretrained_skeleton(tmp_path, dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    change(
        tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = read(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tied_model_whose_files_hold_the_head_alone(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", NAME])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(folder, name, value):
    def edit(tensors):
        tensors[name].view(-1)[-1] = value

    change(folder / "model.safetensors", edit)
    with pytest.raises(ConfigError, match=f"{name} cannot be used"):
        read(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_codes_are_no_weights(folder, kind):
    """transformers would cast them and start from numbers that no scale belongs to."""
    change(folder / "model.safetensors", lambda tensors: tensors.update({NAME: tensors[NAME].to(kind)}))
    with pytest.raises(ConfigError, match=rf"{NAME} is stored as (I8|U8|I64|F8_E4M3), and a weight must be F32"):
        read(folder)


@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_packed", "qweight", "SCB"])
def test_a_part_of_a_quantized_weight_is_never_left_over(folder, part):
    name = NAME.replace("weight", part)
    change(folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(ConfigError, match=rf"holds {name}, a part of a quantized weight.*Start from"):
        read(folder)


def test_values_beyond_the_models_dtype(folder):
    change(folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(3.4e38))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight cannot be used.*beyond bfloat16's range.*float32"):
        loading.pretrained(str(folder), dtype=torch.bfloat16)


def test_the_missing_weights_are_named(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"9 weights have missing keys, for example model\.layers\.2\."):
        loading.pretrained_skeleton(folder, dtype=torch.float32)  # before anything is read


HEADERS = {
    "overlap": lambda h, k, q: h[k].update(data_offsets=list(h[q]["data_offsets"])),
    "gap": lambda h, k, q: h[k].update(data_offsets=[h[k]["data_offsets"][0] + 4, h[k]["data_offsets"][1] + 4]),
    "negative": lambda h, k, q: h[k].update(data_offsets=[-64, h[k]["data_offsets"][1]]),
    "swapped": lambda h, k, q: h[k].update(data_offsets=h[k]["data_offsets"][::-1]),
    "null": lambda h, k, q: h[k].update(data_offsets=[None, h[k]["data_offsets"][1]]),
    "fraction": lambda h, k, q: h[k].update(data_offsets=[float(v) for v in h[k]["data_offsets"]]),
    "bool": lambda h, k, q: h[k].update(data_offsets=[False, h[k]["data_offsets"][1]]),
    "shape": lambda h, k, q: h[k].update(shape=[1, *h[k]["shape"]][:1]),
    "dtype": lambda h, k, q: h[k].update(dtype="F64"),
    "unknown dtype": lambda h, k, q: h[k].update(dtype="F31"),
    "no shape": lambda h, k, q: h[k].pop("shape"),
    "left out": lambda h, k, q: h.pop(k),
    "metadata": lambda h, k, q: h.update(__metadata__={"format": 3}),
    "a list": lambda h, k, q: h.update({k: [1, 2]}),
}


def sealed(header, data) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("what", [*HEADERS, "trailing bytes", "short"])
def test_headers_that_the_library_refuses_are_refused(tmp_path, what):
    path = tmp_path / "x.safetensors"
    save_file({"k": torch.ones(3, 4), "q": torch.zeros(3, 4)}, path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    assert set(entries(path)) == {"k", "q"}
    if what in HEADERS:
        HEADERS[what](header, "k", "q")
    data = {"trailing bytes": data + b"\0", "short": data[:-1]}.get(what, data)
    path.write_bytes(sealed(header, data))
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(ConfigError, match=r"x\.safetensors is not a safetensors file, or is damaged"):
        entries(path)


def test_what_the_library_reads_is_read_alike(tmp_path):
    path = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(3)
    made = {
        "matrix": torch.randn(5, 7, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "cube": torch.randint(-9, 9, (2, 3, 4), generator=generator, dtype=torch.int8),
        "flags": torch.tensor([True, False]),
    }
    save_file(made, path)
    for name, entry in entries(path).items():
        parts = [entry.rows(a, b).reshape(-1) for a, b in entry.tiles()]
        assert torch.equal(torch.cat(parts).view(entry.shape), made[name]) if parts else not made[name].numel()
    cube = entries(path)["cube"]
    assert torch.equal(cube.rows(2, 5), made["cube"].view(6, 4)[2:5])
