"""data.task: classify through the whole program, on tables that a small encoder can learn."""

import json
from pathlib import Path

import pytest
import torch
from labelled import write_table
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from qgalore.steps.streaming.stream import Stream


def rows(run="run"):
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


def test_an_encoder_learns_and_its_export_predicts_the_same(classify_run):
    code, out, err = classify_run("train.max_steps=60", "train.eval_every=60", "train.save_every=60")
    assert code == 0, err
    assert "the head is new: classifier.bias, classifier.weight" in out
    assert "labels: 2 classes (no, yes)" in out
    assert "classifier (in the task's head, trained in full)" in out
    assert "rows/s" in out
    evaluation = rows()[-1]
    assert set(evaluation) == {"step", "eval_loss", "eval_accuracy", "eval_f1", "eval_matthews"}
    # which class is commoner alone gives about half; a word in the text decides, so a body that trains learns it
    assert evaluation["eval_accuracy"] > 0.8
    model = AutoModelForSequenceClassification.from_pretrained("runs/run/export/hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/run/export/hf")
    assert model.config.id2label == {0: "no", 1: "yes"}
    lines = [line.split("\t") for line in Path("dev.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        right = [
            model.config.id2label[int(model(**tokenizer(one, two, return_tensors="pt")).logits.argmax())] == label
            for _, one, two, label in lines
        ]
    # bf16 may turn a row that lies on the border
    assert sum(right) / len(right) == pytest.approx(evaluation["eval_accuracy"], abs=1.5 / 40)


def test_a_preview_shows_texts_beside_their_labels(classify_run):
    code, out, _ = classify_run("--preview", "20")
    assert code == 0
    blocks = out.split("\nrow ")[1:]
    assert len(blocks) == 20
    expected = {True: [], False: []}
    for line in Path("train.tsv").read_text().splitlines()[1:]:
        _, one, two, label = line.split("\t")
        expected[label == "yes"].append(f"{one}{two}".replace(" ", ""))
    for block in blocks:
        head, text = block.split("\n", 1)
        read = "".join(char for char in text.split("read | ")[1] if char.isalpha())
        assert read.replace("endoftext", "") in expected["label 'yes'" in head]


def test_resuming_gives_the_same_bits(classify_run):
    """Dropout is on (0.1, BERT's default), and a refresh falls between the two halves."""
    assert classify_run()[0] == 0
    assert classify_run("run.name=half", "train.max_steps=4", "train.lr_schedule=constant")[0] == 0
    assert classify_run("run.name=whole", "train.lr_schedule=constant")[0] == 0
    code, out, err = classify_run("run.name=half", "train.lr_schedule=constant", "--resume", "auto")
    assert code == 0, err
    assert "after step 4" in out
    for name in ("model", "optimizer"):
        one, other = (
            load_file(f"runs/{run}/checkpoints/step-00000008/{name}.safetensors") for run in ("whole", "half")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows("whole")[-1] == rows("half")[-1]
    Path("train.tsv").write_text(Path("train.tsv").read_text().replace("\tno\n", "\tyes\n", 1))
    code, _, err = classify_run("run.name=half", "train.lr_schedule=constant", "--resume", "auto")
    assert code == 2
    assert "other tokens" in err


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_streamed_blocks_come_once_for_several_held_out_batches(classify_run, monkeypatch, kind):
    """Three batches in each of three evaluations; the figures are those of a model that is always there."""
    visits, own = [], Stream.visit
    monkeypatch.setattr(Stream, "visit", lambda self, *what, **how: visits.append(how) or own(self, *what, **how))
    run = (f"model.path={kind}", "train.grad_accumulation=2", "train.max_steps=4", "train.eval_every=2")
    for name, stream in (("there", "none"), ("streamed", "weights")):
        code, _, err = classify_run(*run, f"run.name={name}", f"memory.stream={stream}", "export.formats=[]")
        assert code == 0, err
    assert visits == [{"stepped": False}] * 3
    clocks = ("second", "memory")
    there, streamed = (
        [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in rows(name)]
        for name in ("there", "streamed")
    )
    assert streamed == there
    assert sum("eval_loss" in row for row in there) == 3


@pytest.mark.parametrize("method", ["adamw", "galore"])
def test_a_decoder_and_other_methods(classify_run, method):
    code, out, err = classify_run(f"method={method}", "model.path=decoder", "export.formats=[]")
    assert code == 0, err
    assert "the head is new: score.weight" in out
    assert "lm_head.weight" in out  # has no place in a classifier, and is named
    assert rows()[-1]["eval_loss"] > 0


@pytest.mark.slow
def test_regression(classify_run, tmp_path):
    write_table(tmp_path / "train.tsv", 200, 1, number=True)
    write_table(tmp_path / "dev.tsv", 40, 2, number=True)
    options = ("train.max_steps=60", "train.eval_every=60", "train.lr=0.006", "train.lr_schedule=constant")
    code, out, err = classify_run("data.label_type=number", *options)
    assert code == 0, err
    assert "labels: numbers" in out
    evaluation = rows()[-1]
    assert set(evaluation) == {"step", "eval_loss", "eval_pearson", "eval_spearman"}
    assert evaluation["eval_pearson"] > 0.5  # chance gives 0 ± 1/√39 = 0.16
    model = AutoModelForSequenceClassification.from_pretrained("runs/run/export/hf")
    assert model.config.problem_type == "regression"


def test_the_body_is_the_folders_and_the_head_is_drawn_from_the_seed(classify_run, tmp_path):
    from qgalore import config
    from qgalore.training import assemble, classification
    from qgalore.training.model import architecture, source_of

    classify_run("train.max_steps=1", "export.formats=[]")
    settings = config.resolve(config.load("c.yaml"), "cpu", False)
    labels = classification.PLANNED
    vocabulary = assemble.Vocabulary(290, None, None, labels, 0)

    def tensors(seed):
        run = settings.run.model_copy(update={"seed": seed})
        chosen = settings.model_copy(update={"run": run})
        model = architecture(chosen, vocabulary, lambda line: None)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        source = source_of(chosen, model)
        return {name: make(0, shapes[name][0]).clone() for name, make in source}, set(shapes)

    one, names = tensors(0)
    other, _ = tensors(1)
    assert set(one) == names
    stored = load_file(tmp_path / "encoder" / "model.safetensors")
    for name, value in one.items():
        if name.startswith("bert."):
            assert torch.equal(value, stored[name.removeprefix("bert.")])
            assert torch.equal(value, other[name])
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    # transformers draws it with initializer_range 0.02; 64 values give a deviation within 40 % (4.5 sigma)
    assert float(one["classifier.weight"].std()) == pytest.approx(0.02, rel=0.4)


def test_a_head_for_other_labels_is_new_and_an_incomplete_body_is_an_error(classify_run, tmp_path):
    path = tmp_path / "encoder" / "model.safetensors"
    stored = load_file(path)
    bodied = {f"bert.{name}": value for name, value in stored.items()}
    three = {**bodied, "classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    save_file(three, path, {"format": "pt"})
    code, out, err = classify_run("train.max_steps=1", "export.formats=[]")
    assert code == 0, err
    assert "the head is new" in out
    two = {**bodied, "classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
    save_file(two, path, {"format": "pt"})
    code, out, err = classify_run("run.name=fits", "train.max_steps=1", "export.formats=[]")
    assert code == 0, err
    assert "the head is new" not in out
    save_file({name: value for name, value in two.items() if "layer.1" not in name}, path, {"format": "pt"})
    code, _, err = classify_run("run.name=broken", "train.max_steps=1")
    assert code == 2
    assert "missing keys" in err
    assert "bert.encoder.layer.1" in err


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.valid=null"], "data.valid: data.task: classify needs held-out data"),
        (["data.metric=[pearson]"], "data.metric: pearson does not suit data.label_type: class"),
        (["export.formats=[int8]"], "a classifier is exported as hf only"),
        (["data.text_keys=[one,three]"], "has no 'three'; its keys are 'id', 'one', 'two', 'label'"),
        (["data.label_type=number"], "'no', which is not a number"),
        (["data.task=text", "data.label_key=mark"], "data.label_key: goes with data.task: classify only"),
        (["data.sequence_length=512"], "above the model's max_position_embeddings"),
    ],
)
def test_bad_settings_end_with_a_message(classify_run, overrides, complaint):
    code, _, err = classify_run(*overrides)
    assert code == 2
    assert complaint in err


def test_the_plan_needs_no_data(classify_run):
    code, out, err = classify_run("--plan", "data.train=absent.tsv")
    assert code == 0, err
    assert "planned peak" in out


def test_an_epoch_is_all_examples_once(classify_run):
    code, out, err = classify_run("train.max_steps=null", "train.epochs=0.2")
    assert code == 0, err
    examples = len(Path("train.tsv").read_text().splitlines()) - 1
    steps = -(-examples // 5 // 16)
    assert f"0.2 epochs are {steps} steps of 16 samples" in out
    assert [row["step"] for row in rows() if "lr" in row] == list(range(1, steps + 1))
