"""The medical page's handlers without a browser: which model, which views, and what is refused."""

from __future__ import annotations

import dataclasses
import html
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from mmkit.apps import medical
from mmkit.data.drawn.scans import sample_picture, sample_volume
from mmkit.errors import InputError
from mmkit.vision.medical.result import SegmentationResult
from mmkit.vision.medical.volumes import Volume

pytestmark = pytest.mark.skipif(len(medical.model_choices()) < 2, reason="the bundled models are not installed")


def result(shape=(6, 8, 4), spacing=(1.0, 2.0, 1.5)) -> SegmentationResult:
    mask = np.zeros(shape, np.uint8)
    mask[1:3, 2:5, 1] = 1
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    return SegmentationResult(mask, image, image, ("background", "<b>spot</b>"), spacing, np.eye(4), 0.1)


def test_the_kind_of_file_chooses_the_model(tmp_path) -> None:
    picture, truth = sample_picture(1, 96)
    Image.fromarray(picture).save(tmp_path / "cells.png")
    Image.fromarray(truth).save(tmp_path / "truth.png")
    mask, record = medical.segment_medical(str(tmp_path / "cells.png"), None, str(tmp_path / "truth.png"))
    assert np.asarray(Image.open(mask)).shape == (96, 96)
    assert [row["class"] for row in record["classes"]] == ["nucleus"]
    assert 0 <= record["classes"][0]["dice"] <= 1

    volume, _ = sample_volume(1, (20, 24, 16))
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1])), tmp_path / "scan.nii.gz")
    mask, record = medical.segment_medical(str(tmp_path / "scan.nii.gz"))
    assert nibabel.load(mask).shape == (20, 24, 16)
    assert record["spacing"] == [1.0, 1.0, 3.0]
    with pytest.raises(Exception, match=r"scan\.nii\.gz: labels must be whole numbers"):
        medical.segment_medical(str(tmp_path / "cells.png"), None, str(tmp_path / "scan.nii.gz"))
    with pytest.raises(Exception, match="must be equal"):
        medical.segment_medical(str(tmp_path / "cells.png"), None, str(mask))
    (tmp_path / "cut.nii").write_bytes(b"not a volume")
    with pytest.raises(Exception, match=r"^\W*cut\.nii cannot be read(?!.*" + tmp_path.name + ")"):
        medical.segment_medical(str(tmp_path / "cut.nii"))
    with pytest.raises(Exception, match="No model of that name"):
        medical.segment_medical(str(tmp_path / "cells.png"), "/etc")


def test_views_keep_proportions_and_names_are_escaped() -> None:
    found = result()
    picture = medical.draw(found, None, medical.PREDICTION, 0.5, "Axial (Z)", 1)
    assert picture.size == (180, 480)
    side = medical.draw(found, None, medical.PREDICTION, 0.5, "Sagittal (X)", 99)
    assert side.size[0] / side.size[1] == pytest.approx(8 * 2 / (4 * 1.5), rel=0.01)
    assert "<b>" not in medical.legend(found)
    table = medical.table(found, found.mask)
    assert "&lt;b&gt;" in table
    assert [cell in table for cell in (">1<", ">18 mm³<", ">1.000<")] == [True] * 3


def test_stained_tissue_keeps_its_color_under_outlines() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 1
    tissue = np.full((60, 80, 3), (150, 90, 190), np.uint8)
    found = SegmentationResult(mask, mask.astype(np.float32), tissue, ("background", "nucleus"), (1.0, 1.0), None, 0.1)
    view, status, *_, show = (medical._show(found, None, 0.5)[i] for i in (1, 2, 6))
    assert show["value"] == medical.OUTLINES
    seen = np.asarray(view.resize((80, 60)))
    assert tuple(seen[30, 40]) == tuple(seen[5, 5]) == (150, 90, 190)  # nothing is painted over, inside or outside
    assert tuple(np.asarray(found.plot())[20, 40]) == (255, 235, 59)
    assert "rgb(255, 235, 59)" in status  # the legend shows the color of the lines
    grey = dataclasses.replace(found, image=np.full((60, 80, 3), 90, np.uint8))
    assert medical._show(grey, None, 0.5)[6]["value"] == medical.PREDICTION


def test_a_volume_opens_at_the_slice_with_most_content() -> None:
    found = result()
    assert found.best_slice() == 1
    image = np.zeros((6, 8, 4), np.float32)
    image[2, 3, 3] = 1
    assert dataclasses.replace(found, mask=np.zeros_like(found.mask), image=image).best_slice() == 3


def test_truth_and_nothing_can_be_shown() -> None:
    found = result()
    truth = np.zeros_like(found.mask)
    truth[5, 7, 1] = 1
    views = {
        s: np.asarray(medical.draw(found, truth, s, 1.0, "Axial (Z)", 1))
        for s in ("Prediction", "Ground truth", "Nothing")
    }
    assert not np.array_equal(views["Prediction"], views["Ground truth"])
    assert not np.array_equal(views["Nothing"], views["Ground truth"])
    assert (np.ptp(views["Nothing"].astype(int), axis=-1) == 0).all()


def test_a_picture_unlike_the_training_data_is_said_to_be_above_all_else() -> None:
    found = dataclasses.replace(result(), unlike=3.0)
    status = medical._show(found, None, 0.5)[2]
    assert status.startswith('<p role="alert"')
    assert "unlike everything the network was trained on" in status
    assert "<b>spot</b> in anything" in html.unescape(status)
    assert "<b>spot" not in status
    assert "alert" not in medical._show(result(), None, 0.5)[2]
    assert "robability" not in medical.table(found, None)


def test_export_writes_what_the_table_shows() -> None:
    found = result()
    mask, record = medical.export(found, None)
    assert mask.endswith("mask.nii.gz")
    with open(record) as f:
        assert json.load(f)["classes"] == found.measures()


def test_a_picture_that_would_take_minutes_is_refused_before_it_is_read(tmp_path) -> None:
    Image.new("L", (4000, 4000)).save(tmp_path / "slide.png")
    with pytest.raises(InputError, match=r"4000 x 4000 = 16 million pixels; this page takes up to 4\.2 million\. Crop"):
        medical.predict(str(tmp_path / "slide.png"), medical.AUTOMATIC)


def test_oversized_inputs_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(medical, "MAX_WINDOWS", 0)
    with pytest.raises(InputError, match="Crop it first"):
        medical.predict(sample_picture(0, 64)[0], medical.AUTOMATIC)


def test_automatic_takes_the_default_for_pictures_and_the_most_alike_for_volumes() -> None:
    assert medical.model_choices()[0] == "unet_nuclei"
    assert medical.choose_pipeline(medical.AUTOMATIC, sample_picture(0, 64)[0]) is medical.load_pipeline("unet_nuclei")
    drawn = Volume(sample_volume(7)[0], (1.0, 1.0, 1.0), np.eye(4))
    assert medical.choose_pipeline(None, drawn) is medical.load_pipeline("lightm_unet_blobs")


def test_automatic_knows_an_mri_crop(data_dir) -> None:
    crop = sorted((data_dir / "med_hippocampus/images").glob("*.nii.gz"))[0]
    assert medical.choose_pipeline(medical.AUTOMATIC, str(crop)) is medical.load_pipeline("unet_hippocampus")
