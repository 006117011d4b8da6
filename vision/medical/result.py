"""The result of a segmentation: measured, drawn, saved."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmkit.errors import InputError
from mmkit.results import Result, json_text, png
from mmkit.vision.medical.instances import split_touching
from mmkit.vision.medical.metrics import dice
from mmkit.vision.medical.volumes import ras

COLORS = (
    (0, 0, 0),
    (230, 75, 53),
    (0, 160, 135),
    (243, 155, 22),
    (60, 84, 180),
    (145, 91, 178),
    (126, 97, 72),
    (77, 187, 213),
)
"""Color of each class, background first; further classes start again after the background."""


OUTLINE, OUTLINE_GROUND = (255, 235, 59), (20, 20, 20)
"""A bright line beside a dark one is seen on any ground."""


@dataclass
class SegmentationResult(Result):
    """What the pipeline found.

    Attributes:
        mask: uint8 class per pixel, (H, W) or (X, Y, Z), lying as the file does.
        score: float32 softmax score of the chosen class, 0..1, same shape. No probability: nobody has calibrated it.
        image: the input as shown: uint8 (H, W, 3) or float32 (X, Y, Z).
        class_names: background first.
        spacing: pixel size per axis: mm for volumes, ones for pictures.
        affine: voxel-to-world matrix of a volume, else None.
        seconds: time of the prediction.
        unlike: distance from the training data over the limit; above 1 there is a `warning`. `None`: the weights do not tell.
        touching: objects of a class touch each other, as cells do: `objects` parts them with `split_touching`.
    """

    mask: np.ndarray
    score: np.ndarray
    image: np.ndarray
    class_names: tuple[str, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    seconds: float
    unlike: float | None = None
    touching: bool = False

    def objects(self, number: int = 1, labels: np.ndarray | None = None) -> np.ndarray:
        """The single objects of a class: int32 numbers from 1, 0 elsewhere, of the mask's shape. Of `touching` ones, those from 12 pixels.

        Args:
            number: the class.
            labels: another label map of the mask's shape to look into (the truth).
        """
        where = (self.mask if labels is None else labels) == number
        if self.touching:
            return split_touching(where)
        from scipy.ndimage import label

        return label(where)[0].astype(np.int32)

    @property
    def warning(self) -> str:
        """What to say when the input is unlike everything the network was trained on, else ""."""
        if self.unlike is None or self.unlike <= 1:
            return ""
        names = " or ".join(self.class_names[1:])
        return (
            f"This input is unlike everything the network was trained on ({self.unlike:.1f} times the limit). It finds "
            f"{names} in anything: do not trust the result."
        )

    def measures(self, truth: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Per class but the background: pixels, share of the image, size (px or mm3), separate objects, mean score.

        With `truth` (a label map of the mask's shape) also the Dice overlap. Raises `InputError` when shapes differ.
        """
        size_name = "volume_mm3" if self.mask.ndim == 3 else "area_px"
        rows = []
        for number, name in enumerate(self.class_names[1:], 1):
            where = self.mask == number
            count = int(where.sum())
            row: dict[str, Any] = {"class": name, "pixels": count, "percent": round(100 * count / where.size, 3)}
            row[size_name] = round(count * float(np.prod(self.spacing)), 2)
            row["objects"] = int(self.objects(number).max(initial=0))
            row["mean_score"] = round(float(self.score[where].mean()), 4) if count else None
            if truth is not None:
                row["dice"] = round(dice(self.mask, truth, number), 4)
            rows.append(row)
        return rows

    def record(self, truth: np.ndarray | None = None) -> dict[str, Any]:
        """What a JSON file holds: {"spacing": [...], "classes": measures, "unlike": number or None, "warning": text}."""
        unlike = None if self.unlike is None else round(self.unlike, 3)
        measures = self.measures(truth)
        return {"spacing": list(self.spacing), "classes": measures, "unlike": unlike, "warning": self.warning}

    def upright(self, data: np.ndarray) -> np.ndarray:
        """A view of a volume of the mask's shape with its axes to the right, front and top; pictures stay as they are."""
        return data if self.affine is None or data.ndim != 3 else ras(data, self.affine)

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """`spacing` in the order of the axes of `upright`."""
        if self.affine is None or self.mask.ndim != 3:
            return self.spacing
        from nibabel.orientations import io_orientation

        order = [int(axis) for axis in io_orientation(self.affine)[:, 0]]
        return tuple(self.spacing[order.index(axis)] for axis in range(3))

    def best_slice(self, axis: int = 2) -> int:
        """The slice of a volume with the largest segmented area, or the most varied one when nothing was found. See `overlay`."""
        mask, image = self.upright(self.mask), self.upright(self.image)
        across = tuple(a for a in range(mask.ndim) if a != axis)
        area = (mask > 0).sum(across)
        return int(area.argmax() if area.any() else image.std(across).argmax())

    @property
    def stained(self) -> bool:
        """Whether the input is a picture in color, as stained tissue is: a fill would hide or mimic its color."""
        return self.mask.ndim == 2 and bool(np.ptp(self.image, axis=-1).mean() > 8)

    def overlay(
        self,
        opacity: float = 0.5,
        index: int | None = None,
        axis: int = 2,
        labels: np.ndarray | None = None,
        outline: int = 0,
    ) -> Image.Image:
        """The picture, or one slice of the volume, with the classes in color.

        Args:
            opacity: of the color, 0..1.
            index, axis: which slice of a volume `upright`; default: the one with the largest area. Axis 0 is sagittal, 1 coronal,
                2 axial, however the file lies. Slices are shown with the first remaining axis to the right and the second upwards.
            labels: another label map of the same shape to paint instead (the truth).
            outline: width in pixels of a bright line, with a dark one beside it, at the rim of every region; 0 draws none.

        Raises:
            InputError: an axis the volume does not have.
        """
        if axis not in (0, 1, 2):
            raise InputError(f"axis must be 0, 1 or 2, not {axis!r}.")
        labels = self.mask if labels is None else labels
        if self.mask.ndim == 2:
            base = self.image.astype(np.float32)
        else:
            image, labels = self.upright(self.image), self.upright(labels)
            index = self.best_slice(axis) if index is None else min(max(int(index), 0), image.shape[axis] - 1)
            low, high = np.percentile(image, (0.5, 99.5))
            grey = np.clip((_slice(image, index, axis) - low) / max(high - low, 1e-6), 0, 1) * 255
            base, labels = np.repeat(grey[..., None], 3, -1), _slice(labels, index, axis)
        colors = np.array([color_of(i) for i in range(len(self.class_names))], np.float32)[labels]
        alpha = np.where(labels[..., None] > 0, float(opacity), 0.0)
        base = base * (1 - alpha) + colors * alpha
        if outline:
            regions = self._regions(labels)
            base[_rim(regions, 2 * outline)] = OUTLINE_GROUND
            rim = _rim(regions, outline)
            base[rim] = np.array([self.outline_color(i) for i in range(len(self.class_names))])[labels[rim]]
        return Image.fromarray((base + 0.5).astype(np.uint8))

    def _regions(self, labels: np.ndarray) -> np.ndarray:
        """What outlines go around: classes, or their single objects where those touch."""
        if not self.touching:
            return labels
        found = np.zeros(labels.shape, np.int32)
        for number in range(1, len(self.class_names)):
            objects = self.objects(number, labels)
            found = np.where(objects > 0, objects + found.max(), found)
        return found

    @property
    def outline_width(self) -> int:
        """Pixels that an outline takes to be seen when the whole picture is on a screen."""
        return 1 + max(self.mask.shape) // 600

    def outline_color(self, label: int) -> tuple[int, int, int]:
        """The color of a label's outline: yellow shows on any stain; several classes keep their own."""
        return OUTLINE if len(self.class_names) == 2 else color_of(label)

    def plot(self) -> Image.Image:
        """The overlay: colored areas, on pictures in color outlines."""
        return self.overlay(0.0, outline=self.outline_width) if self.stained else self.overlay()

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.nii` and `.nii.gz`: the mask with spacing and affine; `.json`: `record()`. Of pictures also `.png`: class numbers as a palette
        picture, and `.objects.png`: the numbers of the single objects of the first class, 16 bits.
        """
        formats = {
            ".nii.gz": lambda: gzip.compress(self._nifti(), mtime=0),
            ".nii": self._nifti,
            ".json": lambda: json_text(self.record()),
        }
        if self.mask.ndim == 3:
            return formats
        return {".objects.png": self._numbers, ".png": lambda: png(self._palette()), **formats}

    def _numbers(self) -> bytes:
        numbers = self.objects()
        if numbers.max(initial=0) > 65_535:
            raise InputError(
                f"A picture of 16 bits cannot number {numbers.max():,} objects; save `objects()` as an array."
            )
        return png(Image.fromarray(numbers.astype(np.uint16)))

    def _palette(self) -> Image.Image:
        picture = Image.fromarray(self.mask)
        picture.putpalette([v for i in range(len(self.class_names)) for v in color_of(i)])
        return picture

    def _nifti(self) -> bytes:
        import nibabel

        data = self.mask.T[:, ::-1, None] if self.mask.ndim == 2 else self.mask
        return nibabel.Nifti1Image(data, np.eye(4) if self.affine is None else self.affine).to_bytes()


def color_of(label: int) -> tuple[int, int, int]:
    """The RGB color, 0..255, that a label is drawn in."""
    return COLORS[0] if label == 0 else COLORS[1 + (label - 1) % (len(COLORS) - 1)]


def _rim(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a region within `width` of another label."""
    from scipy.ndimage import maximum_filter, minimum_filter

    size = 2 * width + 1
    return (labels > 0) & (minimum_filter(labels, size) != maximum_filter(labels, size))


def _slice(data: np.ndarray, index: int, axis: int) -> np.ndarray:
    return np.take(data, index, axis).T[::-1]
