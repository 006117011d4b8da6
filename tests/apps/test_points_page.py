"""The page of point clouds without a browser: files, pictures, the lab and its limits."""

from __future__ import annotations

import gradio as gr
import numpy as np
import pytest
import trimesh

from mmkit.apps import points as page
from mmkit.pointcloud import read_point_cloud
from mmkit.weights import list_weights

needs_weights = pytest.mark.skipif("point_shapes" not in list_weights(), reason="the bundled models are not installed")


def test_points_become_a_file_the_viewer_shows():
    cloud = page.drawn_cloud("mug", False, 1, 300)
    path = page.model_file(cloud, np.full((300, 3), 200, np.uint8))
    mesh = trimesh.load(path, force="mesh")
    assert len(mesh.faces) == 8 * 300
    assert np.allclose(mesh.bounds, [cloud.min(0) - 0.028, cloud.max(0) + 0.028], atol=1e-5)
    assert len(read_point_cloud(path, 50)) == 50


def test_thumbnails_show_the_cloud():
    picture = np.asarray(page.thumbnail(page.drawn_cloud("table", False, 1, 256)))
    assert 200 < (picture.min(-1) < 200).sum() < picture.shape[0] * picture.shape[1] // 2


@needs_weights
def test_a_file_is_answered_through_the_api(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, page.drawn_cloud("chair", False, 2))
    answer = page.classify_cloud(str(path))
    assert answer["label"] in answer["classes"]
    assert sum(p["points"] for p in answer["parts"]) == 2048


def test_the_lab_says_what_it_needs():
    with pytest.raises(gr.Error, match="at least two classes"):
        page.on_adapt(None, "Point-PEFT")
    with pytest.raises(gr.Error, match="name"):
        page.on_add(None, " ", None)
    with pytest.raises(gr.Error, match="Adapt"):
        page.on_ask(None, None)
