"""What a session drives: SqueezeSAM and its closer look, HF SAM and SAM 2 agree with the plain models."""

import numpy as np
import pytest
import torch

from mmkit.errors import InputError
from mmkit.vision.clicks.engines import SqueezeSAMEngine
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.pipeline import InteractiveSegmenter

PICTURE = np.full((40, 60, 3), 128, np.uint8)


def test_squeeze_sam_session_equals_the_model_and_batches_prompts():
    model = SqueezeSAM(img_size=32, patch_embed_dim=8, dims=(8, 12), mlp_dim=8, num_heads=2).eval()
    segmenter = InteractiveSegmenter(model)
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    segmenter.set_image(picture)
    found = segmenter.add_click(7, 5)
    with torch.no_grad():
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        logits, scores = model(pixels, torch.tensor([[[[7.0, 5.0]]]]), torch.tensor([[[1]]]))
    best = int(scores[0, 0].argmax())
    np.testing.assert_allclose(found.logits, logits[0, 0, best].numpy(), atol=1e-4)
    several = segmenter.predict_many(
        [{"points": [(7, 5)]}, {"box": (2, 2, 9, 9)}, {"points": [(1, 1)], "box": (0, 0, 5, 5)}]
    )
    assert len(several) == 3
    np.testing.assert_allclose(several[0].logits, found.logits, atol=1e-4)
    assert segmenter.clicks == [(7, 5, True)]
    with pytest.raises(InputError, match="negative"):
        segmenter.add_click(3, 3, positive=False)


def tiny_sam():
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    vision = SamVisionConfig(
        hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        window_size=2, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    return spoken(SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)))


def spoken(model):
    """With weights so large that every part of a prompt shows in the logits."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def test_sam_embeds_once_and_agrees_with_the_plain_model():
    torch.manual_seed(0)
    model = tiny_sam()
    calls = []
    encode = model.get_image_embeddings
    model.get_image_embeddings = lambda *a, **k: calls.append(1) or encode(*a, **k)
    segmenter = InteractiveSegmenter(model)
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    segmenter.set_image(picture)
    segmenter.add_click(30, 20)
    first = segmenter.mask.logits.copy()
    second = segmenter.add_click(5, 5, positive=False).logits
    segmenter.set_box(3, 3, 40, 40)
    prompts = [
        {"points": [(30, 20)]}, {"box": (4, 4, 40, 30)}, {"points": [(9, 9), (20, 30)], "labels": [0, 1], "box": (1, 1, 39, 40)},
    ]  # fmt: skip
    together = segmenter.predict_many(prompts)
    assert len(calls) == 1
    for mask, prompt in zip(together, prompts, strict=True):
        assert (mask.logits == segmenter.predict_many([prompt])[0].logits).all()
    fresh = segmenter.predict_many([{"points": [(30, 20), (5, 5)], "labels": [1, 0]}])[0].logits
    assert abs(fresh - second).max() > 0.01 * abs(fresh).max()  # the previous mask was part of the second prompt
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(picture) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        out = model(
            torch.nn.functional.pad(pixels, (0, 0, 0, 16)),
            input_points=torch.tensor([[[[30.0, 20.0]]]]),
            input_labels=torch.tensor([[[1]]]),
            multimask_output=True,
        )
    low = out.pred_masks[0, 0, int(out.iou_scores.argmax())][None, None]
    big = torch.nn.functional.interpolate(low, (64, 64), mode="bilinear")[0, 0, :48].numpy()
    np.testing.assert_allclose(first, big, atol=1e-4 * abs(big).max())


def tiny_sam2():
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads=1, num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[2], window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    decoder = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    prompt = Sam2PromptEncoderConfig(hidden_size=32, image_size=64, mask_input_channels=4)
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return spoken(Sam2Model(config))


def test_sam2_embeds_once_and_agrees_with_the_plain_model():
    torch.manual_seed(0)
    model = tiny_sam2()
    segmenter = InteractiveSegmenter(model)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    segmenter.set_image(picture)
    found = segmenter(picture, [(20, 10)], box=(3, 5, 40, 60)).logits
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(picture) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        out = model(
            pixels,
            input_points=torch.tensor([[[[20.0, 10.0]]]]),
            input_labels=torch.tensor([[[1]]]),
            input_boxes=torch.tensor([[[3.0, 5.0, 40.0, 60.0]]]),
            multimask_output=True,
        )
    best = out.pred_masks[0, :, int(out.iou_scores.argmax())][None]
    expected = torch.nn.functional.interpolate(best, (64, 64), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())
    segmenter.set_image(PICTURE)
    assert segmenter.add_click(10, 10).logits.shape == (40, 60)
    assert segmenter.add_click(50, 30, positive=False).logits.shape == (40, 60)


@pytest.mark.parametrize("make", [tiny_sam, tiny_sam2])
def test_a_folder_of_a_transformers_model_is_an_engine(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    expected = InteractiveSegmenter(model)(PICTURE, [(10, 10)]).logits
    np.testing.assert_allclose(InteractiveSegmenter(tmp_path)(PICTURE, [(10, 10)]).logits, expected, atol=1e-5)


def test_a_first_click_looks_twice_and_later_ones_once_near_the_object():
    torch.manual_seed(0)
    settings = {"img_size": 32, "dims": (8, 16), "patch_embed_dim": 8, "mlp_dim": 16, "num_heads": 2}
    model = SqueezeSAM(**settings, negative_clicks=True, previous_mask=True, keep_aspect=True, single_mask=True).eval()
    segmenter = InteractiveSegmenter(SqueezeSAMEngine(model))
    segmenter.set_image(np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8))
    seen = []
    model.forward_fused = lambda fused, token, run=model.forward_fused: seen.append(fused) or run(fused, token)
    segmenter.add_click(60, 60)
    assert len(seen) == 2
    assert seen[0][:, 6].sum() == 0 < seen[1][:, 6].sum()  # the previous mask
    segmenter.add_click(62, 60, positive=False)
    assert len(seen) == 3
    segmenter.predictor.engine.zoom = False
    segmenter.reset()
    segmenter.add_click(60, 60)
    assert len(seen) == 4
