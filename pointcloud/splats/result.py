"""What a view of a scene is: colours, depths and opacity that can be looked at and saved; and films around a scene."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmkit.errors import InputError
from mmkit.pointcloud.cameras import Camera, orbit
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.results import Result, png
from mmkit.storage import atomic_write
from mmkit.storage.files import check_writable, expanded


@dataclass
class ViewResult(Result):
    """One view: `color` (H, W, 3) in 0..1, `depth` (H, W) along z, 0 where nothing is seen, `alpha` (H, W) in 0..1."""

    color: np.ndarray
    depth: np.ndarray
    alpha: np.ndarray
    camera: Camera

    def plot(self) -> Image.Image:
        """The colours."""
        return Image.fromarray(np.rint(255 * self.color.clip(0, 1)).astype(np.uint8))

    def depth_image(self) -> Image.Image:
        """Depths from near (bright) to far (dark), black where nothing is seen."""
        from matplotlib import colormaps

        seen = self.alpha > 0.5
        if not seen.any():
            return Image.new("RGB", (self.depth.shape[1], self.depth.shape[0]))
        near, far = np.quantile(self.depth[seen], (0.02, 0.98))
        scaled = 1 - ((self.depth - near) / max(far - near, 1e-9)).clip(0, 1)
        picture = colormaps["viridis"](scaled)[..., :3] * seen[..., None]
        return Image.fromarray(np.rint(255 * picture).astype(np.uint8))

    def alpha_image(self) -> Image.Image:
        """Opacity, white where light does not pass."""
        return Image.fromarray(np.rint(255 * self.alpha.clip(0, 1)).astype(np.uint8)).convert("RGB")

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """A picture, or all arrays."""
        return {".png": lambda: png(self.plot()), ".npz": self._arrays}

    def _arrays(self) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, color=self.color, depth=self.depth, alpha=self.alpha, viewmat=self.camera.viewmats[0].numpy(),
            K=self.camera.Ks[0].numpy(),
        )  # fmt: skip
        return buffer.getvalue()


@torch.no_grad()
def view(model: GaussianModel, camera: Camera, background: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ViewResult:
    """Render one camera."""
    device = model.means.device
    image, alpha, _ = model.render(camera, render_mode="RGB+ED", backgrounds=torch.tensor([background], device=device))
    seen, light = image[0].cpu().numpy(), alpha[0, ..., 0].cpu().numpy()
    return ViewResult(seen[..., :3].clip(0, 1), seen[..., 3], light, camera)


def turntable(
    model: GaussianModel, path: str | os.PathLike[str], *, frames: int = 60, size: int = 256, elevation: float = 25.0,
    distance: float | None = None, fps: int = 20, background: tuple[float, float, float] = (0.0, 0.0, 0.0),
    on_frame: Callable[[int], None] | None = None,
) -> Path:  # fmt: skip
    """A film once around the scene, as .mp4 (H.264).

    Args:
        frames, size, fps: of the film; `size` is the side of its square pictures, in even pixels.
        elevation, distance: of the camera; the distance defaults to 2.6 times the scene's radius.
        on_frame: called with the number of frames done.

    Raises:
        InputError: another suffix, an odd or too large size, a frame rate that is none, or an angle or distance of no camera.
        StorageError: the film cannot be written there.
    """
    import av

    path = expanded(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"A film must be called .mp4, not {path.name!r}.")
    if size % 2 or not 16 <= size <= 2048 or not 1 <= frames <= 10_000:
        raise InputError(f"size must be even, 16 to 2048, and frames 1 to 10000; got {size} and {frames}.")
    if not isinstance(fps, int) or not 1 <= fps <= 1000:
        raise InputError(f"fps must be a whole number from 1 to 1000, not {fps!r}.")
    centre, radius = model.bounds()
    away = 2.6 * max(radius, 1e-3) if distance is None else distance
    cameras = orbit(centre, away, [360 * i / frames for i in range(frames)], elevation, width=size, height=size)
    check_writable(path)
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_image(view(model, cameras[i], background).plot())
            container.mux(stream.encode(frame))
            if on_frame is not None:
                on_frame(i + 1)
        container.mux(stream.encode())
    return path
