"""CLIPScore by an open_clip model with random weights: the figures are those of its own embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmkit.diffusion.spm import ClipScorer
from mmkit.errors import CheckpointError, InputError


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import json

    import open_clip

    config = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def test_scores_are_scaled_cosines_of_each_picture_with_its_text(weights: Path) -> None:
    scorer = ClipScorer("tiny-clip", weights)
    pictures = [Image.new("RGB", (40, 30), c) for c in ("red", "blue", "white")]
    texts = ["a red cat", "blue", ""]
    rows = [scorer.model.encode_image(scorer.prepare(p)[None], normalize=True)[0] for p in pictures]
    told = scorer.model.encode_text(scorer.tokenizer(texts), normalize=True)
    want = torch.tensor([2.5 * max(float(a @ b), 0.0) for a, b in zip(rows, told, strict=True)])
    torch.testing.assert_close(scorer(pictures, texts), want, atol=1e-5, rtol=1e-4)
    nearer = sum(float(a @ told[0]) <= float(a @ told[2]) for a in rows) / 3
    assert scorer.error_rate(pictures, "a red cat") == pytest.approx(nearer)


def test_wrong_input(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        ClipScorer("ViT-Z", weights)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not hold"):
        ClipScorer("tiny-clip", tmp_path / "other.safetensors")
    scorer = ClipScorer("tiny-clip", weights)
    with pytest.raises(InputError, match="1 pictures and 2 texts"):
        scorer([Image.new("RGB", (8, 8))], ["a", "b"])
    with pytest.raises(InputError, match="needs pictures"):
        scorer.cosines([], ["a"])
