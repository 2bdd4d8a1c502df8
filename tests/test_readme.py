"""What README.md promises: its commands run, its figures are the plan's, and the pages are written for a reader."""

import gzip
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_header_is
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from qgalore import config
from qgalore.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{n}.md" for n in ("architecture", "tasks", "results", "method")))


def commands(page: str) -> list[str]:
    """The shell commands of a page's indented lines, one by one."""
    outside = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    return [one.strip() for line in re.findall(r"^    (\S.*)", outside, flags=re.M) for one in line.split(" && ")]


# What no test can run: it fetches from elsewhere, makes the environment that tests run in, or is the tests themselves.
SET_UP = {
    "git clone <this repository> qgalore",
    "cd qgalore",
    "python -m venv .venv",
    ". .venv/bin/activate",
    "pip install -e .",
    "pip install -e '.[test]'",
    "python -m pytest",
}
QUICKSTART = "python train.py --config quickstart.yaml"
GENERATE = 'python tools/generate.py runs/quickstart/export/hf --prompt "It was"'
PLAN = "python train.py --config llama7b_16gb.yaml --plan"
PRETRAIN = (
    "python train.py --config llama7b_16gb.yaml data.train=FOLDER data.valid=null data.tokenizer=FOLDER run.name=mine"
)
INSTRUCT = "python train.py --config instruct_example.yaml"
FINETUNE = "python train.py --config finetune_llama3_8b_16gb.yaml model.path=FOLDER data.train=conversations.jsonl"
CLASSIFY = "python train.py --config glue_mrpc model.path=FOLDER data.train=MRPC/train.tsv data.valid=MRPC/dev.tsv"
RESUME = "python train.py --config quickstart.yaml --resume auto"
EXPORT = "python tools/export.py runs/quickstart/checkpoints/step-00000300 --format gguf --out exported"
RUN_HERE = {QUICKSTART, GENERATE, PLAN, PRETRAIN, INSTRUCT, FINETUNE, CLASSIFY, RESUME, EXPORT}

SMALL = "model.overrides={hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2}"
SHORT = ("device=cpu", "train.micro_batch_size=2", "train.eval_batches=1", "sample.max_new_tokens=4")


def test_every_command_is_run_below():
    assert set(commands(README)) == SET_UP | RUN_HERE


def run(command: str, folder: Path, *appended: str) -> str:
    """What ``command`` prints in ``folder``, with overrides ``appended`` that make it quick; it must succeed."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    whole = [sys.executable, str(ROOT / script), *arguments, *appended]
    answer = subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}{answer.stderr}"
    return answer.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the quickstart and the example on conversations have run for a few steps."""
    folder = tmp_path_factory.mktemp("readme")
    few = ("train.max_steps=4", "train.save_every=2", *SHORT, SMALL)
    printed = run(QUICKSTART, folder, *few, "export.formats=[hf]")
    assert "held-out loss" in printed
    assert "planned peak" in printed
    run(INSTRUCT, folder, "train.max_steps=2", *SHORT, SMALL)
    return folder, few


@pytest.mark.slow
def test_an_export_continues_a_prompt(trained):
    assert run(GENERATE, trained[0], "--max-new-tokens", "5").startswith("It was")


@pytest.mark.slow
def test_a_checkpoint_is_exported(trained):
    folder, _ = trained
    run(EXPORT.replace("00000300", "00000004"), folder)
    assert (folder / "exported" / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(trained, tmp_path):
    folder, few = trained
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    last = "runs/quickstart/checkpoints/step-00000004"
    shutil.rmtree(tmp_path / last)
    run(RESUME, tmp_path, *few, "export.formats=[]")
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(place / last / name) for place in (folder, tmp_path))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items()), name


@pytest.mark.slow
def test_a_configuration_trains_on_a_folder_of_yours(trained, tmp_path):
    """The 7B configuration with everything as it is but its size, on a folder of text and one with a tokenizer."""
    (tmp_path / "FOLDER").mkdir()
    for part in (trained[0] / "runs" / "quickstart" / "tokenizer").iterdir():
        shutil.copy(part, tmp_path / "FOLDER")
    with gzip.open(ROOT / "configs/quickstart_data/valid.jsonl.gz") as source:
        (tmp_path / "text.jsonl").write_bytes(source.read())
    command = PRETRAIN.replace("data.train=FOLDER", "data.train=text.jsonl")
    small = SMALL.replace("}", ", num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 4096}")
    fitting = ("memory.budget=null", "data.sequence_length=64", "data.max_tokens=20000", "train.warmup_steps=1")
    assert "done:" in run(command, tmp_path, "train.max_steps=2", *SHORT, *fitting, small)
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.slow
def test_a_model_is_fine_tuned_on_conversations(trained, tmp_path):
    shutil.copytree(trained[0] / "runs" / "instruct_example" / "export" / "hf", tmp_path / "FOLDER")
    shutil.copy(ROOT / "configs/instruct_data/train.jsonl", tmp_path / "conversations.jsonl")
    small = ("memory.budget=null", "data.sequence_length=256", "data.valid_fraction=0.1", "train.warmup_steps=1")
    assert "done:" in run(FINETUNE, tmp_path, "train.max_steps=2", *SHORT, *small)


@pytest.mark.slow
def test_a_model_learns_to_classify(tmp_path):
    tokenizer = train_tokenizer(["one two three four"] * 3, vocab_size=270)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "FOLDER")
    tokenizer.save_pretrained(tmp_path / "FOLDER")
    (tmp_path / "MRPC").mkdir()
    rows = [f"{number % 2}\t1\t2\tone two\tthree {'four' if number % 2 else 'one'}" for number in range(8)]
    for part in ("train", "dev"):
        table = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])
        (tmp_path / "MRPC" / f"{part}.tsv").write_text(table)
    assert "f1" in run(CLASSIFY, tmp_path, "train.max_steps=2", "train.warmup_steps=1", *SHORT[:3])


def peaks() -> dict[str, tuple[int, str, str]]:
    """Rank, planned peak and host memory, as README's table has them, by configuration."""
    rows = re.findall(r"^\| `(\S+\.yaml)` \| (\d+) \| (\S+ GiB) \| (\S+ GiB|–) \|$", README, flags=re.M)
    return {name: (int(rank), peak, host) for name, rank, peak, host in rows}


def test_every_row_of_the_comparison_has_a_source():
    """A link, or a command that shows it; and each project is named by the commit that was read."""
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| project")]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"\]\((?:https://)?\S+\)|`python ", row.rsplit("|", 2)[1]), row
    commits = set(re.findall(r"https://github.com/([\w.-]+/[\w.-]+)/(?:blob|tree)/([^/)]+)", page))
    assert len(commits) == len({name for name, _ in commits}) == 7
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for _, commit in commits)


def to_tenths(words: str) -> str:
    """``"12.40 GiB"`` → ``"12.4 GiB"``."""
    return f"{float(words.split()[0]):.1f} GiB"


def test_the_table_of_peaks_is_that_of_the_configurations_and_of_the_results():
    results, streaming = ((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("results.md", "streaming.md"))
    assert len(peaks()) == len(re.findall(r"^\| `\w\S+\.yaml`", README, flags=re.M)) >= 6
    for name, (rank, peak, host) in peaks().items():
        text = (ROOT / "configs" / name).read_text()
        header = re.search(r"^#\s+total\s+(\S+ GiB)$", text, flags=re.M)[1]
        assert to_tenths(header) == peak, name
        assert config.load(name).lowrank.rank == rank
        waiting = re.search(r"^#\s+host total\s+(\S+ GiB)$", text, flags=re.M)  # what is smaller is not worth a figure
        assert (to_tenths(waiting[1]) if waiting else "–") == host, name
        row = rf"^\| `{re.escape(name)}` \| "
        if config.load(name).memory.stream in ("weights", "all"):
            assert re.search(rf"{row}`\w+` \| \S+ \| {header} \| {waiting[1]} \|$", streaming, flags=re.M)
        else:
            assert re.search(rf"{row}{rank} \| \S+ \| {header.split()[0]} \|$", results, flags=re.M)


@pytest.mark.slow
def test_the_plan_command_prints_the_peak_of_the_table(tmp_path):
    """Plans of the others are held to their headers elsewhere, and the headers to the table above."""
    printed = run(PLAN, tmp_path)
    name = PLAN.split("--config ")[1].split()[0]
    assert to_tenths(re.search(r"planned peak (\S+ GiB)", printed)[1]) == peaks()[name][1]
    assert_header_is(printed, config.PACKAGED / name)
    assert not any(tmp_path.iterdir()), "a plan writes nothing"


def test_the_library_example_trains_and_saves(tiny_llama, token_batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```", README, flags=re.M | re.S)[1]
    model, tokens = tiny_llama(), token_batches(steps=1)[0]
    batch = {"input_ids": tokens, "labels": tokens}
    with torch.no_grad():
        before = float(model(**batch).loss)
    names = {"model": model, "batches": [batch] * 6}
    exec(compile(code, "README.md", "exec"), names)
    again = AutoModelForCausalLM.from_pretrained("trained", dtype=torch.float32)
    with torch.no_grad():
        after, saved = float(model(**batch).loss), float(again(**batch).loss)
    assert after < before - 0.1
    assert abs(saved - after) < 0.02  # bf16
    assert "converted: " in str(names["report"])


def sentences(page: str) -> list[str]:
    """The sentences of a Markdown page: of paragraphs and items of lists, without headings, tables, code and links."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    lines = [re.sub(r"\]\([^)]*\)", "]", line) for line in page.splitlines()]
    prose = ["" if re.match(r"    |#|\||!\[", line) else line.strip() for line in lines]
    text = "\n".join(re.sub(r"^([-*]|\d+\.) ", "\n\n", line) for line in prose)
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    found = [one for part in paragraphs for one in re.split(r"(?<=[.!?])[*)]*\s+", part)]
    return [one for one in found if re.search(r"\w", one)]


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_counted_as_a_reader_counts_them():
    page = "# Title\n\nOne two. See [a page](x.md) now:\n\n- four words are here\n- two *more.* Yes\n\n    code here\n"
    assert [words(one) for one in sentences(page)] == [2, 4, 4, 2, 1]


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name):
    found = sentences((ROOT / name).read_text(encoding="utf-8"))
    lengths = [words(one) for one in found]
    assert len(found) > 15
    assert sum(lengths) / len(lengths) <= 18
    assert max(lengths) <= 40, found[lengths.index(max(lengths))]


@pytest.mark.parametrize(("name", "most"), [("README.md", 125), ("docs/results.md", 150)])
def test_pages_end_before_readers_do(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


LINKED = ("formats", "scaling", "configuration", "coming-from", "comparison", "gpu", "docker", "windows")


@pytest.mark.parametrize(
    "name",
    [*PAGES, *(f"docs/{page}.md" for page in LINKED)],
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [one for one in targets if not (page.parent / one).exists()] == []
