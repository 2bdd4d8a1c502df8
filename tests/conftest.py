"""Shared fixtures: devices, a tiny Llama, and a tiny training configuration over the shipped text."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest's processes share the cores

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Files whose tests together give a verdict in about a minute on two cores: number formats, the arithmetic of a step,
# the layers, and what depends on the versions of torch, transformers and Triton.
FAST = (
    "lowrank/test_conv.py",
    "lowrank/test_experts.py",
    "lowrank/test_linear.py",
    "lowrank/test_method.py",
    "lowrank/test_moments.py",
    "lowrank/test_schedule.py",
    "models/test_architectures.py",
    "quant/test_basis.py",
    "quant/test_blockwise.py",
    "quant/test_counter.py",
    "quant/test_dense.py",
    "quant/test_dispatch.py",
    "quant/test_int8.py",
    "quant/test_kernels_without_gpu.py",
    "test_config.py",
    "test_floors.py",
    "test_mutations.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items) -> None:
    """Mark as ``fast`` what lies in ``FAST`` and is not slow."""
    fast = {ROOT / "tests" / name for name in FAST}
    for item in items:
        if item.path in fast and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", GPU])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def tiny_llama():
    """A function device → the same freshly initialised two-layer Llama, vocabulary 96, fp32."""

    def make(device="cpu", **changes) -> LlamaForCausalLM:
        torch.manual_seed(7)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = LlamaConfig(**{**shape, **heads, "attn_implementation": "eager", **changes})
        return LlamaForCausalLM(config).to(device)

    return make


@pytest.fixture
def token_batches():
    """A function (device, steps) → fixed random token batches (4, 17)."""

    def make(device="cpu", steps=4, rows=4):
        generator = torch.Generator().manual_seed(11)
        return [torch.randint(0, 96, (rows, 17), generator=generator).to(device) for _ in range(steps)]

    return make


TINY = {
    "method": "qgalore",
    "run": {"name": "tiny"},
    "device": "cpu",
    "model": {
        "config": "llama_quickstart",
        "overrides": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    },
    "data": {"valid_fraction": 0.02, "vocab_size": 512, "sequence_length": 32},
    "train": {"max_steps": 6, "micro_batch_size": 4, "lr": 0.01, "warmup_steps": 2, "eval_every": 3, "save_every": 2},
    "lowrank": {"rank": 16, "update_proj_gap": 3, "scale": 1.0},
    "sample": {"max_new_tokens": 4},
}


@pytest.fixture(scope="session")
def known_texts(tmp_path_factory):
    """The cache of ``TINY``: its tokenizer and tokens, which the first run of a session makes for all others."""
    return tmp_path_factory.mktemp("texts")


@pytest.fixture
def tiny_run(tmp_path, monkeypatch, capfd, known_texts):
    """A function (overrides…) → (exit code, standard output, standard error) of ``train.py`` on a tiny model.

    Works in a temporary folder that holds ``tiny.yaml`` and a copy of ``known_texts``, unless a test file has none;
    data is the held-out text of the quickstart.
    """
    import train

    monkeypatch.chdir(tmp_path)
    config = {**TINY, "data": {**TINY["data"], "train": str(ROOT / "configs/quickstart_data/valid.jsonl.gz")}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    if known_texts is not None and any(known_texts.iterdir()):
        shutil.copytree(known_texts, tmp_path / "cache")

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = train.main(["--config", "tiny.yaml", *arguments])
        output = capfd.readouterr()
        ordinary = code == 0 and not any(argument.startswith("data.") for argument in arguments)
        made = (tmp_path / "cache").is_dir()  # a plan makes none
        if known_texts is not None and ordinary and made and not any(known_texts.iterdir()):
            shutil.copytree(tmp_path / "cache", known_texts, dirs_exist_ok=True)
        return code, output.out, output.err

    return run


_RECORDS: dict[str, str] = {}


@pytest.fixture
def recorded(tiny_run, tmp_path):
    """(folder, what the run printed) of a finished tiny run whose gaps grow and whose moments have 8 bits.

    Trained once for all tests; each gets its own copy of the records.
    """
    folder = tmp_path / "runs" / "tiny"
    if not _RECORDS:
        wide = ("model.overrides.hidden_size=128", "lowrank.rank=40", "train.max_steps=14", "train.eval_every=7")
        lazy = ("lowrank.update_proj_gap=2", "lowrank.queue_size=1", "lowrank.cos_threshold=0.3")
        code, out, err = tiny_run(*wide, *lazy, "lowrank.max_gap=4", "export.formats=[]")
        assert code == 0, err
        for name in ("config.yaml", "metrics.jsonl", "subspace.jsonl"):
            _RECORDS[name] = (folder / name).read_text()
        _RECORDS["output"] = out
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.jsonl", "subspace.jsonl"):
        (folder / name).write_text(_RECORDS[name])
    return folder, _RECORDS["output"]


@pytest.fixture(scope="session")
def trackers_offline(tmp_path_factory):
    """Where trackio writes. The packages of trackers read the environment once, when they are first used."""
    place = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("TRACKIO_DIR", str(place))):
            patch.setenv(name, value)
        yield place


@pytest.fixture
def folder(tmp_path):
    """Holds ``tiny.yaml`` for several processes: 50 steps of four micro-batches, refreshes at every seventh."""
    config = {**TINY, "data": {**TINY["data"], "train": str(ROOT / "configs/quickstart_data/valid.jsonl.gz")}}
    train = {"grad_accumulation": 4, "micro_batch_size": 1, "max_steps": 50, "eval_every": 25, "save_every": 10}
    train["order"] = "batch_major"  # several processes take no other steps yet, and are compared with one
    config["train"] = {**config["train"], **train}
    config["lowrank"] = {**config["lowrank"], "update_proj_gap": 7}
    config["export"] = {"formats": []}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def classify_run(tmp_path, monkeypatch, capfd):
    """A function (overrides…) → (exit code, standard output, standard error) of ``train.py`` in a folder that holds
    the tables and the bodies ``encoder`` and ``decoder``."""
    from labelled import write_body, write_table

    import train

    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "train.tsv", 200, 1)
    write_table(tmp_path / "dev.tsv", 40, 2)
    for kind in ("encoder", "decoder"):
        write_body(tmp_path / kind, kind)
    config = {
        "method": "qgalore",
        "device": "cpu",
        "run": {"name": "run"},
        "model": {"path": "encoder"},
        "data": {
            "task": "classify",
            "train": "train.tsv",
            "valid": "dev.tsv",
            "text_keys": ["one", "two"],
            "sequence_length": 64,
        },
        "train": {"max_steps": 8, "micro_batch_size": 16, "lr": 0.003, "eval_every": 4, "save_every": 4},
        "lowrank": {"rank": 8, "update_proj_gap": 3, "scale": 1.0},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments):
        capfd.readouterr()
        code = train.main(["--config", "c.yaml", *arguments])
        output = capfd.readouterr()
        return code, output.out, output.err

    return run
