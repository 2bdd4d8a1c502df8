"""The whole program on real text: a run to its end, the same run stopped and resumed, every method, every bad input."""

import copy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import another_process_holds, assert_same, final_state, rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_from_text_to_an_export_that_loads(tiny_run):
    code, out, err = tiny_run()
    assert code == 0, err
    metrics = rows("runs/tiny/metrics.jsonl")
    train = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "memory_bytes"}
    for row in train:
        refreshing = row.pop("refresh_seconds")
        assert set(row) == keys
        assert all(value > 0 for value in row.values())
        assert 0 <= refreshing < row["step_seconds"]
    held_out = [row for row in metrics if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert held_out[0]["eval_loss"] > held_out[1]["eval_loss"] > held_out[2]["eval_loss"]
    assert len(rows("runs/tiny/subspace.jsonl")) >= 14
    assert "sample:" in out
    assert "converted:" in out
    assert "layer-major steps" in out

    # Invariant 4: the rate applied is the scheduled one: 2 steps of warm-up, then a cosine to a tenth.
    assert [row["lr"] for row in train[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert train[-1]["lr"] == pytest.approx(0.001)

    model = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf")
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/export/hf")
    prompt = tokenizer("The planet Mars", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["train"]["optimizer"] == "adamw8bit"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert tiny_run(f"run.name={name}", f"run.seed={seed}", "train.max_steps=2")[0] == 0
    assert_same(final_state("runs/a", 2), final_state("runs/b", 2))
    different = final_state("runs/c", 2)
    assert any(not torch.equal(v, different[n]) for n, v in final_state("runs/a", 2).items())


AUTO_RANKS = ("lowrank.rank=auto", "lowrank.max_rank=48", "lowrank.mean_rank=24", "lowrank.energy=0.8")
BATCH_MAJOR = "train.order=batch_major"
DEFERRED = ("train.grad_accumulation=2", "train.clip_grad_norm=0.5")
MANY = (
    "model.overrides.num_local_experts=64",
    "model.overrides.moe_intermediate_size=32",
    "model.overrides.head_dim=16",
)
FEW = ("train.micro_batch_size=1", "train.eval_batches=8")  # 64 choices a layer for 24 experts: some wait
EXPERTS = ("model.config=qwen3_moe_quickstart", *MANY, *FEW)
FOUR_BITS = ("train.optimizer=adamw4bit", "lowrank.rank=64")


TIMES = ("tokens_per_second", "memory_bytes", "step_seconds", "refresh_seconds")


@pytest.mark.parametrize(
    ("extra", "available"),
    [
        pytest.param((), (2, 4, 6), id="walked"),
        pytest.param(DEFERRED, (2, 4, 6), id="walked, accumulating"),
        pytest.param((BATCH_MAJOR,), (2, 4, 6), id="fused", marks=pytest.mark.slow),
        pytest.param((BATCH_MAJOR, *DEFERRED), (2, 4, 6), id="deferred"),
        pytest.param(("model.dtype=bfloat16",), (2, 4, 6), id="bf16", marks=pytest.mark.slow),
        pytest.param((), (0, 2, 4, 6), id="from-nothing", marks=pytest.mark.slow),
        pytest.param(EXPERTS, (2, 4, 6), id="experts", marks=pytest.mark.slow),
        pytest.param(FOUR_BITS, (2, 4, 6), id="4-bit moments", marks=pytest.mark.slow),
        pytest.param(AUTO_RANKS, (2, 4, 6), id="auto-ranks", marks=pytest.mark.slow),
    ],
)
def test_resume_equals_not_having_stopped(tiny_run, extra, available):
    """Invariant 5. A run loses its later checkpoints and goes on from the first, or from the beginning."""
    assert tiny_run("run.name=whole", *extra)[0] == 0
    assert tiny_run("run.name=cut", "train.keep_last=5", *extra)[0] == 0
    for gone in (step for step in available[1:] if step):
        shutil.rmtree(f"runs/cut/checkpoints/step-{gone:08d}")
    if not available[0]:
        shutil.rmtree("runs/cut/checkpoints")
    code, out, err = tiny_run("run.name=cut", "--resume", "auto", *extra)
    assert ("after step 2" if available[0] else "starting from the beginning") in out
    assert code == 0, err
    assert_same(final_state("runs/whole"), final_state("runs/cut"))
    timeless = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in rows(f"runs/{n}/metrics.jsonl")]
        for n in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]
    assert len(rows("runs/whole/subspace.jsonl")) == len(rows("runs/cut/subspace.jsonl"))


@pytest.mark.slow
def test_resume_from_a_path_and_further(tiny_run):
    assert tiny_run("train.keep_last=5")[0] == 0
    code, out, _ = tiny_run("--resume", "runs/tiny/checkpoints/step-00000004", "train.keep_last=5")
    assert code == 0
    assert "after step 4" in out
    steps = [row["step"] for row in rows("runs/tiny/metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_configuration(tiny_run):
    assert tiny_run("train.max_steps=2")[0] == 0
    code, _, err = tiny_run("--resume", "auto", "lowrank.rank=8", "train.lr=0.02")
    assert code == 2
    assert "lowrank.rank: 16 → 8" in err
    assert "train.lr: 0.01 → 0.02" in err


def test_a_mixture_trains_with_its_balance_and_says_what_waits(tiny_run):
    code, out, err = tiny_run(*EXPERTS, "model.overrides.router_aux_loss_coef=0.5")
    assert code == 0, err
    assert "cross entropy + 0.5 · the routers' load-balancing loss" in out
    assert "not called in a trial" not in out
    metrics = rows("runs/tiny/metrics.jsonl")
    idle = [row for row in metrics if "without_gradient" in row]
    assert idle
    assert all(row["waiting"] <= row["without_gradient"] for row in idle)
    losses = [row["loss"] for row in metrics if "loss" in row]
    held_out = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    assert held_out[1] < held_out[0] < losses[0] - 0.5  # the balance, at least 0.5 · 2, is in the training loss alone
    assert any(row["waited"] for row in rows("runs/tiny/subspace.jsonl"))


OFTEN = ("galore8bit", "adamw")
RARELY = [pytest.param(method, marks=pytest.mark.slow) for method in ("galore", "adamw8bit")]


@pytest.mark.parametrize("method", [*OFTEN, *RARELY])
def test_every_method_trains(tiny_run, method):
    code, out, err = tiny_run(f"method={method}", "train.max_steps=4", "train.eval_every=1", "train.lr=0.005")
    assert code == 0, err
    losses = [row["eval_loss"] for row in rows("runs/tiny/metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]
    if method.startswith("adamw"):
        assert f"method {method} ignores lowrank.rank" in out


def test_adamw_is_torchs_adamw(tiny_run):
    """Invariant 1 through the whole program: ``method=adamw`` against a loop of five lines on the same batches."""
    from qgalore import config
    from qgalore.training import assemble

    overrides = ["method=adamw", "train.weight_decay=0.1", "run.name=x"]
    assert tiny_run(*overrides, "run.name=y")[0] == 0
    run = assemble.build(config.load("tiny.yaml", overrides), None)
    model, options = copy.deepcopy(run.model).train(), run.loop  # a copy has none of the optimizer's hooks
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups)
    position = ()
    for step in range(6):
        indices, position = options.data.order_for(0).take(position, 4)
        batch = options.data.train.batch(indices)
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).backward()
        for group in opt.param_groups:
            group["lr"] = options.stepping.lr_at(step)
        opt.step()
        opt.zero_grad()
    trained = load_file("runs/y/checkpoints/step-00000006/model.safetensors")
    moved = sum(float((p.detach() - start[n]).double().square().sum()) for n, p in model.named_parameters())
    apart = sum(float((p.detach() - trained[n]).double().square().sum()) for n, p in model.named_parameters())
    assert apart**0.5 < 1e-4 * moved**0.5


def test_activation_checkpointing_changes_no_bit(tiny_run):
    assert tiny_run("run.name=a", "train.max_steps=3", "train.save_every=3")[0] == 0
    assert (
        tiny_run("run.name=b", "train.max_steps=3", "train.save_every=3", "train.activation_checkpointing=true")[0] == 0
    )
    assert_same(final_state("runs/a", 3), final_state("runs/b", 3))


def test_bf16_compute(tiny_run):
    code, out, err = tiny_run("model.dtype=bfloat16", "train.lr=0.005")
    assert code == 0, err
    assert "cpu, bfloat16" in out
    losses = [row["eval_loss"] for row in rows("runs/tiny/metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]


def test_a_pretrained_folder_is_continued(tiny_run):
    """The export of one run is the start of the next: the loss begins where it ended."""
    assert tiny_run("train.max_steps=30", "train.eval_every=30", "train.save_every=30")[0] == 0
    ended = [row["eval_loss"] for row in rows("runs/tiny/metrics.jsonl") if "eval_loss" in row][-1]
    code, out, err = tiny_run(
        "run.name=next",
        "model.config=null",
        "model.overrides={}",
        "model.path=runs/tiny/export/hf",
        "train.max_steps=1",
        "train.lr=1e-6",
    )
    assert code == 0, err
    assert "tokenizer: the model's own" in out
    began = [row["eval_loss"] for row in rows("runs/next/metrics.jsonl") if "eval_loss" in row][-1]
    assert began == pytest.approx(ended, abs=0.02)


def test_a_finished_run_that_is_resumed_records_nothing_twice(tiny_run):
    first = None
    for _ in range(3):
        code, _, err = tiny_run("train.max_steps=4", "train.eval_every=2", "export.formats=[]", "--resume", "auto")
        assert code == 0, err
        first = first or Path("runs/tiny/metrics.jsonl").read_bytes()
        assert Path("runs/tiny/metrics.jsonl").read_bytes() == first
    assert [row["step"] for row in rows("runs/tiny/metrics.jsonl") if "eval_loss" in row] == [0, 2, 4]
    code, _, err = tiny_run("--resume", "runs/tiny", "train.max_steps=4")
    assert (code, "give auto" in err, "runs/tiny/checkpoints/step-00000004" in err) == (2, True, True)


def test_a_run_without_save_every_saves_by_the_clock(tiny_run, monkeypatch):
    """Half an hour passes in each step: every one is saved, the weights are those of a run that saves at its end."""
    from qgalore.training import keeping

    plain = ("train.save_every=null", "train.keep_last=9", "export.formats=[]", BATCH_MAJOR)
    plain += ("train.stepping=deferred",)  # saves no beginning
    code, out, err = tiny_run("run.name=end", *plain)
    assert code == 0, err
    assert "note: train.save_every is not set: a checkpoint is saved after every 30m00s of work" in out
    assert [path.name for path in Path("runs/end/checkpoints").iterdir()] == ["step-00000006"]
    hours = iter(range(0, 10**9, 1800))
    monkeypatch.setattr(
        keeping.Keeper.__init__, "__kwdefaults__", {"team": keeping.ALONE, "clock": lambda: next(hours)}
    )
    assert tiny_run("run.name=clock", *plain)[0] == 0
    assert sorted(path.name for path in Path("runs/clock/checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in range(1, 7)
    ]
    assert_same(final_state("runs/end"), final_state("runs/clock"))


def test_a_run_that_ends_in_nan_is_not_done(tiny_run, monkeypatch):
    """A weight that is not finite, of which no step said anything, and a held-out loss that is not."""
    from qgalore.training import loop

    evaluate = loop.Loop._evaluate

    def spoilt(self):
        result = evaluate(self)
        if self.position.step:
            self.model.model.norm.weight.data[3] = float("nan")
        return result

    monkeypatch.setattr(loop.Loop, "_evaluate", spoilt)
    code, out, err = tiny_run("run.name=weight", "train.max_steps=2")
    assert code == 4
    assert "model.norm.weight holds values that are not finite after the last step" in err
    assert "done:" not in out
    assert not Path("runs/weight/export").exists()
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self: type(evaluate(self))(float("nan"), 1))
    code, out, err = tiny_run("run.name=loss", "train.max_steps=2")
    assert (code, "the held-out loss is nan after the last step, 2" in err, "done:" in out) == (4, True, False)


def test_lines_that_are_no_records_are_set_aside(tiny_run):
    assert tiny_run("train.max_steps=2", "export.formats=[]")[0] == 0
    good = Path("runs/tiny/metrics.jsonl").read_bytes()
    Path("runs/tiny/metrics.jsonl").write_bytes(good + b"null\n")
    code, out, err = tiny_run("train.max_steps=2", "export.formats=[]", "--resume", "auto")
    assert code == 0, err
    assert "1 line of runs/tiny/metrics.jsonl" in out
    assert Path("runs/tiny/metrics.jsonl").read_bytes() == good
    assert Path("runs/tiny/metrics.jsonl.set-aside").read_bytes() == b"null\n"


def test_a_run_that_another_process_trains_is_left_alone(tiny_run):
    assert tiny_run("train.max_steps=1", "export.formats=[]")[0] == 0
    before = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    with another_process_holds(Path("runs/tiny")) as child:
        for arguments in (["--resume", "auto"], []):
            code, out, err = tiny_run("train.max_steps=2", "export.formats=[]", *arguments)
            assert (code, f"runs/tiny is in use: process {child}" in err, out) == (2, True, "")
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != ".lock")
    assert tiny_run("train.max_steps=2", "export.formats=[]", "--resume", "auto")[0] == 0


def test_what_a_run_is_made_of_is_written_whole(tiny_run, monkeypatch):
    """The disk fills up in the middle of a library's own write: one message, and nothing under the final name."""
    from transformers import PreTrainedTokenizerBase

    real = PreTrainedTokenizerBase.save_pretrained

    def full(self, folder, **options):
        if "runs" not in Path(folder).parts:  # in the cache there is room
            return real(self, folder, **options)
        (Path(folder) / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # as the package tokenizers does

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    code, _, err = tiny_run()
    assert (code, err.count("error:"), "Traceback" in err) == (2, 1, False)
    assert "No space left on device" in err
    assert not [path for path in Path("runs/tiny").iterdir() if "tokenizer" in path.name]


def test_a_second_run_does_not_overwrite_the_first(tiny_run):
    assert tiny_run("train.max_steps=1")[0] == 0
    code, _, err = tiny_run("train.max_steps=1")
    assert code == 2
    assert "--resume auto" in err
    assert "run.name" in err


def test_resume_from_the_middle_sets_later_checkpoints_aside(tiny_run):
    assert tiny_run("train.keep_last=5")[0] == 0
    code, out, _ = tiny_run("--resume", "runs/tiny/checkpoints/step-00000002", "train.max_steps=3", "train.keep_last=1")
    assert code == 0
    assert "left-step-00000006" in out
    names = sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir())
    assert names == ["left-step-00000004", "left-step-00000006", "step-00000003"]


@pytest.mark.slow
def test_resume_refuses_another_runs_folder_other_tokens_and_a_finished_past(tiny_run):
    shutil.copy(ROOT / "configs/quickstart_data/valid.jsonl.gz", "mine.jsonl.gz")
    tokens = ("data.train=mine.jsonl.gz", "train.max_steps=2")
    assert tiny_run("run.name=a", *tokens)[0] == 0
    assert tiny_run("run.name=b", *tokens)[0] == 0
    code, _, err = tiny_run("run.name=b", "--resume", "runs/a/checkpoints/step-00000002", *tokens)
    assert (code, "already holds a run" in err) == (2, True)
    code, _, err = tiny_run("run.name=a", "--resume", "auto", *tokens, "train.max_steps=1")
    assert (code, "beyond the run's last, " in err) == (2, True)
    shutil.copy(ROOT / "configs/quickstart_data/train.jsonl.gz", "mine.jsonl.gz")
    code, _, err = tiny_run("run.name=a", "--resume", "auto", *tokens, "train.max_steps=4")
    assert (code, "was made with other tokens" in err) == (2, True)


BAD_INPUT = {
    "unknown key": (["train.lrr=1"], "did you mean train.lr"),
    "rank of zero": (["lowrank.rank=0"], "lowrank.rank"),
    "missing data": (["data.train=nowhere.txt"], "nowhere.txt"),
    "empty data": (["data.train=empty.txt"], "empty.txt"),
    "one token": (["data.train=short.txt", "data.tokenizer=tok"], "token"),
    "wrong kind of data": (["data.train=tiny.yaml.jsonl"], "tiny.yaml.jsonl"),
    "missing tokenizer": (["data.tokenizer=./nowhere"], "nowhere"),
    "no such preset": (["model.config=lama_quickstart"], "did you mean llama_quickstart"),
    "vocabulary too small": (["model.overrides={vocab_size: 100}"], "vocab_size is 100"),
    "sequence too long": (["data.sequence_length=4096", "data.document_attention=joined"], "4096"),
    "odd heads": (["model.overrides={hidden_size: 65}"], "hidden size (65)"),
    "missing model folder": (["model.config=null", "model.overrides={}", "model.path=./nowhere"], "config.json"),
    "unknown optimizer": (["train.optimizer=torch.optim.Nope"], "torch.optim.Nope"),
    "refused optimizer": (["train.optimizer=torch.optim.Adafactor"], "parameter's own value"),
    "no layer left": (["lowrank.exclude=['*']"], "no layer"),
    "no GPU": (["device=cuda"], "device is cuda"),
    "empty prompt": (["sample.prompt=''"], "sample.prompt has 0 tokens"),
    "moments that do not rotate": (["train.optimizer=torch.optim.RMSprop"], "lowrank.moments=keep"),
    "no ordinary optimizer": (["train.optimizer=torch.optim.LBFGS"], "trial step"),
    "missing checkpoint": (["--resume", "runs/nowhere"], "--resume runs/nowhere does not exist"),
    "a file to resume": (["--resume", "empty.txt"], "--resume empty.txt is a file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_message(tiny_run, case):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("x")
    Path("tiny.yaml.jsonl").write_text("method: qgalore\n")
    arguments, expected = BAD_INPUT[case]
    if "data.tokenizer=tok" in arguments:
        from qgalore.data.tokenizer import train_tokenizer

        train_tokenizer(["some text"], vocab_size=300, report=lambda line: None).save_pretrained("tok")
    code, _, err = tiny_run(*arguments)
    assert code == 2
    assert "error:" in err
    assert expected in err
    assert "Traceback" not in err


def test_a_rank_above_the_matrices_trains_and_is_said(tiny_run):
    code, out, err = tiny_run("lowrank.rank=9999", "train.max_steps=1")
    assert code == 0, err
    assert "rank 9999 is above the matrix's smaller side; clamped to 64" in out


def test_odd_widths_train(tiny_run):
    widths = "model.overrides={hidden_size: 60, intermediate_size: 101, num_hidden_layers: 1, num_attention_heads: 2, "
    code, out, err = tiny_run(widths + "num_key_value_heads: 1}", "train.max_steps=2", "lowrank.rank=7")
    assert code == 0, err
    assert "in_features 101; 101 is used" in out


# train.py in a process that is sent a signal while it writes the record of its third step.
INTERRUPTED = """
import os, sys
sys.path.insert(0, {root!r})
from qgalore.training.records import Records
import train

append = Records.append

def signalled(self, rows):
    append(self, rows)
    if any(row.get("step") == 3 and "loss" in row for row in rows):
        os.kill(os.getpid(), {number})

Records.append = signalled
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(tiny_run, number, code):
    assert tiny_run("run.name=whole", "train.save_every=null")[0] == 0
    arguments = ["--config", "tiny.yaml", "run.name=cut", "train.save_every=null"]
    program = INTERRUPTED.format(root=str(ROOT), number=int(number))
    cut = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert cut.returncode == code, cut.stderr
    assert "--resume auto" in cut.stderr
    assert max(path.name for path in Path("runs/cut/checkpoints").iterdir()) == "step-00000003"
    assert tiny_run("--resume", "auto", *arguments[2:])[0] == 0
    assert_same(final_state("runs/whole"), final_state("runs/cut"))


def test_a_record_that_cannot_be_written_is_one_clear_message(tiny_run):
    Path("runs/tiny/subspace.jsonl").mkdir(parents=True)
    code, _, err = tiny_run()
    assert code == 2
    assert "subspace.jsonl could not be written" in err
    assert "Traceback" not in err


def test_help_and_usage():
    answer = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--resume" in answer.stdout
    wrong = subprocess.run([sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--config" in wrong.stderr
