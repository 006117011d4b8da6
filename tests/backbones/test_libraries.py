"""Libraries: transformers' and open_clip's models answer like timm's, and their folders stay readable by themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmkit.backbones import (
    Builder,
    ImageBackboneInfo,
    backbone_info,
    create_backbone,
    example_input,
    head_names,
    image_info,
    save_backbone,
)
from mmkit.data import ImageTransform
from mmkit.errors import CheckpointError, InputError
from mmkit.registry import LIBRARIES
from mmkit.storage import write_safetensors

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN = {**WIDTH, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
DECODER = {"decoder_hidden_size": 16, "decoder_intermediate_size": 16, "decoder_num_attention_heads": 2}
TRANSFORMERS = {
    "vit": PLAIN,
    "dinov2": {**WIDTH, "image_size": 32, "patch_size": 8},
    "dinov2_with_registers": {**WIDTH, "image_size": 32, "patch_size": 8},
    "dinov3_vit": {**PLAIN, "num_register_tokens": 4},
    "siglip": PLAIN,
    "siglip_vision_model": PLAIN,
    "clip": PLAIN,
    "clip_vision_model": PLAIN,
    "beit": PLAIN,
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "convnext": STAGES,
    "dinov3_convnext": STAGES,
    "hiera": {"image_size": [64, 64], "patch_stride": [4, 4], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 4, 8]},
    "videomae": {**PLAIN, **DECODER, "num_frames": 4, "decoder_num_hidden_layers": 1},
    "sam": {**WIDTH, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "output_channels": 16,
            "mlp_dim": 64},
}  # fmt: skip


def random_like_example(model: nn.Module) -> torch.Tensor:
    args, _ = example_input(model, 2) or ((), {})
    return torch.randn_like(args[0])


def first(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformers_model_answers_with_logits_and_its_folder_is_read_by_transformers(
    kind: str, tmp_path: Path
) -> None:
    model = create_backbone(f"transformers:{kind}", num_classes=3, **TRANSFORMERS[kind]).eval()
    info, x = image_info(model), random_like_example(model)
    called = set()
    for path in info.heads:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    logits = model(x)
    assert (logits.shape, called, info.trained) == ((2, 3), set(info.heads), False)
    assert info.num_features == model.get_submodule(info.heads[0]).in_features
    save_backbone(model, tmp_path / "m", class_names=("a", "b", "c"))
    again = create_backbone(tmp_path / "m").eval()
    assert torch.equal(again(x), logits)
    restored = image_info(again)
    assert (restored.class_names, restored.trained) == (("a", "b", "c"), False)  # as it was never trained
    assert restored.preprocessing() == info.preprocessing()
    inner = model.model if hasattr(model, "model") else model.tower
    theirs, report = type(inner).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(first(theirs.eval()(x)), first(inner(x)))
    assert create_backbone(tmp_path / "m", num_classes=5).eval()(x).shape == (2, 5)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_without_classes_the_library_s_own_object_is_returned_and_its_file_fills_a_classifier(
    kind: str, tmp_path: Path
) -> None:
    model = create_backbone(f"transformers:{kind}", **TRANSFORMERS[kind]).eval()
    assert type(model).__module__.startswith("transformers")
    assert (head_names(model), backbone_info(model).heads) == ((), ())
    x = random_like_example(model)
    model.save_pretrained(tmp_path / "theirs")  # the library's own folder, under the names it writes
    assert torch.equal(first(create_backbone(tmp_path / "theirs").eval()(x)), first(model(x)))
    file = tmp_path / "theirs" / "model.safetensors"
    filled = create_backbone(f"transformers:{kind}", file, num_classes=4, **TRANSFORMERS[kind]).eval()
    assert filled(x).shape == (2, 4)
    assert backbone_info(filled).trained
    inner = filled.model if hasattr(filled, "model") else filled.tower
    last = [k for k in model.state_dict() if "1." in k and k.endswith("weight")][-1]
    match = [v for k, v in inner.state_dict().items() if k.endswith(last)]
    assert torch.equal(match[0], model.state_dict()[last])


def test_the_visual_half_of_a_whole_clip_loads(tmp_path: Path) -> None:
    import transformers

    text = {**WIDTH, "intermediate_size": 64, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=PLAIN, text_config=text, projection_dim=16)
    ).eval()
    whole.save_pretrained(tmp_path / "clip")
    x = torch.randn(1, 3, 32, 32)
    tower = create_backbone(tmp_path / "clip").eval()
    assert torch.equal(tower(x).pooler_output, whole.vision_model(x).pooler_output)
    assert create_backbone(tmp_path / "clip", num_classes=3)(x).shape == (1, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "size": {"shortest_edge": 36},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
            "resample": 3,
        },
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
        {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "rescale_factor": 1 / 127.5,
            "resample": 3,
        },
        {
            "size": {"height": 40, "width": 40},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
            "resample": 2,
        },
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False, "resample": 3},
    ],
)
def test_a_folder_s_own_image_processor_is_honoured(settings: dict, tmp_path: Path) -> None:
    import transformers

    processor = transformers.CLIPImageProcessorPil(**settings)
    model = create_backbone("transformers:vit", num_classes=2, **PLAIN)
    model.model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    ours = ImageTransform.of(image_info(create_backbone(tmp_path / "m")).preprocessing())(image)
    # The two centre crops may round half a pixel differently; everything else must agree.
    shifted = [torch.roll(ours, (a, b), (1, 2))[:, 1:-1, 1:-1] for a in (0, 1, -1) for b in (0, 1, -1)]
    assert min((expected[:, 1:-1, 1:-1] - s).abs().max() for s in shifted) < 0.02 / min(processor.image_std)


def test_a_damaged_or_greedy_transformers_folder_is_explained(tmp_path: Path) -> None:
    model = create_backbone("transformers:vit", num_classes=2, **PLAIN)
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value, match in (
        ("hidden_size", "wide", "do not make a ViTForImageClassification"),
        ("architectures", ["NoSuchForImageClassification"], "no model"),
        ("use_pretrained_backbone", True, "from the hub"),
        ("num_hidden_layers", 3, "missing"),
    ):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises((InputError, CheckpointError), match=match):
            create_backbone(tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": "tall"}}))
    with pytest.raises(CheckpointError, match="do not make"):
        create_backbone(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    index = {"weight_map": {"vit.layernorm.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        create_backbone(tmp_path)


def test_a_folder_that_timm_wrote_keeps_its_preprocessing_and_labels(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_resnet", num_classes=2)
    cfg = {
        "input_size": [3, 192, 160], "interpolation": "bilinear", "crop_pct": 0.95, "crop_mode": "squash", "mean": [0.5] * 3,
        "std": [0.4] * 3, "num_classes": 2, "classifier": "fc", "first_conv": "conv1.0",
    }  # fmt: skip
    config = {
        "architecture": "test_resnet",
        "num_classes": 2,
        "num_features": model.num_features,
        "label_names": ["cat", "dog"],
    }
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    ours = create_backbone(tmp_path).eval()
    info = image_info(ours)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    resolved = timm.data.resolve_model_data_config(theirs)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items()} == info.preprocessing()
    assert info.class_names == ("cat", "dog")
    x = torch.randn(1, *info.input_size)
    assert torch.equal(ours(x), theirs(x))
    for key, value, match in (
        ("model_args", {"pretrained": True}, "model_args may not hold"),
        ("model_args", {"checkpoint_path": "/etc/passwd"}, "model_args may not hold"),
        ("model_args", [1], "must be objects"),
        ("architecture", "hf-hub:timm/resnet18", "no model"),
        ("architecture", "../resnet18", "no model"),
        ("pretrained_cfg", {**cfg, "std": [0, 1, 1]}, "std is"),
        ("pretrained_cfg", {**cfg, "input_size": "large"}, "input_size is"),
        ("model_args", {"no_such_setting": 1}, "cannot be built"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg, key: value}))
        with pytest.raises((InputError, CheckpointError), match=match):
            create_backbone(tmp_path)


def test_one_channel_goes_from_the_transform_to_the_logits() -> None:
    model = create_backbone("mmkit:tiny_vit", in_chans=1, num_classes=3).eval()
    info = image_info(model)
    assert (info.input_size[0], len(info.mean), len(info.std)) == (1, 1, 1)
    picture = ImageTransform.of(info.preprocessing())(np.zeros((40, 50, 3), dtype=np.uint8))
    assert model(picture[None]).shape == (1, 3)
    for name in ("test_resnet", "test_convnext", "pit_ti_224", "test_vit"):
        one = create_backbone(name, in_chans=1, num_classes=3).eval()
        args, _ = example_input(one) or ((), {})
        assert one(args[0]).shape == (1, 3)


def test_unknown_tags_and_impossible_settings_are_explained() -> None:
    for name, settings, match in (
        ("vit_tiny_patch16_224.bogus", {}, "augreg"),
        ("test_vit", {"no_such": 1}, "no_such"),
        ("test_vit", {"act_layer": "no_such"}, "cannot be built"),
        ("test_vit", {"img_size": -3}, "cannot be built"),
        ("test_vit", {"pretrained_cfg": {}}, "no settings"),
        ("test_vit", {"num_classes": 2.5}, "whole number"),
        ("open_clip:ViT-B-32", {"widht": 3}, "embed_dim and vision_cfg"),
        ("open_clip:ViT-B-32", {"vision_cfg": {"widht": 3}}, "cannot be built"),
        ("transformers:vit", {"widht": 3}, "no setting 'widht'"),
        ("transformers:vit", {"hidden_size": "wide"}, "cannot be built"),
        ("transformers:vitt", {}, "vit"),
        ("transformers:ViTModell", {}, "ViTModel"),
        ("transformers:bert", {}, "does not take pictures"),
    ):
        with pytest.raises(InputError, match=match):
            create_backbone(name, **settings)


SMALL = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TOWERS = {
    "ViT-B-32": SMALL,
    "RN50": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "coca_ViT-B-32": {**SMALL, "attn_pooler_heads": 2},
    "ViT-B-16-SigLIP": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"},
    "convnext_base": {"timm_model_name": "test_convnext", "image_size": 160},
    "MobileCLIP-S1": {"timm_model_name": "test_resnet", "image_size": 160},
}


@pytest.mark.parametrize("name", TOWERS)
def test_an_open_clip_tower_takes_a_classifier_and_its_published_files(name: str, tmp_path: Path) -> None:
    import open_clip

    settings = {"embed_dim": 16, "vision_cfg": TOWERS[name]}
    tower, model = create_backbone(f"open_clip:{name}", **settings).eval(), create_backbone(
        f"open_clip:{name}", num_classes=3, **settings
    ).eval()  # fmt: skip
    x, info = random_like_example(model), image_info(model)
    assert (model(x).shape, info.heads, info.num_features) == ((2, 3), ("head",), 16)
    published = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    transform = open_clip.image_transform(
        info.input_size[-1], False, *(published.get(k) for k in ("mean", "std", "resize_mode", "interpolation"))
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    assert torch.allclose(ImageTransform.of(info.preprocessing())(image), transform(image))
    whole = {f"visual.{k}": v for k, v in tower.state_dict().items()} | {
        "logit_scale": torch.ones(()),
        "text.x": torch.ones(1),
    }
    for file, state in (("whole", whole), ("visual", tower.state_dict()), ("own", model.state_dict())):
        path = tmp_path / f"{file}.safetensors"
        write_safetensors(path, state)
        loaded = create_backbone(f"open_clip:{name}", path, num_classes=3, **settings).eval()
        assert torch.equal(first(loaded.tower(x)), first((model.tower if file == "own" else tower)(x)))
        if file != "own":
            assert torch.equal(first(create_backbone(f"open_clip:{name}", path, **settings).eval()(x)), first(tower(x)))
    save_backbone(model, tmp_path / "m")
    assert torch.equal(create_backbone(tmp_path / "m").eval()(x), model(x))


@pytest.mark.slow
def test_towers_of_open_clip_and_types_of_transformers_answer_with_logits_or_say_why() -> None:
    import open_clip
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as types

    refused = []
    for name in [f"open_clip:{n}" for n in open_clip.list_models()[::12]] + [f"transformers:{n}" for n in types]:
        try:
            with torch.device("meta"):  # shapes without values: even the largest cost nothing
                model = create_backbone(name, num_classes=7).eval()
        except InputError as error:
            refused.append((name, str(error)))
            continue
        args, kwargs = example_input(model, 2) or ((), {})
        with torch.no_grad(), torch.device("meta"):
            assert model(*args, **kwargs).shape == (2, 7), name
    assert len(refused) < 10
    assert all(re.search("take pictures alone|requires|wraps a timm model", message) for _, message in refused)


DIFFUSERS = {
    "UNet2DModel": {"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1,
                    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False,
                    "num_class_embeds": 3},
    "UNet2DConditionModel": {"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1,
                             "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
                             "cross_attention_dim": 8, "attention_head_dim": 4, "mid_block_type": None},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8,
                              "norm_num_groups": 4, "num_embeds_ada_norm": 4},
    "PixArtTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8,
                                 "norm_num_groups": 4, "cross_attention_dim": 8, "caption_channels": 6,
                                 "use_additional_conditions": False},
    "SD3Transformer2DModel": {"sample_size": 8, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
                              "joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 6},
    "AutoencoderKL": {"block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_diffusers_model_runs_on_its_example_input_and_is_saved_for_diffusers(name: str, tmp_path: Path) -> None:
    import diffusers

    model = create_backbone(f"diffusers:{name}", **DIFFUSERS[name]).eval()
    assert not isinstance(backbone_info(model), ImageBackboneInfo)
    _, kwargs = example_input(model, 2) or ((), {})
    with torch.no_grad():
        expected = model(**kwargs)[0]
        save_backbone(model, tmp_path / "m")
        assert torch.equal(create_backbone(tmp_path / "m").eval()(**kwargs)[0], expected)
        assert torch.equal(getattr(diffusers, name).from_pretrained(tmp_path / "m").eval()(**kwargs)[0], expected)


def test_another_package_s_library_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Builder):
        library = "mine"

        def build(self, name, pretrained, num_classes, overrides):  # type: ignore[no-untyped-def]
            model = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
            model.backbone_info = ImageBackboneInfo(
                f"mine:{name}", input_size=(3, 2, 2), heads=("1",), num_classes=num_classes
            )
            return model

    monkeypatch.setitem(LIBRARIES._known, "mine", Mine)
    model = create_backbone("mine:flat", num_classes=4)
    args, kwargs = example_input(model, 3) or ((), {})
    assert model(*args, **kwargs).shape == (3, 4)
