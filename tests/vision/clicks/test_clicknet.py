"""ClickNet: two parts that agree, sessions that look twice, scenes and the loss it learns from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.clicks import (
    ClickNet,
    ClickNetEngine,
    InteractiveSegmenter,
    SceneMaker,
    build_bank,
    clicknet_mobilenetv2,
    two_look_loss,
)
from mmkit.vision.clicks.geodesic import _running_minimum
from mmkit.vision.clicks.scenes import WHOLE

TINY = {"img_size": 64, "dims": (8, 8, 8, 16, 16), "depth": (1, 1, 1, 1), "heads": (1, 1, 1, 1)}


@pytest.fixture
def model() -> ClickNet:
    torch.manual_seed(0)
    net = ClickNet(**TINY).eval()
    with torch.no_grad():
        net.fine[-1].weight *= 20  # masks that differ from place to place
        net.fine[-1].bias.uniform_(-1, 1)
    return net


def picture(height: int = 80, width: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def square_bank(side: int = 128):
    """Two pictures with a bright square each; the second has an unknown rim."""
    rows = []
    for color, start in (((250, 40, 40), 30), ((40, 60, 250), 60)):
        image, ids = np.full((side, side, 3), 110, np.uint8), np.zeros((side, side), np.uint8)
        image[start : start + 50, start : start + 50], ids[start : start + 50, start : start + 50] = color, 1
        rows.append((Image.fromarray(image), ids, [{"ids": (1,), "unknown": (), "weight": 1.0}]))
    return build_bank([(1.0, rows)], side, torch.device("cpu"))


@pytest.mark.parametrize(
    "wrong", [{"img_size": 50}, {"dims": (8, 8)}, {"dims": (8, 8, 8, 8, 9)}, {"num_masks": 0}, {"depth": (1, -1, 1, 1)}]
)
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(InputError, match="ClickNet needs"):
        ClickNet(**{**TINY, **wrong})


def test_the_encoder_is_frozen_and_the_rest_small():
    model = clicknet_mobilenetv2()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert sum(p.numel() for p in model.parameters()) < 4_000_000
    assert not model.train().encoder.training


def test_forward_is_encode_and_decode_and_padding_says_nothing(model):
    images = torch.rand(2, 3, 48, 64)
    points, labels = torch.tensor([[[[20.0, 30.0]], [[50.0, 5.0]]]] * 2), torch.tensor([[[1], [1]]] * 2)
    with torch.no_grad():
        logits, iou = model(images, points, labels)
        assert logits.shape == (2, 2, 4, 48, 64)
        assert ((iou >= 0) & (iou <= 1)).all()
        padded = torch.cat([points, torch.full_like(points, -1.0)], 2), torch.cat([labels, -torch.ones_like(labels)], 2)
        torch.testing.assert_close(model(images, *padded)[0], logits, rtol=1e-4, atol=1e-4)
        view = model.encode(model.preprocess(images[1:]))
        low, _ = model.decode(view, points[1, :1], labels[1, :1])
        torch.testing.assert_close(model.upscale(low, (48, 64))[0], logits[1, 0], rtol=1e-4, atol=1e-4)
        moved = model(images, points + 8, labels)[0]
        negative = model(images, points, 1 - labels)[0]
        for other in (moved, negative):
            assert (other - logits).abs().max() > 1e-3


def test_an_unknown_previous_mask_is_none_and_a_known_one_matters(model):
    view = model.encode(model.preprocess(torch.rand(1, 3, 64, 64)))
    prompt = (torch.tensor([[[20.0, 30.0]]]), torch.tensor([[1]]))
    with torch.no_grad():
        fresh, _ = model.decode(view, *prompt)
        unknown, _ = model.decode(view, *prompt, torch.full((1, 1, 32, 32), torch.nan))
        known, _ = model.decode(view, *prompt, torch.full((1, 1, 32, 32), 4.0))
    torch.testing.assert_close(fresh, unknown)
    assert (known - fresh).abs().max() > 1e-3


def test_a_saved_folder_answers_like_the_model(model, tmp_path):
    model.save_pretrained(tmp_path / "net")
    found = InteractiveSegmenter(str(tmp_path / "net"), device="cpu")(picture(), [(30, 40)])
    np.testing.assert_allclose(
        found.logits, InteractiveSegmenter(model, device="cpu")(picture(), [(30, 40)]).logits, atol=1e-4
    )


def test_a_view_is_encoded_once(model):
    engine = ClickNetEngine(model)
    seen, see = [], engine._see
    engine._see = lambda pixels: seen.append(pixels.shape) or see(pixels)
    segmenter = InteractiveSegmenter(engine)
    segmenter.set_image(picture())
    assert len(seen) == 1
    segmenter.add_click(60, 40)
    count = len(seen)
    assert count <= 2  # the whole picture, and the window of the second look
    segmenter.undo()
    segmenter.add_click(60, 40)
    assert len(seen) == count


def test_masks_on_offer_go_from_small_to_large():
    rows, cols = np.indices((40, 60))
    away = np.hypot(cols - 30, rows - 20)
    segmenter = InteractiveSegmenter(
        lambda image, points, labels: np.stack([12.0 - away, 5.0 - away, 12.1 - away, 17.0 - away])
    )
    assert segmenter.masks == []
    with pytest.raises(InputError, match="no mask yet"):
        segmenter.larger()
    segmenter.set_image(np.zeros((40, 60, 3), np.uint8))
    shown = segmenter.add_click(30, 20)
    areas = [int(m.binary.sum()) for m in segmenter.masks]
    assert areas == sorted(areas)
    assert len(areas) == 3  # two of the four are one to a person
    assert int(shown.binary.sum()) == areas[1]
    assert int(segmenter.smaller().binary.sum()) == areas[0]
    with pytest.raises(InputError, match="no smaller mask"):
        segmenter.smaller()
    assert int(segmenter.mask.binary.sum()) == areas[0]
    assert int(segmenter.undo().binary.sum()) == areas[1]
    assert int(segmenter.larger().binary.sum()) == areas[2]
    assert len(segmenter.clicks) == 1
    with pytest.raises(InputError, match="no larger mask"):
        segmenter.larger()
    several = segmenter(np.zeros((40, 60, 3), np.uint8), [(30, 20)], multimask_output=True)
    assert [int(m.binary.sum()) for m in several] == areas


def test_a_chosen_mask_is_what_the_next_click_corrects():
    before = []

    class Engine:
        def encode(self, image):
            return None

        def predict(self, state, points, labels, previous):
            before.append(previous)
            low = torch.full((1, 2, 8, 8), -1.0)
            low[0, 0, :2], low[0, 1, :6] = 1.0, 1.0
            return low, torch.tensor([[0.9, 0.2]]), lambda x: x

    segmenter = InteractiveSegmenter(Engine())
    segmenter.set_image(np.zeros((8, 8, 3), np.uint8))
    segmenter.add_click(1, 1)
    segmenter.larger()
    segmenter.add_click(2, 2)
    assert int((before[-1] > 0).sum()) == 48


def test_a_window_of_a_scene_is_a_part_of_its_whole():
    torch.manual_seed(0)
    maker = SceneMaker(square_bank(), 64, composite=1.0, over=0.0)
    for _ in range(4):
        scene = maker.random()
        framed, target, valid = maker.draw(scene)
        assert framed.shape == (4, 64, 64)
        assert not (target & ~valid).any()
        near = maker.draw(scene, (0.25, 0.5, 0.5))[1]
        part = target[32:, 16:48]
        both = torch.nn.functional.avg_pool2d(near[None].float(), 2)[0] - part.float()
        assert both.abs().mean() < 0.08
    assert WHOLE == (0.0, 0.0, 1.0)


def test_natural_scenes_are_what_the_product_sees():
    torch.manual_seed(0)
    bank = square_bank(64)
    maker = SceneMaker(bank, 64)
    layers = [maker.place(0, natural=True) for _ in range(40)]
    exact = [layer for layer in layers if layer.extent == 64]
    assert 8 < len(exact) < 32
    pixels, ids, inside = maker.look(exact[0], WHOLE)
    torch.testing.assert_close(pixels * 255, bank.images[0].float(), rtol=0, atol=1.0)
    assert (ids == bank.maps[0]).all()
    assert inside.all()


def test_objects_fill_from_a_hundredth_to_most_of_the_view():
    torch.manual_seed(0)
    maker = SceneMaker(square_bank(), 64, composite=1.0, over=0.0)
    shares = [float(maker.draw(maker.random())[1].float().mean()) for _ in range(60)]
    assert min(shares) < 0.02
    assert max(shares) > 0.4


@pytest.mark.slow
def test_the_loss_of_two_looks_teaches_the_decoder_and_not_the_encoder(model):
    torch.manual_seed(0)
    model.train()
    maker = SceneMaker(square_bank(), 64, over=0.0)
    encoder = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 3e-3), []
    for _ in range(30):
        loss, metrics = two_look_loss(model, maker, 4, model.encoder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert metrics.keys() == {"first", "second", "best"}
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    assert all(torch.equal(v, encoder[k]) for k, v in model.encoder.state_dict().items())
    assert all(p.grad is not None for p in trained)


@pytest.mark.slow
def test_two_onnx_files_answer_clicks_like_the_model(model: ClickNet, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    segmenter = InteractiveSegmenter(model)
    with pytest.raises(InputError, match="give a folder"):
        segmenter.export(tmp_path / "model.onnx")
    folder = segmenter.export(tmp_path / "clicks")
    assert sorted(p.name for p in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "mmkit.json"]
    see, answer = (runtime.InferenceSession(str(folder / f"{name}.onnx")) for name in ("encoder", "decoder"))
    image = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255
    framed = model.preprocess(image)
    seen = dict(zip([o.name for o in see.get_outputs()], see.run(None, {"image": framed.numpy()}), strict=True))
    half = model.img_size // 2
    before = np.full((1, 1, half, half), np.nan, np.float32)
    for points, labels in (([[60.0, 40.0]], [1]), ([[60.0, 40.0], [10.0, 10.0]], [1, 0])):
        at = np.array([points], np.float32) * (model.img_size / 120)
        given = {"image": framed.numpy(), **seen, "points": at, "labels": np.array([labels]), "previous": before}
        masks, iou = answer.run(None, given)
        with torch.no_grad():
            known = None if np.isnan(before).all() else torch.from_numpy(before)[:, 0][None]
            wanted, rated = model(image, torch.tensor([[points]]), torch.tensor([[labels]]), known)
        found = model.upscale(torch.from_numpy(masks), (80, 120))
        torch.testing.assert_close(found, wanted[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(torch.from_numpy(iou), rated[0], atol=1e-4, rtol=1e-3)
        before = masks[:, :1]
    other = InteractiveSegmenter(lambda image, points, labels: np.zeros(image.shape[:2]))
    with pytest.raises(InputError, match="Only ClickNet"):
        other.export(tmp_path / "other")


def test_a_running_minimum_is_the_same_in_words_that_onnx_knows(monkeypatch) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for dim in (2, 3):
        wanted = _running_minimum(x, dim)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            assert torch.equal(_running_minimum(x, dim), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_session_in_half_precision_answers_as_in_single(model, dtype) -> None:
    masks = {}
    for kind in ("float32", dtype):
        session = InteractiveSegmenter(model, dtype=kind)
        session.set_image(picture())
        session.add_click(60, 40)
        session.add_click(10, 10, positive=False)
        session.set_box(20, 20, 90, 70)
        masks[kind] = session.add_click(50, 40).binary
    assert 0 < masks["float32"].mean() < 1
    assert (masks["float32"] == masks[dtype]).mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_in_half_precision_are_made_smaller_too(model, dtype) -> None:
    half = ClickNet(**TINY).eval().to(dtype)
    images, points = torch.rand(1, 3, 80, 120).to(dtype), torch.tensor([[[[60.0, 40.0]]]])
    with torch.no_grad():
        low, iou = half(images, points, torch.ones(1, 1, 1, dtype=torch.long))
    assert low.shape[-2:] == (80, 120)
    assert low.isfinite().all()
    assert iou.isfinite().all()
