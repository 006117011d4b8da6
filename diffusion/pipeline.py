"""Text-to-image: any diffusers pipeline, with seeds per picture, progress, and adapters by name and strength.

draw = mmkit.pipeline("text-to-image")                       # the bundled model of drawn scenes
draw.load_adapter("night", "runs/night/adapter")
draw(["a red circle", "two blue stars"], seed=3, strengths={"night": 0.5}).save("pictures.png")
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from mmkit.adapters import attached_adapters, load_adapter, set_active_adapters
from mmkit.devices import resolve_device, resolve_dtype
from mmkit.diffusion.denoiser import denoiser_of
from mmkit.diffusion.result import TextToImage
from mmkit.errors import CheckpointError, InputError, check_seed, nearest
from mmkit.lazy import library
from mmkit.storage import read_json
from mmkit.storage.files import expanded

BUNDLED = "text_to_image_scenes"


class TextToImagePipeline:
    """Pictures from prompts.

    Args:
        model: a diffusers pipeline, a folder that `save_pretrained` of one wrote, or `None` for the bundled model of drawn scenes.
        device, dtype: as in `mmkit.pipeline`.

    Attributes:
        pipe: the diffusers pipeline.
        denoiser: its transformer or UNet, where adapters go.

    Raises:
        InputError: not a text-to-image pipeline.
        CheckpointError: a folder that diffusers cannot read.
    """

    task = "text-to-image"
    default_weights = BUNDLED

    def __init__(self, model: Any = None, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"):
        self.device = resolve_device(device)
        self.pipe = self._open(model)
        self.denoiser = denoiser_of(self.pipe)
        own = next(self.denoiser.parameters()).dtype
        wanted = resolve_dtype(dtype, own)
        self.pipe.to(*(self.device, wanted) if wanted != own else (self.device,))
        self.pipe.set_progress_bar_config(disable=True)
        self._takes = set(inspect.signature(self.pipe.__call__).parameters)
        if "prompt" not in self._takes:
            raise InputError(f"{type(self.pipe).__name__} takes no prompt; give a text-to-image pipeline of diffusers.")

    def _open(self, model: Any) -> Any:
        if model is None or model == BUNDLED:
            from mmkit.backbones import load_weights
            from mmkit.diffusion.scenes import scenes_pipeline

            return scenes_pipeline(load_weights(BUNDLED))  # type: ignore[arg-type]
        if not isinstance(model, (str, os.PathLike)):
            return model
        diffusers = library("diffusers")

        folder = expanded(model)
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"{folder} is not a folder of a diffusers pipeline: it has no model_index.json. Give such a folder, or no model for "
                "the bundled one."
            )
        try:
            index = read_json(folder / "model_index.json")
            without = (
                {"vae": None} if index.get("vae", [None]) == [None, None] else {}
            )  # a pipeline that works on pixels
            return diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, **without
            )
        except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"diffusers cannot read {folder}: {str(error)[:300]}") from error

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Attach a saved adapter to the denoiser under `name`. Raises `CheckpointError` when it does not fit."""
        load_adapter(self.denoiser, folder, name=name)

    @property
    def adapters(self) -> list[str]:
        """Names of the attached adapters."""
        return list(attached_adapters(self.denoiser))

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that the bundled model has never seen; empty for models that know all words."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown is None:
            return []
        return [w for w in prompt.split() if unknown in tokenizer(w, add_special_tokens=False).input_ids]  # type: ignore[misc]

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        steps: int = 16,
        guidance_scale: float = 3.0,
        negative_prompt: str = "",
        strengths: Mapping[str, float] | None = None,
        batch_size: int = 16,
        on_progress: Callable[[float], None] | None = None,
        **options: Any,
    ) -> TextToImage:
        """Draw `num_images` pictures for each prompt.

        Args:
            prompts: one or several; adjacent pictures belong to the same prompt.
            seed: picture i is drawn from `seed + i`, whatever the batch.
            steps, guidance_scale, negative_prompt: as in diffusers.
            strengths: adapter name -> strength for this call; `None` leaves all as they are, `{}` switches all off.
            batch_size: pictures that are computed at once.
            on_progress: called with the share that is done, 0..1.
            options: passed to the diffusers pipeline (height, width, ...).

        Raises:
            InputError: no prompt, a number that is out of range, an unknown adapter or option.
        """
        texts: list[Any] = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        if not texts or not all(isinstance(p, str) for p in texts):
            raise InputError(f"Give a prompt, or several in a list, not {type(prompts).__name__}.")
        for name, value in {"num_images": num_images, "steps": steps, "batch_size": batch_size}.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number from 1, not {value!r}.")
        check_seed(seed)
        if steps == 1 and type(self.pipe).__name__ == "PixArtAlphaPipeline":
            raise InputError("PixArtAlphaPipeline needs two steps or more: its single step is for distilled models.")
        if unknown := set(options) - self._takes:
            raise InputError(
                f"{type(self.pipe).__name__} takes no {sorted(unknown)}. {nearest(min(unknown), self._takes)}"
            )
        texts = [p for p in texts for _ in range(num_images)]
        seeds = [seed + i for i in range(len(texts))]
        started = time.perf_counter()
        images: list[Image.Image] = []
        with _Strengths(self.denoiser, strengths):
            for start in range(0, len(texts), batch_size):
                part = slice(start, start + batch_size)

                def report(pipe: Any, step: int, *rest: Any, start: int = start, size: int = len(texts[part])) -> Any:
                    if on_progress is not None:
                        on_progress((start + size * min(step + 1, steps) / steps) / len(texts))
                    return rest[-1] if rest else None

                images += self.run(texts[part], seeds[part], steps, guidance_scale, negative_prompt, report, options)
        settings = {"steps": steps, "guidance_scale": guidance_scale, "strengths": dict(strengths or {}), **options}
        return TextToImage(images, texts, seeds, settings, time.perf_counter() - started)

    def run(
        self,
        texts: list[str],
        seeds: list[int],
        steps: int,
        guidance: float,
        negative: str = "",
        report: Callable[..., Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Image.Image]:
        """Call the diffusers pipeline once; `report` is its `callback_on_step_end`."""
        pixels = "vae" in self.pipe.components and self.pipe.vae is None
        settings: dict[str, Any] = {
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": min(getattr(self.pipe.tokenizer, "model_max_length", 120), 120),
            "output_type": "latent" if pixels else "pil",
            "negative_prompt": [negative] * len(texts),
        }
        if report is None:
            pass
        elif "callback_on_step_end" in self._takes:
            settings["callback_on_step_end"] = report
        elif "callback" in self._takes:
            settings |= {"callback": lambda step, *rest: report(None, step), "callback_steps": 1}
        out = self.pipe(
            prompt=texts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            **{k: v for k, v in settings.items() if k in self._takes} | dict(options or {}),
        ).images
        if not pixels:
            return list(out)
        bytes_ = ((out.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
        return [Image.fromarray(b) for b in bytes_]


class _Strengths:
    """Inside the block exactly the named adapters act, at their strengths."""

    def __init__(self, model: torch.nn.Module, strengths: Mapping[str, float] | None):
        self.model, self.wanted = model, strengths

    def __enter__(self) -> None:
        if self.wanted is None:
            return
        adapters = attached_adapters(self.model)
        self.before = {name: (a.enabled, a.scale) for name, a in adapters.items()}
        set_active_adapters(self.model, list(self.wanted))
        for name, strength in self.wanted.items():
            adapters[name].scale = strength

    def __exit__(self, *error: Any) -> None:
        if self.wanted is None:
            return
        for name, (enabled, scale) in self.before.items():
            adapter = attached_adapters(self.model)[name]
            adapter.enabled, adapter.scale = enabled, scale
