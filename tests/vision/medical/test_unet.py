"""The plain U-Net: sizes, what it refuses, and that it learns."""

from __future__ import annotations

import pytest
import torch

import mmkit
from mmkit.errors import InputError
from mmkit.vision.medical import Microscopy, Patches, UNet, segmentation_loss


def test_it_is_of_the_size_of_the_small_lightm_unet():
    ours = sum(p.numel() for p in mmkit.create_model("unet_2d_tiny").parameters())
    theirs = mmkit.create_model("lightm_unet_2d_tiny", in_chans=3, num_classes=2, init_filters=8)
    assert ours == pytest.approx(sum(p.numel() for p in theirs.parameters()), rel=0.05)


@pytest.mark.parametrize(("dims", "size"), [(2, (33, 47)), (3, (9, 12, 17))])
def test_any_size_comes_back(dims, size):
    model = UNet(dims, 1, 3, channels=(4, 6, 8)).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_what_it_refuses():
    for wrong in ({"spatial_dims": 4}, {"channels": ()}, {"num_classes": 0}):
        with pytest.raises(InputError):
            UNet(**wrong)
    model = UNet(channels=(4, 4))
    for shape in ((1, 1, 8, 8), (3, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(InputError, match="2D network takes"):
            model(torch.zeros(shape))


def test_a_saved_one_drives_the_pipeline(tmp_path):
    UNet(channels=(4, 6)).save_pretrained(tmp_path / "unet")
    result = mmkit.pipeline("medical-segmentation", tmp_path / "unet")(torch.zeros(20, 30, 3).byte().numpy())
    assert result.mask.shape == (20, 30)


def test_it_learns_a_bright_square():
    torch.manual_seed(0)
    model = UNet(channels=(4, 8))
    image, labels = torch.randn(3, 40, 40), torch.zeros(40, 40, dtype=torch.long)
    labels[10:30, 10:30] = 1
    image[:, 10:30, 10:30] += 2
    patches = Patches([(image, labels)], (24, 24), 60)
    config = mmkit.FitConfig(max_steps=15, batch_size=4, lr=1e-2, progress=False, device="cpu")
    losses = mmkit.fit(model, patches, loss_fn=segmentation_loss, config=config).losses
    assert losses[-1] < 0.6 * losses[0]


def test_cases_are_drawn_by_weight():
    cases = [(torch.full((1, 8, 8), float(k)), torch.full((8, 8), k)) for k in range(3)]
    torch.manual_seed(0)
    drawn = Patches(cases, (4, 4), 50, weights=[0, 1, 3])
    found = torch.stack([drawn[i][1][0, 0] for i in range(50)]).bincount(minlength=3)
    assert found[0] == 0
    assert found[2] > found[1] > 0
    with pytest.raises(InputError, match="2 weights for 3 cases"):
        Patches(cases, (4, 4), 5, weights=[1, 1])


def test_microscopy_keeps_labels_on_what_they_mark():
    torch.manual_seed(0)
    labels = torch.zeros(48, 48, dtype=torch.long)
    labels[12:24, 20:36] = 1
    image = (4.0 * labels).expand(3, -1, -1) - 1
    for _ in range(20):
        changed, moved = Microscopy(stain=0.05, invert=0)(image, labels)
        assert changed.shape == image.shape
        assert moved.shape == labels.shape
        assert set(moved.unique().tolist()) == {0, 1}
        inside, outside = changed[:, moved == 1].mean(), changed[:, moved == 0].mean()
        assert inside - outside > 1
