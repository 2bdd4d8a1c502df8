"""Use as a library: the examples, Hugging Face's Trainer, and what is refused there."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import qgalore
import qgalore.steps.api
from qgalore.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import accelerate_loop
import cnn
import hf_trainer
import large_batch
import own_loop


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_own_loop_learns():
    losses = own_loop.main()
    # counting upwards is certain but for the first token, so any model that learns leaves the uniform guess, ln 64
    assert losses[-1] < losses[0] - 0.5


def test_a_step_in_one_call_learns(capsys):
    """Also once the room of that code is imported, whose name must not be the function's."""
    losses = large_batch.main()
    assert losses[-1] < losses[0] - 0.5
    assert "through 2 blocks" in capsys.readouterr().out
    assert qgalore.step is qgalore.steps.api.step


def test_accelerate_learns_and_resumes_to_the_same_bits(tmp_path):
    """Weights, scales and bases after 20 steps, against those of a run that goes on from step 10 in the middle of a
    gap. Rows that count upwards are certain but for the first token: who learns leaves the uniform guess, ln 64."""
    model = accelerate_loop.main(tmp_path)
    tokens = accelerate_loop.batch(1000)
    with torch.no_grad():
        assert float(model(input_ids=tokens, labels=tokens).loss) < math.log(64) - 0.5
    assert differing(state_of(model), state_of(accelerate_loop.main(tmp_path, resume=True))) == []


@pytest.mark.slow
def test_the_convolutions_learn():
    """A network that answers zero has a relative error of 1, one that hands on the start (which it must learn to) less:
    after a fifth of the steps both are past it, and within a factor of one and a half of each other."""
    projected, plain = cnn.main(steps=50)
    inputs, targets = cnn.fields(64, seed=3)
    unchanged = float((inputs[:, 1:] - targets).norm() / targets.norm())
    assert max(projected, plain) < unchanged
    assert projected < 1.5 * plain


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, weights) of an uninterrupted run of examples/hf_trainer.py."""
    folder = tmp_path_factory.mktemp("trainer")
    return folder, state_of(hf_trainer.main(folder))


def test_trainer_resumes_to_the_same_bits(finished, tmp_path):
    """Weights, scales and bases after 20 steps, against those of a run that goes on from step 10; dropout is on,
    and a basis is refreshed in every fourth step."""
    folder, weights = finished
    shutil.copytree(folder / "trainer", tmp_path / "trainer")
    for step in (15, 20):
        shutil.rmtree(tmp_path / "trainer" / f"checkpoint-{step}")
    resumed = state_of(hf_trainer.main(tmp_path, resume=True))
    assert differing(weights, resumed) == []
    assert differing(weights, state_of(hf_trainer.build())) != []


def test_trainers_checkpoint_is_loaded_and_its_int8_codes_are_not_taken_for_weights(finished):
    folder, weights = finished
    model = hf_trainer.build()
    qgalore.load(model, folder / "trainer" / "checkpoint-20")
    assert differing(weights, state_of(model)) == []
    with pytest.raises((ValueError, KeyError), match="qgalore-checkpoint"):
        AutoModel.from_pretrained(folder / "trainer" / "checkpoint-20")


def test_saved_folder_computes_what_was_trained(finished):
    """bf16 rounds a weight by at most 2⁻⁹ of itself; through two layers of width 64 the logits stay within 5 %."""
    folder, _ = finished
    model = hf_trainer.build().eval()
    qgalore.load(model, folder / "trainer" / "checkpoint-20")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "final", dtype=torch.float32).eval()
    tokens = torch.randint(1, 64, (8, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        trained, saved = model(tokens).logits, loaded(tokens).logits
    assert float((trained - saved).norm() / trained.norm()) < 0.05


def test_tensors_of_another_conversion_are_refused(tiny_llama, tmp_path):
    """Through torch's load_state_dict even when it is not strict, as Trainer calls it, and through qgalore.load."""
    plain, converted, other = tiny_llama(), tiny_llama(), tiny_llama()
    qgalore.convert(converted, rank=8)
    qgalore.convert(other, rank=8, weight_format="none")
    for target, source in ((converted, plain), (other, converted), (converted, other)):
        before = state_of(target)
        with pytest.raises(RuntimeError, match="with the same options"):
            target.load_state_dict(source.state_dict(), strict=False)
        assert not [n for n in differing(before, state_of(target)) if n.endswith("proj.weight")]
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        qgalore.load(converted, tmp_path)
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        qgalore.load(converted, tmp_path / "nowhere")


def trainer_for(folder, *, stepping="deferred", own_optimizer=True, **arguments):
    model = hf_trainer.build()
    optimizer = qgalore.optimizer(model, lr=1e-3, stepping=stepping) if own_optimizer else None
    options = TrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True, **arguments)
    pair = (optimizer, None)
    guard = [qgalore.TrainerGuard()]
    return Trainer(model, options, train_dataset=hf_trainer.rows(64, 1), optimizers=pair, callbacks=guard)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"stepping": "fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0}, "gradient_accumulation_steps=2"),
        ({"stepping": "fused", "max_grad_norm": 1.0}, "max_grad_norm=1.0 finds no gradients"),
        ({"own_optimizer": False}, "an optimizer of its own"),
    ],
)
def test_trainer_setups_that_would_silently_differ_are_refused(tmp_path, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        trainer_for(tmp_path, **options).train()


def test_fused_stepping_works_under_trainer(tmp_path):
    trainer = trainer_for(tmp_path, stepping="fused", max_grad_norm=0)
    before = state_of(trainer.model)
    trainer.train()
    changed = set(differing(before, state_of(trainer.model)))
    assert {name for name in before if name.endswith("query.weight")} <= changed


def test_loss_scaling_is_refused(tiny_llama, token_batches):
    model = tiny_llama()
    qgalore.convert(model, rank=8)
    optimizer = qgalore.optimizer(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    tokens = token_batches()[0]
    scaler.scale(model(input_ids=tokens, labels=tokens).loss).backward()
    before = state_of(model)
    with pytest.raises(ConfigError, match="use bfloat16"):
        scaler.step(optimizer)
    after = state_of(model)
    assert not [name for name in differing(before, after) if name.endswith("weight")]


def test_several_devices_and_processes_are_refused(tiny_llama):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = tiny_llama()
    qgalore.convert(model, rank=8)
    with pytest.raises(ConfigError, match="one device"):
        model.model.layers[0].mlp.up_proj._replicate_for_data_parallel()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match="2 processes"):
            qgalore.optimizer(model, lr=1e-3)
    finally:
        torch.distributed.destroy_process_group()
