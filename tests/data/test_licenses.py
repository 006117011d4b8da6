"""Pictures are chosen by their license, from either kind of listing."""

from __future__ import annotations

import json

import pytest

from mmkit.data.licenses import permissive_pictures
from mmkit.errors import InputError


def test_share_alike_and_unknown_licenses_are_left_out(tmp_path):
    lines = [
        "b.jpg,CC-BY-2.0",
        "a.jpg,no-known-copyright-restrictions",
        "c.jpg,CC-BY-SA-2.0",
        "d.jpg,CC-BY-NC-2.0",
        "e.jpg,",
    ]
    (tmp_path / "index.csv").write_text("\n".join(["path,license", *lines]))
    assert permissive_pictures(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b.jpg"]


def test_annotations_name_pictures_too(tmp_path):
    rows = [{"image": "images/2.jpg", "license": "CC-BY-SA-2.0"}, {"image": "images/1.jpg", "license": "CC-BY-2.0"}]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    assert permissive_pictures(tmp_path) == [tmp_path / "images/1.jpg"]


def test_a_folder_without_listing_or_permissive_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"index\.csv"):
        permissive_pictures(tmp_path)
    (tmp_path / "index.csv").write_text("path,license\na.jpg,CC-BY-SA-2.0\n")
    with pytest.raises(InputError, match="names no picture"):
        permissive_pictures(tmp_path)
