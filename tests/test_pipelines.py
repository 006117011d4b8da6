"""One contract for every pipeline: what no person can have meant is refused in words, whatever its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.errors import InputError, MMKitError
from mmkit.results import Result
from mmkit.video import write_video

ODD: dict[str, Any] = {
    "none": None, "whole": 3, "number": -1.5, "object": object(), "class": Path, "missing": "missing.png", "null": "a\0b",
    "nobody": "~no_such_user/a.png", "empty": "",
    "no bytes": b"", "junk": b"junk" * 9, "dict": {}, "dict of one": {"a": 1}, "nested": [[None]], "set": {1},
    "no pixels": np.zeros((0, 0, 3), np.uint8), "nan": np.full((20, 20, 3), np.nan, np.float32), "one axis": np.zeros(7),
    "inf": np.full((20, 20, 3), np.inf, np.float32), "five axes": np.zeros((1, 1, 2, 2, 2)), "words": np.array(["a"]),
    "objects": np.array([object()]), "complex": np.zeros((9, 9, 3), complex), "empty picture": Image.new("RGB", (0, 0)),
    "huge": 10**30, "yes": True,
}  # fmt: skip
MEANT = {  # what is an answerable question after all
    "text-to-image": {"missing", "null", "nobody", "empty"},
    "novel-view": {"none"},
    "semantic-slam": {"none"},
}


@pytest.mark.parametrize("task", mmkit.list_tasks())
def test_what_nobody_meant_is_refused_in_words(task: str) -> None:
    pipeline = mmkit.pipeline(task)
    raw = []
    for name, given in ODD.items():
        if name in MEANT.get(task, ()):
            continue
        try:
            raw.append(f"{name}: answered with {type(pipeline(given)).__name__}")
        except MMKitError as error:
            if len(str(error).split()) < 4:
                raw.append(f"{name}: says only {str(error)!r}")
        except Exception as error:
            raw.append(f"{name}: {type(error).__name__}: {error}")
    assert not raw, "\n".join(raw)


@pytest.mark.parametrize("task", mmkit.list_tasks())
@pytest.mark.parametrize(
    "settings",
    [
        {"model": "no such model"},
        {"model": "~no_such_user/model"},
        {"model": ""},
        {"model": 3},
        {"device": "abacus"},
        {"dtype": "int7"},
    ],
)
def test_what_cannot_be_built_is_refused_in_words(task: str, settings: dict[str, Any]) -> None:
    with pytest.raises(MMKitError) as caught:
        mmkit.pipeline(task, **settings)
    assert len(str(caught.value).split()) > 3


@pytest.mark.parametrize("task", ["image-classification", "point-cloud-classification"])
def test_a_list_is_answered_in_its_order(task: str) -> None:
    pipeline = mmkit.pipeline(task)
    make = np.random.default_rng(0)
    if task == "image-classification":
        given: list[Any] = [Image.fromarray(make.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(2)]
    else:
        given = [make.normal(size=(300, 3)).astype(np.float32) for _ in range(2)]
    assert pipeline([]) == []
    several = pipeline(given)
    assert [type(s) for s in several] == [type(pipeline(given[0]))] * 2
    assert isinstance(several[0], Result)
    assert [s.label for s in several] == [pipeline(g).label for g in given]


@pytest.mark.parametrize(
    "task",
    [
        "dense-features", "image-classification", "mask-explorer", "medical-segmentation", "point-cloud-classification",
        "point-cloud-segmentation", "semantic-segmentation", "video-classification",
    ],
)  # fmt: skip
def test_a_model_of_damaged_weights_gives_no_answer(task, tmp_path):
    given: Any = np.zeros((32, 32, 3), np.uint8)
    if "cloud" in task:
        given = np.random.default_rng(0).random((200, 3))
    elif "video" in task:
        given = write_video(tmp_path / "clip.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    pipe = mmkit.pipeline(task)
    with torch.no_grad():
        for weight in pipe.model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"NaN or infinite values|is not finite"):
        pipe(given)
