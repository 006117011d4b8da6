"""Training across processes: kill -9 and resume, two gloo processes against one, launched as a user would."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_runs_of_fit_resume_bit_equal():
    resume = benchmark("resume")
    found = resume.compare(lambda f: resume.fit_command(f, 24), ("checkpoint",), 1, 24, seed=1)
    assert found["bit_equal"] == 1
    assert found["rows"][0]["half_written"] > 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_commands_resume_bit_equal(tmp_path):
    resume = benchmark("resume")
    data = resume.write_pictures(tmp_path / "data")
    found = resume.compare(lambda f: resume.finetune_command(f, 10, data), ("step", "result"), 2, 10, seed=2)
    assert found["bit_equal"] == 2


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    ddp = benchmark("ddp_equivalence")
    one, w1 = ddp.run(tmp_path / "one", 1, 16, "ragged last step")
    two, w2 = ddp.run(tmp_path / "two", 2, 8, "ragged last step")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=0.011)
    assert all(torch.allclose(w1[k], w2[k], atol=1e-3) for k in w1)
