"""The package as users get it: cheap to import, complete as a wheel, arrows pointing one way."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmkit

ROOT = Path(__file__).parent.parent

FOLDERS = {"mmkit": "mmkit", **{d: f"mmkit/{d}" for d in ("vision", "diffusion", "video", "pointcloud", "apps")}}


def _sources() -> dict[str, Path]:
    """Installed path -> source file, for everything a wheel must contain."""
    found = {}
    for folder, target in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".safetensors", ".json", ".css", ".js", ".webp")
                and "__pycache__" not in path.parts
            ):
                found[f"{target}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


def test_import_mmkit_loads_no_heavy_library() -> None:
    code = (
        "import torch, sys, json; import mmkit\n"
        "heavy = [m for m in ('transformers', 'diffusers', 'peft', 'timm', 'gradio', 'open_clip', 'accelerate') if m in sys.modules]\n"
        "print(json.dumps(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_public_names_resolve() -> None:
    import mmkit

    for name in mmkit.__all__:
        assert getattr(mmkit, name) is not None
    with pytest.raises(AttributeError):
        _ = mmkit.no_such_name
    assert {"ssf", "bitfit", "linear_probe", "lora"} <= set(mmkit.list_adapters())
    assert "image-classification" in mmkit.list_tasks()


def test_every_registered_name_resolves() -> None:
    from mmkit import registry

    for table in (registry.ADAPTERS, registry.MODELS, registry.TASKS):
        for name in table.names():
            assert callable(table.get(name)), name


MODULE = {"open_clip_torch": "open_clip", "pillow": "PIL", "scikit-learn": "sklearn"}
"""Distributions whose module has another name."""
LENT = {
    "contourpy": "matplotlib", "llvmlite": "numba", "starlette": "gradio", "tokenizers": "transformers",
    "torchcodec": "a reader to be asked for by name",
}  # fmt: skip
"""Modules that come with a dependency, and one that need not be there."""


def _imported(folder: Path) -> set[str]:
    """Top modules that a folder's sources import, also lazily through `library(name)`."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "library",
                "import_module",
            ):
                found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found - set(sys.stdlib_module_names) - {"mmkit"}


def test_every_dependency_is_used_and_every_import_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def modules(lines: list[str]) -> set[str]:
        names = {re.split(r"[\[<>=]", line)[0] for line in lines}
        return {MODULE.get(name, name.replace("-", "_")) for name in names}

    needed = modules(project["dependencies"])
    extras = {name: modules(project["optional-dependencies"][name]) for name in ("apps", "slam", "cuda")}
    core = set().union(*(_imported(ROOT / folder) for folder in FOLDERS if folder != "apps"))
    assert needed <= core | _imported(ROOT / "apps")
    assert extras["apps"] <= _imported(ROOT / "apps")
    assert not core & extras["apps"]
    developers = modules(
        project["optional-dependencies"]["dev"]
    )  # exporters and logs, asked for by name when they are missing
    assert not core - needed - extras["slam"] - extras["cuda"] - LENT.keys() - developers
    assert not _imported(ROOT / "apps") - needed - extras["apps"] - LENT.keys()


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mmkit.__version__ == project["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == project["version"]


@pytest.mark.slow
def test_source_and_wheel_are_complete_and_work_elsewhere(tmp_path: Path) -> None:
    """The wheel is built from the source distribution, as anybody would who has only that."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, source], check=True, capture_output=True)
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "docs/index.md", "docs/pictures/home.webp", "deploy/Dockerfile"}
    wanted |= {"examples/methods/ssf.py", "benchmarks/tables.py"}
    assert packed >= wanted
    assert not [name for name in packed if name.startswith("tests/") or name.endswith(".pyc")]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    missing = sorted(set(_sources()) - names)
    assert not missing
    assert not [n for n in names if n.split("/")[0] in FOLDERS and n.split("/")[0] != "mmkit"]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()"
        " and '__editable__' not in repr(f)]\n"
        "import mmkit, mmkit.vision, numpy\nassert mmkit.__file__.startswith(sys.argv[1]), mmkit.__file__\n"
        "assert mmkit.vision.__file__.startswith(sys.argv[1]), mmkit.vision.__file__\n"
        "r = mmkit.pipeline('image-classification')(numpy.zeros((32, 32, 3), numpy.uint8))\nprint(len(r.labels))"
    )
    (tmp_path / "empty").mkdir()
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip() == "5"


def test_bundled_weights_are_small_and_match_their_manifest() -> None:
    from mmkit.weights import FOLDER, list_weights, load_tensors, weight_entry

    assert sum(f.stat().st_size for f in FOLDER.glob("*.safetensors")) < 40e6
    assert {f.name for f in FOLDER.glob("*.safetensors")} == {weight_entry(n).file for n in list_weights()}
    for name in list_weights():
        entry = weight_entry(name)
        assert load_tensors(name)
        assert all((entry.summary, entry.license, entry.command, entry.data, entry.score))
        script = entry.command.split("python ", 1)[1].split()[0]
        assert (ROOT / script).is_file(), entry.command
