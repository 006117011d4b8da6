"""README from top to bottom in a fresh clone and a fresh environment; only in `make test-all`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.release
def test_readme_can_be_followed_without_an_edit(tmp_path):
    out = tmp_path / "newcomer.json"
    subprocess.run([sys.executable, str(ROOT / "benchmarks/newcomer.py"), "--output", str(out)], check=True)
    assert len(json.loads(out.read_text())["steps"]) >= 6


def test_the_newcomer_follows_every_block():
    spec = importlib.util.spec_from_file_location("newcomer", ROOT / "benchmarks/newcomer.py")
    assert spec is not None
    assert spec.loader is not None
    newcomer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(newcomer)
    found = list(newcomer.steps((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [what for _, what in found][:2] == ["make demo", "make demo HEADLESS=1"]
    assert sum(language == "python" for language, _ in found) == 2
    assert any(what.startswith("mmkit finetune --data photos/") for _, what in found)
