"""Every key of the schema under wrong values of every kind, and whole configurations that were mutated."""

import json
import math
import random
import re
import time

import pytest
import yaml

from qgalore import config, plain_yaml
from qgalore.config import messages
from qgalore.errors import ConfigError

LEAST = {"model": {"config": "llama_60m"}, "data": {"train": "x.txt"}, "train": {"max_steps": 10, "lr": 0.01}}
KEYS = list(messages.keys())
WRONG = {
    "word": "perhaps-not", "negative": -3, "huge": 10**40, "nan": math.nan, "inf": math.inf, "null": None,
    "list": [1, {"a": 2}], "mapping": {"secret": 1, "other": 2}, "true": True, "half": 0.25, "text": "",
}  # fmt: skip
PYDANTIC = re.compile(r"Input should|validation error|\btype=|input_value|\(got |Extra inputs|Field required|pydantic")


def with_value(name: str, value) -> dict:
    data = {section: dict(values) for section, values in LEAST.items()}
    section, _, key = name.rpartition(".")
    (data.setdefault(section, {}) if section else data)[key] = value
    return data


def complaint(data) -> str:
    try:
        config.parse(data, "mine.yaml")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "field"), KEYS, ids=[name for name, _ in KEYS])
def test_a_wrong_value_is_told_with_key_value_rule_and_remedy(name, field):
    refused = 0
    for value in WRONG.values():
        told = complaint(with_value(name, value))
        assert not PYDANTIC.search(told), told
        assert "secret" not in told or name == "train.optimizer_options", told
        line = next((line.strip() for line in told.splitlines() if line.strip().startswith(f"{name} is ")), None)
        if line is None:
            continue
        refused += 1
        rule, _, remedy = line.partition("; it must be ")[2].partition(". ")
        assert line.startswith(f"{name} is {messages.shown(value)}; "), line
        assert rule
        assert re.search(r"[Ll]eave the key out|for example|Did you mean", remedy), line
        assert len(line) < 420, line
    numeric = {int, float} & {getattr(one, "__origin__", one) for one in config.schema.members(field.annotation)}
    if numeric or "Literal" in str(field.annotation) or field.annotation is bool:
        accepted = [kind for kind, value in WRONG.items() if not complaint(with_value(name, value))]
        assert set(accepted) <= {"null", "true", "half"}, accepted
    assert refused >= 3


def test_every_number_has_both_ends():
    for name, field in KEYS:
        allowed = config.schema.members(field.annotation)
        for one in {int, float} & set(allowed):
            for far in (-(10**20), 10**20):
                assert complaint(with_value(name, one(far))), f"{name} takes {far}"


def test_every_remedy_can_be_carried_out():
    for name, field in KEYS:
        section, _, key = name.rpartition(".")
        written = plain_yaml.read(messages.as_yaml(messages.example_of(field)))
        told = complaint(with_value(name, written))
        assert f"{name} is" not in told, told
        assert not field.is_required() or not told
        assert field.description.endswith("."), name
        assert messages.extra_of(field, "unset") or messages.default_of(field) is not None or field.is_required(), name
        assert section or key in config.Config.model_fields


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lowrank.rank", "ful", ["full or auto", "Did you mean full?", "a whole number from 1"]),
        ("train.betas", [0.9], ["a list of two values"]),
        ("train.betas", [0.9, 1.0], ["below 1"]),
        ("memory.budget", 16, ["memory.budget is 16", "a size with its unit, such as 15.5GiB"]),
        ("memory.budget", "0GiB", ["a size with its unit"]),
        ("train.lr", -1, ["train.lr is -1; it must be a number above 0"]),
        ("train.lr", None, ["train.lr is empty (null)"]),
        ("train", None, ["train is empty (null); it must be a section"]),
        ("train", [1], ["it must be a section"]),
        ("train", "fast", ["train is 'fast'"]),
        ("lowrank.cos_threshold", 5, ["lowrank.cos_threshold is 5; it must be a number from 0 to 1"]),
        ("tracking", ["mlflow"], ["tracking is ['mlflow']; ", "for example tracking=[tensorboard]"]),
        ("export.formats", ["hf", "bin"], ["each hf, int8 or gguf"]),
        ("export.formats", ["hf", "hf"], ["different values"]),
        ("tracking", ["wandv"], ["tracking is ['wandv']; it must be a list", "for example tracking=[tensorboard]"]),
        ("train.keep_best", 1, ["true or false"]),
        ("train.activation_checkpointing", "of", ["true or false, or auto or offload"]),
        ("train.weight_decay", 200, ["train.weight_decay: 200 times train.lr"]),
        ("lowrank.max_gap", 10, ["lowrank.max_gap: 10 is below lowrank.update_proj_gap, 200"]),
        ("run.name", "a/b", ["letters, digits and . + - _"]),
    ],
)
def test_particular_words(name, value, words):
    told = complaint(with_value(name, value))
    assert all(word in told for word in words), told


def test_missing_keys_are_named_with_an_example():
    told = complaint({"model": {"config": "llama_60m"}, "data": {}})
    assert "data.train: missing, and it has no default. Add it, for example data.train=my_text.jsonl." in told
    assert "train: missing, and a run needs this section. Give its keys, for example train.max_steps=1000." in told


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.learning_rate", "train.lr"),
        ("train.num_train_epochs", "train.epochs"),
        ("data.max_length", "data.sequence_length"),
        ("data.max_seq_length", "data.sequence_length"),
        ("train.eval_steps", "train.eval_every"),
        ("train.save_steps", "train.save_every"),
        ("train.per_device_train_batch_size", "train.micro_batch_size"),
        ("train.gradient_accumulation_steps", "train.grad_accumulation"),
        ("train.warmup_fraction", "train.warmup_ratio"),
        ("train.bf16", "model.dtype"),
        ("fp16", "model.dtype"),
        ("train.gradient_checkpointing", "train.activation_checkpointing"),
        ("train.optim", "train.optimizer"),
        ("lr_scheduler_type", "train.lr_schedule"),
        ("train.max_grad_norm", "train.clip_grad_norm"),
        ("train.seed", "run.seed"),
        ("output_dir", "run.dir"),
        ("model.model_name_or_path", "model.path"),
        ("dataset", "data.train"),
        ("lowrank.lora_alpha", "lowrank.alpha"),
        ("lowrank.target_modules", "lowrank.include"),
        ("train.lrr", "train.lr"),
        ("train.eval_evry", "train.eval_every"),
        ("data.lr", "train.lr"),
        ("learning-rate", "train.lr"),
        ("metod", "method"),
        ("trian", "train"),
    ],
)
def test_a_key_of_another_trainer_is_understood(name, meant):
    assert f"{name}: unknown key; did you mean {meant}?" in complaint(with_value(name, 1))


def test_names_of_others_lead_to_keys_that_exist():
    from qgalore.config.other_names import _NAMES

    assert set(_NAMES) <= {name for name, _ in KEYS}
    assert "every step is logged" in complaint(with_value("train.logging_steps", 1))


def test_many_problems_are_cut_short():
    told = complaint({**LEAST, **{f"key{i}": i for i in range(500)}})
    assert "and 480 more; mend these first" in told
    assert len(told.splitlines()) == 22


@pytest.mark.parametrize(
    ("arguments", "section", "key", "value"),
    [
        (["run.name=2024"], "run", "name", "2024"),
        (["run.name=2024-01-05"], "run", "name", "2024-01-05"),
        (["run.name=1e5"], "run", "name", "1e5"),
        (["run.name=no"], "run", "name", "no"),
        (["data.text_key=1"], "data", "text_key", "1"),
        (["sample.prompt=Question: what is 2?"], "sample", "prompt", "Question: what is 2?"),
        (["model.overrides.rms_norm_eps=1e-5"], "model", "overrides", {"rms_norm_eps": 1e-5}),
        (["train.optimizer_options={momentum: 5e-1}"], "train", "optimizer_options", {"momentum": 0.5}),
        (["train.max_steps=1e3"], "train", "max_steps", 1000),
        (["train.save_every="], "train", "save_every", None),
    ],
)
def test_values_mean_what_they_look_like(tmp_path, arguments, section, key, value):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(LEAST))
    loaded = config.load(str(tmp_path / "mine.yaml"), arguments)
    assert getattr(getattr(loaded, section), key) == value
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(str(tmp_path / "again.yaml")) == loaded


def test_files_that_are_no_configuration_are_named_for_what_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"# x\n" * 400_000)
    for name, why in [
        ("folder", "this is a folder"),
        ("binary.yaml", "is not UTF-8 text"),
        ("latin.yaml", "is not UTF-8 text (byte 13)"),
        ("large.yaml", "more than 1 MiB"),
        ("/dev/null", "a device or a pipe"),
        ("no" * 5000, "no such file"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(why)):
            config.load(str(tmp_path / name))


# ---------------------------------------------------------------- mutations
PARTS = (
    "null", "-1", "1e400", "[]", "{}", "*x", "&x", "!!set", "\t", "\x1b", "\0", "é", "\ud800", ": ", "- ", "? ", "<<: ",
    "'", '"', "[" * 40, "true", "nan", ".inf", "2024-13-45", "9" * 5000, "x" * 300, "#", "---\n", "%", "@", "|", "\n",
)  # fmt: skip


def mutated(text: str, chance: random.Random) -> bytes:
    """``text`` with a few pieces replaced, inserted, doubled or cut out, sometimes in bytes."""
    for _ in range(chance.randint(1, 3)):
        place, end = sorted(chance.randint(0, len(text)) for _ in range(2))
        end = min(end, place + 40)
        kind = chance.randrange(5)
        if kind == 0:
            text = text[:place] + chance.choice(PARTS) + text[place:]
        elif kind == 1:
            text = text[:place] + text[end:]
        elif kind == 2:
            text = text[:place] + text[place:end] * 2 + text[end:]
        elif kind == 3:
            lines = text.split("\n")
            at = chance.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {chance.choice(PARTS)}"
            text = "\n".join(lines)
        else:
            text = text[:place] + text[end:] + text[place:end]
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if chance.random() < 0.2:
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw)


def test_300_mutated_configurations_are_refused_in_words_or_mean_what_they_say(tmp_path):
    chance = random.Random(14)
    files = [path.read_text() for path in sorted(config.PACKAGED.glob("*.yaml"))]
    path, told, accepted, slowest = tmp_path / "mutant.yaml", [], 0, 0.0
    for _ in range(300):
        path.write_bytes(mutated(chance.choice(files), chance))
        started = time.process_time()
        try:
            made = config.load(str(path))
        except ConfigError as error:
            told.append(str(error))
        else:
            accepted += 1
            again = plain_yaml.read(config.dump(made))
            json.dumps(again, allow_nan=False)  # nothing but finite numbers, texts, lists and mappings
            assert config.parse(again, "again") == made
            config.remarks(config.resolve(made, "cpu", False)) if made.train.grad_accumulation == 1 else None
        slowest = max(slowest, time.process_time() - started)
    print(f"{len(told)} refused, {accepted} accepted, slowest {slowest:.2f} s")
    assert not [one for one in told if PYDANTIC.search(one)]
    assert len(told) > 150
    assert accepted > 20  # comments, order, values that are as good
    assert slowest < 5
