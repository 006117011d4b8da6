"""A film with a folder of depth pictures as an RGB-D sequence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.errors import InputError
from mmkit.pointcloud.slam.datasets import RGBDSequence, camera_of, folder_of, pictures_of
from mmkit.storage.files import expanded

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")


class RGBDVideo(RGBDSequence):
    """The pictures of a film, in order, with one depth picture each.

    Frames are decoded as they are asked for; going back starts the film again.

    Args:
        video: the film.
        depth: a folder of depth pictures, one a frame.
        camera: a camera.json (fx, fy, cx, cy, depth_scale), default the one beside the film.
        longest: shrink frames to so many pixels on the longer side.
        every: keep every so many frames.

    Raises:
        InputError: no such film, not a film, or another number of depth pictures than frames.
    """

    def __init__(
        self, video: str | os.PathLike[str], depth: str | os.PathLike[str], *, camera: str | os.PathLike[str] | None = None,
        longest: int | None = None, every: int = 1,
    ):  # fmt: skip
        self.video = expanded(video)
        about, K, scale = camera_of(self.video.parent / "camera.json" if camera is None else expanded(camera))
        count = sum(1 for _ in _decoded(self.video, draw=False))
        super().__init__(
            [self.video] * count, pictures_of(folder_of(depth)), K, depth_scale=scale, longest=longest, every=every,
            distortion=about.get("distortion", ()), name=self.video.name,
        )  # fmt: skip
        self._film, self._next, self._every = _decoded(self.video), 0, every

    def _picture(self, index: int) -> Image.Image:
        index *= self._every
        if index < self._next:
            self._film, self._next = _decoded(self.video), 0
        while True:
            picture = next(self._film, None)
            self._next += 1
            if picture is None:
                raise InputError(f"{self.video} ends before its frame {index}.")
            if self._next > index:
                return picture


def _decoded(path: Path, draw: bool = True) -> Iterator[Any]:
    """The pictures of a film; without `draw` just one thing for each."""
    import av

    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise InputError(f"{path} holds no pictures.")
            for frame in film.decode(video=0):
                yield frame.to_image().convert("RGB") if draw else True
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path} is not a readable film: {error}.") from error
