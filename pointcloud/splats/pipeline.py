"""New views of a scene: a splat file, a fitted folder or the bundled still life goes in, pictures from anywhere come out."""

from __future__ import annotations

import os
from typing import ClassVar

from torch import nn

from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.pointcloud.cameras import Camera, orbit
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.splat_files import FORMATS, load_splats
from mmkit.pointcloud.splats.result import ViewResult, view
from mmkit.storage.files import expanded
from mmkit.weights import bundled_name, load_tensors

MAX_SIDE = 4096


class NovelViewPipeline(Pipeline):
    """Renders a `GaussianModel`, a splat file (.ply, .splat, .spz, .sog, .glb), a folder written by `save_pretrained`, or a bundled scene.

    Example:
        >>> import mmkit
        >>> view = mmkit.pipeline("novel-view")(azimuth=30, elevation=35, size=64)
        >>> view.plot().size
        (64, 64)
    """

    task: ClassVar[str] = "novel-view"
    default_weights: ClassVar[str] = "splat_still_life"

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """The scene behind a file, a folder or a bundled name."""
        path = expanded(model)
        if path.suffix.lower() in FORMATS:
            return load_splats(path)
        if path.is_dir():
            return GaussianModel.from_pretrained(path)
        if bundled_name(str(model)) is None:
            raise InputError(f"{model} is no splat file ({', '.join(FORMATS)}), folder or bundled scene.")
        return GaussianModel.from_tensors(load_tensors(str(model)))

    def __call__(
        self, camera: Camera | None = None, *, azimuth: float = 30.0, elevation: float = 25.0, distance: float | None = None,
        fov: float = 50.0, size: int | tuple[int, int] = 256, background: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> ViewResult:  # fmt: skip
        """One view.

        Args:
            camera: a camera of your own; or, around the middle of the scene:
            azimuth, elevation: degrees; elevation 90 is above.
            distance: in the scene's unit; default 2.6 times its radius.
            fov: angle across the longer side, in degrees, 5 to 150.
            size: side or (width, height) in pixels, at most 4096.
            background: colour in 0..1.
        """
        assert isinstance(self.model, GaussianModel)
        if camera is not None and not isinstance(camera, Camera):
            raise InputError(
                f"camera is a Camera, such as orbit(...) makes, or None with azimuth and elevation; not {type(camera).__name__}."
            )
        if camera is None:
            width, height = (size, size) if isinstance(size, int) else size
            if not (min(width, height) >= 1 and max(width, height) <= MAX_SIDE and 5 <= fov <= 150):
                raise InputError(f"size must be 1 to {MAX_SIDE} pixels and fov 5 to 150 degrees; got {size} and {fov}.")
            centre, radius = self.model.bounds()
            away = 2.6 * max(radius, 1e-3) if distance is None else distance
            camera = orbit(centre, away, [azimuth], elevation, width=width, height=height, fov=fov)
        return view(self.model, camera, background)
