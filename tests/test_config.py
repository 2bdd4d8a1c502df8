from pathlib import Path

import pytest
import yaml

from qgalore import config
from qgalore.errors import ConfigError

CONFIGS = sorted(config.PACKAGED.glob("*.yaml"))
LEAST = {"model": {"config": "llama_60m"}, "data": {"train": "x.txt"}, "train": {"max_steps": 10, "lr": 0.01}}
PLAIN = {"order": "batch_major"}
SHARD = {**LEAST, "parallel": "shard"}


def change(**sections):
    return {**LEAST, **{name: {**LEAST.get(name, {}), **values} for name, values in sections.items()}}


def message(data) -> str:
    with pytest.raises(ConfigError) as error:
        config.parse(data, "test.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_packaged_configurations_load(path):
    loaded = config.load(path.name)
    resolved = config.resolve(loaded, "cpu", False)
    assert loaded.run.name == path.stem
    assert config.parse(yaml.safe_load(config.dump(resolved)), "dump") == resolved


def test_there_is_one_configuration_for_each_size():
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "llama60m", "llama130m", "llama350m", "llama1b", "llama7b_16gb"} <= names


def test_all_problems_come_at_once_with_suggestions():
    data = change(train={"lrr": 1, "lr": -1, "max_steps": "many"}, lowrank={"rank": 0}, data={"lr": 3})
    text = message(data)
    assert "5 problems" in text
    assert "train.lrr: unknown key; did you mean train.lr?" in text
    assert "data.lr: unknown key; did you mean train.lr?" in text
    assert "train.lr is -1; it must be a number above 0" in text
    assert "train.max_steps" in text
    assert "lowrank.rank is 0; it must be a whole number from 1" in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({**LEAST, "metod": "galore"}, "metod: unknown key; did you mean method?"),
        ({**LEAST, "method": "loha"}, "it must be qgalore, galore, galore8bit"),
        ({**change(lowrank={"rank": "full"}), "method": "lora"}, "needs the rank of its factors"),
        ({**change(lowrank={"rank": "auto"}), "method": "lora"}, "needs the rank of its factors"),
        (change(lowrank={"rank": "auto", "rule": "fira"}), "rule fira needs a number"),
        (change(lowrank={"rank": "auto", "proj_type": "full"}), "goes by one spectrum"),
        (change(lowrank={"rank": "auto", "max_rank": 16, "mean_rank": 24}), "lower it or raise that"),
        (
            change(lowrank={"rank": "auto", "mean_rank": 7}),
            "lowrank.mean_rank is 7; it must be a whole number from 8",
        ),
        (
            change(lowrank={"rank": "auto", "energy": 1.01}),
            "lowrank.energy is 1.01; it must be a number above 0 and at most 1",
        ),
        (
            change(lowrank={"rank": "auto", "energy": 0}),
            "lowrank.energy is 0; it must be a number above 0 and at most 1",
        ),
        ({**change(export={"formats": ["gguf"]}), "method": "lora"}, "merged weights are not int8"),
        ({**change(lowrank={"embeddings": "int8"}), "method": "lora"}, "method lora freezes"),
        ({"model": {"config": "llama_60m"}, "data": {"train": "x"}}, "train: missing, and a run needs this section"),
        (change(model={"path": "somewhere"}), "exactly one of model.config"),
        (change(train={**PLAIN, "stepping": "fused", "clip_grad_norm": 1}), "cannot clip"),
        (
            {**SHARD, "method": "lora"},
            "method: lora does not go with parallel: shard; use qgalore",
        ),
        ({**SHARD, "train": {**LEAST["train"], **PLAIN}}, "train.order: batch_major does not go with parallel: shard"),
        (
            {**SHARD, "memory": {"stream": "all"}},
            "parallel: shard does not go with memory.stream: all; use memory.stream",
        ),
        (
            {**SHARD, "memory": {"stream": "weights", "slots": 3}},
            "memory.slots: 3 does not go with memory.stream: weig",
        ),
        ({**change(export={"formats": ["int8"]}), "method": "galore"}, "int8 needs int8 weights"),
        (change(train={"betas": [0.9, 1.0]}), "train.betas is [0.9, 1.0]; it must be a list of two values"),
        (change(train={"lr": float("inf")}), "train.lr"),
        (change(lowrank={"rank": True}), "lowrank.rank is true"),
        (change(lowrank={"rank": -3}), "lowrank.rank is -3"),
        (change(run={"name": "a/b"}), "run.name"),
        (change(run={"name": ".."}), "run.name"),
        (change(run={"seed": 2**63}), "run.seed"),
        (change(train={"optimizer": "torch.optim.SGD", "eps": 1e-6}), "train.optimizer_options"),
    ],
)
def test_bad_values(data, expected):
    assert expected in message(data)


def test_numbers_as_yaml_writes_them():
    parsed = config.parse(change(train={"lr": "1e-3"}), "test")
    assert parsed.train.lr == 1e-3


def test_overrides_and_their_errors(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    loaded = config.load(str(path), ["train.lr=0.5", "lowrank.rank=full", "export.formats=[]", "run.seed=3"])
    assert (loaded.train.lr, loaded.lowrank.rank, loaded.export.formats, loaded.run.seed) == (0.5, "full", [], 3)
    for bad, expected in [
        ("train.lr", "form key.sub=value"),
        ("train.lr.x=1", "lr is a value, not a section. Give all of it at once, as train.lr=…"),
        ("train.lrx=1", "did you mean train.lr?"),
        ("train.lr=[", "not YAML"),
    ]:
        with pytest.raises(ConfigError) as error:
            config.load(str(path), [bad])
        assert expected in str(error.value)
    with pytest.raises(ConfigError, match=r"train is a list, not a section\. Give all of it at once, as data\.train=…"):
        config.load(str(path), ["data.train=[a.txt, b.txt]", "data.train.0.weight=2"])


def test_names_are_looked_up_here_and_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("quickstart.yaml") == config.find("quickstart") == config.PACKAGED / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text("{}")
    assert config.find("quickstart.yaml") == Path("quickstart.yaml")
    with pytest.raises(ConfigError, match=r"did you mean quickstart\.yaml"):
        config.find("quikstart.yaml")


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "train:\n  lr: 3\n  max_steps: 1\n")
    with pytest.raises(ConfigError, match="'train' is given twice"):
        config.load(str(path))


@pytest.mark.parametrize("content", ["", "- 1\n- 2", "a: [", "just text"])
def test_files_that_are_not_a_mapping(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        config.load(str(path))


def test_data_beside_the_configuration_is_found(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x.txt").write_text("text")
    (tmp_path / "here" / "mine.yaml").write_text(yaml.safe_dump(LEAST))
    monkeypatch.chdir(tmp_path)
    assert config.load("here/mine.yaml").data.train[0].path == "here/x.txt"


def test_methods_resolve():
    def resolved(method, bf16=False, **sections):
        made = config.resolve(config.parse({**change(**sections), "method": method}, "t"), "cpu", bf16)
        return made.lowrank.weight_format, made.lowrank.basis_format, made.train.optimizer, made.model.dtype

    assert resolved("qgalore") == ("int8", "int4", "adamw8bit", "float32")
    assert resolved("galore") == ("none", "fp32", "adamw", "float32")
    assert resolved("galore8bit", bf16=True) == ("none", "bf16", "adamw8bit", "bfloat16")
    assert resolved("adamw")[2] == "adamw"
    assert resolved("adamw8bit")[2] == "adamw8bit"
    assert resolved("qgalore", lowrank={"basis_format": "nf4"}, train={"optimizer": "adamw"})[1:3] == ("nf4", "adamw")


def test_stepping_follows_accumulation_and_clipping():
    def stepping(**train):
        return config.resolve(config.parse(change(train={**PLAIN, **train}), "t"), "cpu", False).train.stepping

    assert stepping() == "fused"
    assert stepping(grad_accumulation=2) == "deferred"
    assert stepping(clip_grad_norm=1.0) == "deferred"
    assert stepping(stepping="deferred") == "deferred"
    with pytest.raises(ConfigError, match="use deferred"):
        stepping(stepping="fused", grad_accumulation=2)


def test_processes_share_the_micro_batches_of_a_step():
    def stepping(processes, **train):
        return config.resolve(config.parse(change(train=train), "t"), "cpu", False, processes).train.stepping

    assert stepping(4, grad_accumulation=4) == "fused"
    assert stepping(2, grad_accumulation=4) == "deferred"
    with pytest.raises(ConfigError, match="set a multiple of 4"):
        stepping(4, grad_accumulation=6)


def test_remarks_name_what_has_no_effect():
    made = config.parse({**change(lowrank={"rank": 4}, train={"warmup_steps": 10}), "method": "adamw"}, "t")
    text = " ".join(config.remarks(made))
    assert "lowrank.rank" in text
    assert "never reached" in text
    assert config.remarks(config.parse(LEAST, "t")) == []
    for sections, key in [
        ({"lowrank": {"rank": "full", "proj_type": "left"}}, "lowrank.proj_type"),
        ({"train": {"lr_schedule": "constant", "min_lr_ratio": 0.5}}, "train.min_lr_ratio"),
        ({"lowrank": {"weight_format": "none", "group_size": 32}}, "lowrank.group_size"),
        ({"lowrank": {"rank": 8, "max_rank": 32}}, "lowrank.max_rank"),
        ({"data": {"tokenizer": "x", "vocab_size": 999}}, "data.vocab_size"),
        ({"data": {"valid": "x", "valid_fraction": 0.1}}, "data.valid_fraction"),
    ]:
        assert [line for line in config.remarks(config.parse(change(**sections), "t")) if line.startswith(key)], key


def test_a_dump_reads_back_for_any_optimizer():
    made = config.resolve(config.parse(change(train={"optimizer": "torch.optim.SGD"}), "t"), "cpu", False)
    assert config.parse(yaml.safe_load(config.dump(made)), "t") == made


def test_differences_ignore_what_may_change():
    first = config.parse(LEAST, "t")
    later = config.parse(change(train={"max_steps": 20, "save_every": 5}, run={"name": "other"}), "t")
    assert config.differences(first.model_dump(mode="json"), later) == []
    other = config.parse(change(train={"lr": 0.02}, lowrank={"rank": 4}), "t")
    assert config.differences(first.model_dump(mode="json"), other) == [
        "lowrank.rank: 128 → 4",
        "train.lr: 0.01 → 0.02",
    ]


def test_off_is_a_word_though_yaml_reads_it_as_false():
    assert config.load("quickstart.yaml", ["train.loss_spike=off"]).train.loss_spike == "off"
