"""Interactive segmentation: sessions, engines, export, proposals, the click rule, and training from clicks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import mmkit
from mmkit.errors import InputError
from mmkit.vision.clicks.engines import SqueezeSAMEngine
from mmkit.vision.clicks.metrics import Click, iou, miou_at_k, next_click, noc, simulate_clicks
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.pipeline import InteractiveSegmenter
from mmkit.vision.clicks.result import Mask, mask_to_rle, rle_to_mask
from mmkit.vision.clicks.saliency import initial_prompt, saliency_map
from mmkit.vision.clicks.training import (
    _right_clicks,
    close_small_holes,
    distance_transform,
    focal_dice,
    iterative_loss,
    mask_iou,
    merge_held_objects,
    sample_boxes,
    sample_clicks,
    sample_outliers,
    whole_object_parents,
)

PICTURE = np.full((40, 60, 3), 128, np.uint8)


def disks(image, points, labels):
    """A disk of radius 6 around each positive click, removed around each negative one."""
    rows, cols = np.indices(image.shape[:2])
    inside = np.zeros(image.shape[:2], bool)
    for (x, y), label in zip(points, labels, strict=True):
        inside[(cols - x) ** 2 + (rows - y) ** 2 <= 36] = label == 1
    return np.where(inside, 5.0, -5.0)


@pytest.fixture
def session():
    segmenter = InteractiveSegmenter(disks)
    segmenter.set_image(PICTURE)
    return segmenter


def test_clicks_undo_redo_and_reset(session):
    one = session.add_click(20, 20).binary
    two = session.add_click(24, 20, positive=False).binary
    assert one.sum() > two.sum() > 0
    assert session.clicks == [(20, 20, True), (24, 20, False)]
    assert (session.undo().binary == one).all()
    assert (session.redo().binary == two).all()
    session.redo()
    assert session.undo() is not None
    assert session.undo() is None
    assert session.undo() is None
    session.add_click(5, 5)
    assert session.clicks == [(5, 5, True)]
    session.reset()
    assert session.mask is None
    assert session.clicks == []


def test_a_new_picture_forgets_the_clicks(session):
    session.add_click(20, 20)
    session.set_image(np.zeros((10, 10, 3), np.uint8))
    assert session.mask is None
    assert session.clicks == []
    assert session.undo() is None


@pytest.mark.parametrize("x, y", [(-1, 0), (60, 0), (0, 40), (float("nan"), 3)])
def test_clicks_outside_are_refused_and_change_nothing(session, x, y):
    session.add_click(1, 1)
    with pytest.raises(InputError, match="outside"):
        session.add_click(x, y)
    assert session.clicks == [(1, 1, True)]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ({"points": [(1, 1)], "labels": [7]}, "labels must lie"),
        ({"points": [(1, 1)], "labels": [1.5]}, "labels must lie"),
        ({"points": [(1, 1)], "labels": ["in"]}, "one number per point"),
        ({"points": [(1, 1), (2, 2)], "labels": [1]}, "2 points but 1"),
        ({"points": [(-1, -1)], "labels": [-1]}, "at least one point or a box"),
        ({"points": [3, 3]}, "pairs"),
        ({"points": [(3, 3, 3)]}, "pairs"),
        ({"points": "here"}, "pairs"),
        ({"points": [("a", 3)]}, "pairs"),
        ({"points": [(60, 3)]}, "outside the picture of 60x40"),
        ({"points": [(3, 3)], "labels": [2]}, "two points labelled 2 and 3"),
        ({"points": [(3, 3), (9, 9)], "labels": [2, 3], "box": (1, 1, 5, 5)}, "one only"),
        ({"box": (1, 2, 3)}, "x0, y0, x1, y1"),
        ({"box": (1, 2, 61, 9)}, "outside the picture of 60x40"),
        ({"box": (3, 3, 3, 9)}, "empty"),
    ],
)
def test_malformed_prompts_are_explained(session, prompt, message):
    session.add_click(1, 1)
    with pytest.raises(InputError, match=message):
        session.predict_many([prompt])
    assert session.clicks == [(1, 1, True)]
    with pytest.raises(InputError, match=message):
        session(PICTURE, **{"points": (), **prompt})


def test_corner_labels_are_the_box_and_the_far_edges_count(session):
    session(PICTURE, [(30, 25), (4, 4), (3, 9), (-1, -1)], labels=[3, 1, 2, -1])
    assert session.box == (3, 9, 30, 25)
    assert session.clicks == [(4, 4, True)]
    session.set_box(60, 40, 0, 0)
    assert session.box == (0, 0, 59, 39)


def test_misuse_is_explained(session):
    for prompts in ([], [3], [{"point": (1, 1)}]):
        with pytest.raises(InputError, match="predict_many takes"):
            session.predict_many(prompts)
    with pytest.raises(InputError, match="model must be"):
        InteractiveSegmenter(np.zeros(3))
    with pytest.raises(InputError, match="empty"):
        session.set_box(3, 3, 3, 9)
    with pytest.raises(InputError, match="no mask yet"):
        session.reset() or session.cutout()
    with pytest.raises(InputError, match="set_image"):
        InteractiveSegmenter(disks).add_click(1, 1)
    with pytest.raises(InputError, match="not a promptable"):
        InteractiveSegmenter(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="expected logits"):
        InteractiveSegmenter(lambda image, points, labels: np.zeros((3, 3)))(PICTURE, [(1, 1)])


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "1"])
def test_every_picture_mode_is_taken(mode, session):
    session.set_image(Image.new(mode, (30, 20)))
    assert session.add_click(5, 5).logits.shape == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10)])
def test_extreme_sizes_are_taken(size):
    model = SqueezeSAM(img_size=32, patch_embed_dim=8, dims=(8, 12), mlp_dim=8, num_heads=2, keep_aspect=True)
    segmenter = InteractiveSegmenter(model)
    segmenter.set_image(Image.new("RGB", size))
    segmenter.propose()
    assert segmenter.mask.logits.shape == size[::-1]


def test_rotated_and_broken_files(session, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    session.set_image(tmp_path / "turned.jpg")
    assert session.image.size == (20, 30)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError):
        session.set_image(tmp_path / "broken.png")
    assert session.image.size == (20, 30)


def test_masks_export_to_rle_polygons_and_cutouts(session, tmp_path):
    session.add_click(20, 20)
    mask = session.add_click(40, 20)
    assert (rle_to_mask(mask.rle()) == mask.binary).all()
    assert len(mask.polygons()) == 2
    assert mask.save(tmp_path / "m.png").exists()
    soft, hard = Image.open(tmp_path / "m.png"), mask.cutout(soft=False)
    assert soft.mode == "RGBA"
    assert abs((np.asarray(soft)[..., 3] > 127).sum() - mask.binary.sum()) < 20
    assert ((np.asarray(hard)[..., 3] == 255) == mask.binary).all()
    assert json.loads(mask.save(tmp_path / "m.json").read_text())["segmentation"]["size"] == [40, 60]
    assert (np.load(mask.save(tmp_path / "m.npy")) == mask.binary).all()
    assert mask.plot().size == (60, 40)
    with pytest.raises(InputError, match="suffix"):
        mask.save(tmp_path / "m.txt")
    for rle in ({"size": [2, 2], "counts": [1]}, {"counts": [1]}, {"size": [2, 2], "counts": "04"}):
        with pytest.raises(InputError, match="counts"):
            rle_to_mask(rle)


def test_a_mask_without_an_estimate_is_saved_as_plain_json(session, tmp_path):
    path = session.add_click(20, 20).save(tmp_path / "m.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["predicted_iou"] is None


def test_a_cutout_hides_nothing_behind_its_transparency(session):
    session.set_image(np.full((40, 60, 3), 77, np.uint8))
    pixels = np.asarray(session.add_click(20, 20).cutout())
    assert (pixels[pixels[..., 3] == 255][:, :3] == 77).all()
    assert (pixels[pixels[..., 3] == 0] == 0).all()


def test_an_overlay_tints_the_inside_outlines_it_and_leaves_the_rest(session):
    overlay = np.asarray(session.add_click(20, 20).overlay((0, 0, 228), opacity=0.5))
    assert overlay[20, 20].tolist() == [64, 64, 178]
    assert overlay[20, 26].tolist() == [0, 0, 228]
    assert overlay[20, 27].tolist() == [128, 128, 128]


def test_a_mask_follows_its_picture_to_another_size(session):
    mask = session.add_click(20, 20)
    large = mask.resized(Image.new("RGB", (180, 120)))
    assert large.cutout().size == (180, 120)
    assert large.iou is mask.iou
    assert iou(large.binary, np.kron(mask.binary, np.ones((3, 3), bool))) > 0.9


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_rle_round_trip(mask):
    assert (rle_to_mask(mask_to_rle(mask)) == mask).all()


def test_rle_counts_start_with_background_column_by_column():
    mask = np.array([[1, 0], [1, 0]], bool)
    assert mask_to_rle(mask) == {"size": [2, 2], "counts": [0, 2, 2]}


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


def test_saliency_finds_the_odd_one_out():
    picture = np.full((60, 90, 3), (40, 120, 60), np.uint8)
    picture[15:45, 35:65] = (220, 60, 40)
    saliency = saliency_map(Image.fromarray(picture))
    prompt = initial_prompt(saliency, with_box=True)
    (x, y) = prompt.points[0]
    assert 35 <= x < 65
    assert 15 <= y < 45
    assert prompt.confidence > 0.5
    assert prompt.box[0] < 45 < prompt.box[2]


def test_nothing_salient_means_the_centre_with_no_confidence():
    prompt = initial_prompt(saliency_map(Image.new("RGB", (50, 30))))
    assert prompt.points == ((25, 15),)
    assert prompt.confidence == 0
    assert prompt.box is None
    with pytest.raises(InputError):
        initial_prompt(np.full((3, 3), np.nan))


def ball(color=(220, 60, 40)):
    rows, cols = np.indices((90, 120))
    target = (cols - 70) ** 2 + (rows - 40) ** 2 < 20**2
    picture = np.full((90, 120, 3), (40, 120, 60), np.uint8)
    picture[target] = color
    return picture, target


def test_the_random_walker_needs_no_network():
    picture, target = ball()
    segmenter = InteractiveSegmenter("random-walker")
    segmenter.set_image(picture)
    segmenter.propose()
    assert iou(segmenter.mask.binary, target) > 0.85
    segmenter.reset()
    assert iou(segmenter.add_click(70, 40).binary, target) > 0.85
    assert not segmenter.add_click(70, 30, positive=False).binary[30, 70]
    segmenter.reset()
    assert iou(segmenter.set_box(45, 15, 95, 65).binary, target) > 0.85
    segmenter.reset()
    assert not segmenter.add_click(3, 3, positive=False).binary.any()


def test_the_evaluation_click_is_the_deepest_error():
    rng = np.random.default_rng(0)
    target = ndimage.binary_dilation(rng.random((30, 40)) > 0.98, iterations=4)
    prediction = ndimage.binary_dilation(rng.random((30, 40)) > 0.98, iterations=3)
    missed = ndimage.distance_transform_edt(np.pad(target & ~prediction, 1))[1:-1, 1:-1]
    extra = ndimage.distance_transform_edt(np.pad(prediction & ~target, 1))[1:-1, 1:-1]
    click = next_click(target, prediction)
    assert click.positive == (missed.max() > extra.max())
    deep = missed if click.positive else extra
    assert deep[click.y, click.x] == deep.max()
    assert (click.y, click.x) == tuple(np.argwhere(deep == deep.max())[0])
    assert next_click(target, target) is None
    other = next_click(target, prediction, [click])
    assert (other.x, other.y) != (click.x, click.y)
    with pytest.raises(InputError):
        next_click(target, prediction[:5])


def test_equal_errors_give_a_negative_click_and_ignored_pixels_none():
    target, prediction = np.zeros((9, 20), bool), np.zeros((9, 20), bool)
    target[2:7, 2:7] = True
    prediction[2:7, 12:17] = True
    assert next_click(target, prediction) == Click(14, 4, False)
    assert next_click(target, prediction, ignore=prediction) == Click(4, 4, True)


def test_number_of_clicks_of_known_predictors():
    target = np.zeros((20, 20), bool)
    target[5:15, 5:15] = True
    oracle = [simulate_clicks(lambda clicks: target, target)]
    assert noc(oracle, 0.9) == (1.0, 0)
    never = [simulate_clicks(lambda clicks: np.zeros_like(target), target)]
    assert noc(never, 0.5) == (20.0, 1)
    assert len(never[0]) == 20
    with pytest.raises(InputError):
        simulate_clicks(lambda clicks: target, np.zeros_like(target))
    with pytest.raises(InputError):
        noc([], 0.9)


def test_a_predictor_that_stamps_squares_needs_the_hand_counted_clicks():
    target = np.zeros((3, 12), bool)
    target[:, :9] = True

    def stamp(clicks):
        out = np.zeros_like(target)
        for click in clicks:
            out[:, max(0, click.x - 1) : click.x + 2] = click.positive
        return out

    # First click at (1, 1) (all interior points are 2 deep), then (4, 1), then (7, 1): a third more each time.
    scores = simulate_clicks(stamp, target, max_clicks=5)
    np.testing.assert_allclose(scores, [1 / 3, 2 / 3, 1, 1, 1])
    assert noc([scores], 0.6) == (2.0, 0)
    assert miou_at_k([scores, scores], 2) == pytest.approx(2 / 3)
    assert len(simulate_clicks(stamp, target, stop_at=0.5)) == 2


def test_iou_leaves_ignored_pixels_out():
    a, b = np.array([[1, 1, 0]], bool), np.array([[1, 0, 0]], bool)
    assert iou(a, b) == 0.5
    assert iou(a, b, ignore=np.array([[0, 1, 0]], bool)) == 1
    assert iou(~a & a, ~b & b) == 1


def test_batched_distance_transform_is_exact():
    mask = torch.rand(3, 17, 26) > 0.1
    mask[1] = True
    for found, region in zip(distance_transform(mask), mask, strict=True):
        expected = ndimage.distance_transform_edt(np.pad(region.numpy(), 1))[1:-1, 1:-1]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("style", ["uniform", "ritm", "center"])
def test_training_clicks_lie_in_the_error_with_the_right_sign(style):
    target = torch.zeros(3, 40, 40, dtype=torch.bool)
    target[:, 10:30, 10:30] = True
    prediction = target.clone()
    prediction[0, 10:30, 10:20] = False  # missed
    prediction[1, 0:9, :] = True  # too much; sample 2 is perfect
    valid = torch.ones_like(target)
    for _ in range(5):
        points, labels = sample_clicks(prediction, target, valid, style=style)
        assert labels.tolist() == [1, 0, -1]
        assert 10 <= points[0, 0] < 20
        assert points[1, 1] < 9
        assert points[2].tolist() == [-1, -1]
    with pytest.raises(InputError):
        sample_clicks(prediction, target, valid, style="odd")


def test_boxes_follow_the_object_and_outliers_miss_it():
    target = torch.zeros(2, 30, 40, dtype=torch.bool)
    target[0, 5:10, 7:20] = True
    target[1, 0:3, 0:2] = True
    points, labels = sample_boxes(target, jitter=0)
    assert points.tolist() == [[[7, 5], [19, 9]], [[0, 0], [1, 2]]]
    assert labels.tolist() == [[2, 3]] * 2
    for _ in range(5):
        wrong, kinds = sample_outliers(target, torch.ones_like(target), near=4)
        assert kinds.tolist() == [1, 1]
        assert not any(target[i, int(y), int(x)] for i, (x, y) in enumerate(wrong))


def test_loss_prefers_the_right_mask_and_skips_unknown_pixels():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    valid = torch.ones_like(target)
    good, bad = 8 * (2 * target - 1)[:, None], -8 * (2 * target - 1)[:, None]
    losses = focal_dice(torch.cat([good, bad], dim=1), target, valid)
    assert losses[0, 0] < 0.01 < 1 < losses[0, 1]
    half = good.clone()
    half[..., 4:] *= -1
    valid[..., 4:] = 0
    assert focal_dice(half, target, valid)[0, 0] < 0.01


def test_the_focal_balance_decides_where_an_uncertain_pixel_ends():
    target = torch.zeros(1, 1, 2, dtype=torch.bool)
    target[..., 0] = True  # one logit for both: inside half of the time
    found = {}
    for alpha in (0.25, 0.5):
        logit = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([logit], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            both = logit.view(1, 1, 1, 1).expand(1, 1, 1, 2)
            (
                focal_dice(both, target, torch.ones_like(target), alpha=alpha)
                - focal_dice(both, target, torch.ones_like(target), focal_weight=0)
            ).sum().backward()
            optimizer.step()
        found[alpha] = logit.sigmoid().item()
    assert found[0.25] < 0.42
    assert found[0.5] == pytest.approx(0.5, abs=0.01)


def test_start_clicks_are_right_and_distinct():
    target = torch.zeros(64, 32, 32, dtype=torch.bool)
    target[:, 4:20, 6:18] = True
    valid = torch.ones_like(target)
    valid[:, 28:] = False
    points, labels = _right_clicks(target, valid, 5, negatives=True)
    assert points.shape == (64, 5, 2)
    assert {-1, 0, 1} == set(labels.unique().tolist())
    for spots, kinds in zip(points.long().tolist(), labels.tolist(), strict=True):
        clicks = [(x, y, k) for (x, y), k in zip(spots, kinds, strict=True) if k >= 0]
        assert all(target[0, y, x] == bool(k) and valid[0, y, x] for x, y, k in clicks)
        assert len(set(clicks)) == len(clicks)
    assert 0 not in _right_clicks(target, valid, 5, negatives=False)[1]


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


def test_parts_know_their_whole_and_holes_close():
    whole = np.zeros((30, 30), bool)
    whole[5:25, 5:25] = True
    part, alone = np.zeros_like(whole), np.zeros_like(whole)
    part[6:10, 6:20] = True
    alone[0:3, 0:3] = True
    assert whole_object_parents([part, whole, alone]) == [1, 1, 2]
    dotted = whole.copy()
    dotted[10, 10] = False
    dotted[12:18, 12:18] = False
    closed = close_small_holes(dotted)
    assert closed[10, 10]
    assert not closed[14, 14]


def test_persons_are_merged_with_what_they_hold():
    person, bag, far = (np.zeros((60, 60), bool) for _ in range(3))
    person[10:50, 20:35] = True
    bag[30:40, 36:44] = True
    far[0:5, 55:60] = True
    assert merge_held_objects([person, bag, far], ["person", "handbag", "handbag"]) == [(0, 1)]
    assert merge_held_objects([person, bag], ["person", "car"]) == [(0,)]


def test_iterative_training_reaches_every_weight():
    model = SqueezeSAM(
        img_size=32, patch_embed_dim=8, dims=(8, 12), mlp_dim=8, num_heads=2, negative_clicks=True, previous_mask=True
    )
    target = torch.zeros(6, 32, 32, dtype=torch.bool)
    target[:, 8:20, 8:20] = True
    moved = set()
    for _ in range(12):
        loss, metrics = iterative_loss(model, {"image": torch.rand(6, 3, 32, 32), "target": target}, outlier_prob=0.5)
        loss.backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved | _dead_biases(model) == {n for n, _ in model.named_parameters()}
    assert 0 <= metrics["iou"] <= metrics["best"] <= 1


def _dead_biases(model):
    """Key biases cancel in the softmax, up to rounding."""
    return {n for n, _ in model.named_parameters() if n.endswith("k_proj.bias")}


def scenes(n, seed, side=64):
    """Colored disks and rectangles with occlusion."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((side, side))
    out = []
    for _ in range(n):
        image = np.ones((side, side, 3)) * rng.random(3) + rng.normal(0, 0.05, (side, side, 3))
        ids = np.zeros((side, side), int)
        for k in range(1, 4):
            y, x, a, b = *rng.uniform(10, side - 10, 2), *rng.uniform(6, 14, 2)
            shape = (abs(cols - x) < a) & (abs(rows - y) < b) if k % 2 else (cols - x) ** 2 + (rows - y) ** 2 < a**2
            ids[shape], image[shape] = k, rng.random(3)
        wanted = rng.integers(1, 4)
        target = ids == (wanted if (ids == wanted).sum() >= 40 else 3)
        out.append(_example(image, target))
    return out


def persons(n, seed, side=64):
    """A head, a torso and a bag in random colors; the target is all three, "parts" lists each."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((side, side))
    out = []
    for _ in range(n):
        image = np.ones((side, side, 3)) * rng.random(3) + rng.normal(0, 0.05, (side, side, 3))
        y, x, r = rng.uniform(14, 24), rng.uniform(18, 36), rng.uniform(5, 8)
        head = (cols - x) ** 2 + (rows - y) ** 2 < r**2
        torso = (abs(cols - x) < 1.4 * r) & (rows > y + 0.8 * r) & (rows < y + 4 * r)
        bag = (abs(cols - x - 2.2 * r) < 0.9 * r) & (abs(rows - y - 3 * r) < r) & ~torso
        parts = [head & ~torso, torso, bag]
        for part in parts:
            image[part] = rng.random(3)
        out.append(_example(image, head | torso | bag, parts))
    return out


def _example(image, target, parts=()):
    pixels = torch.from_numpy(np.clip(image, 0, 1)).permute(2, 0, 1).float()
    row = {"image": pixels, "target": torch.from_numpy(target)}
    return {**row, "parts": torch.from_numpy(np.stack(parts))} if len(parts) else row


def toy(**options):
    return SqueezeSAM(
        img_size=64,
        patch_embed_dim=16,
        dims=(16, 24, 32, 48),
        mlp_dim=48,
        num_heads=4,
        iou_head_hidden_dim=48,
        **options,
    )


def train_toy(model, data, steps, **options):
    from mmkit.training import FitConfig, fit

    def loss_fn(model, batch):
        return iterative_loss(model, batch, max_rounds=1, box_prob=0, outlier_prob=0, **options)

    data = [{k: row[k] for k in ("image", "target")} for row in data]
    config = FitConfig(max_steps=steps, batch_size=16, lr=3e-3, clip_grad=1.0, progress=False, warmup_steps=20)
    fit(model, data, loss_fn=loss_fn, config=config)
    return model.eval()


@torch.no_grad()
def masks_at(model, row, region, off=False):
    """All masks for a click deep inside `region` (or off the picture), and the predicted IoU."""
    y, x = np.unravel_index(int(distance_transform(region[None])[0].argmax()), region.shape)
    point = (-50.0, -50.0) if off else (float(x), float(y))
    logits, scores = model(row["image"][None], torch.tensor([[[point]]]), torch.tensor([[[-1 if off else 1]]]))
    return logits[0, 0] > 0, scores[0, 0]


def best_iou(model, data, off=False):
    return np.mean(
        [mask_iou(masks_at(model, r, r["target"], off)[0], r["target"], torch.tensor(True)).max().item() for r in data]
    )


@pytest.mark.slow
def test_a_small_network_learns_to_follow_the_click_and_needs_it():
    torch.manual_seed(0)
    model = train_toy(toy(), scenes(600, 0), 200)
    held_out = scenes(60, 1)
    with_click, without = best_iou(model, held_out), best_iou(model, held_out, off=True)
    assert with_click > 0.35
    assert without < 0.5 * with_click


@pytest.mark.slow
def test_whole_object_targets_make_a_click_on_a_part_select_the_whole():
    torch.manual_seed(0)
    model = train_toy(toy(), persons(320, 2), 80)
    whole, as_part = [], []
    for row in persons(25, 3):
        for part in row["parts"]:
            masks, scores = masks_at(model, row, part)
            chosen = masks[scores.argmax()]
            whole.append(float(mask_iou(chosen, row["target"], torch.tensor(True))))
            as_part.append(float(mask_iou(chosen, part, torch.tensor(True))))
    assert np.mean(whole) > 0.6
    assert np.mean(whole) > np.mean(as_part)


def test_the_task_is_listed():
    assert "interactive-segmentation" in mmkit.list_tasks()
    assert isinstance(mmkit.pipeline("interactive-segmentation", disks)(PICTURE, [(5, 5)]), Mask)
