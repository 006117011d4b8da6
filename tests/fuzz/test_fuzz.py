"""Damaged and hostile inputs: every reader answers, or refuses with an error of ours, in time and without a trace."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmkit.errors import InputError

INPUTS = 10_400
"""Of all targets together, in the slow test."""


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_harness", Path(__file__).parent / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_harness"] = module
    spec.loader.exec_module(module)
    return module


harness = _load()
QUICK = [target for target in harness.TARGETS if target.name not in ("folders", "commands")]


@pytest.mark.parametrize("target", QUICK, ids=lambda t: t.name)
def test_a_few_damaged_inputs_are_read_or_refused(target) -> None:
    outcome = harness.run(target, 40)
    assert outcome.failures == []
    assert outcome.counts["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", harness.TARGETS, ids=lambda t: t.name)
def test_ten_thousand_damaged_inputs_are_read_or_refused(target) -> None:
    assert sum(t.share for t in harness.TARGETS) == pytest.approx(1)
    assert INPUTS >= 10_000
    count = round(INPUTS * target.share)
    outcome = harness.run(target, count)
    assert outcome.failures == []
    assert outcome.counts["read"] + outcome.counts["refused"] == count
    assert outcome.grown < harness.MAX_MEMORY


def test_what_goes_wrong_is_noticed(tmp_path: Path) -> None:
    def seeds(folder: Path) -> list[Path]:
        (folder / "a.bin").write_bytes(b"seed")
        return [folder / "a.bin"]

    def read(path: Path, written: Path) -> None:
        kind = path.read_bytes()[:1]
        if kind == b"0":
            raise KeyError("raw")
        if kind == b"1":
            while True:
                pass
        if kind == b"2":
            (written / "half").touch()
            raise InputError("refused")

    def damage(path: Path, rng: random.Random) -> None:
        path.write_bytes(str(rng.randrange(4)).encode())

    limit, harness.MAX_SECONDS = harness.MAX_SECONDS, 0.1
    try:
        outcome = harness.run(harness.Target("all", seeds, read, damage, 1.0), 40)
    finally:
        harness.MAX_SECONDS = limit
    told = "\n".join(outcome.failures)
    assert all(text in told for text in ("KeyError: 'raw'", "TimeoutError", "left ['half']"))
    assert outcome.counts["read"] > 0
