"""What can be known of the image without building it: its sources, extras, Python, user and mounted folders."""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qgalore.cli import main

if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml with tomllib", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = {"ubuntu22.04": "3.10", "ubuntu24.04": "3.12"}  # that of the packages python3


def instructions() -> list[tuple[str, str]]:
    """(word, what follows it) of each instruction of the Dockerfile, with its lines joined."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


def all_of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in all_of("ENV") for pair in shlex.split(line))


def copied() -> list[str]:
    return [source for line in all_of("COPY") for source in line.split()[:-1]]


def test_all_that_the_package_is_built_from_is_there_and_sent():
    """setup.py reads both folders, and pyproject.toml names the two files."""
    needed = {"pyproject.toml", "setup.py", "qgalore", "configs", PROJECT["readme"], *PROJECT["license-files"]}
    assert set(copied()) == needed
    assert all((ROOT / name).exists() for name in needed)
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == needed


def test_its_extras_exist_and_its_python_is_taken():
    (extras,) = [line.partition("=")[2].split(",") for line in all_of("ARG") if line.startswith("EXTRAS=")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    system = all_of("FROM")[-1].rpartition("-")[2]
    assert SpecifierSet(PROJECT["requires-python"]).contains(PYTHONS[system])


def test_it_does_not_run_as_root():
    words = [word for word, _ in instructions()]
    assert all_of("USER") == ["trainer"]
    assert words.index("USER") > max(place for place, word in enumerate(words) if word == "RUN")


def test_the_page_mounts_the_folders_that_the_image_uses():
    """A run's relative folders lie in the working folder; the hub's files and Triton's have a place by variable."""
    page = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    docker run")]
    check, train = (shlex.split(line) for line in commands)
    inside = [value.rpartition(":")[2] for option, value in pairwise(train) if option == "-v"]
    (work,) = all_of("WORKDIR")
    assert inside == [f"{work}/runs", f"{work}/cache", environment()["HF_HOME"]]
    assert environment()["TRITON_CACHE_DIR"].startswith(f"{work}/cache/")
    for line in (check, train):
        assert line[line.index("--gpus") + 1] == "all"
        assert line[line.index("qgalore") + 1] in main.COMMANDS
    assert (ROOT / "configs" / train[-1]).is_file()
    assert all_of("ENTRYPOINT") == ['["qgalore"]']


def test_the_extra_for_a_gpu_asks_for_the_triton_of_each_system():
    found = [Requirement(text) for text in PROJECT["optional-dependencies"]["gpu"]]
    for system, name in (("Linux", "triton"), ("Windows", "triton-windows")):
        asked = [one.name for one in found if one.marker.evaluate({"platform_system": system})]
        assert [one for one in asked if one.startswith("triton")] == [name]
