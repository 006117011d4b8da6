"""A scene from posed pictures: Adam on the rasteriser, with Gaussians that wander, multiply and are reused.

The loss is 0.8 L1 + 0.2 (1 - SSIM) plus small pressure on opacities and scales; every so often Gaussians that became transparent are
put where opaque ones are, new ones are added in the same way up to a limit, and each step shakes positions a little: the scheme of
arXiv 2404.09591, which needs no good starting points.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmkit.errors import CheckpointError, InputError, InterruptedRun, RunDiffersError, check_seed
from mmkit.ops.gaussian.reference import covariance
from mmkit.pointcloud.cameras import PosedImages
from mmkit.pointcloud.gaussians import NAMES, GaussianModel
from mmkit.pointcloud.similarity import ssim
from mmkit.storage import folder_lock, read_tensors, write_safetensors
from mmkit.storage.files import check_writable
from mmkit.storage.folders import check_no_saved
from mmkit.training.setup import StopSignals

_RATES = {"means": 1.6e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 2.5e-3 / 20}
_DEAD = 0.005  # opacity below which a Gaussian is put elsewhere
STATE = "fit.safetensors"


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    The defaults were chosen on drawn scenes other than those `benchmarks/rasterizer.py --fit` measures, and on other pictures of its
    room: among rates of 2 to 9, noise of 0.1 to 1, with and without SSIM, 5000 to 16000 Gaussians.

    Attributes:
        steps: one picture each.
        max_gaussians: the number grows towards this.
        start_gaussians: how many to begin with, from known points or at random.
        sh_degree: of the result; one degree more every quarter of the steps.
        rate: factor on all learning rates; those of positions are also scaled by the scene's size and fall to a hundredth.
        ssim: weight of the structural term.
        opacity_pressure, scale_pressure: weights of their means in the loss.
        noise: strength of the shaking.
        refine_every: steps between moving and adding Gaussians, until 85 % of the steps.
        background: colour behind everything.
        rasterize_mode: "classic" or "antialiased".
        seed: of points, order of pictures and noise.
    """

    steps: int = 1000
    max_gaussians: int = 12000
    start_gaussians: int = 4000
    sh_degree: int = 2
    rate: float = 4.0
    ssim: float = 0.2
    opacity_pressure: float = 0.003
    scale_pressure: float = 0.003
    noise: float = 0.3
    refine_every: int = 25
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rasterize_mode: str = "classic"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.max_gaussians < 1 or self.start_gaussians < 1 or self.refine_every < 1:
            raise InputError("steps, max_gaussians, start_gaussians and refine_every must be at least 1.")
        if not 0 <= self.sh_degree <= 3:
            raise InputError(f"sh_degree must be 0 to 3, not {self.sh_degree}.")
        check_seed(self.seed)


@dataclass
class FitResult:
    """A fitted scene, the loss of each step, and figures of held-out pictures if there were any."""

    model: GaussianModel
    losses: list[float]
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)


def fit_images(
    posed: PosedImages, config: FitConfig | None = None, *, model: GaussianModel | None = None, held_out: PosedImages | None = None,
    output_dir: str | os.PathLike[str] | None = None, resume: bool = True, save_every: int = 500, strategy: Any = None,
    progress: bool = True, on_step: Callable[[int, float, GaussianModel], None] | None = None,
) -> FitResult:  # fmt: skip
    """Reconstruct a scene.

    Args:
        posed: pictures with cameras; their known points are where Gaussians start, else these start anywhere the cameras look.
        config: settings.
        model: a scene to go on from.
        held_out: pictures that are only measured, at the end.
        output_dir: keeps the state every `save_every` steps and when Ctrl-C or SIGTERM ends the fit; with `resume` it goes on from there
            as if nothing had happened.
        strategy: one of gsplat's (`DefaultStrategy`, `MCMCStrategy`) in place of ours; it cannot be resumed.
        progress: show a bar.
        on_step: called with the step (from 1), its loss and the model; what it raises ends the fit.

    Raises:
        InputError: no pictures, a state of other settings (`RunDiffersError`), a folder in use or saved whole, a loss that is not finite.
        CheckpointError: the state is damaged.
        InterruptedRun: by Ctrl-C or SIGTERM, with the state saved.

    Example:
        >>> from mmkit.pointcloud.splats import FitConfig, drawn_scene, fit_images
        >>> result = fit_images(drawn_scene(4, 32), FitConfig(steps=3, start_gaussians=50), progress=False)
        >>> len(result.losses)
        3
    """
    config = config or FitConfig()
    if len(posed) == 0:
        raise InputError("There are no pictures to fit.")
    fit = _Fit(posed, config, model, strategy)
    started = time.perf_counter()
    with (
        _kept(fit, output_dir, resume) as keep,
        tqdm(total=config.steps, initial=fit.step, disable=not progress, desc="fitting", unit="step") as bar,
    ):
        while fit.step < config.steps:
            loss = fit.advance()
            bar.update()
            if fit.step % 20 == 0:
                bar.set_postfix(loss=f"{loss:.4f}", gaussians=len(fit.model))
            keep(fit.step % save_every == 0 or fit.step == config.steps)
            if on_step is not None:
                on_step(fit.step, loss, fit.model)
    result = FitResult(fit.model, fit.losses, time.perf_counter() - started)
    if held_out is not None:
        result.scores = measure(fit.model, held_out, config.background)
    return result


@contextlib.contextmanager
def _kept(fit: _Fit, output_dir: str | os.PathLike[str] | None, resume: bool) -> Iterator[Callable[[bool], None]]:
    """Yield what is to be called after each step, with whether its state is due; the folder is ours meanwhile."""
    if output_dir is None:
        yield lambda due: None
        return
    check_no_saved(output_dir)
    with folder_lock(output_dir) as folder, StopSignals() as signals:
        check_writable(folder / STATE)
        if resume and (folder / STATE).is_file():
            fit.restore(folder / STATE)

        def keep(due: bool) -> None:
            if due or signals.number:
                fit.save(folder / STATE)
            if signals.number:
                raise InterruptedRun(fit.step, signals.number, folder)

        yield keep


@torch.no_grad()
def measure(
    model: GaussianModel, posed: PosedImages, background: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of the pictures, which are clamped and rounded to 8 bits first."""
    psnr, similar = [], []
    ground = torch.tensor([background])
    for i in range(len(posed)):
        image, _, _ = model.render(posed.camera[i], backgrounds=ground)
        got, want = (image[0].clamp(0, 1) * 255).round() / 255, posed.images[i].float() / 255
        psnr.append(-10 * math.log10(max(float((got - want).square().mean()), 1e-10)))
        similar.append(float(ssim(got.permute(2, 0, 1), want.permute(2, 0, 1))))
    return {"psnr": sum(psnr) / len(psnr), "ssim": sum(similar) / len(similar)}


class _Fit:
    """The state of a fit and one step of it."""

    def __init__(self, posed: PosedImages, config: FitConfig, model: GaussianModel | None, strategy: Any):
        self.posed, self.config, self.strategy = posed, config, strategy
        self.random = torch.Generator().manual_seed(config.seed)
        self.size = _scene_size(posed)
        self.model = _start(posed, config, self.random, self.size) if model is None else model
        self.optimizer = torch.optim.Adam(
            [{"params": [getattr(self.model, n)], "name": n, "lr": config.rate * r} for n, r in _RATES.items()],
            eps=1e-15,
            fused=True,
        )
        self.step, self.order = 0, torch.empty(0, dtype=torch.long)
        self.losses: list[float] = []
        self.strategy_state = None if strategy is None else strategy.initialize_state()

    def advance(self) -> float:
        """One picture; the loss."""
        c = self.config
        if not len(self.order):
            self.order = torch.randperm(len(self.posed), generator=self.random)
        which, self.order = int(self.order[0]), self.order[1:]
        rate = c.rate * _RATES["means"] * self.size * 0.01 ** (self.step / c.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        degree = min(c.sh_degree, 4 * self.step // c.steps)
        packed = self.strategy is None
        image, _, meta = self.model.render(
            self.posed.camera[which], sh_degree=degree, backgrounds=torch.tensor([c.background]), packed=packed
        )
        got, want = image[0].permute(2, 0, 1), self.posed.images[which].permute(2, 0, 1).float() / 255
        loss = (1 - c.ssim) * F.l1_loss(got, want)
        if c.ssim:
            loss = loss + c.ssim * (1 - ssim(got, want))
        pressed = loss + c.opacity_pressure * self.model.opacities.sigmoid().mean()
        pressed = pressed + c.scale_pressure * self.model.scales.exp().mean() / self.size
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"The loss of step {self.step + 1} is {value}; lower `rate`, or check the cameras.")
        if self.strategy is None:
            pressed.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._shake(rate)
            if self.step % c.refine_every == c.refine_every - 1 and self.step < 0.85 * c.steps:
                self._reuse()
                self._add()
        else:
            self._follow(pressed, meta, rate)
        self.step += 1
        self.losses.append(value)
        return value

    def _follow(self, loss: Tensor, meta: dict[str, Any], rate: float) -> None:
        """gsplat's way of refining: it replaces entries of a dictionary of parameters."""
        parameters = dict(self.model.named_parameters())
        optimizers = {n: _OneGroup(self.optimizer, i) for i, n in enumerate(_RATES)}
        arguments = (parameters, optimizers, self.strategy_state, self.step, meta)
        self.strategy.step_pre_backward(*arguments)
        loss.backward()
        extra = {"lr": rate} if hasattr(self.strategy, "noise_lr") else {"packed": False}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.strategy.step_post_backward(*arguments, **extra)
        for name, value in parameters.items():
            setattr(self.model, name, value)
        self.model.config["num_gaussians"] = len(self.model)

    @torch.no_grad()
    def _shake(self, rate: float) -> None:
        """Noise in the shape of each Gaussian, strong only where it is nearly transparent."""
        m = self.model
        gate = 1 / (1 + torch.exp(-100 * (1 - m.opacities.sigmoid() - 0.995)))
        noise = torch.randn(m.means.shape, generator=self.random) * gate[:, None] * (self.config.noise * 5e5 * rate)
        m.means.add_(torch.einsum("nij,nj->ni", covariance(m.quats, m.scales.exp()), noise))

    @torch.no_grad()
    def _reuse(self) -> None:
        """Put transparent Gaussians where opaque ones are, sharing their opacity."""
        alive = self.model.opacities.sigmoid()
        dead = (alive <= _DEAD).nonzero().squeeze(-1)
        if not len(dead) or len(dead) == len(alive):
            return
        weights = torch.where(alive <= _DEAD, 0.0, alive)
        chosen = torch.multinomial(weights, len(dead), replacement=True, generator=self.random)
        change = {n: getattr(self.model, n).data.clone() for n in NAMES}
        self._share(change, chosen)
        for name in NAMES:
            change[name][dead] = change[name][chosen]
        lines = torch.arange(len(alive))
        lines[chosen] = -1  # their moments belong to what they were
        self.model.replace(change, self.optimizer, lines)

    @torch.no_grad()
    def _add(self) -> None:
        """5 % more, copies of opaque ones."""
        n = len(self.model)
        more = min(self.config.max_gaussians, math.ceil(1.05 * n)) - n
        if more <= 0:
            return
        chosen = torch.multinomial(
            self.model.opacities.sigmoid() + 1e-12, more, replacement=True, generator=self.random
        )
        change = {name: getattr(self.model, name).data.clone() for name in NAMES}
        self._share(change, chosen)
        change = {name: torch.cat([value, value[chosen]]) for name, value in change.items()}
        lines = torch.cat([torch.arange(n), torch.full((more,), -1)])
        lines[chosen] = -1
        self.model.replace(change, self.optimizer, lines)

    def _share(self, change: dict[str, Tensor], chosen: Tensor) -> None:
        """Opacities and scales of Gaussians that become several, so that the picture changes little (arXiv 2404.09591, eq. 9)."""
        count = torch.bincount(chosen, minlength=len(change["means"])).add(1).clamp_max(51)
        which = (count > 1).nonzero().squeeze(-1)
        n = count[which].double()
        old = change["opacities"][which].double().sigmoid()
        new = 1 - (1 - old) ** (1 / n)
        total = torch.zeros_like(new)
        for i in range(1, int(n.max()) + 1 if len(n) else 1):
            terms = sum(math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1) for k in range(i))
            total += torch.where(i <= n, terms, 0.0)
        new = new.clamp(_DEAD, 1 - 1e-6)
        change["opacities"][which] = (new / (1 - new)).log().float()
        change["scales"][which] += (old / total.clamp_min(1e-12)).log().float()[:, None]

    # ------------------------------------------------------------------------------------------------- interrupted fits

    def _about(self) -> dict[str, Any]:
        """What decides the result, as JSON gives it back."""
        cameras = self.posed.camera
        pictures = [len(self.posed), cameras.width, float(cameras.viewmats.double().sum())]
        about: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(self.config), "pictures": pictures}))
        return about

    def save(self, path: Path) -> None:
        """All that decides what comes next."""
        tensors = {f"model.{n}": getattr(self.model, n).data for n in NAMES}
        for n in NAMES:
            for key, value in self.optimizer.state[getattr(self.model, n)].items():
                tensors[f"adam.{n}.{key}"] = value
        tensors |= {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "order": self.order,
            "random": self.random.get_state(),
        }
        tensors["about"] = torch.tensor(list(json.dumps(self._about()).encode()), dtype=torch.uint8)
        write_safetensors(path, tensors)

    def restore(self, path: Path) -> None:
        """Go on from `save`. Raises `RunDiffersError`, and `CheckpointError` for a file that holds no whole state."""
        try:
            tensors = read_tensors(path, allow_pickle_format=False)
            saved, own = json.loads(bytes(tensors["about"].tolist())), self._about()
            changes = {k: f"{saved[k]} is now {own[k]}" for k in own if saved[k] != own[k]}
            if changes:
                raise RunDiffersError(path.parent, changes, finished=len(tensors["losses"]) == saved["steps"])
            self._fill(tensors)
        except RunDiffersError:
            raise
        except (
            CheckpointError,
            KeyError,
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:  # RecursionError is a RuntimeError
            raise CheckpointError(
                f"{path} holds no whole state of a fit ({type(error).__name__}: {error}). Delete it to start over."
            ) from error

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        change = {n: tensors[f"model.{n}"] for n in NAMES}
        self.model.replace(change, self.optimizer)
        for n in NAMES:
            prefix = f"adam.{n}."
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.optimizer.state[getattr(self.model, n)] = moments
        self.losses, self.order = tensors["losses"].tolist(), tensors["order"]
        self.step = len(self.losses)
        self.random.set_state(tensors["random"])


class _OneGroup:
    """One parameter group of an optimiser, as an optimiser of its own for gsplat's strategies."""

    def __init__(self, optimizer: torch.optim.Optimizer, index: int):
        self.param_groups, self.state = [optimizer.param_groups[index]], optimizer.state


def _scene_size(posed: PosedImages) -> float:
    """How far the cameras are spread around their middle, times 1.1; 1 for a single place."""
    places = posed.camera.positions
    return max(1.1 * float((places - places.mean(0)).norm(dim=1).max()), 1e-3) if len(places) > 1 else 1.0


def _start(posed: PosedImages, config: FitConfig, random: torch.Generator, size: float) -> GaussianModel:
    n = config.start_gaussians
    if posed.points is not None and len(posed.points):
        chosen = torch.randperm(len(posed.points), generator=random)[:n]
        points = posed.points[chosen]
        colors = None if posed.point_colors is None else posed.point_colors[chosen]
    else:
        centre = _focus(posed)
        points = centre + (2 * torch.rand(n, 3, generator=random) - 1) * 0.6 * size
        colors = torch.rand(n, 3, generator=random)
    model = GaussianModel.from_points(points, colors, sh_degree=config.sh_degree, rasterize_mode=config.rasterize_mode)
    if posed.points is None:  # in a room full of random points smaller Gaussians overlap less, and render faster
        model.scales.data -= math.log(2)
    return model


def _focus(posed: PosedImages) -> Tensor:
    """The point nearest to all lines of sight."""
    axes = posed.camera.viewmats[:, 2, :3]
    away = torch.eye(3) - axes[:, :, None] * axes[:, None]
    system = away.sum(0) + 1e-6 * torch.eye(3)
    return torch.linalg.solve(system, (away @ posed.camera.positions.unsqueeze(-1)).sum(0)).squeeze(-1)
