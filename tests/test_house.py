"""The house: rooms behind doors, arrows that point one way, no circle; read from the source, imports inside functions included."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOMAINS = ("vision", "video", "diffusion", "pointcloud")
AREAS = {"mmkit": "mmkit", **{d: f"mmkit.{d}" for d in (*DOMAINS, "apps")}}
CORE = (  # from the bottom up: each imports only what stands before it
    "errors", "memory", "lazy", "charts", "registry", "devices", "ops", "storage", "results", "data", "weights",
    "backbones", "adapters", "training", "pipelines", "cli",
)  # fmt: skip
ROOMS = sorted(p.parent.relative_to(ROOT).as_posix() for d in DOMAINS for p in (ROOT / d).glob("*/__init__.py"))


def modules() -> dict[str, Path]:
    """Installed name -> source file of every module of the package."""
    found = {}
    for folder, package in AREAS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere, except what a door lists under `if TYPE_CHECKING:`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py":
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = modules()
GRAPH = {name: set(imports(path)) for name, path in MODULES.items()}


def area(module: str) -> str:
    """ "vision" of "mmkit.vision.gmm", "adapters" of "mmkit.adapters.core", "" of what is not ours and of `mmkit` itself."""
    return module.split(".")[1] if module.startswith("mmkit.") else ""


def room(module: str) -> str:
    """ "mmkit.vision.gmm" of whatever lies in that room, else ""."""
    path = "/".join(module.split(".")[1:3])
    return f"mmkit.{path.replace('/', '.')}" if path in ROOMS else ""


def test_every_part_of_the_core_has_its_place():
    assert {area(m) for m in MODULES if m != "mmkit"} == {*CORE, *DOMAINS, "apps"}


def test_core_folders_import_only_what_stands_below_them():
    wrong = [
        (module, target)
        for module, targets in GRAPH.items()
        if area(module) in CORE
        for target in targets
        if area(target) and (area(target) not in CORE or CORE.index(area(target)) > CORE.index(area(module)))
    ]
    assert not wrong


def test_data_stands_on_storage_and_errors_alone():
    assert {area(t) for m, ts in GRAPH.items() if area(m) == "data" for t in ts} <= {
        "",
        "data",
        "storage",
        "errors",
        "lazy",
    }


def test_no_file_imports_itself_around_a_circle():
    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for target in GRAPH[queue.pop()] & GRAPH.keys() - seen:
                seen.add(target)
                queue.append(target)
        return seen

    assert not sorted(m for m in MODULES if m in reach(m))


def test_domains_know_the_core_and_themselves_only():
    wrong = [
        (module, target)
        for module, targets in GRAPH.items()
        if area(module) in DOMAINS
        for target in targets
        if area(target) not in ("", area(module), *CORE) or target.split(".")[0] in ("gradio", *DOMAINS, "apps")
    ]
    assert not wrong


def test_rooms_of_one_domain_do_not_lean_on_each_other():
    wrong = [(m, t) for m, ts in GRAPH.items() for t in ts if room(m) and room(t) and room(m) != room(t)]
    assert not wrong


def test_apps_and_the_core_enter_domains_through_their_doors():
    wrong = [
        (module, target)
        for module, targets in GRAPH.items()
        if area(module) not in DOMAINS
        for target in targets
        if area(target) in DOMAINS and target not in ("mmkit." + area(target), room(target))
    ]
    assert not wrong


def test_one_owner_writes_and_reads_what_is_saved():
    """Nobody else renames files into place, opens tensor files, touches the umask or looks for homes; the two that may say why."""
    alone = (
        "os.replace(",
        "os.rename(",
        "torch.load(",
        "torch.save(",
        "load_file(",
        "save_file(",
        "safe_open(",
        "umask(",
        ".expanduser(",
    )
    allowed = {
        "mmkit.data.archive": "puts what it unpacked into place",
        "mmkit.vision.clicks.export": "reads a file's header, after storage read its tensors",
    }
    found = {m for m, path in MODULES.items() if any(word in path.read_text(encoding="utf-8") for word in alone)}
    assert {m for m in found if area(m) != "storage"} == set(allowed)


def test_the_test_sees_imports_inside_functions_and_of_submodules(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from mmkit.adapters import core\n    import gradio.themes\n")
    assert list(imports(file)) == ["mmkit.adapters.core", "gradio.themes"]


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_has_a_door_that_says_what_it_is_and_whose(folder):
    package = importlib.import_module(f"mmkit.{folder.replace('/', '.')}")
    text = package.__doc__ or ""
    assert 2 <= len(text.strip().splitlines()) <= 6
    assert "arXiv" in text or "No paper" in text
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


LONG = {"mmkit/adapters/core.py": "the contract of an adapter, read in one piece"}
"""Files above 500 lines, and why."""


def test_a_file_is_read_in_one_sitting_or_says_why_not():
    long = {
        path.relative_to(ROOT).as_posix()
        for folder in (*AREAS, "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 500
    }
    assert long <= LONG.keys()


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_has_the_usual_files(folder):
    files = {p.name for p in (ROOT / folder).glob("*.py")}
    assert {"adapter.py", "model.py", "training.py"} & files
    assert (
        "pipeline.py" in files or (ROOT / folder).parent.joinpath("pipeline.py").exists()
    )  # or one for the whole domain


@pytest.mark.parametrize("package", ["mmkit", "mmkit.data", "mmkit.training", "mmkit.video"])
def test_names_at_the_large_doors_resolve(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_no_example_saves_what_was_interrupted() -> None:
    """`fit` returns after Ctrl-C: what is saved or bundled then is half a model."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"\bfit\(\s*\w+,", text) and re.search(r"bundle\(|save_pretrained\(|save_adapter\(", text):
            assert ".stopped" in text, f"{path.name} asks nobody whether training ended"
