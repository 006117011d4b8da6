"""A slice of `benchmarks/zoo.py`: families found by name, each method attached, trained, merged, saved and taken off again."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import zoo

PATTERNS = (
    "timm/*/test", "timm/beit/beit", "timm/eva/eva", "open_clip/coca*", "open_clip/RN50", "transformers/swinv2", "diffusers/DiT*",
)  # fmt: skip
METHODS = ["ssf", "bitfit", "lora", "ia3", "ln_tuning", "zeroi2v"]
QUICK = ("timm/resnet/test", "timm/vision_transformer/test")
FAMILIES = {key: maker for key, maker in zoo.zoo() if any(fnmatch.fnmatch(key, p) for p in PATTERNS)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_no_silent_no_op_no_wrong_merge_and_no_raw_error(family: str) -> None:
    row: dict[str, Any] = zoo.visit(FAMILIES[family], METHODS, seconds=60)
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert "stopped" not in row, row["stopped"]
    assert not list(zoo.notes(row, "F"))
    attached = [m for m, result in row["methods"].items() if result["marks"][0] == "o"]
    assert {"ssf", "bitfit"} <= set(attached)


def test_patterns_find_families_in_every_library() -> None:
    assert {key.partition("/")[0] for key in FAMILIES} == {"timm", "open_clip", "transformers", "diffusers"}
    assert all(any(fnmatch.fnmatch(key, p) for key in FAMILIES) for p in PATTERNS)
