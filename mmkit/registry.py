"""Names that resolve to code: adapters, models, pipeline tasks and apps.

A table row is a name and where its object lives ("module:attribute"); the module is imported when the name is first used,
so the core lists what the domains offer without importing them. Other packages add names with a decorator at import
time or through an entry point group, without touching mmkit.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
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
        if not isinstance(name, str):
            raise InputError(
                f"The {self.kind} is given by its name, a text, not by {type(name).__name__}. {nearest('', self._known)}"
            )
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
            for point in _installed(self._group):
                self._known.setdefault(point.name, f"{point.module}:{point.attr}")


@functools.cache  # reading what every installed package says takes 10 ms
def _installed(group: str) -> EntryPoints:
    return entry_points(group=group)


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
        "point_peft": "mmkit.pointcloud.point_peft.adapter:PointPEFT",
        "pointgst": "mmkit.pointcloud.point_peft.pointgst:PointGST",
        "idpt": "mmkit.pointcloud.point_peft.idpt:IDPT",
        "difffit": "mmkit.diffusion.difffit.adapter:DiffFit",
        "spm": "mmkit.diffusion.spm.adapter:SPM",
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
            "mmkit.vision.clicks",
            "squeeze_sam_base",
            "squeeze_sam_small",
            "squeeze_sam_tiny",
            "squeeze_sam_photo",
            "clicknet_mobilenetv2",
        ),
        **_from(
            "mmkit.vision.medical", "lightm_unet_2d", "lightm_unet_3d", "lightm_unet_2d_tiny", "lightm_unet_3d_tiny"
        ),
        "unet": "mmkit.vision.medical:UNet",
        **_from("mmkit.vision.medical", "unet_2d_tiny", "unet_2d_small"),
        **_from("mmkit.video.zeroi2v", "zeroi2v_clip_b16_8f", "zeroi2v_clip_b16_16f_ssv2", "zeroi2v_clip_b16_32f"),
        **_from("mmkit.video.zeroi2v", "zeroi2v_clip_l14_8f", "zeroi2v_clip_l14_32f", "zeroi2v_clip_l14_32f_ssv2"),
        **_from("mmkit.vision.piip", "piip_tsb", "piip_sbl", "piip_tsbl", "piip_h6b", "piip_lh6b"),
        "piip": "mmkit.vision.piip:PIIP",
        "piip_feature_pyramid": "mmkit.vision.piip:PIIPFeaturePyramid",
        "piip_segmenter": "mmkit.vision.piip:PIIPSegmenter",
        **_from(
            "mmkit.pointcloud.point_peft",
            "point_mae",
            "point_mae_scan",
            "point_mae_parts",
            "point_mae_nano",
            "point_mae_nano_parts",
            "point_mae_nano_pretraining",
            "point_bert",
        ),
        "point_mae_classifier": "mmkit.pointcloud.point_peft:PointMAE",
        "point_mae_segmenter": "mmkit.pointcloud.point_peft:PointMAESegmenter",
        "point_mae_pretraining": "mmkit.pointcloud.point_peft:PointMAEForPretraining",
        **_from("mmkit.diffusion", "scene_judge", "scene_painter"),
        "video_classifier": "mmkit.video.zeroi2v:VideoClassifier",
    },
    entry_point_group="mmkit.models",
)

MODEL_CLASSES = Registry(  # what a saved model names in its config.json
    "model class",
    {
        **_from("mmkit.vision.gmm", "GMMViT", "GMMCaiT", "GMMT2T", "GMMPiT", "GMMSwin"),
        **_from("mmkit.vision.clicks", "SqueezeSAM", "ClickNet"),
        **_from("mmkit.vision.medical", "LightMUNet", "UNet"),
        **_from("mmkit.vision.piip", "PIIP", "PIIPFeaturePyramid", "PIIPSegmenter"),
        **_from("mmkit.video.zeroi2v", "VideoClassifier"),
        **_from("mmkit.pointcloud.point_peft", "PointMAE", "PointMAESegmenter", "PointMAEForPretraining"),
        **_from("mmkit.pointcloud.splats", "GaussianModel"),
        **_from("mmkit.diffusion", "SceneJudge", "ScenePainter"),
    },
    entry_point_group="mmkit.model_classes",
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
        "pyramid-explorer": "mmkit.vision.piip:PyramidExplorer",
        "dense-features": "mmkit.vision.piip:DenseFeaturesPipeline",
        "semantic-segmentation": "mmkit.vision.piip:SemanticSegmentationPipeline",
        "image-classification": "mmkit.vision.classification:ImageClassificationPipeline",
        "text-to-image": "mmkit.diffusion:TextToImagePipeline",
        "video-classification": "mmkit.video.zeroi2v:VideoClassificationPipeline",
        "point-cloud-classification": "mmkit.pointcloud.point_peft:PointCloudClassificationPipeline",
        "point-cloud-segmentation": "mmkit.pointcloud.point_peft:PointCloudSegmentationPipeline",
        "novel-view": "mmkit.pointcloud.splats:NovelViewPipeline",
        "semantic-slam": "mmkit.pointcloud.slam:SemanticSLAMPipeline",
    },
)

APPS = Registry(
    "app",
    {
        "gmm": "mmkit.apps.gmm:APP",
        "segment": "mmkit.apps.segment:APP",
        "medical": "mmkit.apps.medical:APP",
        "piip": "mmkit.apps.piip:APP",
        "finetune": "mmkit.apps.finetune:APP",
        "splats": "mmkit.apps.splats:APP",
        "slam": "mmkit.apps.slam:APP",
        "video": "mmkit.apps.video:APP",
        "points": "mmkit.apps.points:APP",
        "diffusion": "mmkit.apps.diffusion:APP",
        "erasure": "mmkit.apps.erasure:APP",
        "pareto": "mmkit.apps.pareto:APP",
    },
)

COMMANDS = Registry(  # what `mmkit <command>` runs, so that the core need not know the domains
    "command",
    {
        "demo": "mmkit.vision.classification:run_demo",
        "finetune": "mmkit.vision.classification",
        "finetune-text-to-image": "mmkit.diffusion:finetune",
        "finetune-video-classification": "mmkit.video.zeroi2v:finetune",
        "finetune-point-cloud-classification": "mmkit.pointcloud.point_peft:finetune",
        "finetune-segmentation": "mmkit.vision.medical:finetune",
        "splat": "mmkit.pointcloud.splats",
        "slam": "mmkit.pointcloud.slam.command:slam",
        "erase": "mmkit.diffusion.spm.command:erase",
        "studio": "mmkit.apps:launch_studio",
    },
)
