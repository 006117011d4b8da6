"""`fit` in one process: it learns, it stops when told, and it leaves the caller's model and random state alone."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmkit
from mmkit.errors import InputError, TrainingError
from mmkit.storage.runs import list_checkpoints
from mmkit.training import FitConfig, fit
from mmkit.training.setup import make_accelerator

QUIET = {"progress": False, "device": "cpu"}


def points(n: int = 120) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator)
    return [(row, int(row[:3].argmax())) for row in x]


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 3))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_and_reports(tmp_path):
    data, seen = points(), []
    result = fit(
        network(),
        data[:90],
        data[90:],
        config=FitConfig(epochs=12, batch_size=16, lr=0.02, warmup_epochs=1, tensorboard=True, **QUIET),
        output_dir=tmp_path,
        on_step=seen.append,
    )
    assert result.best_metrics["accuracy"] > 0.75
    assert (result.steps, result.stopped, len(result.losses)) == (72, "finished", 72)
    assert [info.step for info in seen] == list(range(1, 73))
    assert seen[0].total == 72
    assert seen[-1].epoch == 12
    assert seen[-1].metrics == result.metrics
    lrs = [info.lr for info in seen]
    assert lrs[0] < lrs[5] < lrs[7]  # warm-up
    assert lrs[7] > lrs[40] > lrs[-1]
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [float(r["loss"]) for r in rows] == pytest.approx(result.losses, rel=1e-6)
    history = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert float(history[-1]["accuracy"]) == pytest.approx(result.metrics["accuracy"])
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["best"] == result.best_metrics
    assert (
        saved["trainable_parameters"] == result.trainable_parameters == sum(p.numel() for p in network().parameters())
    )
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_fit_is_the_function_whatever_was_imported_first():
    code = "import mmkit.training.loop, mmkit.training.config; from mmkit.training import fit; assert callable(fit)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert mmkit.fit is fit


def test_best_weights_are_restored():
    data, model = points(), network()
    result = fit(model, data[:90], data[90:], config=FitConfig(epochs=6, batch_size=16, lr=0.05, **QUIET))
    model.eval()
    with torch.no_grad():
        hits = [int(model(x[None]).argmax()) == y for x, y in data[90:]]
    assert sum(hits) / len(hits) == pytest.approx(result.best_metrics["accuracy"])
    assert result.best_metrics["accuracy"] == max(row["accuracy"] for row in result.history)


def test_same_seed_same_result_and_callers_random_state_untouched():
    data = points()
    config = FitConfig(epochs=2, batch_size=16, **QUIET)
    first, second, other = network(0.3), network(0.3), network(0.3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    a = fit(first, data, config=config)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(99)
    torch.manual_seed(99)
    b = fit(second, data, config=config)
    c = fit(other, data, config=FitConfig(epochs=2, batch_size=16, seed=1, **QUIET))
    assert a.losses == b.losses
    assert equal(tensors(first), tensors(second))
    assert a.losses != c.losses


def test_grad_accumulation_equals_a_bigger_batch_also_on_the_last_step():
    data = points(50)  # 50 = 3 * 16 + 2
    layers = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    big = fit(layers[0], data, config=FitConfig(epochs=3, batch_size=16, **QUIET))
    small = fit(layers[1], data, config=FitConfig(epochs=3, batch_size=4, grad_accum=4, **QUIET))
    assert big.losses == pytest.approx(small.losses, abs=1e-6)
    assert len(big.losses) == 12


def test_cancel_then_resume_is_bit_equal(tmp_path):
    data, config = points(), FitConfig(epochs=4, batch_size=16, lr=0.02, ema_decay=0.9, **QUIET)
    whole = network(0.2)
    expected = fit(whole, data[:90], data[90:], config=config, output_dir=tmp_path / "whole")
    count = iter(range(10**6))
    stopped = network(0.2)
    part = fit(
        stopped, data[:90], data[90:], config=config, output_dir=tmp_path / "part", should_stop=lambda: next(count) > 12
    )
    assert part.stopped == "cancelled"
    assert 0 < part.steps < 24
    resumed = network(0.2)
    result = fit(resumed, data[:90], data[90:], config=config, output_dir=tmp_path / "part")
    assert result.stopped == "finished"
    assert result.losses == expected.losses
    assert result.history == expected.history
    assert equal(tensors(resumed), tensors(whole))
    assert (tmp_path / "part" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    again = network(0.2)  # a finished run is only loaded
    assert fit(again, data[:90], data[90:], config=config, output_dir=tmp_path / "part").losses == expected.losses
    assert equal(tensors(again), tensors(whole))


def test_of_equally_good_weights_those_of_lower_loss_are_kept():
    """Few held-back pictures are soon all right: the first weights that manage it have learnt next to nothing."""
    seen: list[dict[str, torch.Tensor]] = []
    measured = iter([(0.5, 0.1), (1.0, 0.9), (1.0, 0.3), (1.0, 0.4), (0.75, 0.2)])

    def metrics(model, loader):
        seen.append(tensors(model))
        return dict(zip(("accuracy", "loss"), next(measured), strict=True))

    model = network()
    config = FitConfig(epochs=5, batch_size=16, lr=0.05, **QUIET)
    result = fit(model, points(), points(), metrics_fn=metrics, config=config)
    assert result.best_metrics == {"accuracy": 1.0, "loss": 0.3}
    assert equal(tensors(model), seen[2])
    assert not equal(tensors(model), seen[1])


def test_patience_waits_for_a_better_monitor_alone():
    measured = iter([(1.0, 0.9), (1.0, 0.5), (1.0, 0.3), (1.0, 0.2)])
    result = fit(
        network(),
        points(),
        points(),
        metrics_fn=lambda model, loader: dict(zip(("accuracy", "loss"), next(measured), strict=True)),
        config=FitConfig(epochs=4, batch_size=16, patience=2, **QUIET),
    )
    assert (result.stopped, len(result.history), result.best_metrics["loss"]) == ("early", 3, 0.3)


def test_results_do_not_depend_on_the_number_of_workers():
    class Noisy:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            x, y = self.data[index]
            return x + 0.1 * torch.randn_like(x) + random.random() + float(np.random.rand()), y

    curves = [
        fit(network(), Noisy(points(40)), config=FitConfig(epochs=2, batch_size=8, num_workers=n, **QUIET)).losses
        for n in (0, 2)
    ]
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == len(curves[0])


def test_ctrl_c_saves_and_returns(tmp_path):
    def interrupt(info):
        if info.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    config = FitConfig(epochs=4, batch_size=16, **QUIET)
    before = signal.getsignal(signal.SIGINT)
    result = fit(network(), points(), config=config, output_dir=tmp_path, on_step=interrupt)
    assert result.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"step_{result.steps:08d}"
    assert fit(network(), points(), config=config, output_dir=tmp_path).stopped == "finished"


def test_early_stopping():
    data = points()
    config = FitConfig(epochs=50, batch_size=32, lr=1e-6, patience=2, monitor="-loss", **QUIET)
    stuck = fit(nn.Linear(6, 3), data, data, metrics_fn=lambda model, loader: {"loss": 1.0}, config=config)
    assert stuck.stopped == "early"
    assert len(stuck.history) == 3


class Poisoned:
    """Example 17 holds a NaN."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return (x * float("nan"), y) if index == 17 else (x, y)

    def describe(self, index):
        return f"photos/{index:03d}.png"


def test_nan_names_the_step_and_the_file_and_saves_the_state_before_it(tmp_path):
    model = network()
    with pytest.raises(TrainingError, match=r"step \d+.*photos/017.png") as info:
        fit(model, Poisoned(points(64)), config=FitConfig(epochs=1, batch_size=8, **QUIET), output_dir=tmp_path)
    assert info.value.files == ("photos/017.png",)
    assert info.value.saved == tmp_path / "checkpoints" / f"failed_at_{info.value.step:08d}"
    assert (info.value.saved / "state.json").is_file()
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())  # running statistics as well


def test_nan_loss_without_bad_data_lists_the_batch():
    def explode(model, batch):
        return model(batch[0]).sum() * float("inf")

    with pytest.raises(TrainingError, match=r"at step 1.*example") as info:
        fit(nn.Linear(6, 3), points(20), loss_fn=explode, config=FitConfig(batch_size=4, **QUIET))
    assert len(info.value.files) == 4


def test_frozen_batch_norm_and_flags_come_back_unchanged():
    model = network()
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    model.eval()
    before = tensors(model)
    fit(model, points(), config=FitConfig(epochs=1, batch_size=16, lr=0.05, **QUIET))
    after = tensors(model)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"4.weight", "4.bias"}
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    assert all(p.grad is None for p in model.parameters())


def test_custom_loss_metrics_and_extra_columns(tmp_path):
    def loss_fn(model, batch):
        error = (model(batch["x"])[:, 0] - batch["y"]).square().mean()
        return error, {"root": float(error.detach().sqrt())}

    data = [{"x": x, "y": x.sum()} for x, _ in points()]
    result = fit(
        nn.Linear(6, 1),
        data,
        data,
        loss_fn=loss_fn,
        metrics_fn=lambda model, loader: {"mse": sum(float(loss_fn(model, b)[0]) for b in loader)},
        config=FitConfig(epochs=8, batch_size=16, lr=0.1, monitor="-mse", optimizer="sgd", **QUIET),
        output_dir=tmp_path,
    )
    assert result.metrics["mse"] < 0.05 * result.history[0]["mse"] or result.metrics["mse"] < 1e-2
    assert "root" in (tmp_path / "log.csv").read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_cpu_that_cannot_multiply_it_is_told(monkeypatch, recwarn, fast):
    monkeypatch.setattr("mmkit.training.setup.cpu_multiplies_bf16", lambda: fast)
    make_accelerator(FitConfig(mixed_precision="bf16", device="cpu"))
    make_accelerator(FitConfig(device="cpu"))  # accelerate keeps its settings for the life of the process
    assert any("bfloat16" in str(w.message) for w in recwarn) is not fast


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_keeps_float32_weights(precision):
    model, data = network(), points()
    result = fit(
        model, data, data, config=FitConfig(epochs=5, batch_size=16, lr=0.02, mixed_precision=precision, **QUIET)
    )
    assert result.metrics["accuracy"] > 0.6
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model(torch.randn(2, 6)).dtype == torch.float32
    fit(model, data, config=FitConfig(epochs=1, **QUIET))  # back to full precision in the same process


def test_weight_decay_spares_one_dimensional_tensors():
    from mmkit.training.groups import parameter_groups

    model = network()
    groups, names = parameter_groups(nn.ModuleDict({"model": model}), model, None, 0.1)
    decay = dict(zip(names, [g["weight_decay"] for g in groups for _ in g["params"]], strict=True))
    assert {k for k, v in decay.items() if v > 0} == {"model.0.weight", "model.4.weight"}
    assert len(decay) == 6


def test_an_adapter_may_ask_for_its_own_rate_and_no_decay():
    import timm

    from mmkit.adapters import apply_adapter
    from mmkit.training.groups import parameter_groups
    from mmkit.training.setup import Trainee, current_lr, make_optimizer, make_scheduler

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    adapter = apply_adapter(model, "gmm", modules_to_save=("head",))
    groups, names = parameter_groups(Trainee(model, adapter), model, adapter, 0.1)
    wanted = {"alpha": (10.0, 0.0), "sigma": (10.0, 0.0), "weight": (1.0, 0.1), "bias": (1.0, 0.0)}
    found = [(g["lr_scale"], g["weight_decay"]) for g in groups for _ in g["params"]]
    assert found == [wanted[name.rsplit(".", 1)[-1]] for name in names]
    config = FitConfig(lr=0.02, warmup_steps=2, **QUIET)
    optimizer = make_optimizer(config, groups)
    scheduler = make_scheduler(config, optimizer, 10, 5)
    for step in (0, 2, 9):
        scheduler.step_update(step)
        rates = [g["lr"] / g["lr_scale"] for g in optimizer.param_groups]
        assert rates == pytest.approx([current_lr(optimizer)] * len(rates))
    scheduler.step_update(2)
    assert current_lr(optimizer) == pytest.approx(0.02, rel=0.2)


def test_two_steps_by_hand_match_plain_torch():
    data, ours, theirs = points(32), nn.Linear(6, 3), nn.Linear(6, 3)
    theirs.load_state_dict(ours.state_dict())
    config = FitConfig(epochs=1, batch_size=16, lr=0.01, schedule="constant", weight_decay=0.1, clip_grad=None, **QUIET)
    fit(ours, data, config=config)
    from mmkit.training.sampling import StepSampler

    sampler = StepSampler(32, 16)
    optimizer = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.01
    )
    for step in range(2):
        chosen = sampler.examples(step)
        x, y = torch.stack([data[i][0] for i in chosen]), torch.tensor([data[i][1] for i in chosen])
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_cancelled_during_evaluation_evaluates_on_resume(tmp_path):
    data, config = points(), FitConfig(epochs=2, batch_size=30, **QUIET)
    whole = network()
    expected = fit(whole, data[:60], data[60:], config=config, output_dir=tmp_path / "a")
    calls = {"n": 0}

    def stop() -> bool:
        calls["n"] += 1
        return calls["n"] == 3  # two steps, then the first batch of the evaluation

    first = fit(network(), data[:60], data[60:], config=config, output_dir=tmp_path / "b", should_stop=stop)
    assert (first.stopped, first.steps, first.history) == ("cancelled", 2, [])
    model = network()
    second = fit(model, data[:60], data[60:], config=config, output_dir=tmp_path / "b")
    assert second.history == expected.history
    assert equal(tensors(model), tensors(whole))


BAD = {
    "empty": (lambda: fit(network(), [], config=FitConfig(**QUIET)), "train data set is empty"),
    "iterable": (lambda: fit(network(), iter([1])), "give max_steps"),
    "patience": (lambda: fit(network(), points(), config=FitConfig(patience=1, **QUIET)), "validation"),
    "nothing to train": (lambda: fit(network().requires_grad_(False), points(), config=FitConfig(**QUIET)), "nothing"),
    "optimizer": (lambda: fit(network(), points(), config=FitConfig(optimizer="adamv", **QUIET)), "Did you mean"),
    "monitor": (lambda: fit(network(), points(), points(), config=FitConfig(monitor="acc", **QUIET)), "'accuracy'"),
    "drop_last": (lambda: fit(network(), points(8), config=FitConfig(drop_last=True, **QUIET)), "drop_last"),
    "shapes": (
        lambda: fit(network(), [(torch.zeros(3), 0), (torch.zeros(4), 1)], config=FitConfig(**QUIET)),
        r"cannot be stacked: .*\(3,\)",
    ),
    "loss shape": (
        lambda: fit(network(), points(), loss_fn=lambda m, b: m(b[0]), config=FitConfig(**QUIET)),
        "one number",
    ),
    "detached": (
        lambda: fit(network(), points(), loss_fn=lambda m, b: torch.zeros(()), config=FitConfig(**QUIET)),
        "does not depend",
    ),
    "lr": (lambda: FitConfig(lr=0), "lr must be above 0"),
    "batch size": (lambda: FitConfig(batch_size=0), "batch_size must be at least 1"),
    "precision": (lambda: FitConfig(mixed_precision="fp8"), "mixed_precision"),
}


def with_adapter(spoil):
    model = network()
    adapter = mmkit.apply_adapter(model, "ssf")
    model(torch.randn(4, 6))  # a merge wants to have seen the sites at work
    return fit(model, points(), adapter=spoil(adapter) or adapter, config=FitConfig(**QUIET))


BAD |= {
    name: (lambda spoil=spoil: with_adapter(spoil), words)
    for name, spoil, words in (
        ("an adapter's name", lambda a: "ssf", "apply_adapter returned, not str"),
        ("merged adapter", lambda a: a.merge() and None, "unmerge"),
        ("detached adapter", lambda a: a.detach() and None, "attach"),
        ("disabled adapter", lambda a: setattr(a, "enabled", False), "enable it"),
        ("scale 0", lambda a: setattr(a, "scale", 0), "adapter.scale = 1"),
    )
}


def numbers_of_loss(given):
    return lambda model, batch: (torch.nn.functional.cross_entropy(model(batch[0]), batch[1]), *given)


BAD |= {
    f"numbers {given}": (
        lambda given=given: fit(network(), points(), loss_fn=numbers_of_loss(given), config=FitConfig(**QUIET)),
        "loss_fn must return",
    )
    for given in ((None,), ({"a": torch.ones(2)},), ({"a": None},), ({}, 3))
}


@torch.no_grad()
def without_gradients():
    return fit(network(), points(), config=FitConfig(**QUIET))


def of_inference_mode():
    with torch.inference_mode():
        model = network()
    return fit(model, points(), config=FitConfig(**QUIET))


BAD |= {
    "no_grad": (without_gradients, r"outside torch.no_grad\(\)"),
    "inference mode": (of_inference_mode, "made in torch.inference_mode"),
    "folder": (lambda: fit(network(), points(), config=FitConfig(**QUIET), output_dir=3), "A path is a text"),
    "complex": (
        lambda: fit(network(), points(), loss_fn=lambda m, b: m(b[0]).mean() * 1j, config=FitConfig(**QUIET)),
        "one number",
    ),
}


def test_numbers_of_the_loss_do_not_take_the_columns_of_the_log(tmp_path):
    given = ({"step": 7, "loss": 8.0, "own": 9.0},)
    result = fit(
        network(), points(8), loss_fn=numbers_of_loss(given), config=FitConfig(epochs=1, **QUIET), output_dir=tmp_path
    )
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, result.steps + 1))
    assert [float(row["loss"]) for row in rows] == pytest.approx(result.losses)
    assert {(row["loss_fn_step"], row["loss_fn_loss"], row["own"]) for row in rows} == {("7", "8", "9")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, message = BAD[case]
    with pytest.raises(InputError, match=message):
        run()
