"""Parity with the official implementations: every case found is loaded through the public path and compared.

Cases lie in `tests/golden/<method>/<case>/meta.json` and in each directory of `MMKIT_GOLDEN_DIR` (separated by the
platform's path separator) with the same layout. `loader_<method>.py` beside this file knows how to run one.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


COMPILES = {"gaussian_rasterizer"}
"""Methods whose kernels take half a minute to compile on a fresh checkout."""


def _cases() -> list[Path]:
    extra = [Path(d) for d in os.environ.get("MMKIT_GOLDEN_DIR", "").split(os.pathsep) if d]
    return [meta.parent for root in [HERE, *extra] for meta in sorted(root.glob("*/*/meta.json"))]


def _name(case: Path) -> str:
    return f"{case.parent.name}/{case.name}" + ("" if HERE in case.parents else "@extra")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=_name(c), marks=[pytest.mark.slow] * (c.parent.name in COMPILES)) for c in _cases()],
)
def test_case_matches_the_official_implementation(case: Path) -> None:
    method = case.parent.name
    loader = HERE / f"loader_{method}.py"
    if not loader.exists():
        pytest.skip(f"no loader yet for {method}")
    spec = importlib.util.spec_from_file_location(loader.stem, loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.run(case, json.loads((case / "meta.json").read_text(encoding="utf-8")))


def test_there_are_cases() -> None:
    assert len([c for c in _cases() if HERE in c.parents]) >= 4
