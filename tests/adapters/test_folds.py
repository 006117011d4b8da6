"""Merged equals adapted, checked: folds that weights cannot express are refused by name and nothing is written."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import contract
import pytest
import torch
from torch import Tensor, nn

from mmkit.adapters import apply_adapter
from mmkit.adapters.trial import channel_axis
from mmkit.backbones import create_backbone
from mmkit.errors import InputError, NotMergeableError


def _around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU()).eval()


def _std_conv() -> nn.Module:
    from timm.layers import StdConv2d

    return StdConv2d(8, 8, 3, padding=1)


def _scaled_conv() -> nn.Module:
    from timm.layers import ScaledStdConv2d

    return ScaledStdConv2d(8, 8, 3, padding=1)


UNFOLDABLE: dict[str, Callable[[], nn.Module]] = {  # the weight that is read is not the one that is stored
    "weight standardisation": _std_conv,
    "scaled standardisation": _scaled_conv,
    "weight_norm": lambda: torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "weight_norm, parametrised": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral_norm": lambda: torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral_norm, parametrised": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_layers_that_compute_their_weight_are_refused_by_name(kind: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = _around(UNFOLDABLE[kind]()), torch.randn(2, 3, 6, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = apply_adapter(model, method, targets=("1",), **({"init_std": 0.0} if method == "ssf" else {"r": 2}))
    contract.randomise(adapter, 0.3)
    adapted = model(x)
    with pytest.raises(NotMergeableError, match=r"cannot be folded.*1 \(") as refused:
        adapter.merge()
    assert refused.value.sites == ("1",)
    assert torch.equal(model(x), adapted)
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


FOLDABLE: dict[str, Callable[[], nn.Module]] = {
    "circular padding": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "reflected padding": lambda: nn.Conv2d(8, 8, 5, padding=2, padding_mode="reflect"),
    "same padding": lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    "groups": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 2, stride=2),
    "transposed in groups": lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "norm without parameters": lambda: nn.GroupNorm(2, 8, affine=False),
}


NORMS = {k for k in FOLDABLE if "norm" in k}
CANNOT_ACT = {("lora", k) for k in NORMS | {"transposed", "transposed in groups"}} | {
    ("bitfit", "norm without parameters")
}
# peft's layers pad with zeros and never dilate, whatever the convolution does; grouped ones it does not merge
CANNOT_FOLD = {("ssf", "transposed in groups")} | {
    ("lora", k) for k in ("circular padding", "reflected padding", "same padding", "groups", "depthwise")
}


@pytest.mark.parametrize("method", ["ssf", "bitfit", "lora"])
@pytest.mark.parametrize("kind", FOLDABLE)
def test_what_is_merged_equals_what_was_adapted_or_is_refused(kind: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = _around(FOLDABLE[kind]()), torch.randn(2, 3, 6, 6)
    settings = {"init_std": 0.0} if method == "ssf" else {}
    if (method, kind) in CANNOT_ACT:
        with pytest.raises(InputError, match=r"cannot act on them|has no module|peft cannot"):
            apply_adapter(model, method, targets=("1",), **settings)
        return
    adapter = apply_adapter(model, method, targets=("1",), **settings)
    contract.randomise(adapter, 0.3)
    adapted = model(x)
    if (method, kind) in CANNOT_FOLD:
        with pytest.raises(NotMergeableError, match=r"1 \("):
            adapter.merge()
    else:
        adapter.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)


class ChannelsFirst(nn.LayerNorm):
    """As in segmentation encoders: normalises (B, C, H, W) over C. The name says nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        y = (x - mean) / (x.var(1, unbiased=False, keepdim=True) + self.eps).sqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def test_channels_are_found_by_trying() -> None:
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.sam.modeling_sam import SamLayerNorm

    assert channel_axis(ChannelsFirst(7)) == (7, 1)
    assert channel_axis(ChannelsFirst(3)) == (3, 1)  # as wide as the picture that is tried
    for norm in (SamLayerNorm, ConvNextLayerNorm):
        assert channel_axis(norm(8, data_format="channels_first")) == (8, 1)
        assert channel_axis(norm(8, data_format="channels_last")) == (8, -1)
    assert channel_axis(nn.LayerNorm(8)) == (8, -1)
    assert channel_axis(nn.LayerNorm((4, 5, 6))) is None
    assert channel_axis(nn.Conv2d(3, 8, 1)) == (8, -3)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ChannelsFirst(8), (2, 8, 6, 8)),
        (nn.LayerNorm(8), (2, 6, 8)),
        (nn.Conv2d(4, 8, 3, padding=1), (4, 8, 8)),  # unbatched, and as wide as it has channels
        (nn.Conv1d(4, 8, 3, padding=1), (4, 8)),
    ],
)
@pytest.mark.parametrize("method", ["ssf", "bitfit"])
def test_adapters_act_along_channels_and_fold(method: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(layer, nn.Tanh()).eval(), torch.randn(shape)
    adapter = apply_adapter(model, method, **({"init_std": 0.0} if method == "ssf" else {}))
    contract.randomise(adapter, 0.5)
    adapted = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_norms_without_parameters_get_some_of_the_models_type(name: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 1,
        "sample_size": 8,
    }
    text = torch.randn(1, 3, 16)
    options = {
        "DiTTransformer2DModel": (
            {"out_channels": 4, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero", "patch_size": 2},
            {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])},
        ),
        "PixArtTransformer2DModel": (
            {"out_channels": 4, "caption_channels": 16, "cross_attention_dim": 16, "patch_size": 2},
            {"timestep": torch.tensor([3]), "encoder_hidden_states": text},
        ),
        "SD3Transformer2DModel": (
            {
                "out_channels": 4,
                "joint_attention_dim": 16,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 16,
                "patch_size": 2,
            },
            {"timestep": torch.tensor([3]), "encoder_hidden_states": text, "pooled_projections": torch.randn(1, 16)},
        ),
    }
    settings, inputs = options[name]
    model = create_backbone(f"diffusers:{name}", **small, **settings).eval().requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    keys = list(model.state_dict())
    adapter = apply_adapter(model, "ssf", init_std=0.1)
    try:
        adapted = model(hidden_states=x, **inputs).sample
    except ValueError as error:  # says which modules this call does not reach
        adapter.detach()
        adapter = apply_adapter(
            model, "ssf", init_std=0.1, exclude=ast.literal_eval(str(error).rpartition("exclude=")[2].rstrip("."))
        )
        adapted = model(hidden_states=x, **inputs).sample
    adapter.merge()
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(model(hidden_states=x, **inputs).sample, adapted, atol=2e-5, rtol=1e-3)
    adapter.detach()
    assert list(model.state_dict()) == keys


def test_two_doras_on_one_module_are_not_folded_one_by_one() -> None:
    model, x = contract.build("vit").requires_grad_(False), contract.inputs("vit")
    pair = [apply_adapter(model, "dora", name=n, r=4) for n in "ab"]
    for a in pair:
        contract.randomise(a, 0.05)
    both = contract.run(model, x)
    with pytest.raises(NotMergeableError, match="would not do what the adapter does"):
        pair[0].merge()
    assert torch.equal(contract.run(model, x), both)


def test_one_module_under_two_names_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model, x = Twice(), torch.randn(3, 4)
    adapter = apply_adapter(model, "lora", r=2, targets=("first", "second"))
    assert adapter.own_paths == ["first"]
    contract.randomise(adapter, 0.5)
    adapted = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted)


def test_a_fold_that_lies_is_caught_whatever_the_method() -> None:
    from mmkit.adapters.bitfit import BitFit

    class Lies(BitFit):
        def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
            return {"bias": module.bias.detach() - site.delta.detach()}  # the wrong sign

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = Lies().attach(model)
    contract.randomise(adapter, 0.5)
    adapted = model(x)
    with pytest.raises(NotMergeableError, match="off by"):
        adapter.merge()
    assert torch.equal(model(x), adapted)


def test_the_trained_copy_takes_every_argument_and_the_frozen_module_is_not_run() -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, pre_logits: bool = False, *, gain: float = 1.0) -> Tensor:
            x = self.norm(x) * gain
            return x if pre_logits else self.fc(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top = Top()

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.top(x, **kwargs)

    model, x = Net().eval(), torch.randn(3, 4)
    wanted = [{}, {"pre_logits": True}, {"pre_logits": True, "gain": 3.0}]
    base = [model(x, **w) for w in wanted]
    adapter = apply_adapter(model, "linear_probe", modules_to_save=("top",))
    assert all(torch.equal(model(x, **w), b) for w, b in zip(wanted, base, strict=True))
    calls: list[int] = []
    model.top.norm.register_forward_hook(lambda *_: calls.append(1))
    contract.randomise(adapter, 0.5)
    assert model(x, pre_logits=True, gain=3.0).shape == (3, 4)
    assert not torch.equal(model(x), base[0])
    assert not calls


def test_a_bias_is_made_where_a_method_adds_one_and_goes_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    for method in ("ssf", "beft"):
        adapter = apply_adapter(model, method)
        contract.randomise(adapter, 0.5)
        adapted = model(x)
        adapter.merge()
        assert model[0].bias is not None
        torch.testing.assert_close(model(x), adapted)
        adapter.detach()
        assert model[0].bias is None


def test_lora_is_refused_by_name_where_a_convolution_pads_in_its_own_way() -> None:
    from timm.layers import ScaledStdConv2dSame

    model = nn.Sequential(
        ScaledStdConv2dSame(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3), ScaledStdConv2dSame(4, 4, 3, stride=2)
    )
    with pytest.raises(InputError, match=r"0 \(ScaledStdConv2dSame, cannot act.*exclude=\('0', '2'\)"):
        apply_adapter(model, "lora")
    adapter = apply_adapter(model, "lora", exclude=("0", "2"))
    assert adapter.own_paths == ["1"]
