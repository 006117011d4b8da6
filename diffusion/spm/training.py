"""Training an eraser: from prompts alone, by what the frozen model answers. arXiv 2312.16145; without anchors it is ESD, arXiv 2303.07345.

One step: draw a prompt of the concept, sample some steps with the eraser acting, and there move its answer to the concept towards
`neutral - s (positive - neutral)` of the frozen model, while its answers to anchors stay the frozen model's.

Differences to Con6924/SPM:
- The timestep is the one that sampling has come to. The official code takes the one at the same share of the 1,000 training timesteps,
  which lies up to one step of sampling earlier.
- Anchors are all used. Of its four the official code predicts the second and the fourth, and the empty prompt twice:
  `anchor_kind="released"` does that.
- Pure noise, where sampling begins, is trained on as well; the official code begins after one step.
- The neutral answer is to the concept's own prompt with the surrogate in its place, "a circle" for "a red circle", so that what else a
  prompt says is not pushed away with the concept. For a prompt that is the concept alone it is the official one.
- `own_anchors` looks at anchors in pictures on the way to themselves. In those of the concept, where the official code looks, they are
  strangers, and what it keeps there says little about how they are drawn.
- Pictures have the pipeline's own size; the official code draws sizes at random. The learning rate falls along one cosine, not three.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmkit.adapters import Adapter, apply_adapter, attached_adapters, set_active_adapters
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import SPM, phrases
from mmkit.diffusion.spm.calls import Calls, Condition, rows_of, with_text
from mmkit.diffusion.spm.closed_form import closed_form_edit
from mmkit.diffusion.spm.losses import anchoring_loss, erasing_loss, gaussian_anchors
from mmkit.diffusion.spm.templates import check_prompts, concept_prompts, filled
from mmkit.diffusion.spm.uce import fill
from mmkit.diffusion.training import Sampler
from mmkit.errors import InputError
from mmkit.storage.files import expanded
from mmkit.training import FitConfig, FitResult, StepInfo, fit

ANCHORS = ("prompts", "gaussian", "released", "none")
STARTS = ("zeros", "uce")
KEPT_BY_UCE = 40
"""Prompts to keep that a start from UCE's edit keeps; each is a row of its linear system."""
SMALL = 10_000_000
"""Parameters of a denoiser below which `EraseConfig.of` takes other settings than the published ones."""


@dataclass(frozen=True)
class EraseConfig:
    """How an eraser is trained. The defaults are those of the published SPMs of Stable Diffusion 1.4.

    Attributes:
        guidance_scale: how far to push away from the concept; 0 only puts the surrogate in its place.
        anchor_kind: what must stay as it is: "prompts" to keep and the empty prompt, "gaussian" embeddings, "released" (see above) or
            "none"; default: "prompts" where some are given, else "gaussian".
        anchors: anchors for each picture of a step.
        own_anchors: share of the steps that look at anchors of kind "prompts" in pictures of their own, 0..1; the others look at them
            in pictures of the concept.
        anchor_weight: of the anchoring loss. To be tried anew for another base model: small ones want 1 to 100.
        rollin_steps, rollin_guidance: of the sampling that leads to a noisy picture.
        batch_size: pictures in a step.
        start: "zeros", or "uce": the membranes of cross-attention begin with UCE's edit, cut to their rank.
        lr, max_steps, warmup_steps, seed: as in `FitConfig`.
    """

    guidance_scale: float = 1.0
    anchor_kind: str | None = None
    anchors: int = 4
    own_anchors: float = 0.0
    anchor_weight: float = 1000.0
    rollin_steps: int = 30
    rollin_guidance: float = 3.0
    batch_size: int = 1
    start: str = "zeros"
    lr: float = 1e-4
    max_steps: int = 3000
    warmup_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.anchor_kind not in (None, *ANCHORS):
            raise InputError(f"anchor_kind is one of {', '.join(ANCHORS)}, not {self.anchor_kind!r}.")
        if self.start not in STARTS:
            raise InputError(f"start is one of {', '.join(STARTS)}, not {self.start!r}.")
        for name, least in {
            "anchors": 1,
            "rollin_steps": 2,
            "batch_size": 1,
            "max_steps": 1,
            "warmup_steps": 0,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is a whole number from {least}, not {value!r}.")
        if not 0 <= self.own_anchors <= 1:
            raise InputError(f"own_anchors lies in 0..1, not {self.own_anchors!r}.")

    @classmethod
    def small(cls, **settings: Any) -> EraseConfig:
        """Settings for denoisers of a few million parameters, found on the bundled one: half a minute for a concept."""
        found: dict[str, Any] = {
            "anchors": 2, "own_anchors": 0.7, "anchor_weight": 2.0, "rollin_steps": 6, "batch_size": 4,
            "lr": 1e-2, "max_steps": 300, "warmup_steps": 10,
        }  # fmt: skip
        return cls(**found | settings)

    @classmethod
    def of(cls, model: nn.Module, **settings: Any) -> EraseConfig:
        """`small()` for models below ten million parameters, else the published settings."""
        count = sum(p.numel() for p in model.parameters())
        return cls.small(**settings) if count < SMALL else cls(**settings)


class Draws(Dataset[Tensor]):
    """One random number per step, from which all that is random in it follows; `fit` seeds it by epoch and index."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(2**62, ())


class EraseLoss:
    """`loss_fn` for `mmkit.fit` on batches of `Draws` of one.

    Args:
        calls: of the pipeline.
        adapter: the eraser in training, attached.
        prompts: of the concept, and of words under which it is drawn unasked.
        positives: the concept's own prompt for each.
        neutrals: what takes the place of each.
        keep: prompts whose answers stay.
    """

    def __init__(
        self,
        calls: Calls,
        adapter: Adapter,
        prompts: Sequence[str],
        positives: Sequence[str],
        neutrals: Sequence[str],
        keep: Sequence[str],
        config: EraseConfig,
    ):
        self.calls, self.adapter, self.config = calls, adapter, config
        self.prompts = list(prompts)
        self.kind = config.anchor_kind or ("prompts" if keep else "gaussian")
        if self.kind == "prompts" and not keep:
            raise InputError("anchor_kind='prompts' needs prompts to keep: keep=['a dog', ...].")
        self.texts = [*self.prompts, *neutrals, *positives, "", *keep]  # rows of the condition, in this order
        with adapter.disabled():
            self.condition = calls.condition(self.texts)

    def identity(self) -> dict[str, Any]:
        """What decides the result beside the model."""
        config = dataclasses.asdict(self.config)
        return {"texts": self.texts, "kind": self.kind, "pipeline": self.calls.options, **config}

    def __call__(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts, of a batch of one number."""
        config, generator = self.config, torch.Generator().manual_seed(int(batch[0]))

        def draw(high: int, count: int) -> list[int]:
            return torch.randint(high, (count,), generator=generator).tolist()

        size, count = config.batch_size, len(self.prompts)
        chosen, at = draw(count, size), draw(config.rollin_steps, 1)[0]
        own = self._own(size, generator)
        texts = [self.texts[i] for i in [*chosen, *own]]
        rolled, t = self.calls.rolled_in(
            texts, draw(2**31, len(texts)), config.rollin_steps, at, config.rollin_guidance
        )
        latents = self._rows(rolled, range(size))
        neutral, concept = [count + i for i in chosen], [2 * count + i for i in chosen]
        frozen = self._frozen(self._rows(latents, [*range(size)] * 2), t, self.told([*concept, *neutral]))
        positive, wanted = frozen.chunk(2)
        answer = self.calls.answer(latents, t, self.told(chosen))
        loss = erasing_loss(answer, positive, wanted, config.guidance_scale)
        parts = {"erasing": float(loss.detach())}
        if self.kind != "none":
            repeated = [i for i in range(size) for _ in range(config.anchors)]
            if own:
                latents, anchors = self._rows(rolled, range(size, len(texts))), self.told(own)
            else:
                latents, anchors = (
                    self._rows(latents, repeated),
                    self._anchors([chosen[i] for i in repeated], generator),
                )
            before = self._frozen(latents, t, anchors)
            kept = anchoring_loss(self.calls.answer(latents, t, anchors), before)
            parts["anchoring"] = float(kept.detach())
            loss = loss + config.anchor_weight * kept
        return loss, parts

    def told(self, index: Sequence[int]) -> Condition:
        """The condition of the texts with these numbers."""
        told: Condition = rows_of(self.condition, index, len(self.texts))
        return told

    def _rows(self, latents: Any, index: Sequence[int]) -> Any:
        return rows_of(latents, index, len(latents))

    def _frozen(self, latents: Any, t: Any, condition: Condition) -> Tensor:
        with torch.no_grad(), self.adapter.disabled():
            return self.calls.answer(latents, t, condition)

    def _own(self, size: int, generator: torch.Generator) -> list[int]:
        """Numbers of the anchors that this step looks at in pictures of their own: the empty prompt, and some to keep; or none."""
        config, empty = self.config, 3 * len(self.prompts)
        if (
            self.kind != "prompts"
            or not config.own_anchors
            or float(torch.rand((), generator=generator)) >= config.own_anchors
        ):
            return []
        keep = torch.randint(1, len(self.texts) - empty, (size * config.anchors - 1,), generator=generator)
        return [empty, *(empty + i for i in keep.tolist())]

    def _anchors(self, near: list[int], generator: torch.Generator) -> Condition:
        """Anchors for the texts with the numbers `near`, one for each."""
        empty = 3 * len(self.prompts)
        if self.kind == "prompts":
            return self.told(
                [empty + i for i in torch.randint(len(self.texts) - empty, (len(near),), generator=generator)]
            )

        empties = {i for i in range(len(near)) if self.kind == "released" and i % 2 == 0}

        def replaced(embedding: Tensor, row: int) -> Tensor:
            return embedding if row in empties else gaussian_anchors(embedding, 1, generator)[0]

        return with_text(self.told([empty if i in empties else n for i, n in enumerate(near)]), replaced)


class SPMTrainer:
    """Trains one eraser on a pipeline; it is attached at once and acts as far as it has learned.

    Args:
        pipeline: as in `TextToImagePipeline`.
        concepts: phrases to erase with one adapter.
        surrogate: what is drawn in their place, put into the templates; nothing by default.
        keep: prompts that must draw what they drew, near neighbours of the concept first of all.
        superclass: words that leave the concept open and under which it is drawn all the same, "shape" for a circle: their prompts learn
            not to draw it, too, and are named by the adapter, so that transport opens for them.
        templates: prompts of a concept that are trained on, with {} in its place; `["{}", "a photo of {}"]` reaches further.
        adapter: any method of `mmkit.list_adapters()`; SPM by default.
        settings: of the adapter.
        name: of the adapter on the model.
        config: see `EraseConfig`; default: `EraseConfig.of` the model.
        options: passed to the pipeline (height, width, ...).

    Raises:
        InputError: an empty concept, one that is also to be kept, words the model does not know, prompts too long for its tokenizer.
    """

    def __init__(
        self,
        pipeline: Any,
        concepts: str | Sequence[str],
        *,
        surrogate: str = "",
        keep: Sequence[str] = (),
        superclass: Sequence[str] = (),
        templates: Sequence[str] = ("{}",),
        adapter: str = "spm",
        settings: dict[str, Any] | None = None,
        name: str = "spm",
        config: EraseConfig | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.draw = pipeline if isinstance(pipeline, TextToImagePipeline) else TextToImagePipeline(pipeline)
        self.config = config or EraseConfig.of(self.draw.denoiser)
        named, open_ = phrases(concepts), phrases(superclass, allow_none=True)
        self.prompts = concept_prompts(self.draw, (*named, *open_), keep, templates)
        check_prompts(self.draw, [surrogate] if surrogate else [])
        positives = [filled(t, n) for n in (*named, *[named[0]] * len(open_)) for t in templates]
        neutrals = [filled(t, surrogate) for t in templates] * len((*named, *open_))
        own: dict[str, Any] = {"concepts": (*named, *open_)} if adapter == "spm" else {}
        self.adapter = apply_adapter(self.draw.denoiser, adapter, name=name, **(own | (settings or {})))
        try:
            calls = Calls(self.draw, options)
            if self.config.start == "uce":
                self._begin_with_uce((*named, *open_), keep, surrogate, templates, options)
            self.loss = EraseLoss(calls, self.adapter, self.prompts, positives, neutrals, list(keep), self.config)
        except BaseException:
            self.adapter.detach()
            raise

    def _begin_with_uce(self, names: Any, keep: Any, surrogate: str, templates: Sequence[str], options: Any) -> None:
        """Fill the membranes that UCE's edit has a place in."""
        last = [t for t in templates if t.endswith("{}")] or ["{}"]  # UCE edits the last word of a prompt
        with self.adapter.disabled():
            change = closed_form_edit(self.draw, names, keep[:KEPT_BY_UCE], surrogate, last, None, options)
        if not isinstance(self.adapter, SPM) or not fill(self.adapter, change):
            raise InputError(
                "start='uce' is for SPM adapters with membranes at cross-attention (attn2.to_k, attn2.to_v)."
            )

    def train(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        sample_every: int = 0,
        samples: Sequence[str] = (),
        on_step: Callable[[StepInfo], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress: bool = True,
        resume: bool | str = "auto",
    ) -> FitResult:
        """Train; other adapters on the model rest meanwhile.

        Args:
            output_dir: gets `run/` (logs and checkpoints: the same call continues exactly) and `samples/`; `None` writes nothing.
            sample_every: every so many steps draw `samples` (default: the concept's prompts) from the same seeds.
            on_step, should_stop, progress, resume: see `mmkit.training.fit`.
        """
        config, folder = self.config, None if output_dir is None else expanded(output_dir)
        settings = FitConfig(
            max_steps=config.max_steps, batch_size=1, lr=config.lr, warmup_steps=min(config.warmup_steps, config.max_steps // 2),
            clip_grad=None, checkpoint_every=100, seed=config.seed, progress=progress, resume=resume,
        )  # fmt: skip
        others = {k: a.enabled for k, a in attached_adapters(self.draw.denoiser).items()}
        set_active_adapters(self.draw.denoiser, self.adapter.name)
        try:
            return fit(
                self.draw.denoiser, Draws(), loss_fn=self.loss, config=settings, output_dir=folder and folder / "run",
                adapter=self.adapter, should_stop=should_stop,
                on_step=Sampler(self.draw, folder, sample_every, list(samples) or self.prompts[:8], on_step),
            )  # fmt: skip
        finally:
            self.draw.denoiser.eval()
            for name, adapter in attached_adapters(self.draw.denoiser).items():
                adapter.enabled = others[name]
