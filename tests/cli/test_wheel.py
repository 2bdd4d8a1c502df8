"""What ``pip install qgalore`` brings: the program and its configurations, which work from an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("train.max_steps=2", "train.eval_every=2", "train.save_every=2", "data.vocab_size=512", "export.formats=[]")


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function (arguments…) → what ``qgalore`` answers, installed from a wheel, in a folder that begins empty."""
    place = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("qgalore", "configs"):
        shutil.copytree(ROOT / name, place / "source" / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source" / name)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", place / "dist", place / "source")
    (wheel,) = (place / "dist").glob("qgalore-*.whl")
    pip("install", "--no-deps", "--target", place / "site", wheel)
    shutil.rmtree(place / "source")  # the installed package finds nothing but what it brought
    (place / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(place / "site")}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(place / "site/bin/qgalore"), *arguments]
        return subprocess.run(
            command, cwd=place / "empty", env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.mark.slow
def test_the_quickstart_runs_from_an_empty_folder_and_says_how_to_go_on(installed):
    first = installed("train", "--config", "quickstart.yaml", *SHORT)
    assert first.returncode == 0, first.stderr
    assert "everything is in runs/quickstart" in first.stdout
    again = installed("train", "--config", "quickstart.yaml", *SHORT)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert "--resume auto" in again.stderr
    more = installed("train", "--config", "quickstart", "--resume", "auto", *SHORT, "train.max_steps=4")
    assert more.returncode == 0, more.stderr
    shown = installed("convergence", "runs", "--html", "page.html")  # whose script is a file of the package
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_every_configuration_and_its_data_come_along(installed):
    told = installed("plan", "--config", "nowhere").stderr
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in told
    planned = installed("plan", "--config", "instruct_example", "data.vocab_size=512")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.slow
def test_a_comparison_trains_with_the_installed_package(installed):
    settings = [argument for one in SHORT for argument in ("--set", one)]
    done = installed("compare", "--config", "quickstart", "--variant", "base:", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out" in done.stdout
