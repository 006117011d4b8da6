"""SqueezeSAM: sizes, prompt painting, the added channels, export, and that a small one learns to follow clicks."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmkit
from mmkit.backbones.model import load_official_checkpoint
from mmkit.errors import BackendUnavailableError, CheckpointError, InputError
from mmkit.vision.clicks.export import export_onnx, export_program, load_int8, save_int8
from mmkit.vision.clicks.model import SqueezeSAM, squeeze_sam_base, squeeze_sam_small, squeeze_sam_tiny
from mmkit.vision.clicks.official import config_from_official

MINI = {"img_size": 32, "patch_embed_dim": 8, "dims": (8, 12, 16), "mlp_dim": 16, "num_heads": 2}


def mini(**options):
    return SqueezeSAM(**{**MINI, **options}).eval()


def prompt(*points, labels=None):
    return torch.tensor(points, dtype=torch.float32)[None, None], torch.tensor(labels or [1] * len(points))[None, None]


@pytest.mark.parametrize(
    "build, parameters, tensors, gmac",
    [
        (squeeze_sam_base, 10_159_260, 377, 26.26),
        (squeeze_sam_small, 7_398_372, 377, 7.04),
        (squeeze_sam_tiny, 7_302_932, 342, 3.03),
    ],
)
def test_named_variants_have_the_published_size(build, parameters, tensors, gmac):
    with torch.device("meta"):
        model = build().eval()
        fused = torch.zeros(1, 5, 512, 512)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_fused(fused)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.005)


def test_variants_are_listed():
    assert {"squeeze_sam_base", "squeeze_sam_small", "squeeze_sam_tiny"} <= set(mmkit.list_models("squeeze_sam"))


def test_outputs_have_the_documented_shapes():
    logits, iou = mini()(torch.rand(2, 3, 20, 30), torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2))
    assert logits.shape == (2, 4, 3, 20, 30)
    assert iou.shape == (2, 4, 3)


def test_a_click_is_a_disk_of_81_pixels():
    model = mini(img_size=64)
    points, labels = prompt((32, 32))
    box, disk = model.encode_prompts(points, labels, (64, 64))[0, 0]
    assert disk.sum() == 81
    assert box.all()


def test_a_box_is_filled_inclusively_in_either_corner_order():
    model = mini()
    for corners in ([(4, 6), (10, 12)], [(10, 12), (4, 6)], [(10, 6), (4, 12)]):
        points, labels = prompt(*corners, labels=[2, 3])
        box, disk = model.encode_prompts(points, labels, (32, 32))[0, 0]
        assert box[6:13, 4:11].all()
        assert box.sum() == 49
        assert disk.sum() == 0


@pytest.mark.parametrize("strict", [True, False])
def test_an_empty_prompt_paints_nothing(strict):
    model = mini(strict_official_prompts=strict)
    points, labels = prompt((-1, -1), (-1, -1), labels=[-1, -1])
    assert model.encode_prompts(points, labels, (32, 32)).sum() == 0


def test_a_leading_negative_click_is_a_box_only_for_the_official_reading():
    points, labels = prompt((4, 4), (9, 9), labels=[0, 1])
    assert mini(strict_official_prompts=True).encode_prompts(points, labels, (32, 32))[0, 0, 0].sum() == 36
    assert mini().encode_prompts(points, labels, (32, 32))[0, 0, 0].all()


def test_both_prompt_readings_agree_on_proper_prompts():
    strict, ours = mini(strict_official_prompts=True), mini()
    for rows, kinds in [
        ([(3, 3), (9, 8), (5, 5)], [2, 3, 1]),
        ([(3, 3), (9, 8), (-1, -1)], [1, 1, -1]),
        ([(3, 3), (9, 8), (-1, -1)], [2, 3, -1]),
    ]:
        points, labels = prompt(*rows, labels=kinds)
        torch.testing.assert_close(
            strict.encode_prompts(points, labels, (20, 30)),
            ours.encode_prompts(points, labels, (20, 30)),
            rtol=0,
            atol=0,
        )


def test_added_channels_and_late_fusion_change_nothing_until_trained(tmp_path):
    from mmkit.storage import write_safetensors

    official = mini()
    write_safetensors(tmp_path / "five.safetensors", official.state_dict())
    extended = mini(negative_clicks=True, previous_mask=True)
    load_official_checkpoint(extended, tmp_path / "five.safetensors")
    late = mini(late_fusion=True)
    late.load_state_dict(official.state_dict(), strict=False)
    images = torch.rand(1, 3, 32, 32)
    points, labels = prompt((8, 8), (20, 20), labels=[1, 0])
    previous = torch.randn(1, 1, 16, 16)
    expected = official(images, points, labels)
    for found in (extended(images, points, labels, previous), late(images, points, labels)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_added_prompts_reach_the_output_once_their_weights_are_not_zero():
    model = mini(negative_clicks=True, previous_mask=True, late_fusion=True)
    torch.nn.init.normal_(model.patch_embed.proj[0].weight)
    torch.nn.init.normal_(model.prompt_token.scale)
    images = torch.rand(1, 3, 32, 32)
    points, labels = prompt((8, 8))
    both, kinds = prompt((8, 8), (20, 20), labels=[1, 0])
    plain = model(images, points, labels)[0]
    assert not torch.allclose(plain, model(images, both, kinds)[0])
    assert not torch.allclose(plain, model(images, points, labels, torch.ones(1, 1, 16, 16))[0])


def test_a_channel_count_between_the_two_is_refused():
    state = mini(negative_clicks=True).state_dict()
    with pytest.raises(CheckpointError, match="input channels"):
        mini(negative_clicks=True, previous_mask=True).official_state(state)


@pytest.mark.parametrize("size", [(1, 1), (10, 2000), (37, 20)])
@pytest.mark.parametrize("keep_aspect", [True, False])
def test_any_picture_size_works(size, keep_aspect):
    model = mini(keep_aspect=keep_aspect, antialias=True)
    points, labels = prompt((0, 0))
    logits, _ = model(torch.rand(1, 3, *size), points, labels)
    assert logits.shape[-2:] == size
    assert logits.isfinite().all()


def test_keeping_the_aspect_pads_and_places_clicks_to_scale():
    model = mini(keep_aspect=True, img_size=64)
    points, labels = prompt((50, 25))
    fused = model.early_fusion(torch.ones(1, 3, 50, 100), points, labels)
    assert fused[0, :3, 32:].abs().sum() == 0
    ys, xs = torch.nonzero(fused[0, 4], as_tuple=True)
    assert (ys.float().mean(), xs.float().mean()) == (16, 32)


@pytest.mark.parametrize(
    "images, points, labels, message",
    [
        (torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1), "images must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1), "float"),
        (torch.rand(1, 3, 8, 8), torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1), "points must be"),
        (torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2), "labels must be"),
        (torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), 4), "labels must lie"),
        (torch.rand(1, 3, 0, 8), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1), "images must be"),
    ],
)
def test_wrong_prompts_are_refused(images, points, labels, message):
    with pytest.raises(InputError, match=message):
        mini()(images, points, labels)


def test_a_previous_mask_must_belong_to_the_queries():
    with pytest.raises(InputError, match="previous must be"):
        mini(previous_mask=True)(torch.rand(1, 3, 8, 8), *prompt((3, 3)), torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize("act_layer", ["ReLU", "GELU", "SiLU", "LeakyReLU", "Hardswish", "ELU"])
def test_official_configurations_become_keywords(act_layer):
    official = {
        "encoder_image_size": 16, "encoder_patch_size": 2, "encoder_patch_embed_dim": 4, "encoder_unet_conv_dims": [4, 8],
        "decoder_transformer_depth": 1, "decoder_transformer_mlp_dim": 8, "decoder_num_heads": 2, "num_multimask_outputs": 2,
        "iou_head_depth": 1, "iou_head_hidden_dim": 8, "normalization_type": "sync_batch_norm",
    }  # fmt: skip
    for given in (act_layer, getattr(torch.nn, act_layer)):
        model = SqueezeSAM(**config_from_official({**official, "activation_fn": given}))
        assert isinstance(model.unet_encoder.down_layers[0].double_conv[0].conv[1], getattr(torch.nn, act_layer))
        assert model.strict_official_prompts
    with pytest.raises(InputError, match="lacks"):
        config_from_official(official)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_layer": "instance"},
        {"act_layer": "tanh"},
        {"dims": ()},
        {"dims": 8},
        {"dims": (8, 0)},
        {"img_size": 8, "dims": (8,) * 6},
        {"img_size": "large"},
        {"patch_size": 0},
        {"num_multimask_outputs": 0},
        {"depth": -1},
        {"num_heads": 5},
    ],
)
def test_impossible_configurations_are_refused(options):
    with pytest.raises(InputError):
        mini(**options)


def test_it_survives_saving_and_loading(tmp_path):
    model = mini(negative_clicks=True, norm_first=True, act_layer="gelu")
    model.save_pretrained(tmp_path)
    images, (points, labels) = torch.rand(1, 3, 20, 20), prompt((3, 3))
    assert torch.equal(
        model(images, points, labels)[0], SqueezeSAM.from_pretrained(tmp_path).eval()(images, points, labels)[0]
    )


def test_int8_file_is_a_quarter_and_predicts_nearly_the_same(tmp_path):
    from mmkit.storage import write_safetensors

    model = squeeze_sam_base(img_size=256).eval()
    write_safetensors(tmp_path / "float.safetensors", model.state_dict())
    small = save_int8(model, tmp_path / "int8.safetensors")
    assert small.stat().st_size * 3.5 < (tmp_path / "float.safetensors").stat().st_size
    images, (points, labels) = torch.rand(1, 3, 64, 64), prompt((30, 30))
    with torch.no_grad():
        expected, found = model(images, points, labels)[0], load_int8(small)(images, points, labels)[0]
    assert (expected - found).norm() < 0.1 * expected.norm()


def test_a_foreign_file_is_not_taken_for_int8(tmp_path):
    mini().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="save_int8"):
        load_int8(tmp_path / "model.safetensors")


@pytest.mark.slow
def test_exported_program_agrees_for_other_batch_sizes():
    model = mini(negative_clicks=True)
    program = export_program(model).module()
    fused = torch.randn(5, 6, 32, 32)
    with torch.no_grad():
        for found, expected in zip(program(fused), model.forward_fused(fused), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx_file_agrees(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, fused = mini(negative_clicks=True, previous_mask=True).eval(), torch.randn(3, 7, 32, 32)
    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "m.onnx")))
    assert [o.name for o in session.get_outputs()] == ["logits", "iou"]
    with torch.no_grad():
        expected = model.forward_fused(fused)
    for found, want in zip(session.run(None, {"fused": fused.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), want, atol=1e-4, rtol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_export_names_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendUnavailableError, match="pip install"):
        export_onnx(mini(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
