"""Heads: every family of timm says where its classifiers are, and a copy put in their place acts."""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path

import pytest
import torch
from torch import nn

from mmkit.backbones import ImageBackboneInfo, backbone_info, create_backbone, example_input, head_names, head_scopes
from mmkit.errors import InputError
from mmkit.storage import write_safetensors

# One per way of keeping classifiers; names by pattern, so that new versions of timm are swept too.
KINDS = {
    "test_vit": ("head",),
    "test_convnext": ("head.fc",),
    "test_efficientnet": ("classifier",),
    "test_resnet": ("fc",),
    "test_nfnet": ("head.fc",),
    "deit_tiny_distilled_*": ("head", "head_dist"),
    "levit_128s": ("head", "head_dist"),
    "efficientformer_l1": ("head", "head_dist"),
    "crossvit_tiny_*": ("head.0", "head.1"),
    "efficientvim_m1": ("heads.0", "heads.1", "heads.2", "heads.3"),
    "efficientvit_b0": ("head.classifier.4",),
    "poolformer_s12": ("head.fc",),
    "caformer_s18": ("head.fc",),
    "repvit_m0_9": ("head",),
    "hrnet_w18_small": ("classifier",),
    "legacy_seresnet18": ("last_linear",),
}


@pytest.mark.parametrize("pattern,heads", KINDS.items())
def test_the_heads_of_a_family_are_called_and_a_copy_of_them_acts(pattern: str, heads: tuple[str, ...]) -> None:
    import timm

    name = sorted(n for n in timm.list_models() if fnmatch.fnmatch(n, pattern))[0]
    model = create_backbone(name, num_classes=7).eval()
    assert head_names(model) == heads
    args, kwargs = example_input(model) or ((), {})
    x = torch.randn_like(args[0])
    with torch.no_grad():
        before = model(x, **kwargs)
    for head in heads:
        twin = copy.deepcopy(model.get_submodule(head))
        for p in twin.parameters():
            nn.init.normal_(p, std=0.5)
        handle = model.get_submodule(head).register_forward_hook(lambda _m, a, _o, twin=twin: twin(*a))
        with torch.no_grad():
            assert (model(x, **kwargs) - before).abs().max() > 1e-3, head
        handle.remove()
    assert create_backbone(name, num_classes=0).backbone_info.heads == ()


@pytest.mark.slow
def test_modules_of_timm_name_their_heads() -> None:
    import timm

    missing = []
    for module in timm.list_modules()[::4]:  # all of them: benchmarks/zoo.py
        name = sorted(timm.list_models(module=module), key=len)[0]
        with torch.device("meta"):
            model = timm.create_model(name)
        paths = dict(model.named_modules())
        heads = head_names(model)
        if (model.num_classes and not heads) or not all(any(True for _ in paths[h].parameters()) for h in heads):
            missing.append(name)
    assert missing == []


def test_a_head_is_known_with_what_belongs_to_it_alone() -> None:
    assert head_scopes(create_backbone("test_convnext", num_classes=3)) == ("head",)
    assert head_scopes(create_backbone("test_vit", num_classes=3)) == ("head",)


def test_a_classifier_without_a_name_is_found_by_the_shape_it_gives() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Conv2d(3, 4, 8)
            self.trunk = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.answer(self.trunk(x)).mean((2, 3))

    class Named(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.answer(self.trunk(x))

    info = ImageBackboneInfo("mine", input_size=(3, 8, 8), num_classes=4)
    for cls, heads in ((Named, ("answer",)), (Odd, ())):
        model = cls()
        assert head_names(model) == ()
        model.backbone_info = info
        assert head_names(model) == heads


def test_classes_for_a_model_without_a_classifier_are_refused() -> None:
    with pytest.raises(InputError, match="does not apply"):
        create_backbone("diffusers:AutoencoderTiny", num_classes=3)
    assert backbone_info(nn.Linear(2, 2)).heads == ()


def test_a_classifier_that_only_acts_in_training_starts_fresh_with_the_others(tmp_path: Path) -> None:
    model = create_backbone("volo_d1_224", num_classes=5)
    assert head_names(model) == ("head",)  # what a prediction comes from
    write_safetensors(tmp_path / "m.safetensors", model.state_dict())
    other = create_backbone("volo_d1_224", tmp_path / "m.safetensors", num_classes=3)
    assert other.aux_head.out_features == other.head.out_features == 3
