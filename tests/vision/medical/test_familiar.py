"""Inputs that are unlike the training data are said to be: with the bundled weights, and with weights of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import mmkit
from mmkit.data.drawn.scans import sample_picture, sample_volume
from mmkit.data.images import load_image
from mmkit.errors import InputError
from mmkit.vision.medical import Familiarity, Volume, normalize, nuclei_cases
from mmkit.weights import weight_entry

DATA = Path(os.environ.get("MMKIT_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


def photo(side: int = 96) -> np.ndarray:
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:side, 180 : 180 + side])


def as_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(load_image(image))).float().permute(2, 0, 1)


def bundled(name: str) -> Familiarity:
    return Familiarity.from_dict(weight_entry(name).extra["familiarity"])


def test_a_photo_of_a_person_brings_a_warning_and_a_micrograph_none(tmp_path) -> None:
    segment = mmkit.pipeline("medical-segmentation")
    result = segment(photo(), progress=False)
    assert result.unlike > 1
    assert "unlike everything the network was trained on" in result.warning
    result.save(tmp_path / "person.json")
    record = json.loads((tmp_path / "person.json").read_text())
    assert (record["unlike"], record["warning"]) == (round(result.unlike, 3), result.warning)
    assert all("probability" not in key for row in record["classes"] for key in row)
    cells = segment(sample_picture(7, 128)[0], progress=False)
    assert cells.unlike < 1
    assert cells.warning == cells.record()["warning"] == ""


def test_volumes_are_told_apart_too() -> None:
    familiarity = bundled("lightm_unet_blobs")
    drawn = torch.from_numpy(sample_volume(7)[0])[None]
    ramp = torch.linspace(0, 1, 40).expand(1, 40, 40, 40)
    assert familiarity.distance(normalize(drawn)) < 1 < familiarity.distance(normalize(ramp))
    weak = mmkit.pipeline("medical-segmentation", "lightm_unet_blobs", window=16)
    assert weak(Volume(ramp[0, :8, :8, :8].numpy(), (1.0, 1.0, 1.0), np.eye(4)), progress=False).warning


def test_exposure_and_half_precision_change_nothing_and_nothing_is_too_small() -> None:
    familiarity = bundled("unet_nuclei")
    picture = as_tensor(sample_picture(3)[0])
    plain = familiarity.distance(normalize(picture))
    assert familiarity.distance(normalize(picture * 0.3 + 20)) == pytest.approx(plain, abs=1e-4)
    assert familiarity.distance(normalize(picture).half()) == pytest.approx(plain, abs=0.02)
    for size in ((1, 1), (3, 2), (1, 500)):
        assert familiarity.distance(normalize(torch.zeros(3, *size))) > 1


def test_weights_of_ones_own_get_it_from_their_training_data() -> None:
    pictures = [normalize(as_tensor(sample_picture(i, 96)[0])) for i in range(12)]
    familiarity = Familiarity.measure(pictures)
    again = Familiarity.from_dict(json.loads(json.dumps(familiarity.to_dict())))
    assert again.distance(pictures[0]) == familiarity.distance(pictures[0]) < 0.1
    model = mmkit.load_weights("lightm_unet_nuclei")
    segment = mmkit.pipeline("medical-segmentation", model, familiarity=familiarity)
    assert segment(photo(64), progress=False).warning
    assert mmkit.pipeline("medical-segmentation", model)(photo(64), progress=False).unlike is None
    with pytest.raises(InputError, match="two"):
        Familiarity.measure(pictures[:1])


@pytest.mark.skipif(not (DATA / "med_nuclei").is_dir(), reason="needs med_nuclei in MMKIT_DATA_DIR")
def test_few_micrographs_and_nearly_all_photos_are_warned_of() -> None:
    familiarity = bundled("unet_nuclei")
    cells = [familiarity.distance(image) > 1 for image, _ in nuclei_cases(DATA / "med_nuclei", "test")]
    assert np.mean(cells) <= 0.05
    files = sorted((DATA / "photos_more").glob("*.jpg"))[::6]
    photos = [normalize(as_tensor(f)) for f in files]
    assert np.mean([familiarity.distance(x) > 1 for x in photos]) >= 0.95
