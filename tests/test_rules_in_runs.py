"""Rules chosen in a configuration: training, resuming, exporting, and what a rule does not read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qgalore import config
from qgalore.config import RULES
from qgalore.config.lowrank_section import LowRankSection
from qgalore.errors import ConfigError
from qgalore.lowrank import rules
from qgalore.training import assemble

ROOT = Path(__file__).resolve().parent.parent
# A rate at which two steps of warm-up and four of training lower the loss; wide enough for 8-bit moments.
RATES = {"apollo": 0.01, "apollo_mini": 0.003, "scale": 0.003, "fira": 0.01, "muon": 0.01, "sinkgd": 0.003}
WIDE = ("model.overrides={hidden_size: 128, intermediate_size: 160, num_hidden_layers: 1}", "lowrank.rank=40")


def arguments(rule, *more):
    return ("lowrank.scale=null", f"lowrank.rule={rule}", f"train.lr={RATES[rule]}", *WIDE, *more)


def final_state(run, step=6):
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def test_the_table_names_every_rule_with_its_published_scale():
    scales = {
        "galore": 0.25,
        "apollo": 1.0,
        "apollo_mini": 128**0.5,
        "scale": 1.0,
        "fira": 1.0,
        "muon": 1.0,
        "sinkgd": 1.0,
    }
    assert {name: facts.scale for name, facts in RULES.items()} == scales
    assert set(rules.NAMES) == set(RULES)
    assert {name for name, facts in RULES.items() if facts.uses_basis} == {"galore", "fira"}
    fields, own = LowRankSection.model_fields, rules.RuleOptions()
    assert (fields["momentum"].default, fields["mu"].default) == (own.momentum, own.mu)


@pytest.mark.parametrize(
    "rule", [r if r in ("apollo", "fira", "muon") else pytest.param(r, marks=pytest.mark.slow) for r in RATES]
)
def test_a_rule_trains_and_goes_on_to_the_same_bits(tiny_run, rule):
    """Through train.py: the loss falls, a run that lost its last checkpoints ends like one that did not, and the
    int8 export is the trained integers."""
    extra = arguments(rule, "train.keep_last=9", "export.formats=[hf, int8]")
    code, out, err = tiny_run("run.name=whole", *extra, "train.eval_every=1")
    assert code == 0, err
    assert "layer-major: the model is walked" in out
    share = re.search(r"muon: +orthogonalisation is ([\d.]+%) of a step's arithmetic", out)
    said = re.findall(r"orthogonalisation ([\d.]+%) of the arithmetic", out)  # in the progress lines
    assert (share is not None, bool(said)) == (rule == "muon", rule == "muon")
    assert set(said) <= {share and share[1]}
    rows = [json.loads(line) for line in Path("runs/whole/metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0]
    shutil.copytree("runs/whole", "runs/cut")
    for step in (4, 6):
        shutil.rmtree(f"runs/cut/checkpoints/step-{step:08d}")
    code, out, err = tiny_run("run.name=cut", "--resume", "auto", *extra, "train.eval_every=1")
    assert (code, "after step 2" in out) == (0, True), err
    whole, cut = final_state("runs/whole"), final_state("runs/cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    looks = [json.loads(line) for line in Path("runs/cut/updates.jsonl").read_text().splitlines()]
    assert [row["step"] for row in looks] == [1] * 7, "each of the seven matrices, once: a resume repeats no row"
    assert all((row["momentum_cosine"] is not None) == (rule == "muon") for row in looks)
    exported = load_file("runs/whole/export/hf/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    q, scale = whole[name].float(), whole[f"{name}_scale"].float()
    dense = (q.view(q.shape[0], scale.shape[1], -1) * scale.unsqueeze(2)).view(q.shape)
    assert torch.equal(exported[name], dense.bfloat16())


def test_a_scale_of_null_is_the_rules_own():
    for rule, facts in RULES.items():
        loaded = config.load("quickstart.yaml", ["lowrank.scale=null", f"lowrank.rule={rule}"])
        assert config.resolve(loaded, "cpu", False).lowrank.scale == facts.scale


@pytest.mark.parametrize("asked", ["train.grad_accumulation=2", "train.clip_grad_norm=1", "train.stepping=deferred"])
def test_keeping_full_gradients_is_refused_unless_asked_for(asked):
    load = ["lowrank.rule=scale", "train.order=batch_major", asked]
    with pytest.raises(ConfigError) as error:
        config.load("quickstart.yaml", load)
    for words in (asked.split("=")[0], "24 GiB for a 7B model", "train.full_gradients: keep"):
        assert words in str(error.value)
    kept = config.load("quickstart.yaml", [*load, "train.full_gradients=keep"])
    assert config.resolve(kept, "cpu", False).train.stepping == "deferred"
    assert config.load("quickstart.yaml", [*load, "method=adamw"])  # no low-rank layers, no rule
    with pytest.raises(ConfigError, match=r"lowrank\.rank: rule apollo needs the rank"):
        config.load("quickstart.yaml", ["lowrank.rule=apollo", "lowrank.rank=full"])


def test_accumulation_with_kept_gradients_is_planned_and_trains(tiny_run):
    kept = ("train.grad_accumulation=2", "train.full_gradients=keep", "train.micro_batch_size=2")
    kept += ("train.order=batch_major",)
    code, out, err = tiny_run(*arguments("scale"), *kept)
    assert code == 0, err
    weights = 128 * (4 * 128 + 3 * 160)  # q, k, v, o; gate, up, down
    line = next(line for line in out.splitlines() if "full gradient" in line)
    assert "KiB" in line
    planned = float(line.split()[-2])
    assert planned == pytest.approx(4 * weights / 1024, abs=0.1)


def test_keys_that_a_rule_does_not_read_are_named():
    loaded = config.load("quickstart.yaml", ["lowrank.rule=scale", "train.full_gradients=keep"])
    text = "\n".join(config.remarks(loaded))
    assert "lowrank.rank, lowrank.update_proj_gap, lowrank.queue_size has no effect with rule: scale" in text
    apollo = "\n".join(config.remarks(config.load("quickstart.yaml", ["lowrank.rule=apollo"])))
    assert "lowrank.queue_size has no effect with rule: apollo" in apollo
    assert "lowrank.rank" not in apollo
    keys = ["lowrank.momentum=8bit", "lowrank.mu=0.5"]
    assert config.remarks(config.load("quickstart.yaml", keys)) == [
        "lowrank.momentum, lowrank.mu has no effect with rule: galore; rule muon reads it"
    ]
    lora = config.remarks(config.load("quickstart.yaml", [*keys, "method=lora"]))
    assert "lowrank.momentum, lowrank.mu has no effect with method: lora" in lora
    muon = "\n".join(config.remarks(config.load("quickstart.yaml", [*keys, "lowrank.rule=muon"])))
    assert "lowrank.rank" in muon
    assert "lowrank.m" not in muon
    galore = config.remarks(config.load("quickstart.yaml", ["train.full_gradients=keep"]))
    assert galore == ["train.full_gradients has no effect with rule: galore, which needs none"]


def test_a_run_from_before_a_key_existed_can_go_on():
    now = config.resolve(config.load("quickstart.yaml", []), "cpu", False)
    saved = now.model_dump(mode="json")
    del saved["lowrank"]["rule"], saved["train"]["full_gradients"]
    assert config.differences(saved, now) == []
    assert config.differences({**saved, "method": "galore"}, now) == ["method: 'galore' → 'qgalore'"]


def test_the_plan_names_the_bytes_of_rules(tiny_run):
    """No basis and no moments of the layers for ``scale``; for ``fira`` GaLore's, and one norm for each layer."""
    sizes = {}
    for rule in ("galore", "scale", "fira", "muon", "sinkgd"):
        run = assemble.build(config.load("tiny.yaml", [*WIDE, f"lowrank.rule={rule}", f"run.name={rule}"]), None)
        sizes[rule] = run.planned.resident
    assert sizes["scale"]["bases"] == 0 < sizes["fira"]["bases"] == sizes["galore"]["bases"]
    of_layers = {rule: one["moments"] - sizes["scale"]["moments"] for rule, one in sizes.items()}
    assert of_layers["fira"] - of_layers["galore"] == 4 * 7  # an fp32 norm for each matrix of the one block
    assert of_layers["sinkgd"] == 0
    # codes, the scales of groups of 128 (of 32 for the 160 columns), the sizes of rows and columns, the step
    shapes = [(128, 128)] * 4 + [(160, 128)] * 2 + [(128, 160)]
    groups = {128: 1, 160: 5}
    assert of_layers["muon"] == sum(m * n // 2 + 2 * m * groups[n] + 4 * (m + n) + 8 for m, n in shapes)


def test_the_plan_says_what_orthogonalising_costs(tiny_run, capfd):
    """At the tokens of a whole step, and for the rule that does it alone."""
    accumulated = ("train.grad_accumulation=3", "train.full_gradients=keep")
    settings = config.load("tiny.yaml", [*arguments("muon"), *accumulated])
    tokens = 3 * settings.train.micro_batch_size * settings.data.sequence_length
    assemble.plan(settings)
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("muon:"))
    assert f"of a step's arithmetic at {tokens:,} tokens a step; it is below 10% from" in line
    assemble.plan(config.load("tiny.yaml", arguments("sinkgd")))
    assert "orthogonalisation" not in capfd.readouterr().out
