"""Training across processes: kill -9 and resume, two gloo processes against one, launched as a user would."""

from __future__ import annotations

import importlib.util
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
def test_killed_run_resumes_bit_equal(tmp_path):
    resume = benchmark("resume")
    whole = tmp_path / "whole"
    assert resume._start(whole, 24, tmp_path / "whole.step").wait() == 0
    _, resumed = resume.killed_run(tmp_path / "killed", 24, kill_at=10, delay=0.01)
    assert resumed % 3 == 0
    expected, found = resume.final_state(whole), resume.final_state(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    ddp = benchmark("ddp_equivalence")
    one, w1 = ddp.run(tmp_path / "one", 1, 16, "ragged last step")
    two, w2 = ddp.run(tmp_path / "two", 2, 8, "ragged last step")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=0.011)
    assert all(torch.allclose(w1[k], w2[k], atol=1e-3) for k in w1)
