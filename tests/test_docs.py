"""What the documentation shows works: every example in a docstring, every block of code in README and CONTRIBUTING."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmkit.cli import app

ROOT = Path(__file__).parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def _with_examples() -> list[str]:
    """Installed names of all modules whose source shows an example."""
    found = []
    for package in PACKAGES:
        for path in Path(importlib.import_module(package).__file__ or "").parent.glob("*.py"):
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(f"{package}.{path.stem}".removesuffix(".__init__"))
    return sorted(found)


def _blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder with the files the documentation names: photos by class, and one photo."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for shade, name in ((60, "cat"), (180, "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.fromarray(rng.integers(0, 60, (32, 32, 3), np.uint8) + np.uint8(shade))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    picture.save(tmp_path / "photo.jpg")
    return tmp_path


def _renders(name: str) -> bool:
    """Whether its examples compile the rasteriser, which takes half a minute on a fresh checkout."""
    return any(room in name for room in ("ops.gaussian", "pointcloud.splats", "pointcloud.slam"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * _renders(n)) for n in _with_examples()])
def test_examples_in_docstrings(name, desk):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def test_no_example_is_skipped():
    assert "mmkit.pipelines" in _with_examples()
    for name in _with_examples():
        assert "doctest: +SKIP" not in Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8")


def test_python_in_the_readme_runs(desk):
    blocks = _blocks("README.md", "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert {p.name for p in (desk / "my_adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
def test_commands_in_the_readme_run(desk):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    ran = 0
    for line in "".join(_blocks("README.md", "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["mmkit"]:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran += 1
    assert ran
    assert (desk / "runs" / "merged" / "model.safetensors").is_file()


def test_files_the_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:mmkit|vision|video|apps|examples|benchmarks|tests)/[\w/.-]+)`", text):
            assert (ROOT / path).exists(), f"{document} names {path}"
