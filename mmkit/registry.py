"""Names that resolve to code: adapters, models, pipeline tasks and apps.

A table row is a name and where its object lives ("module:attribute"); the module is imported when the name is first used,
so the core lists what the domains offer without importing them. Other packages add names with a decorator at import
time or through an entry point group, without touching mmkit.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from mmkit.errors import InputError, nearest

T = TypeVar("T")


class Registry:
    """A table of names whose objects are imported on first use.

    Args:
        kind: what a name stands for, used in messages ("adapter", "model", ...).
        known: name -> "module:attribute".
        entry_point_group: entry points that installed packages may add names through.
        aliases: other names that `get` understands; they are not listed.
    """

    def __init__(
        self,
        kind: str,
        known: dict[str, str],
        entry_point_group: str | None = None,
        aliases: dict[str, str] | None = None,
    ):
        self.kind = kind
        self._aliases = aliases or {}
        self._known: dict[str, Any] = dict(known)
        self._group = entry_point_group

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make `name` resolve to the decorated object. Two objects under one name are an error."""

        def add(obj: T) -> T:
            home = f"{getattr(obj, '__module__', '')}:{getattr(obj, '__qualname__', '')}"
            present = self._known.get(name)
            taken = present if isinstance(present, str) else present and f"{present.__module__}:{present.__qualname__}"
            if taken and taken != home:
                raise InputError(f"{self.kind} {name!r} is already registered by {taken}; choose another name.")
            self._known[name] = obj
            return obj

        return add

    def names(self, pattern: str = "") -> list[str]:
        """All names, sorted; `pattern` is a substring or a shell-style wildcard."""
        self._read_entry_points()
        wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        return sorted(n for n in self._known if fnmatch.fnmatch(n, wild))

    def get(self, name: str) -> Any:
        """The object behind `name`. Raises `InputError` with the nearest names when there is none."""
        name = self._aliases.get(name, name)
        if name not in self._known:
            self._read_entry_points()
        if name not in self._known:
            raise InputError(f"Unknown {self.kind} {name!r}. {nearest(name, self._known)}")
        target = self._known[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = importlib.import_module(module)
            target = getattr(target, attribute) if attribute else target
            self._known[name] = target
        return target

    def _read_entry_points(self) -> None:
        if self._group:
            for point in entry_points(group=self._group):
                self._known.setdefault(point.name, f"{point.module}:{point.attr}")


ADAPTERS = Registry(
    "adapter",
    {
        "ssf": "mmkit.adapters.ssf:SSF",
        "zeroi2v": "mmkit.video.zeroi2v.adapter:ZeroI2V",
        "bitfit": "mmkit.adapters.bitfit:BitFit",
        "linear_probe": "mmkit.adapters.linear_probe:LinearProbe",
        **{  # what peft's layers can do at single modules, see mmkit.adapters.peft
            name: f"mmkit.adapters.peft:{name}"
            for name in (
                "lora",
                "dora",
                "beft",
                "boft",
                "c3a",
                "delora",
                "fourierft",
                "gralora",
                "hira",
                "hra",
                "ia3",
                "ln_tuning",
                "loha",
                "lokr",
                "miss",
                "oft",
                "psoft",
                "randlora",
                "road",
                "shira",
                "waveft",
            )
        },
        "gmm": "mmkit.vision.gmm.adapter:GMMAdapter",
    },
    entry_point_group="mmkit.adapters",
    aliases={"peft": "lora"},
)


def _from(room: str, *names: str) -> dict[str, str]:
    """Rows for names that a room's door lists."""
    return {name: f"{room}:{name}" for name in names}


MODELS = Registry(
    "model",
    {
        **_from(
            "mmkit.vision.gmm", "gmm_vit", "gmm_vit_base", "gmm_vit_heat", "gmm_vit_d6", "gmm_vit_d15", "gmm_vit_d30"
        ),
        **_from("mmkit.vision.gmm", "gmm_cait", "gmm_cait_tiny", "gmm_t2t", "gmm_pit", "gmm_swin"),
        **_from(
            "mmkit.vision.clicks", "squeeze_sam_base", "squeeze_sam_small", "squeeze_sam_tiny", "squeeze_sam_photo"
        ),
        **_from(
            "mmkit.vision.medical", "lightm_unet_2d", "lightm_unet_3d", "lightm_unet_2d_tiny", "lightm_unet_3d_tiny"
        ),
        **_from("mmkit.video.zeroi2v", "zeroi2v_clip_b16_8f", "zeroi2v_clip_b16_16f_ssv2", "zeroi2v_clip_b16_32f"),
        **_from("mmkit.video.zeroi2v", "zeroi2v_clip_l14_8f", "zeroi2v_clip_l14_32f", "zeroi2v_clip_l14_32f_ssv2"),
        "video_classifier": "mmkit.video.zeroi2v:VideoClassifier",
    },
    entry_point_group="mmkit.models",
)

LIBRARIES = Registry(  # where backbones come from: "timm:vit_tiny_patch16_224"
    "backbone library",
    {
        "timm": "mmkit.backbones.timm:TimmBuilder",
        "open_clip": "mmkit.backbones.open_clip:OpenClipBuilder",
        "transformers": "mmkit.backbones.transformers:TransformersBuilder",
        "diffusers": "mmkit.backbones.diffusers:DiffusersBuilder",
        "mmkit": "mmkit.backbones.bundled:BundledBuilder",
    },
    entry_point_group="mmkit.backbones",
)

TASKS = Registry(
    "task",
    {
        "mask-explorer": "mmkit.vision.gmm:MaskExplorer",
        "medical-segmentation": "mmkit.vision.medical:MedicalSegmentationPipeline",
        "interactive-segmentation": "mmkit.vision.clicks:InteractiveSegmenter",
        "image-classification": "mmkit.vision.classification:ImageClassificationPipeline",
        "video-classification": "mmkit.video.zeroi2v:VideoClassificationPipeline",
    },
)

APPS = Registry(
    "app",
    {
        "gmm": "mmkit.apps.gmm:APP",
        "segment": "mmkit.apps.segment:APP",
        "medical": "mmkit.apps.medical:APP",
        "finetune": "mmkit.apps.finetune:APP",
        "video": "mmkit.apps.video:APP",
    },
)

COMMANDS = Registry(  # what `mmkit <command>` runs, so that the core need not know the domains
    "command",
    {
        "demo": "mmkit.vision.classification:run_demo",
        "finetune": "mmkit.vision.classification",
        "studio": "mmkit.apps:launch_studio",
    },
)
