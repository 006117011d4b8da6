"""A hook of mkdocs: a page of the reference for every door, written from the names that the door lists.

Nothing is imported: a door's list is read from its source, and the docstrings by griffe.
"""

from __future__ import annotations

import ast
import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOMAINS = ("vision", "diffusion", "video", "pointcloud", "apps")
CORE = (
    "adapters", "backbones", "backbones.model", "data", "pipelines", "training", "storage", "ops.points", "ops.gaussian",
    "ops.selective_scan", "ops.deformable_attention", "weights", "results", "errors", "registry",
)  # fmt: skip


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Show griffe the package as it installs: the domains inside `mmkit`."""
    folder = Path(tempfile.mkdtemp(prefix="mmkit-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.webp", *DOMAINS)
    shutil.copytree(ROOT / "mmkit", folder / "mmkit", ignore=skip)
    for domain in DOMAINS:
        shutil.copytree(ROOT / domain, folder / "mmkit" / domain, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*.py"):  # griffe knows the section by its plural
        path.write_text(
            re.sub(r"^( +)Example:$", r"\1Examples:", path.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8"
        )
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(folder)]
    named = str(config.nav)  # a page that the list does not name yet follows the first
    config.nav[1:1] = sorted(page.name for page in (ROOT / "docs").glob("*.md") if f"'{page.name}'" not in named)
    pages = [{"mmkit": "api/mmkit.md"}, *({module: f"api/{module}.md"} for module in _doors())]
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference."""
    for module in ("mmkit", *_doors()):
        files.append(File.generated(config, f"api/{module}.md", content=_page(module)))
    return files


def _doors() -> list[str]:
    rooms = [
        ".".join(("mmkit", *path.parent.relative_to(ROOT).parts))
        for domain in DOMAINS
        for path in sorted((ROOT / domain).glob("**/__init__.py"))
    ]
    return [*(f"mmkit.{name}" for name in CORE), *(room for room in rooms if _public(room))]


def _source(module: str) -> Path:
    parts = module.split(".")[1:]
    base = ROOT.joinpath(*parts) if parts and parts[0] in DOMAINS else ROOT.joinpath("mmkit", *parts)
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _public(module: str) -> list[str]:
    """Full names, where they are defined, of what a door offers."""
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    listed = [n.body for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    exported = _exported(tree)
    found = {}
    for node in (line for block in (*listed, tree.body) for line in block):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmkit"):
            for alias in node.names:
                name = alias.asname or alias.name
                if name in exported or (listed and node in listed[0]):
                    found[name] = _home(node.module, alias.name)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (
            node.name in exported if exported else node.name[0] != "_"
        ):
            found[node.name] = f"{module}.{node.name}"
    return [found[name] for name in sorted(found, key=str.lower)]


def _home(module: str, name: str) -> str:
    """Where `name` of `module` is defined, if that is a door too."""
    if _source(module).name == "__init__.py":
        return next((full for full in _public(module) if full.endswith(f".{name}")), f"{module}.{name}")
    return f"{module}.{name}"


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return list(ast.literal_eval(node.value))
    return []


def _page(module: str) -> str:
    about = ast.get_docstring(ast.parse(_source(module).read_text(encoding="utf-8"))) or ""
    if module == "mmkit":  # what it offers is documented where it lives
        shown = ["\n".join(f"- [`{name.rpartition('.')[2]}`][{name}]" for name in _public(module))]
    else:
        shown = [f"::: {name}" for name in _public(module)]
    return "\n\n".join([f"# {module}", about, *shown])
