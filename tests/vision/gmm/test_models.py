"""The five backbones: sizes of the paper, training, saving, official files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mmkit.backbones.model import create_model, list_models, load_official_checkpoint
from mmkit.errors import CheckpointError
from mmkit.storage import write_safetensors
from mmkit.vision.gmm.models.vit import GMMViT

COUNTS = {
    # The specification's table of the official factory. Per mask: CIFAR-10, then CIFAR-100 and Tiny-ImageNet (64 pixels, 200
    # classes) where it gives them.
    "gmm_vit": {
        "none": (2_692_426, 2_709_796, 2_756_744),
        "gmm": (2_693_122, 2_710_492, 2_757_440),
        "elm": (2_728_906, 2_746_276, 2_793_224),
    },
    "gmm_swin": {"none": (7_073_188, 7_107_838, 7_149_794), "gmm": (7_074_088, 7_108_738, 7_150_694)},
    "gmm_cait": {
        "none": (9_020_618, 9_037_988, 9_084_936),
        "gmm": (9_021_578, 9_038_948, 9_085_896),
        "elm": (9_118_922,),
    },
    "gmm_cait_tiny": {
        "none": (5_078_834, 5_088_644, 5_115_096),
        "gmm": (5_079_794, 5_089_604, 5_116_056),
        "elm": (5_177_138,),
    },
    "gmm_pit": {
        "none": (6_972_586, 7_007_236, 7_049_192),
        "gmm": (6_973_186, 7_007_836, 7_049_792),
        "elm": (7_129_258,),
    },
    "gmm_t2t": {
        "none": (6_486_080, 6_509_210, 6_659_262),
        "gmm": (6_486_570, 6_509_700, 6_659_762),
        "elm": (6_600_768, None, 7_822_526),
    },
    "gmm_vit_base": {"none": (4_283_146,), "gmm": (4_282_954,), "elm": (4_806_922,)},
    "gmm_vit_heat": {"none": (2_425_930,), "gmm": (2_426_026,), "elm": (2_949_834,)},
    "gmm_vit_d6": {"none": (3_092_302,), "gmm": (3_092_518,)},
    "gmm_vit_d15": {"none": (2_523_898,), "gmm": (2_525_410,)},
    "gmm_vit_d30": {"none": (1_270_594,), "gmm": (1_274_050,)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_official_ones(name):
    assert name in list_models("gmm_*")
    for mask, counts in COUNTS[name].items():
        for (img_size, num_classes), count in zip(((32, 10), (32, 100), (64, 200)), counts, strict=False):
            if count is not None:
                model = create_model(name, img_size=img_size, num_classes=num_classes, mask=mask)
                assert sum(p.numel() for p in model.parameters()) == count, (mask, img_size, num_classes)


@pytest.mark.parametrize(
    ("name", "patches"),
    [("gmm_vit", (4, 8, 32)), ("gmm_vit_d6", (4, 8, 8)), ("gmm_vit_base", (2, 8, 8)), ("gmm_vit_heat", (2, 4, 4))],
)
def test_patch_sizes_follow_the_image_as_in_the_official_factory(name, patches):
    for img_size, patch in zip((32, 64, 256), patches, strict=True):
        assert create_model(name, img_size=img_size, depth=1, embed_dim=24).config["patch_size"] == patch


SMALL = {
    "gmm_vit": {"embed_dim": 24, "depth": 2, "num_heads": 3},
    "gmm_swin": {"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3]},
    "gmm_cait": {"embed_dim": 12, "depth": 2, "cls_depth": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 16},
    "gmm_pit": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "head_dim": 4, "patch_size": 4},
    "gmm_t2t": {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 8},
}


@pytest.mark.parametrize("mask", ["gmm", "elm", "none"])
@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_trains_saves_and_loads(name, mask, tmp_path):
    model = create_model(name, mask=mask, **SMALL[name])
    images = torch.randn(2, 3, 32, 32)
    model(images).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if ".mask." in k}
    assert bool(grads) == (mask != "none")
    assert all(g is not None for g in grads.values())  # PiT reads its class token: the last mask's gradient is zero
    assert not grads or sum(g.abs().sum() for g in grads.values()) > 0
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), model(images), atol=0, rtol=0)


def test_non_square_images():
    assert GMMViT((16, 32), 4, embed_dim=24, depth=1, num_heads=2)(torch.randn(1, 3, 16, 32)).shape == (1, 10)


def test_a_damaged_official_file_is_refused(tmp_path):
    model = create_model("gmm_vit", **SMALL["gmm_vit"])
    write_safetensors(
        tmp_path / "w.safetensors", {"mask": torch.zeros(1, 1, 64, 64), "pos_embedding": torch.zeros(1, 64, 24)}
    )
    with pytest.raises(CheckpointError, match="missing"):
        load_official_checkpoint(model, tmp_path / "w.safetensors")


@pytest.mark.slow
def test_digits_from_scratch_learn_faster_with_the_mask():
    """Four hundred digits, 20 epochs: with the mask the small ViT has learnt, without it it has hardly begun (one seed)."""
    path = Path(__file__).parents[3] / "benchmarks" / "gmm_small_data.py"
    spec = importlib.util.spec_from_file_location("gmm_small_data", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    masked, plain = (
        benchmark.run("digits", f"mean pooling, {name}", 0, path, 20)["accuracy"] for name in ("GMM", "no mask")
    )
    assert masked >= 0.85
    assert masked >= plain + 0.2


@pytest.mark.parametrize("name", ["gmm_vit", "gmm_cait", "gmm_pit", "gmm_t2t"])  # timm's Swin takes no empty batch
def test_an_empty_batch_gives_an_empty_answer(name):
    model = create_model(name, num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 3)
