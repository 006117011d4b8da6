"""The selective scan: backends agree with the loop, gradients are right in float64, bad input is refused."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmkit.errors import BackendUnavailableError, InputError
from mmkit.ops import Mamba, selective_scan
from mmkit.ops.numba_kernels import run_jobs

LENGTHS = (1, 2, 31, 32, 33, 64, 65, 150)


def problem(
    length: int, dim: int = 20, n: int = 4, batch: int = 2, groups: int = 0, dtype=torch.float32
) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias drawn from fixed distributions."""
    make = torch.Generator().manual_seed(length + dim + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=dtype).requires_grad_()

    shape = (batch, groups, n, length) if groups else (batch, n, length)
    A = (-0.1 - 4 * torch.rand(dim, n, generator=make, dtype=dtype)).requires_grad_()
    u, delta, z = (normal(batch, dim, length) for _ in range(3))
    return [u, delta, A, normal(*shape), normal(*shape), normal(dim), z, normal(dim)]


def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
    """Output, last state and all gradients of one backend, through both results."""
    y, last = selective_scan(*tensors, delta_softplus=True, return_last_state=True, backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).sum() + last.sum(), tensors)
    return [y, last, *grads]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("length", "n"), [*itertools.product(LENGTHS, (1, 4, 16)), (1000, 4)])
def test_backends_agree_with_the_loop(backend: str, length: int, n: int) -> None:
    tensors = problem(length, n=n)
    want = run("reference", tensors)
    got = run(backend, tensors)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max().item())
    for a, b in zip(got[2:], want[2:], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dim, groups", [(20, 2), (48, 3), (6, 6), (16, 1)])
def test_groups_share_b_and_c(backend: str, dim: int, groups: int) -> None:
    tensors = problem(70, dim=dim, groups=groups)
    for a, b in zip(run(backend, tensors), run("reference", tensors), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    parts = [slice(g * dim // groups, (g + 1) * dim // groups) for g in range(groups)]
    u, delta, A, B, C, D, z, bias = tensors
    separate = [
        selective_scan(u[:, p], delta[:, p], A[p], B[:, g], C[:, g], D[p], z[:, p], bias[p], True, backend=backend)
        for g, p in enumerate(parts)
    ]
    whole = selective_scan(*tensors, delta_softplus=True, backend=backend)
    torch.testing.assert_close(torch.cat(separate, 1), whole, atol=1e-5, rtol=1e-5)


def test_torch_backend_over_several_segments() -> None:
    tensors = problem(4500, dim=3, n=2, batch=1)
    for a, b in zip(run("torch", tensors), run("cpu", tensors), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_gradcheck_in_float64() -> None:
    tensors = problem(7, dim=4, n=2, groups=2, dtype=torch.float64)

    def scan(*t: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*t, delta_softplus=True, return_last_state=True, backend="torch")

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


def test_double_precision_takes_the_torch_backend() -> None:
    tensors = problem(33, dtype=torch.float64)
    for a, b in zip(run("auto", tensors), run("reference", tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    with pytest.raises(InputError, match="float64"):
        selective_scan(*tensors, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_strong_decay_stays_finite(backend: str) -> None:
    u = torch.ones(1, 3, 200, requires_grad=True)
    A = torch.full((3, 2), -200.0, requires_grad=True)
    ones = torch.ones(1, 2, 200)
    y = selective_scan(u, torch.ones(1, 3, 200), A, ones, ones, backend=backend)
    y.sum().backward()
    torch.testing.assert_close(y, torch.full_like(y, 2.0))
    assert torch.isfinite(u.grad).all()
    assert torch.isfinite(A.grad).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nan_comes_out_again_in_its_own_channel_only(backend: str) -> None:
    u, delta, A, B, C, *_ = (t.detach() for t in problem(40))
    u[0, 3, 10] = float("nan")
    y = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
    assert y[0, 3, 10:].isnan().all()
    for clean in (y[0, :3], y[1], y[0, 3, :10]):
        assert torch.isfinite(clean).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_non_contiguous_inputs(backend: str) -> None:
    u, delta, A, B, C, *_ = (t.detach() for t in problem(50))
    want = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference")
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, delta, B, C)]
    got = selective_scan(
        strided[0], strided[1], A.t().contiguous().t(), *strided[2:], delta_softplus=True, backend=backend
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, delta, A, B, C, *_ = (t.detach() for t in problem(60))
    half = [t.to(dtype) for t in (u, delta, B, C)]
    got = selective_scan(half[0], half[1], A, *half[2:], delta_softplus=True)
    want = selective_scan(half[0].float(), half[1].float(), A, half[2].float(), half[3].float(), delta_softplus=True)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))


def test_threads_give_the_same_result() -> None:
    tensors = problem(100, dim=40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", tensors)
        torch.set_num_threads(3)
        three = run("cpu", tensors)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


def test_an_error_in_a_job_is_raised() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            run_jobs(lambda x: 1 // x, [(1,), (0,), (2,)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_forked_worker_processes_can_scan() -> None:
    code = (
        "import torch, multiprocessing as m\n"
        "from mmkit.ops import selective_scan\n"
        "torch.set_num_threads(2)\n"
        "x = torch.ones(2, 40, 8); b = torch.ones(2, 3, 8)\n"
        "def f(_): return float(selective_scan(x, x, -torch.ones(40, 3), b, b).sum())\n"
        "want = f(0)\n"
        "assert m.get_context('fork').Pool(1).map(f, [0]) == [want]\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, env={**os.environ})
    assert done.returncode == 0


def test_operator_registration_is_sound() -> None:
    u, delta, A, B, C, D, z, bias = problem(10, dim=4, n=2, groups=1)
    runs = [
        (torch.ops.mmkit.selective_scan_torch, (u, delta.abs(), A, B, C)),
        (torch.ops.mmkit.selective_scan_cpu, (u, delta, A, B, C, D, z, bias, True)),
        (torch.ops.mmkit.selective_scan_cpu, (u, delta.abs(), A, B, C, None, None, None, False)),
    ]
    for operator, arguments in runs:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_fake_and_real_states_have_the_same_shape() -> None:
    from mmkit.ops.selective_scan import _STEPS, cpu as selective_scan_cpu, reference as selective_scan_torch

    assert {"cpu": selective_scan_cpu.STEP, "torch": selective_scan_torch.STEP} == _STEPS


def test_export_keeps_one_node() -> None:
    block = Mamba(8, backend="cpu").eval()
    x = torch.randn(1, 12, 8)
    exported = torch.export.export(block, (x,))
    scans = [n for n in exported.graph.nodes if "selective_scan" in str(n.target)]
    assert len(scans) == 1
    torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(2, 20)}, "u must be"),
        ({0: torch.zeros(2, 20, 0)}, "not empty"),
        ({1: torch.zeros(2, 20, 9)}, "delta must have"),
        ({2: torch.zeros(19, 4)}, "A must be real"),
        ({2: torch.zeros(20, 4, dtype=torch.complex64)}, "A must be real"),
        ({3: torch.zeros(2, 3, 4, 8)}, "divisible by G"),
        ({4: torch.zeros(2, 2, 4, 8)}, "same number of groups"),
        ({5: torch.zeros(3)}, "D must be"),
    ],
)
def test_misfitting_arguments_are_named(change: dict[int, Tensor], message: str) -> None:
    tensors = problem(8)
    for index, value in change.items():
        tensors[index] = value
    with pytest.raises(InputError, match=message):
        selective_scan(*tensors)


def test_missing_cuda_kernel_names_the_pip_command_and_auto_falls_back_visibly(caplog, monkeypatch) -> None:
    tensors = problem(8)
    with pytest.raises(BackendUnavailableError, match="CUDA tensors only"):
        selective_scan(*tensors, backend="cuda")
    with pytest.raises(InputError, match="unknown backend"):
        selective_scan(*tensors, backend="fast")
    from mmkit.ops import backends
    from mmkit.ops.selective_scan import _PREFERENCE, _PROBLEMS, cuda

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    cuda.mamba_ssm_problem.cache_clear()
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.INFO, logger="mmkit.ops"):
        chosen = backends.choose_backend("selective_scan", "auto", torch.device("cuda"), _PREFERENCE, _PROBLEMS)
    cuda.mamba_ssm_problem.cache_clear()
    assert chosen == "torch"
    assert "pip install 'mmkit[cuda]'" in caplog.text


@pytest.mark.parametrize("left_out", [(5,), (6,), (7,), (5, 6, 7)])
@pytest.mark.parametrize("softplus", [True, False])
def test_arguments_that_are_left_out(left_out: tuple[int, ...], softplus: bool) -> None:
    results = []
    for backend in ("cpu", "reference"):
        tensors: list[Tensor | None] = [*problem(70, dim=5)]
        if not softplus:
            tensors[1] = tensors[1].detach().abs().mul(0.1).requires_grad_()
            tensors[7] = tensors[7].detach().abs().mul(0.1).requires_grad_()
        for index in left_out:
            tensors[index] = None
        given = [t for t in tensors if t is not None]
        y = selective_scan(*tensors, delta_softplus=softplus, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), given)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_extreme_steps_and_gates() -> None:
    u, delta, A, B, C, D, z, bias = (t.detach() for t in problem(66))
    extremes = torch.tensor([-torch.inf, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
    delta[..., :8], z[..., 8:16] = extremes, extremes.clamp(-1e4)
    got, want = (selective_scan(u, delta, A, B, C, D, z, bias, True, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
