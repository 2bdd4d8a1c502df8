"""The recipes for other people's trainers: each trains int8 weights, and what it saves computes what was trained."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qgalore
from qgalore.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import tiny_chat

EXAMPLES = Path(tiny_chat.__file__).parent
RECIPES = ("hf_trainer", "trl_sft", "trl_dpo", "accelerate_loop", "lightning_module")
CODES = "weight_int8"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def untrained():
    """(int8 codes by name, tokenizer) of the model with which the recipes begin."""
    tokenizer = tiny_chat.tokenizer()
    model = tiny_chat.model(tokenizer)
    qgalore.convert(model, rank=8)
    return codes(model), tokenizer


def codes(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(CODES)}


def check_trained_and_saved(model, folder, untrained):
    """Every matrix moved. bf16 rounds a weight by at most 2⁻⁹ of itself; through two layers of width 64 the logits stay
    within 5 %, and those of the untrained model are far from that."""
    before, tokenizer = untrained
    after = codes(model)
    assert len(after) == 14
    assert not [name for name in after if torch.equal(after[name], before[name])]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fresh = tiny_chat.model(tokenizer).eval()
    ids = tiny_chat.blocks(AutoTokenizer.from_pretrained(folder), length=32)[:4]
    with torch.no_grad():
        trained, saved, first = (one.eval()(input_ids=ids).logits for one in (model, loaded, fresh))
    assert float((trained - saved).norm() / trained.norm()) < 0.05
    assert float((trained - first).norm() / trained.norm()) > 0.2


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_on_one_screen(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


def test_sft_learns_answers_in_int8_weights(tmp_path, untrained):
    """A uniform guess has a loss of ln 514; the loss of 30 steps over 80 conversations falls by more than a nat."""
    pytest.importorskip("trl", reason="the recipe needs TRL")
    import trl_sft

    model, losses = trl_sft.main(tmp_path)
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    check_trained_and_saved(model, tmp_path / "final", untrained)
    ends = json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == untrained[1].convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_dpo_prefers_and_its_reference_stays(tmp_path, untrained):
    """The reference has the values with which the policy begins, so the first margin is zero, and the last is not."""
    pytest.importorskip("trl", reason="the recipe needs TRL")
    import trl_dpo

    model, reference, margins = trl_dpo.main(tmp_path)
    assert margins[0] == 0
    assert margins[-1] > 0.5
    check_trained_and_saved(model, tmp_path / "final", untrained)
    kept = codes(reference)
    assert not [name for name in kept if not torch.equal(kept[name], untrained[0][name])]


@pytest.mark.slow
def test_lightning_trains_and_its_checkpoint_is_loaded(tmp_path, untrained):
    pytest.importorskip("lightning", reason="the recipe needs Lightning")
    import lightning_module

    module = lightning_module.main(tmp_path)
    assert sum(module.losses[-5:]) / 5 < module.losses[0] - 1
    check_trained_and_saved(module.model, tmp_path / "final", untrained)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = lightning_module.ChatModule.load_from_checkpoint(path)
    state = module.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert not [name for name, value in again.state_dict().items() if not torch.equal(value, state[name])]


@pytest.mark.slow
def test_lightning_resumes_to_the_same_bits(tmp_path):
    """Two epochs of four batches, against one epoch and one more from its checkpoint; a basis is found anew in each."""
    lightning = pytest.importorskip("lightning", reason="tests Lightning")
    import lightning_module

    def fit(epochs, folder, resume=None):
        module = lightning_module.ChatModule()
        settings = {"limit_train_batches": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "logger": False}
        trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, accelerator="cpu", **settings)
        rows = tiny_chat.blocks(module.tokenizer, length=32)[:16]
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), ckpt_path=resume)
        return module

    whole = fit(2, tmp_path / "whole")
    fit(1, tmp_path / "half")
    (path,) = (tmp_path / "half" / "checkpoints").glob("*.ckpt")
    resumed = fit(2, tmp_path / "rest", resume=path).state_dict()
    assert not [name for name, value in whole.state_dict().items() if not torch.equal(value, resumed[name])]


def trl_trainer(folder, *, optimizer=True, embeddings="full", guard=True, **settings):
    """(trainer, model) of two steps on the example conversations."""
    pytest.importorskip("trl", reason="tests TRL")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tiny_chat.tokenizer()
    model = tiny_chat.model(tokenizer)
    qgalore.convert(model, rank=8, embeddings=embeddings)
    own = qgalore.optimizer(model, lr=1e-2) if optimizer else None
    plain = {"bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "max_length": 64, "max_steps": 2}
    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder), per_device_train_batch_size=2, **{**plain, **settings}),
        train_dataset=Dataset.from_list(tiny_chat.conversations()[:8]),
        processing_class=tokenizer,
        optimizers=(own, None),
        callbacks=[qgalore.TrainerGuard()] if guard else [],
    )
    return trainer, model


@pytest.mark.parametrize("guard", [True, False])
def test_an_optimizer_of_trls_own_is_refused(tmp_path, guard):
    """With and without the guard: nothing but a qgalore.optimizer moves int8 weights."""
    trainer, _ = trl_trainer(tmp_path, optimizer=False, guard=guard)
    with pytest.raises(ConfigError, match=r"qgalore\.optimizer"):
        trainer.train()


def test_a_loss_that_would_read_codes_for_weights_is_refused(tmp_path):
    """TRL's loss multiplies with lm_head.weight itself; without the refusal the loss is 170 times too high."""
    trainer, model = trl_trainer(tmp_path, embeddings="int8", guard=False)
    ids = torch.arange(8)[None]
    assert model(input_ids=ids, labels=ids).loss.item() < 10  # its own forward pass calls the head
    with pytest.raises(ConfigError, match="embeddings='full'"):
        trainer.train()


def test_a_checkpoint_of_sft_trainer_resumes(tmp_path):
    trainer, model = trl_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    again, resumed = trl_trainer(tmp_path, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    one, other = codes(model), codes(resumed)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_a_layer_that_no_gradient_reaches_is_named_after_the_first_step(tmp_path, capsys):
    """A layer whose output does not reach the loss never moves, which nobody would see."""
    trainer, model = trl_trainer(tmp_path)
    model.model.layers[1].mlp.forward = torch.zeros_like
    trainer.train()
    assert "got no gradient in the first step, for example model.layers.1.mlp" in capsys.readouterr().out


def test_a_reference_that_follows_is_refused(tmp_path):
    trainer, _ = trl_trainer(tmp_path)
    trainer.args.sync_ref_model = True  # DPOConfig has it
    with pytest.raises(ConfigError, match="sync_ref_model"):
        trainer.train()


def test_liger_would_read_a_converted_head_itself(tmp_path):
    """It replaces the model's forward pass by one that hands lm_head.weight to its loss."""
    trainer, model = trl_trainer(tmp_path, embeddings="int8")
    trainer.args.use_liger_kernel = True
    with pytest.raises(ConfigError, match="use_liger_kernel=True reads the weight"):
        qgalore.TrainerGuard().on_train_begin(trainer.args, None, None, model=model, optimizer=trainer.optimizer)
