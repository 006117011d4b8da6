"""Examples: one for each method, short enough to copy, run here in short form; the gallery shows what they draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples/methods").glob("*.py"))
SHORT: dict[str, dict[str, Any]] = {  # what keeps a run to seconds
    "ssf": {"epochs": 1}, "difffit": {"steps": 3}, "spm": {"steps": 3}, "point_peft": {"steps": 5}, "hier_slam": {"frames": 3},
    "splats": {"steps": 20},
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SHORT)) for p in EXAMPLES]
)
def test_an_example_runs_and_draws(path, tmp_path, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tmp_path / "drawn.png"), **SHORT.get(path.stem, {}))
    picture = Image.open(tmp_path / "drawn.png").convert("L")
    low, high = picture.getextrema()
    assert high - low > 50
    assert min(picture.size) >= 48


def test_every_method_has_an_example_and_a_place_in_the_gallery():
    shown = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f"`python examples/methods/{path.name}" in shown, path.name
        picture = ROOT / f"docs/pictures/gallery/{path.stem}.webp"
        assert picture.stat().st_size < 50_000
        assert f"pictures/gallery/{path.stem}.webp" in shown
    rows = [row for row in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if row.startswith("| [")]
    assert len(EXAMPLES) == len(rows)
