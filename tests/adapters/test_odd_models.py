"""Models as people have them: odd names, lazy layers, inference mode, modules replaced later, wrong arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkit
from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.errors import InputError


class Named(nn.Module):
    """Linear layers in a row, called by the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)  # type: ignore[misc]
        return x


def jiggled(adapter: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return adapter


@pytest.mark.parametrize("names", [("keys", "values", "pop"), ("sites", "saved", "default"), ("[a]", "a", "é d")])
@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_modules_of_any_name_are_adapted_saved_and_merged(method: str, names: tuple[str, ...], tmp_path: Path) -> None:
    x, model = torch.randn(3, 6), Named(*names)
    adapter = jiggled(apply_adapter(model, method, modules_to_save=(names[1],)))
    want = model(x)
    save_adapter(adapter, tmp_path / "adapter")
    again = Named(*names)
    load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(again(x), want, atol=1e-6)
    adapter.merge()
    assert torch.allclose(model(x), want, atol=1e-5)


def test_names_that_sites_are_written_with_are_refused() -> None:
    for name in ("a/b", "a|b"):
        model = Named(name, "c")
        with pytest.raises(InputError, match="exclude it or rename"):
            apply_adapter(model, "ssf")
        assert apply_adapter(model, "ssf", exclude=(name,)).site_paths == ["c"]


def test_a_file_names_modules_whole_not_by_their_endings(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "deep": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    adapter = apply_adapter(model, "lora", targets=("proj",), exclude=("deep.proj",))
    save_adapter(adapter, tmp_path / "adapter")
    adapter.detach()
    assert load_adapter(model, tmp_path / "adapter").site_paths == ["proj"]


@pytest.mark.parametrize("method", ["ssf", "lora", "bitfit"])
def test_an_adapter_made_in_inference_mode_can_be_trained(method: str) -> None:
    model = Named("a", "b")
    with torch.inference_mode():
        adapter = apply_adapter(model, method, modules_to_save=("b",))
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("method", ["ssf", "lora", "bitfit"])
def test_a_model_made_in_inference_mode_is_adapted_merged_and_left_as_it_was(method: str) -> None:
    with torch.inference_mode():
        model = Named("a", "b")
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = model(x)
        adapter = jiggled(apply_adapter(model, method))
        adapted = model(x)
        adapter.merge()
        torch.testing.assert_close(model(x), adapted)
        adapter.detach()
        assert torch.equal(model(x), before)
    assert all(p.requires_grad for p in model.parameters())


class Even(nn.Conv2d):
    """Pads in its own way, as TensorFlow does: half the size, where its `padding` says less."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_an_answer_of_another_shape_is_no_identity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Even(8, 8, 3, stride=2), nn.Conv2d(8, 8, 1))
    with pytest.raises(InputError, match=r"0 \(Even, from shape .*exclude=\('0',\)"):
        apply_adapter(model, "hra", targets=("0", "1"))
    assert apply_adapter(model, "hra", targets=("0", "1"), exclude=("0",)).site_paths == ["1"]


@pytest.mark.parametrize("name", ["", 3, None])
def test_the_name_of_an_adapter_is_a_text(name: Any) -> None:
    with pytest.raises(InputError, match="name of an adapter"):
        apply_adapter(Named("a"), "ssf", name=name)


def test_what_is_no_adapter_and_what_is_no_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use save_backbone"):
        save_adapter(Named("a"), tmp_path / "a")  # type: ignore[arg-type]
    for place in (None, 3):
        with pytest.raises(InputError, match="A path is a text"):
            save_adapter(apply_adapter(Named("a"), "ssf"), place)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="A path is a text"):
            load_adapter(Named("a"), place)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name or folder"):
            mmkit.create_backbone(place)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="given by its name"):
            mmkit.pipeline(place)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ssf", "lora", "bitfit"])
def test_layers_without_a_shape_yet_are_refused(method: str) -> None:
    with pytest.raises(InputError, match="run the model once"):
        apply_adapter(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), method)


@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_what_was_replaced_after_attaching_is_not_merged_into(method: str) -> None:
    x, model = torch.randn(3, 6), Named("a", "b")
    adapter = jiggled(apply_adapter(model, method, modules_to_save=("b",)))
    model(x)
    model.b = nn.Linear(6, 6)
    want = model(x)
    with pytest.raises(InputError, match=r"\['b'\] became other modules"):
        adapter.merge()
    assert torch.equal(model(x), want)
    adapter.detach()


def test_a_start_that_answers_nan_is_no_identity() -> None:
    with pytest.raises(InputError, match="nan"):
        apply_adapter(Named("a"), "lora", alpha=float("nan"))


@pytest.mark.parametrize("model", [None, "resnet18", [nn.Linear(2, 2)], nn.Linear, {"a.b": nn.Linear(2, 2)}])
def test_what_cannot_carry_an_adapter_is_told(model: Any) -> None:
    with pytest.raises(InputError):
        apply_adapter(model, "ssf")


@pytest.mark.parametrize("settings", [{"targets": 5}, {"exclude": None}, {"modules_to_save": (5,)}])
def test_settings_that_name_no_modules_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="takes names of modules"):
        apply_adapter(Named("a"), "ssf", **settings)


@pytest.mark.parametrize("method", ["ssf", "lora", "bitfit"])
def test_an_adapter_does_not_move_to_a_deeper_model(method: str) -> None:
    adapter = apply_adapter(Named("a", "b"), method)
    adapter.detach()
    with pytest.raises(InputError, match=r"another model.*'c'"):
        adapter.attach(Named("a", "b", "c"))
    assert adapter.attach(Named("a", "b")).attached


@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_weights_are_not_loaded_under_a_merged_adapter(method: str) -> None:
    other = {k: v + 1 for k, v in Named("a", "b").state_dict().items()}
    model = nn.Sequential(Named("a", "b"), Named("c"))
    adapter = jiggled(apply_adapter(model, method, targets=("0.a",)))
    model(torch.randn(3, 6))
    before = adapter.model.state_dict()["0.b.weight"].clone()
    adapter.merge()
    for module, state in ((model, model.state_dict()), (model[0], other), (model[0].a, model[0].a.state_dict())):
        with pytest.raises(InputError, match="merged into these weights"):
            module.load_state_dict(state)
    assert torch.equal(model.state_dict()["0.b.weight"], before)
    model[1].load_state_dict(model[1].state_dict())
    adapter.unmerge()
    model[0].load_state_dict(other)
    adapter.merge()
    adapter.detach()
    assert all(torch.equal(v, other[k]) for k, v in model[0].state_dict().items())


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), torch.ones(2)])
def test_a_strength_is_a_finite_number(value: Any) -> None:
    adapter = apply_adapter(Named("a"), "ssf")
    for change in (lambda: setattr(adapter, "scale", value), lambda: adapter.merge(scale=value)):
        with pytest.raises(InputError, match="finite number"):
            change()
    assert adapter.scale == 1.0
    assert adapter.attached


def test_a_merged_adapter_may_be_detached_while_it_is_disabled() -> None:
    x, model = torch.randn(3, 6), Named("a")
    want = model(x)
    adapter = jiggled(apply_adapter(model, "ssf"))
    model(x)
    adapter.merge()
    with adapter.disabled():
        adapter.detach()
    assert torch.equal(model(x), want)
