"""What the documentation shows works: every example in a docstring, every block of code and every figure in README and docs."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
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


DOCUMENTS = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run here: (?P<why>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.S)


def _blocks(file: str, language: str, run: bool = True) -> list[str]:
    """The blocks of a language that run in these tests, or those that say why they do not."""
    found = _BLOCK.finditer((ROOT / file).read_text(encoding="utf-8"))
    return [m["code"] for m in found if m["language"] == language and (m["why"] is None) == run]


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


def _slow(file: str) -> bool:
    """Whether its blocks train or compile the rasteriser."""
    return file.split("/")[-1] in ("erasure.md", "pictures.md", "points.md", "slam.md", "splats.md")


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[pytest.mark.slow] * _slow(f)) for f in DOCUMENTS if _blocks(f, "python")]
)
def test_python_in_the_documents_runs(file, desk):
    for block in _blocks(file, "python"):
        exec(compile(block, file, "exec"), {"__name__": "a block"})
    if file == "README.md":
        saved = {p.name for p in (desk / "my_adapter").iterdir()}
        assert saved >= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("file", DOCUMENTS)
def test_blocks_are_read_by_their_language(file):
    """What does not run here is at least Python, or shell, and names options that exist."""
    for run in (True, False):
        for block in _blocks(file, "python", run):
            compile(block, file, "exec")
        for block in _blocks(file, "sh", run):
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    languages = {m["language"] for m in _BLOCK.finditer((ROOT / file).read_text(encoding="utf-8"))}
    assert languages <= {"python", "sh", "toml", "text"}
    for line in (line for run in (True, False) for block in _blocks(file, "sh", run) for line in block.splitlines()):
        if line.startswith(("make ", "mmkit ")):
            _check_command(line)


def test_commands_named_in_a_sentence_exist():
    for file in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (ROOT / file).read_text(encoding="utf-8"), flags=re.S)
        for line in re.findall(r"`(mmkit [a-z][^`|]*)`", text):
            _check_command(line)


def test_names_of_the_package_in_a_sentence_resolve():
    for file in DOCUMENTS:
        for name in re.findall(r"`(mmkit(?:\.[A-Za-z_]\w*)+)", (ROOT / file).read_text(encoding="utf-8")):
            assert _resolves(name), f"{file}: {name}"


def _resolves(name: str) -> bool:
    parts, found = name.split("."), importlib.import_module("mmkit")
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return False
        else:
            found = getattr(found, part)
    return True


def _check_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M), line
    else:
        name = 2 if words[1] in ("splat",) else 1
        shown = CliRunner().invoke(app, [*words[1 : name + 1], "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
        assert shown.exit_code == 0, line
        assert all(w.split("=")[0] in shown.output for w in words if w.startswith("--")), line


def test_the_lines_of_code_in_tables_are_python_and_name_what_exists():
    from mmkit import list_adapters, list_models, list_tasks

    cells = re.findall(r"\| `([a-z_.]+\(.*?\))` \|", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(cells) >= 10
    for cell in cells:
        compile(cell, cell, "eval")
        for call, known in (("pipeline", list_tasks()), ("create_model", list_models())):
            assert all(name in known for name in re.findall(rf'{call}\("([\w-]+)"', cell)), cell
        assert all(name in list_adapters() for name in re.findall(r'apply_adapter\(\w+, "(\w+)"', cell)), cell


def test_figures_are_those_of_the_results():
    """`python benchmarks/tables.py` writes them."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


FIGURE_ELSEWHERE = {
    "README.md": "What the bundled weights can do: tests/test_claims.py",
    "docs/compared.md": "versions of other libraries",
    "docs/studio.md": "summaries of the pages, compared below",
}
"""Documents with figures that no comment explains, and what holds them."""


@pytest.mark.parametrize("file", [f for f in DOCUMENTS if f not in FIGURE_ELSEWHERE])
def test_no_figure_is_written_by_hand(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    text = re.sub(r"<!-- (=.*? -->.*?<!-- /|table .*?<!-- end) -->|```.*?```|`[^`]*`", "", text, flags=re.S)
    text = re.sub(r"arXiv:? \d{4}\.\d{5}|\(\d{4}\.\d{5}\)", "", text)
    found = re.findall(r"[^\n]*(?:\d\s?%|\b\d+\.\d+ (?:cm|dB|points|seconds|times)|Dice \d)[^\n]*", text)
    assert not found


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path):
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    assert "apply_adapter" in (tmp_path / "api/mmkit.adapters.html").read_text(encoding="utf-8")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", text), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\([\"']?|@import [\"'])(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_commands_in_the_readme_run(desk):
    ran = 0
    for line in "".join(_blocks("README.md", "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mmkit"]:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran += 1
    assert ran
    assert (desk / "runs" / "merged" / "model.safetensors").is_file()


def test_tests_that_the_documents_name_exist():
    named = 0
    for document in DOCUMENTS:
        for path, test in re.findall(r"`(tests/[\w/.]+)::(\w+)`", (ROOT / document).read_text(encoding="utf-8")):
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{test}"
            named += 1
    assert named > 50


def test_every_page_of_the_studio_is_shown():
    from mmkit.registry import APPS

    text = (ROOT / "docs/studio.md").read_text(encoding="utf-8")
    for name in APPS.names():
        app = APPS.get(name)
        assert f"## {app.title}\n\n{app.summary} `mmkit app {name}`" in text
        assert (ROOT / f"docs/pictures/studio/{name}.webp").stat().st_size < 90_000
    assert (ROOT / "docs/pictures/home.webp").stat().st_size < 100_000


def test_every_wish_has_an_answer():
    """Done, with the name of a test, or the reason why not."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/wishes.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| | wish", "| wish"))
    ]
    assert [int(row[0]) for row in rows if row[0].isdigit()] == list(range(1, 19))
    for *_, state, held in rows:
        if held:
            assert "::test_" in held, held
        else:
            assert re.match(r"(not done|not measured)", state), state


def test_files_the_documents_name_exist():
    for document in (*DOCUMENTS, "CONTRIBUTING.md", "benchmarks/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:mmkit|vision|video|diffusion|pointcloud|apps|examples|benchmarks|tests|docs)/[\w/.-]+)`", text
        ):
            assert (ROOT / path).exists(), f"{document} names {path}"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"
