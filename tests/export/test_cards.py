"""Model cards: what the README.md of an export says, and what it never says."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from qgalore import config
from qgalore.convergence.charts import BINS, loss_picture
from qgalore.errors import ConfigError
from qgalore.files import model_card
from qgalore.training import card, origins
from qgalore.training.position import Position

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("train.max_steps=3", "train.eval_every=2", "sample.max_new_tokens=0")
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(folder: Path) -> dict[str, str]:
    """The table of a card."""
    text = (folder / "README.md").read_text()
    return dict(re.findall(r"^\| ([\w -]+) \| (.*) \|$", text, flags=re.M))


def evaluations(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval_loss"] for row in lines if "eval_loss" in row}


def test_the_card_of_a_model_that_was_trained_further(tiny_run, tmp_path):
    """From scratch, and then from the export of the first run, whose card got a licence meanwhile."""
    assert tiny_run("run.name=first", *SHORT)[0] == 0
    first = rows_of(Path("runs/first/export/hf"))
    assert first["base model"] == "none: trained from scratch, with the architecture `llama_quickstart`"
    assert "licence of the base" not in first
    shutil.copytree("runs/first/export/hf", "Base-7B")
    stated = "license: other\nlicense_name: mine\nlicense_link: LICENSE\n"
    readme = Path("Base-7B/README.md")
    readme.write_text(readme.read_text().replace("---\n", f"---\n{stated}", 1))
    here = f"{tmp_path}/Base-7B"
    base = (f"model.path={here}", "model.config=null", "model.overrides={}", "export.formats=[hf, int8]")
    assert tiny_run(*base, *SHORT)[0] == 0, "the second run"

    for fmt in ("hf", "int8"):
        folder = Path("runs/tiny/export") / fmt
        text, rows = (folder / "README.md").read_text(), rows_of(folder)
        header = ModelCard.load(folder / "README.md").data
        assert (header.license, header.license_name) == ("other", "mine")
        assert header.base_model is None, "a folder's name would be taken for an id of the hub"
        assert header.license_link is None, "a file of the base's folder is not here"
        assert header.datasets is None
        assert {"qgalore"} <= set(header.tags)
        assert (rows["base model"], rows["licence of the base"]) == ("`Base-7B`", "`mine`")
        assert rows["training data"] == "`valid.jsonl.gz`"
        assert rows["method"] == "`qgalore`: int8 weights, int4 bases of rank 16, rule galore, adamw8bit"
        assert rows["steps"] == "3, of 4 rows of up to 32 tokens each"
        losses = evaluations(Path("runs/tiny"))
        best = min(losses, key=losses.get)
        assert rows["held-out figures"].startswith(f"loss {losses[3]:.4f}, perplexity ")
        assert rows["held-out figures"].endswith("(after step 3)")
        assert rows["best held-out loss"] == f"{losses[best]:.4f} (after step {best})"
        assert "planned memory" in rows
        for place in (tmp_path, ROOT, Path.home()):
            assert str(place) not in text
        picture = ElementTree.parse(folder / "loss.svg").getroot()
        assert len(picture.findall(f"{SVG}circle")) == len(losses)

    found: dict = {}
    program = re.search(r"```python\n(.*?)```", (Path("runs/tiny/export/hf/README.md")).read_text(), flags=re.S)[1]
    exec(program.replace("FOLDER", "runs/tiny/export/hf"), found)
    assert isinstance(found["model"], PreTrainedModel)
    assert found["tokenizer"]("a planet")["input_ids"]


def test_a_card_that_somebody_wrote_stays_and_ours_follows_the_weights(tiny_run):
    folder = Path("runs/tiny/export/hf")
    assert tiny_run(*SHORT)[0] == 0
    code, out, _ = tiny_run(*SHORT, "train.max_steps=4", "--resume", "auto")
    assert (code, "stays" in out) == (0, False)
    assert rows_of(folder)["steps"].startswith("4,")
    theirs = (folder / "README.md").read_text().replace("# `tiny`", "# My model")
    (folder / "README.md").write_text(theirs)
    code, out, _ = tiny_run(*SHORT, "train.max_steps=5", "--resume", "auto")
    assert code == 0
    assert "README.md was not written by qgalore, or was changed since, so it stays; delete it" in out
    assert (folder / "README.md").read_text() == theirs


def settings(*overrides: str) -> config.Config:
    return config.load("quickstart", ["device=cpu", *overrides])


def test_hub_ids_are_named_as_such_and_paths_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: terms/LICENSE\n---\n")
    monkeypatch.setattr(origins, "local_folder", lambda path: tmp_path)
    path = ("model.config=null", "model.overrides={}", "model.path=Qwen/Qwen2.5-7B")
    found = origins.of(settings(*path, "data.train=allenai/c4:en", f"data.valid={tmp_path}/rows"))
    assert found == {
        "base": "Qwen/Qwen2.5-7B",
        "base_id": "Qwen/Qwen2.5-7B",
        "architecture": None,
        "licence": {
            "license": "apache-2.0",
            "license_link": "https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/terms/LICENSE",
        },
        "train": ["allenai/c4:en"],
        "held_out": ["rows"],
        "datasets": ["allenai/c4"],
    }
    mixed = ("data.train=[{path: x/a.txt, weight: 2}, org/b]", "data.valid={one: c.txt, two: d/e}")
    several = origins.of(settings(*mixed))
    assert (several["train"], several["held_out"]) == (["a.txt", "org/b"], ["c.txt", "d/e"])
    assert several["datasets"] == ["org/b", "d/e"]
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for place, (base, known) in {
        str(snapshot): ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        f"{tmp_path}/rows": ("rows", None),
        "a/b/c": ("c", None),
    }.items():
        found = origins.of(settings(*path[:2], f"model.path={place}"))
        assert (found["base"], found["base_id"]) == (base, known)
        (tmp_path / "origins.json").write_text(json.dumps(found))
        header = card.of("hf", settings(), Position(step=1), tmp_path).header
        assert header.get("base_model") == known


def test_steps_of_another_run_are_named(tmp_path):
    made = card.of("hf", settings(), Position(step=3, steps_before=1200), tmp_path)
    assert dict(made.rows)["earlier steps"] == "1,200 steps of another run, whose data are not named here"


HEADERS = ["- a list", "license: [", "license: 3"]


@pytest.mark.parametrize("readme", [None, "no header", *(f"---\n{header}\n---\n" for header in HEADERS)])
def test_a_licence_that_is_not_stated_is_not_made_up(tmp_path, monkeypatch, readme):
    monkeypatch.setattr(origins, "local_folder", lambda path: tmp_path)
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    known = origins.of(settings("model.config=null", "model.overrides={}", f"model.path={tmp_path}"))
    assert known["licence"] == {}
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    known = origins.of(settings("model.config=null", "model.overrides={}", f"model.path={tmp_path}"))
    assert known["licence"] == {"license": "mit"}


def test_a_hub_that_is_gone_costs_only_the_licence(monkeypatch):
    def gone(path):
        raise ConfigError("no network")

    monkeypatch.setattr(origins, "local_folder", gone)
    known = origins.of(settings("model.config=null", "model.overrides={}", "model.path=a/b"))
    assert (known["base"], known["licence"]) == ("a/b", {})


def test_names_of_files_cannot_write_markdown(tmp_path):
    (tmp_path / "origins.json").write_text(json.dumps({"architecture": "a", "train": ["x` | y\n# z"], "held_out": []}))
    made = card.of("hf", settings(), Position(step=3), tmp_path)
    assert dict(made.rows)["training data"] == "`x' \\| y # z`"
    assert "loss.svg" not in made.text(), "no records, no picture"
    made.write(tmp_path)
    assert not model_card.of_another(tmp_path)
    assert not (tmp_path / "loss.svg").exists()


def test_a_card_knows_the_weights_of_an_earlier_step(recorded):
    """Nothing of later steps is shown."""
    folder, _ = recorded
    losses = evaluations(folder)
    made = card.of("hf", settings(), Position(step=9, best_loss=losses[7], best_step=7), folder)
    rows = dict(made.rows)
    assert rows["held-out figures"].startswith(f"loss {losses[7]:.4f},")
    assert rows["best held-out loss"] == f"{losses[7]:.4f} (after step 7)"
    picture = ElementTree.fromstring(made.picture)
    train, held_out = (len(line.get("points").split()) for line in picture.iter(f"{SVG}polyline"))
    assert (train, held_out) == (9, sum(step <= 9 for step in losses))
    assert 14 in losses


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("method=adamw", "model.dtype=float32"), "`adamw`: all weights in float32, adamw"),
        (("method=lora", "lowrank.rank=8"), "`lora`: int8 weights, factors of rank 8, adamw8bit"),
        (("method=qgalore", "lowrank.rule=scale"), "`qgalore`: int8 weights, rule scale, adamw8bit"),
        (
            ("method=galore8bit", "lowrank.rank=4"),
            "`galore8bit`: weights in float32, fp32 bases of rank 4, rule galore, adamw8bit",
        ),
    ],
)  # fmt: skip
def test_the_line_of_a_method(overrides, line):
    assert card.method(config.resolve(settings(*overrides), "cpu", False)) == line


def test_the_picture_has_its_points_where_they_belong():
    train = [(step, 10.0 - step / 100) for step in range(1, 1001)]
    root = ElementTree.fromstring(loss_picture(train, [(500, 9.0), (1000, 4.0)]))
    lines = [line.get("points").split() for line in root.iter(f"{SVG}polyline")]
    first, held_out = ([tuple(map(float, pair.split(","))) for pair in line] for line in lines)
    assert BINS <= len(first) <= BINS + 1
    assert first == sorted(first), "a falling loss goes down, and y with it up"
    assert held_out[0][0] < held_out[1][0]
    assert held_out[0][1] < held_out[1][1]
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 < x < width and 0 < y < height for x, y in [*first, *held_out])
    assert "1,000" in [text.text for text in root.iter(f"{SVG}text")]
    assert ElementTree.fromstring(loss_picture([(1, 2.0)], [])).tag == f"{SVG}svg"
