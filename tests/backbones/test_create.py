"""Backbones: they describe themselves, keep their preprocessing, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from mmkit.adapters import apply_adapter
from mmkit.backbones import backbone_info, create_backbone, head_names, image_info, save_backbone
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import write_json, write_safetensors

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(**kwargs):  # type: ignore[no-untyped-def]
    return create_backbone("vit_tiny_patch16_224", **{**VIT, **kwargs}).eval()


def test_a_vit_tells_its_parts() -> None:
    info = vit(num_classes=5).backbone_info
    assert (info.grid, info.num_prefix_tokens, info.input_size) == ((4, 4), 1, (3, 32, 32))
    assert info.blocks == ("blocks.0", "blocks.1")
    assert (info.heads, info.num_classes) == (("head",), 5)
    assert info.mean == (0.5, 0.5, 0.5)


def test_an_open_clip_tower_tells_its_parts() -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    tower = create_backbone("open_clip:ViT-B-32", embed_dim=16, vision_cfg=vision)
    assert tower(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert tower.backbone_info.grid == (4, 4)
    assert len(tower.backbone_info.blocks) == 2
    assert tower.backbone_info.mean[0] == pytest.approx(0.48145466)
    assert head_names(tower) == ()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        create_backbone("vit_tiny_patch16_244")
    with pytest.raises(InputError, match="ViT-B-32"):
        create_backbone("open_clip:ViT-B-33")
    with pytest.raises(InputError, match="UNet2DConditionModel"):
        create_backbone("diffusers:UNet2DConditionalModel")
    with pytest.raises(InputError, match="known"):
        create_backbone("timmm:vit_tiny_patch16_224")
    with pytest.raises(InputError, match="not a folder"):
        create_backbone("./no/such/folder")
    with pytest.raises(InputError, match="num_classes"):
        vit(num_classes=-1)


def test_saved_with_its_preprocessing_and_read_by_timm_too(tmp_path: Path) -> None:
    import timm

    model = vit(num_classes=5)
    model.__dict__["backbone_info"] = dataclasses.replace(
        model.backbone_info, mean=(0.1, 0.2, 0.3), interpolation="bilinear"
    )
    save_backbone(model, tmp_path / "m", class_names=tuple("abcde"))
    again = create_backbone(tmp_path / "m").eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
    assert again.backbone_info.mean == (0.1, 0.2, 0.3)
    assert again.backbone_info.interpolation == "bilinear"
    assert again.backbone_info.class_names == tuple("abcde")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(by_timm(x), model(x))
    assert tuple(by_timm.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    other_head = create_backbone(tmp_path / "m", num_classes=3)
    assert other_head(x).shape == (1, 3)
    assert torch.equal(other_head.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_an_attached_adapter_is_not_lost_silently(tmp_path: Path) -> None:
    model = vit()
    apply_adapter(model, "ssf")
    with pytest.raises(InputError, match="merge"):
        save_backbone(model, tmp_path / "m")


def test_partial_and_wrong_checkpoints_list_keys_and_load_nothing(tmp_path: Path) -> None:
    state = vit(num_classes=5).state_dict()
    target = vit(num_classes=5)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    partial = {k: v for k, v in state.items() if k != "norm.weight"} | {"extra.weight": torch.zeros(1)}
    write_safetensors(tmp_path / "partial.safetensors", partial)
    with pytest.raises(CheckpointError, match=r"(?s)1 missing: norm.weight.*1 unexpected: extra.weight"):
        vit(num_classes=5, checkpoint_path=tmp_path / "partial.safetensors")
    from mmkit.backbones.state import load_backbone_state

    with pytest.raises(CheckpointError):
        load_backbone_state(target, partial, "x")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    for name, content in (("a.safetensors", b"123"), ("b.pth", b"not a checkpoint"), ("c.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            vit(checkpoint_path=tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        vit(checkpoint_path=tmp_path / "none.pth")


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="without running code"):
        vit(checkpoint_path=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_position_embeddings_follow_the_image_size_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_safetensors(tmp_path / "m.safetensors", vit(num_classes=5).state_dict())
    larger = vit(num_classes=5, img_size=64, checkpoint_path=tmp_path / "m.safetensors")
    assert "interpolated" in caplog.text
    assert larger(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_the_hub_is_named_when_it_cannot_be_reached() -> None:
    with pytest.raises(CheckpointError, match=r"download https:.*--checkpoint FILE"):
        create_backbone("vit_tiny_patch16_224", pretrained=True)


def test_diffusers_folder(tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    again = create_backbone(tmp_path / "unet")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in unet.state_dict().items())


def test_info_of_any_module() -> None:
    assert backbone_info(torch.nn.Linear(2, 2)).blocks == ()


def test_img_size_says_what_a_convolutional_network_is_prepared_for(tmp_path: Path) -> None:
    model = create_backbone("resnet10t", num_classes=3, img_size=64)
    assert image_info(model).input_size == (3, 64, 64)
    save_backbone(model, tmp_path / "saved")
    assert image_info(create_backbone(tmp_path / "saved")).input_size == (3, 64, 64)
    with pytest.raises(InputError, match="no_such_setting"):
        create_backbone("resnet10t", img_size=64, no_such_setting=1)


def test_a_backbone_says_whether_it_was_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mmkit")
    assert vit().backbone_info.trained is False
    assert create_backbone("mmkit:tiny_vit").backbone_info.trained
    assert backbone_info(torch.nn.Linear(2, 2)).trained is None
    write_safetensors(tmp_path / "m.safetensors", vit(num_classes=5).state_dict())
    assert vit(num_classes=5, checkpoint_path=tmp_path / "m.safetensors").backbone_info.trained
    assert "untrained" not in caplog.text
    fresh = vit(num_classes=3, checkpoint_path=tmp_path / "m.safetensors")
    assert "of other classes: the classifier (head) starts untrained" in caplog.text
    save_backbone(fresh, tmp_path / "saved")
    again = create_backbone(tmp_path / "saved").backbone_info
    assert (again.trained, again.fresh) == (True, ("head",))
    random = create_backbone(save_backbone(vit(num_classes=3), tmp_path / "random"))
    assert random.backbone_info.trained is False
    torch.nn.init.ones_(random.head.bias)  # as training would
    assert create_backbone(save_backbone(random, tmp_path / "random")).backbone_info.trained
    headless = {k: v for k, v in vit(num_classes=5).state_dict().items() if not k.startswith("head.")}
    write_safetensors(tmp_path / "headless.safetensors", headless)
    vit(num_classes=5, checkpoint_path=tmp_path / "headless.safetensors")
    assert "brings no classifier" in caplog.text
    with pytest.raises(CheckpointError, match=r"2 missing: head\.weight"):
        create_backbone("vit_tiny_patch16_224", tmp_path / "headless.safetensors", **{**VIT, "num_classes": None})


def test_a_norm_of_the_head_is_loaded_when_the_classes_are_other(tmp_path: Path) -> None:
    model = create_backbone("test_convnext", num_classes=5)
    torch.nn.init.normal_(model.head.norm.weight)
    write_safetensors(tmp_path / "m.safetensors", model.state_dict())
    other = create_backbone("test_convnext", tmp_path / "m.safetensors", num_classes=3)
    assert torch.equal(other.head.norm.weight, model.head.norm.weight)


def test_random_weights_are_said_before_they_answer() -> None:
    from mmkit.vision.classification.pipeline import ImageClassificationPipeline

    with pytest.warns(UserWarning, match="random weights"):
        ImageClassificationPipeline(vit(num_classes=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageClassificationPipeline()


def test_a_damaged_or_foreign_folder_is_refused_and_none_is_lost(tmp_path: Path) -> None:
    folder = save_backbone(vit(num_classes=5), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 4}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        create_backbone(folder)
    save_backbone(vit(num_classes=5), folder)  # replaces its own kind, whole
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        save_backbone(vit(num_classes=5), folder)
    with pytest.raises(InputError, match="3 class names for a classifier of 5 outputs"):
        save_backbone(vit(num_classes=5), tmp_path / "n", class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="did not come from create_backbone"):
        save_backbone(torch.nn.Linear(2, 2), tmp_path / "n")
    assert not (tmp_path / "n").exists()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="names no architecture"):
        create_backbone(tmp_path / "none")


def test_folders_of_earlier_versions_are_read(tmp_path: Path) -> None:
    model = vit(num_classes=5)
    info = {
        k: v for k, v in dataclasses.asdict(model.backbone_info).items() if k not in ("heads", "trained", "crop_mode")
    }
    config = {
        "mmkit": {**info, "head": "head", "mean": [0.1, 0.2, 0.3], "class_names": list("abcde")},
        "architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {}, "model_args": VIT,
    }  # fmt: skip
    write_json(tmp_path / "config.json", config)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict())
    again = create_backbone(tmp_path).eval()
    assert (again.backbone_info.mean, again.backbone_info.class_names) == ((0.1, 0.2, 0.3), tuple("abcde"))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
