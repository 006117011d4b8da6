"""The medical pipeline: windows, volumes and pictures in, measures and files out, bad input refused."""

from __future__ import annotations

import dataclasses
import json

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmkit
from mmkit.data.drawn.scans import sample_volume
from mmkit.errors import InputError
from mmkit.vision.medical.metrics import dice, dice_per_class
from mmkit.vision.medical.model import LightMUNet
from mmkit.vision.medical.result import SegmentationResult
from mmkit.vision.medical.volumes import Volume
from mmkit.vision.medical.windows import sliding_window


class Threshold(nn.Module):
    """A 'network' whose class 1 is every pixel above zero: the right answer is known."""

    multiple = 4

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 2):
        super().__init__()
        self.spatial_dims, self.in_chans, self.num_classes = dims, channels, classes
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert all(s % self.multiple == 0 for s in x.shape[2:])
        value = x.mean(1, keepdim=True) * self.scale
        return torch.cat([-value, value, *([-value.abs() - 9] * (self.num_classes - 2))], 1)


def segmenter(dims: int = 2, **options):
    return mmkit.pipeline("medical-segmentation", Threshold(dims), **options)


def blob(shape: tuple[int, ...]) -> np.ndarray:
    grid = np.indices(shape) - np.array(shape).reshape(-1, *[1] * len(shape)) / 2
    return ((grid**2).sum(0) < (min(shape) / 4) ** 2).astype(np.float32)


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (50, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_windows_reproduce_a_pixelwise_model(size: tuple[int, int], overlap: float) -> None:
    x = torch.randn(1, *size)
    seen = []
    found = sliding_window(Threshold(), x, (16, 16), overlap=overlap, on_progress=lambda *a: seen.append(a))
    torch.testing.assert_close(
        found,
        Threshold()(torch.nn.functional.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))[None])[0].softmax(0)[
            :, : size[0], : size[1]
        ],
    )
    assert seen[-1][0] == seen[-1][1]


def test_windows_refuse_overflow_and_bad_overlap() -> None:
    with pytest.raises(InputError, match="not finite"):
        sliding_window(lambda x: x * float("inf"), torch.randn(2, 8, 8), (8, 8))
    with pytest.raises(InputError, match="overlap"):
        sliding_window(Threshold(), torch.randn(1, 8, 8), (8, 8), overlap=1.0)
    with pytest.raises(InputError, match="batch_size"):
        sliding_window(Threshold(), torch.randn(1, 8, 8), (8, 8), batch_size=0)


def test_picture_in_mask_out(tmp_path) -> None:
    truth = blob((60, 44))
    Image.fromarray((truth * 200 + 20).astype(np.uint8)).save(tmp_path / "cell.png")
    result = segmenter(window=32, class_names=("nothing", "cell"))(tmp_path / "cell.png", tta=True)
    assert np.array_equal(result.mask, truth.astype(np.uint8))
    (row,) = result.measures(truth.astype(np.uint8))
    assert row["class"] == "cell"
    assert row["pixels"] == row["area_px"] == int(truth.sum())
    assert (row["objects"], row["dice"]) == (1, 1.0)
    assert np.array_equal(np.asarray(Image.open(result.save(tmp_path / "mask.png"))), result.mask)
    record = json.loads(result.save(tmp_path / "new" / "measures.json").read_text())
    assert record == {"spacing": [1.0, 1.0], "classes": result.measures(), "unlike": None, "warning": ""}
    painted = np.asarray(result.overlay(opacity=1.0))
    assert (painted[truth > 0] == (230, 75, 53)).all()
    assert np.array_equal(painted[truth == 0], result.image[truth == 0])


def test_touching_objects_are_counted_and_outlined_one_by_one(tmp_path) -> None:
    y, x = np.mgrid[:40, :60]
    truth = (np.hypot(y - 20, x - 20) < 10) | (np.hypot(y - 20, x - 38) < 10)
    picture = Image.fromarray((truth * 200 + 20).astype(np.uint8))
    together, apart = (segmenter(window=64, touching=touching)(picture) for touching in (False, True))
    assert [r.measures()[0]["objects"] for r in (together, apart)] == [1, 2]
    numbers = np.asarray(Image.open(apart.save(tmp_path / "cells.objects.png")))
    assert (numbers > 0).sum() == truth.sum()
    assert set(np.unique(numbers)) == {0, 1, 2}
    assert numbers[20, 20] != numbers[20, 38]
    many = np.zeros((2, 140_000), np.uint8)
    many[0, ::2] = 1
    crowd = dataclasses.replace(together, mask=many, score=many.astype(np.float32))
    with pytest.raises(InputError, match="70,000 objects"):
        crowd.save(tmp_path / "crowd.objects.png")
    rims = [np.asarray(r.overlay(0.0, outline=1))[20, 29] for r in (together, apart)]
    assert (rims[0] == together.image[20, 29]).all()
    assert (rims[1] != apart.image[20, 29]).any()


def test_volume_keeps_spacing_and_affine(tmp_path) -> None:
    truth = blob((20, 24, 18))
    affine = np.array([[0, -0.5, 0, 3], [2, 0, 0, 1], [0, 0, 1.5, 7], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(truth * 900, affine), tmp_path / "scan.nii.gz")
    result = segmenter(3, window=16)(tmp_path / "scan.nii.gz")
    assert np.array_equal(result.mask, truth.astype(np.uint8))
    assert result.spacing == pytest.approx((2.0, 0.5, 1.5))
    assert result.measures()[0]["volume_mm3"] == pytest.approx(truth.sum() * 1.5)
    back = nibabel.load(result.save(tmp_path / "mask.nii.gz"))
    assert np.array_equal(np.asarray(back.dataobj), result.mask)
    np.testing.assert_allclose(back.affine, affine)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mask.nii.gz", "scan.nii.gz"]
    array = segmenter(3)(truth, spacing=(2, 2, 2))
    assert array.measures()[0]["volume_mm3"] == truth.sum() * 8
    assert result.best_slice() == 9
    assert result.overlay(index=99, axis=0).size == (20, 18)  # sagittal: front to back is the file's first axis
    with pytest.raises(InputError, match="axis must be"):
        result.overlay(axis=3)
    with pytest.raises(InputError, match=r"\.nii\.gz"):
        result.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="suffix"):
        result.save(tmp_path / "mask.mha")


class Head(Threshold):
    """A 'network' that only finds what lies in the upper third of what it is shown: it knows where up is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = torch.arange(x.shape[-1]) > x.shape[-1] * 2 / 3
        return super().forward(torch.where(top, x, -1.0))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SRA"])
def test_the_network_sees_every_scan_upright_and_answers_as_the_file_lies(tmp_path, codes) -> None:
    upright = np.zeros((12, 16, 20), np.float32)
    upright[2:5, 3:9, 15:18], upright[7:9, 3:9, 2:5] = 900, 900
    scan = nibabel.Nifti1Image(upright, np.diag([1, 2, 3, 1]))
    to = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(scan.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = scan.as_reoriented(to)
    nibabel.save(turned, tmp_path / "scan.nii.gz")
    result = mmkit.pipeline("medical-segmentation", Head(3), window=20)(tmp_path / "scan.nii.gz")
    expected = np.zeros_like(upright)
    expected[2:5, 3:9, 15:18] = 1
    lying = nibabel.orientations.apply_orientation(expected, to)
    assert np.array_equal(result.mask, lying)
    assert result.score.shape == result.image.shape == result.mask.shape == turned.shape
    back = nibabel.load(result.save(tmp_path / "mask.nii.gz"))
    np.testing.assert_allclose(back.affine, turned.affine)
    assert np.array_equal(np.asarray(back.dataobj), lying)
    assert result.upright_spacing == (1.0, 2.0, 3.0)
    assert 15 <= result.best_slice(2) < 18  # axial: from the feet to the head
    assert [result.overlay(axis=axis).size for axis in range(3)] == [(16, 20), (12, 20), (12, 16)]
    axial = np.asarray(result.overlay(1.0, index=16, axis=2)).astype(int)
    colored = axial[..., 0] != axial[..., 1]
    assert np.array_equal(colored, expected[:, :, 16].T[::-1] > 0)


def test_padding_to_windows_allocates_no_gigabytes() -> None:
    with pytest.raises(InputError, match="million values"):
        sliding_window(Threshold(), torch.zeros(3, 1, 1_000_000), (256, 256))


def test_a_picture_for_a_volume_network_and_the_reverse() -> None:
    with pytest.raises(InputError, match="segments pictures"):
        segmenter()(np.zeros((8, 8, 8)))
    with pytest.raises(InputError, match="segments volumes"):
        segmenter(3)("photo.png")
    with pytest.raises(InputError, match="three axes"):
        segmenter(3)(np.zeros((8, 8)))
    with pytest.raises(InputError, match="2 classes, but 3"):
        segmenter(class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="window"):
        segmenter(window=(8, 8, 8))
    with pytest.raises(InputError, match="lacks the attribute"):
        mmkit.pipeline("medical-segmentation", nn.Identity())


def test_a_saved_folder_can_be_the_model(tmp_path) -> None:
    LightMUNet(3, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)).save_pretrained(tmp_path)
    result = mmkit.pipeline("medical-segmentation", tmp_path)(Volume(blob((6, 7, 9)), (1.0, 1.0, 1.0), np.eye(4)))
    assert isinstance(result, SegmentationResult)
    assert result.mask.shape == (6, 7, 9)
    assert result.class_names == ("background", "class 1", "class 2")


def test_the_bundled_default_finds_nuclei() -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros((128, 128), np.uint8)
    for y, x in [(24, 30), (30, 90), (80, 40), (90, 100), (60, 64)]:
        truth |= (np.hypot(*(np.indices(truth.shape) - np.array([[[y]], [[x]]]))) < 9).astype(np.uint8)
    image = np.clip(12 + 90 * truth + rng.normal(0, 4, truth.shape), 0, 255).astype(np.uint8)
    result = mmkit.pipeline("medical-segmentation")(image)
    assert dice(result.mask, truth, 1) > 0.75
    assert result.class_names == ("background", "nucleus")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("unet_nuclei", 0.85), ("lightm_unet_nuclei", 0.7)])
def test_the_bundled_networks_on_real_test_pictures(data_dir, name, least) -> None:
    from mmkit.vision.medical.datasets import nuclei_cases

    cases = nuclei_cases(data_dir / "med_nuclei", "test")[::4]
    (score,) = dice_per_class(mmkit.load_weights(name), cases, (256, 256), 2)
    assert score > least


def test_kinds_and_single_nuclei_belong_to_the_cases(data_dir) -> None:
    from mmkit.vision.medical import nuclei_cases, nuclei_instances, nuclei_kinds

    folder = data_dir / "med_nuclei"
    cases, kinds, single = (read(folder, "test") for read in (nuclei_cases, nuclei_kinds, nuclei_instances))
    assert len(cases) == len(kinds) == len(single)
    assert set(kinds) == {"fluorescence", "brightfield_colour"}
    assert all(
        ((numbers > 0) == (labels > 0).numpy()).all() for numbers, (_, labels) in zip(single, cases, strict=True)
    )
    assert max(numbers.max() for numbers in single) > 50


def test_pictures_smaller_than_a_step_of_the_network_are_segmented() -> None:
    for size in ((5, 5), (1, 1), (3, 40)):
        result = mmkit.pipeline("medical-segmentation")(np.full((*size, 3), 90, np.uint8))
        assert result.mask.shape == size


def test_how_unlike_an_input_is_can_be_asked_without_segmenting_it() -> None:
    pipe = mmkit.pipeline("medical-segmentation", "lightm_unet_blobs")
    volume = Volume(sample_volume(7)[0], (1.0, 1.0, 1.0), np.eye(4))
    assert pipe.unlike(volume) == pipe(volume, progress=False).unlike < 1
    assert segmenter().unlike(np.zeros((8, 8), np.uint8)) is None


def test_bundled_volumes_are_predicted_in_windows_of_the_training_patches() -> None:
    assert mmkit.pipeline("medical-segmentation", "lightm_unet_blobs").window == [32, 32, 32]
    assert mmkit.pipeline("medical-segmentation", "lightm_unet_blobs", window=20).window == [20, 20, 20]
    with pytest.raises(InputError, match="window"):
        mmkit.pipeline("medical-segmentation", "lightm_unet_blobs", window=(32, 32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sure_network_may_be_mirrored_in_half_precision(dtype: str) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[4:12, 4:12] = 255
    pipeline = mmkit.pipeline("medical-segmentation", Threshold(), dtype=dtype)
    plain, mirrored = pipeline(picture), pipeline(picture, tta=True)
    assert np.array_equal(mirrored.mask, plain.mask)
    assert plain.mask.sum() == 64


def test_more_classes_than_a_mask_can_number_are_refused() -> None:
    with pytest.raises(InputError, match=r"300 classes; a mask of 8 bits numbers 256"):
        mmkit.pipeline("medical-segmentation", Threshold(classes=300))
    mmkit.pipeline("medical-segmentation", Threshold(classes=256))
