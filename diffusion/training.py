"""Fine-tune the denoiser of a diffusers pipeline on captioned pictures, with any adapter or whole: `finetune`.

The loss is the one the model's scheduler stands for (noise, velocity, clean sample or flow), captions are dropped now and then for
guidance, pictures are encoded once, and the validation loss is taken at noise and timesteps that stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmkit.adapters import Adapter, apply_adapter, save_adapter
from mmkit.diffusion.denoiser import Condition, Denoiser
from mmkit.diffusion.pictures import Captioned, open_captions
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.errors import InputError
from mmkit.storage import read_tensors, write_safetensors
from mmkit.storage.files import expanded
from mmkit.training import FitConfig, FitResult, StepInfo, fit
from mmkit.training.classifying import no_settings
from mmkit.training.digest import tensors_digest
from mmkit.training.reporting import dry
from mmkit.training.setup import kept_modes

LEARNING_RATES = {"difffit": 1e-2, "bitfit": 1e-2, "ia3": 1e-2, "lora": 2e-3, "oft": 2e-3, "full": 5e-4}
"""Peak learning rates for small models and few pictures; other methods start from 2e-3."""

Batch = tuple[Tensor, Tensor]


@dataclass
class FinetuneResult:
    """What fine-tuning produced.

    Attributes:
        pipeline: with the trained adapter attached under the name "default".
        adapter: it, or `None` after training all weights.
        fit: history, seconds, why it stopped. `fit.metrics["loss"]` is the validation loss.
        folder: where the adapter (or the pipeline) was saved, or `None`.
        trained, total: numbers of parameters.
        plan: what would be trained, of a dry run (`fit.stopped` is "dry run" then).
    """

    pipeline: TextToImagePipeline
    adapter: Adapter | None
    fit: FitResult
    folder: Path | None
    trained: int
    total: int
    plan: str = ""

    def summary(self, model: str | None = None) -> str:
        """What came out and how to use it on `model`, for people."""
        if self.plan:
            return self.plan
        method = self.adapter.method if self.adapter is not None else "full"
        told = (
            f"{method} trained {self.trained:,} of {self.total:,} parameters in {self.fit.steps} steps; denoising loss on pictures "
            f"that were held back: {self.fit.metrics['loss']:.4f}."
        )
        if self.folder is None:
            return told
        use = f'draw = mmkit.pipeline("text-to-image"{"" if model is None else f", {model!r}"}); '
        use += f'draw.load_adapter("mine", "{self.folder}")'
        if self.adapter is None:
            use = f'draw = mmkit.pipeline("text-to-image", "{self.folder}")'
        return f'{told}\nSaved to {self.folder}. Try it in Python: {use}; draw("WORDS").save("pictures.png")'


class Latents(Dataset[Batch]):
    """Encoded pictures with the number of their caption: `dataset[i] -> (latents, caption)`."""

    def __init__(self, latents: Tensor, captions: Sequence[int]):
        self.latents, self.captions = latents, torch.as_tensor(captions)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Batch:
        return self.latents[index], self.captions[index]


class DenoisingLoss:
    """`loss_fn` for `mmkit.fit` with a `Denoiser` on batches of `Latents`.

    Args:
        conditions: encoded captions, by number; the last one is the empty caption.
        drop: how often a caption is replaced by the empty one.
    """

    def __init__(self, conditions: Condition, drop: float = 0.1):
        self.conditions, self.drop = conditions, drop

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        clean, captions = batch
        noise, t = torch.randn_like(clean), model.objective.timesteps(len(clean), clean.device)  # type: ignore[union-attr, operator]
        dropped = torch.rand(len(clean), device=clean.device) < self.drop
        captions = torch.where(dropped, len(next(iter(self.conditions.values()))) - 1, captions)
        loss: Tensor = model.loss(clean, self.condition(captions), noise, t).mean()  # type: ignore[operator]
        return loss

    def condition(self, captions: Tensor) -> Condition:
        """The encoded captions of a batch, padding that none of them needs left out."""
        chosen = {k: v.to(captions.device)[captions] for k, v in self.conditions.items()}
        mask = chosen.get("encoder_attention_mask")
        if mask is not None:
            length = int(mask.sum(1).max())
            chosen = {k: v[:, :length] for k, v in chosen.items()}
        return chosen


class ValidationLoss:
    """`metrics_fn` for `mmkit.fit`: the denoising loss with noise and timesteps that depend on `seed` alone."""

    def __init__(self, loss: DenoisingLoss, seed: int = 0):
        self.loss, self.seed = loss, seed

    def __call__(self, model: nn.Module, loader: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed)
        objective: Any = model.objective
        total, count = 0.0, 0
        for clean, captions in loader:
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            steps = torch.rand(len(clean), generator=generator) * (objective.steps - 1)
            t = (steps if objective.kind == "flow" else steps.round().long()).to(clean.device)
            total += float(model.loss(clean, self.loss.condition(captions), noise, t).sum())  # type: ignore[operator]
            count += len(clean)
        return {"loss": total / count}


def finetune(
    data: str | os.PathLike[str] | Captioned | tuple[Tensor, Sequence[str]],
    model: Any = None,
    adapter: str = "difffit",
    *,
    output_dir: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    val: float = 0.1,
    drop: float = 0.1,
    lr: float | None = None,
    max_steps: int = 150,
    batch_size: int = 32,
    seed: int = 0,
    ema_decay: float | None = None,
    sample_every: int = 0,
    samples: Sequence[str] = (),
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
    resume: bool | str = "auto",
    dry_run: bool = False,
) -> FinetuneResult:
    """Adapt a text-to-image model to pictures.

    Args:
        data: a folder (see `open_captions`), a `Captioned`, or pictures (N, 3, H, W) in 0..1 with their captions.
        model: as in `TextToImagePipeline`; its denoiser is trained, text encoder and autoencoder stay as they are.
        adapter: any of `mmkit.list_adapters()`, or "full" for all weights of the denoiser.
        output_dir: gets `adapter/` (or `pipeline/`), `run/` (logs and checkpoints: the same call continues), `latents.safetensors`
            and `samples/`; `None` writes nothing.
        settings: of the adapter.
        val: share of the pictures kept for the validation loss (at least one).
        drop: how often a caption is left out, for guidance.
        lr: peak learning rate; default: `LEARNING_RATES`.
        ema_decay, max_steps, batch_size, seed, progress, resume: see `FitConfig`.
        sample_every: every so many steps draw `samples` (default: the first captions) into `samples/step_*.png`.
        on_step, should_stop: see `mmkit.training.fit`.
        dry_run: read everything and say what would be trained (`plan`), no more; nothing is written, and the model stays as it was.

    Raises:
        InputError: unusable pictures or captions, an unknown adapter, a denoiser that cannot be trained here.
        TrainingError: the loss became NaN.
    """
    if adapter == "full":
        no_settings(settings, adapter)
    draw = model if isinstance(model, TextToImagePipeline) else TextToImagePipeline(model)
    denoiser = Denoiser(draw.pipe)
    folder = None if output_dir is None else expanded(output_dir)
    pictures, captions = _pictures(data, denoiser.size)
    distinct = list(dict.fromkeys(captions))
    numbers = [distinct.index(c) for c in captions]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(val * len(order)))
    train, kept = order[held:], order[:held]
    config = FitConfig(
        max_steps=max_steps, batch_size=batch_size, lr=lr or LEARNING_RATES.get(adapter, 2e-3), warmup_steps=max_steps // 20,
        weight_decay=0.0, monitor="-loss", ema_decay=ema_decay, seed=seed, progress=progress, resume=resume,
        restore_best=False,
    )  # fmt: skip
    total = sum(p.numel() for p in denoiser.model.parameters())
    if dry_run:
        planned, plan = _dry(denoiser, adapter, settings, config, (len(train), len(kept), len(distinct)))
        return FinetuneResult(draw, None, planned, None, planned.trainable_parameters, total, plan)
    latents = _encoded(denoiser, pictures, folder)
    conditions = denoiser.encode_captions([*distinct, *denoiser.empty_captions(1)])
    attached = None if adapter == "full" else apply_adapter(denoiser.model, adapter, **(settings or {}))
    if attached is None:
        denoiser.model.requires_grad_(True)
    loss = DenoisingLoss(conditions, drop)
    result = fit(
        denoiser,
        Latents(latents[train], [numbers[i] for i in train]),
        Latents(latents[kept], [numbers[i] for i in kept]),
        loss_fn=loss,
        metrics_fn=ValidationLoss(loss, seed),
        config=config,
        output_dir=folder and folder / "run",
        adapter=attached,
        on_step=Sampler(draw, folder, sample_every, list(samples) or distinct[:8], on_step),
        should_stop=should_stop,
    )
    denoiser.eval()
    saved = _save(draw, attached, folder) if folder is not None and result.stopped != "interrupted" else None
    return FinetuneResult(draw, attached, result, saved, result.trainable_parameters, total)


def _dry(
    denoiser: Denoiser, adapter: str, settings: dict[str, Any] | None, config: FitConfig, counts: tuple[int, int, int]
) -> tuple[FitResult, str]:
    """What would be trained; the adapter is attached for as long as it takes to count. `counts`: to train on, held back, captions."""
    train, held, captions = counts
    told = f"{captions:,} caption{'s' if captions > 1 else ''}"
    if adapter == "full":
        with kept_modes(denoiser.model):
            return dry(denoiser.model.requires_grad_(True), config, train, held, told)
    attached = apply_adapter(denoiser.model, adapter, **(settings or {}))
    try:
        return dry(denoiser.model, config, train, held, told, attached)
    finally:
        attached.detach()


def _pictures(data: Any, size: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, size, size) in -1..1 and their captions."""
    if isinstance(data, (str, os.PathLike)):
        data = open_captions(data)
    if isinstance(data, Captioned):
        pictures, captions = data.tensor(size), data.captions
    else:
        pictures, captions = data[0] * 2 - 1, list(data[1])
        if pictures.dim() != 4 or pictures.shape[1] != 3 or len(pictures) != len(captions):
            raise InputError(
                f"Pictures (N, 3, H, W) and N captions are needed, not {tuple(pictures.shape)} and {len(captions)}."
            )
        if pictures.shape[-2:] != (size, size):
            pictures = nn.functional.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    if len(captions) < 2:
        raise InputError(f"At least two pictures are needed, one of them for validation; found {len(captions)}.")
    if not torch.isfinite(pictures).all():
        raise InputError("The pictures hold NaN or infinite values.")
    return pictures, captions


def _encoded(denoiser: Denoiser, pictures: Tensor, folder: Path | None) -> Tensor:
    """Latents of all pictures, kept in `folder` for the next run on the same ones."""
    device = next(denoiser.model.parameters()).device
    file = folder and folder / "latents.safetensors"
    key = tensors_digest([("pictures", pictures)])
    if file and file.is_file() and key in (found := read_tensors(file, allow_pickle_format=False)):
        return found[key]
    parts = [denoiser.encode_pictures(part.to(device)).cpu() for part in pictures.split(16)]
    latents = torch.cat(parts)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(file, {key: latents})
    return latents


class Sampler:
    """Draws pictures every so many steps, then passes on to the caller's `on_step`."""

    def __init__(self, draw: TextToImagePipeline, folder: Path | None, every: int, prompts: list[str], then: Any):
        self.draw, self.folder, self.every, self.prompts, self.then = draw, folder, every, prompts, then

    def __call__(self, info: StepInfo) -> None:
        if self.every and self.folder is not None and info.step % self.every == 0:
            self.draw(self.prompts).save(self.folder / "samples" / f"step_{info.step:06d}.png")
        if self.then is not None:
            self.then(info)


def _save(draw: TextToImagePipeline, adapter: Adapter | None, folder: Path) -> Path:
    if adapter is not None:
        return save_adapter(adapter, folder / "adapter")
    draw.pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
