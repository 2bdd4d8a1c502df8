"""Layer-major steps of the trainer give what batch-major steps give, need no replay for a bad loss, and resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WALKED = ("train.order=layer_major", "export.formats=[]", "sample.max_new_tokens=0", "train.keep_last=9")
PLAIN = ("train.order=batch_major", *WALKED[1:])
UNTIED = "model.overrides.tie_word_embeddings=false"
LINES = "layer-major: the model is walked through the 2 blocks of model.layers"


def rows(run):
    lines = Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "lr" in row]


def state(run, step=6):
    folder = Path(f"runs/{run}/checkpoints/step-{step:08d}")
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def losses(run):
    return [row["loss"] for row in rows(run)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [slow("false"), "true", slow("offload"), slow("1"), slow("9")])
def test_one_micro_batch_gives_the_bits_of_batch_major_steps(tiny_run, how):
    code, out, err = tiny_run(*WALKED, "run.name=walked", f"train.activation_checkpointing={how}")
    assert code == 0, err
    assert LINES in out
    code, out, err = tiny_run(*PLAIN, "run.name=plain")
    assert (code, LINES in out) == (0, False), err
    assert losses("walked") == losses("plain")
    norms = [[row["grad_norm"] for row in rows(run)] for run in ("walked", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # the squares add up in another order
    assert_same(state("walked"), state("plain"))


@pytest.mark.parametrize(("count", "clip"), [(2, "0.5"), slow(2, "0"), slow(8, "0"), slow(8, "0.5")])
def test_accumulation_gives_the_bits_of_batch_major_steps(tiny_run, count, clip):
    """From a common checkpoint on: batch-major steps find the very first bases in the first micro-batch alone. Later
    ones, at steps 3 and 6 here, come from the sum in both orders. A tied weight would add its two parts in another
    order."""
    many = (f"train.grad_accumulation={count}", "train.micro_batch_size=1", f"train.clip_grad_norm={clip}")
    many += ("train.max_steps=8", "train.save_every=1", "lowrank.policy=fixed", UNTIED)
    for name in ("walked", "plain"):
        assert tiny_run(*PLAIN, *many, f"run.name={name}", "train.max_steps=8", "train.lr_schedule=constant")[0] == 0
    source = "runs/walked/checkpoints/step-00000001"
    code, out, err = tiny_run(*WALKED, *many, "run.name=walked", "train.lr_schedule=constant", "--resume", source)
    assert code == 0, err
    assert LINES in out
    refreshed = [json.loads(line)["step"] for line in Path("runs/walked/subspace.jsonl").read_text().splitlines()]
    assert max(refreshed) > 3
    assert losses("walked") == losses("plain")
    norms = [[row["grad_norm"] for row in rows(run)] for run in ("walked", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert_same(state("walked", 8), state("plain", 8))


@pytest.mark.parametrize("rule", [slow("fira"), slow("scale")])
def test_rules_with_whole_gradients_accumulate(tiny_run, rule):
    many = ("train.grad_accumulation=2", "train.micro_batch_size=2", f"lowrank.rule={rule}", UNTIED)
    code, _, err = tiny_run(*PLAIN, *many)
    assert code == 2
    assert "or use train.order: auto, which walks" in err
    assert tiny_run(*PLAIN, *many, "run.name=plain", "train.full_gradients=keep")[0] == 0
    code, _, err = tiny_run(*WALKED, *many, "run.name=walked")
    assert code == 0, err
    assert losses("walked") == losses("plain")
    assert_same(state("walked"), state("plain"))


DROPPING = ("model.overrides.attention_dropout=0.3", "train.grad_accumulation=2", "train.micro_batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["false", "true"])
def test_dropout_is_the_same_whether_a_block_runs_once_or_twice_or_the_run_was_cut(tiny_run, how):
    assert tiny_run(*WALKED, *DROPPING, "run.name=whole", "train.activation_checkpointing=true")[0] == 0
    other = (*WALKED, *DROPPING, "run.name=cut", f"train.activation_checkpointing={how}")
    assert tiny_run(*other)[0] == 0
    code, out, err = tiny_run(*other, "--resume", "runs/cut/checkpoints/step-00000002")
    assert code == 0, err
    assert "after step 2" in out
    assert losses("whole") == losses("cut")
    assert_same(state("whole"), state("cut"))
    assert tiny_run(*WALKED, *DROPPING, "run.name=still", "model.overrides.attention_dropout=0.0")[0] == 0
    assert losses("still") != losses("whole"), "the test wants dropout"


def change_losses(monkeypatch, steps, factor):
    """Multiply every loss of some steps (from 1) by ``factor``."""
    from qgalore.training.loop import Loop

    share, done = Loop._share, set()

    def changed(self, batch, tokens):
        loss = share(self, batch, tokens)
        if self.position.step + 1 in steps - done:
            self.order.left_traces() and pytest.fail("a loss was looked at after a weight had moved")
            loss = loss * factor
        return loss

    monkeypatch.setattr(Loop, "_share", changed)
    return done


def test_a_loss_that_is_not_finite_needs_no_replay(tiny_run, monkeypatch):
    """The run with a skipped fourth step has, after it, the weights of a run of three steps."""
    flat = ("train.lr_schedule=constant", "train.save_every=1", *WALKED)
    assert tiny_run("run.name=three", "train.max_steps=3", *flat)[0] == 0
    change_losses(monkeypatch, {4}, float("nan"))
    code, out, err = tiny_run("run.name=six", *flat)
    assert code == 0, err
    assert "step 4/6 | skipped: the loss is nan in step 4" in out
    assert "replaying" not in out
    assert_same(state("three", 3), state("six", 4))
    assert [loss is None for loss in losses("six")] == [False, False, False, True, False, False]


@pytest.mark.parametrize("policy", [slow("warn"), slow("skip"), slow("rollback")])
def test_a_spike_needs_no_replay(tiny_run, monkeypatch, policy):
    long = ("train.max_steps=24", "train.eval_every=24", "train.save_every=21", "train.lr=0.001", *WALKED)
    done = change_losses(monkeypatch, {22}, 10.0)
    if policy == "rollback":  # the other order passes the step again
        from qgalore.training.course import Course

        back = Course.return_to
        monkeypatch.setattr(Course, "return_to", lambda *a, **k: (done.add(22), back(*a, **k)))
    code, out, err = tiny_run(*long, f"train.loss_spike={policy}")
    assert code == 0, err
    said = {"warn": "warning: the loss", "skip": "step 22/24 | skipped: the loss", "rollback": "rolled back to"}
    assert said[policy] in out
    assert "is a spike in step 22" in out
    assert "replaying" not in out
    assert sum(loss is None for loss in losses("tiny")) == (policy == "skip")
    assert [row["step"] for row in rows("tiny")] == list(range(1, 25))


def poison_gradients(monkeypatch, step):
    """Make the gradient that reaches the lower block NaN in one step (from 1): the upper block has stepped then."""
    from qgalore.training.loop import Loop

    real, done = Loop.__post_init__, []

    def watched(self):
        real(self)

        def poison(_, gradients):
            if self.position.step + 1 != step:
                return None
            done.append(step)
            return (gradients[0] * float("nan"),)

        self.model.model.layers[0].mlp.down_proj.register_full_backward_pre_hook(poison)

    monkeypatch.setattr(Loop, "__post_init__", watched)
    return done


CLIP = ("train.clip_grad_norm=0.5",)


@pytest.mark.parametrize(
    ("bad", "extra"), [(4, ()), slow(1, ()), slow(5, ()), slow(1, CLIP), slow(4, CLIP), slow(5, CLIP)]
)
def test_a_gradient_that_is_not_finite_leaves_the_weights_of_a_skipped_step(tiny_run, monkeypatch, bad, extra):
    """Step 4 is one with refreshes. The run ends like a batch-major one that looks at all gradients first."""
    done = poison_gradients(monkeypatch, bad)
    assert tiny_run(*PLAIN, "train.stepping=deferred", "run.name=plain", *extra)[0] == 0
    code, out, err = tiny_run(*WALKED, "run.name=walked", *extra)
    assert code == 0, err
    assert len(done) == 2
    assert f"step {bad}/6 | skipped" in out
    replays = not extra or bad in (1, 4)  # clipping looks at all gradients, but bases have changed before
    assert ("replaying from" in out) == replays
    assert [loss is None for loss in losses("walked")] == [step == bad for step in range(1, 7)]
    if bad > 1:  # a bad first step leaves a deferred run the bases that its first micro-batch gave
        assert_same(state("walked"), state("plain"))


def test_what_cannot_be_walked_says_so_and_steps_batch_major(tiny_run, monkeypatch):
    """A model whose loss asks for a second pass through its blocks."""
    from qgalore.training import assemble

    real = assemble.build_model

    def twice(*arguments):
        model, loss = real(*arguments)
        return model, lambda model, batch: (loss(model, batch) + loss(model, batch)) / 2

    monkeypatch.setattr(assemble, "build_model", twice)
    auto = ("train.order=auto", *WALKED[1:])
    code, out, err = tiny_run(*auto)
    assert code == 0, err
    assert "step:      batch-major: " in out
    code, _, err = tiny_run(*auto, "run.name=whole", "lowrank.rule=fira", "train.grad_accumulation=2")
    assert code == 2
    assert "cannot be walked" in err
    assert "train.full_gradients: keep" in err
    code, _, err = tiny_run(*WALKED, "run.name=asked")
    assert code == 2
    assert "train.order is layer_major, but LlamaForCausalLM cannot be walked block by block" in err
    assert "Set train.order=batch_major or auto" in err
