"""Runs that are bounded by time, and data whose end is not known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from mmkit.errors import InputError
from mmkit.storage.runs import list_checkpoints
from mmkit.training import FitConfig, fit

QUIET = {"progress": False, "device": "cpu"}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def points(n: int = 96) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return [(row, int(row[:3].argmax())) for row in x]


class Clock:
    """Time that passes by one second with each step."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("mmkit.training.loop.time.perf_counter", lambda: self.now)

    def tick(self, info) -> None:
        self.now += 1


def test_max_seconds_counts_over_resumes_and_changes_nothing_else(tmp_path, monkeypatch):
    data, clock = points(), Clock(monkeypatch)
    settings = {"epochs": 4, "batch_size": 16, "lr": 0.02, **QUIET}

    def run(folder, model, seconds):
        config = FitConfig(**settings, max_seconds=seconds)
        return fit(model, data[:80], data[80:], config=config, output_dir=folder, on_step=clock.tick)

    whole = network()
    expected = run(tmp_path / "whole", whole, None)
    first = run(tmp_path / "part", network(), 7)
    assert first.stopped == "max_seconds"
    assert first.steps == 8  # the time is looked at when a step is done
    assert list_checkpoints(tmp_path / "part" / "checkpoints")[-1].name == "step_00000008"
    assert first.metrics  # measured where the time ran out
    again = run(tmp_path / "part", network(), 7)
    assert (again.stopped, again.steps) == ("max_seconds", 8)
    clock.now += 1000  # time between two calls does not count
    more = run(tmp_path / "part", network(), 11)
    assert (more.stopped, more.steps) == ("max_seconds", 13)
    model = network()
    result = run(tmp_path / "part", model, None)
    assert result.stopped == "finished"
    assert result.losses == expected.losses
    assert result.history == expected.history
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


class Stream(IterableDataset):
    """Examples with noise, endless or `length` of them."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __iter__(self):
        for i in itertools.islice(itertools.count(), self.length):
            x = torch.randn(6, generator=torch.Generator().manual_seed(i))
            yield x + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(6), int(x[:3].argmax())


@pytest.mark.parametrize("length", [None, 37])
def test_an_iterable_data_set_trains_and_resumes_by_skipping(tmp_path, length):
    config = {"max_steps": 30, "steps_per_epoch": 10, "batch_size": 16, "lr": 0.02, **QUIET}
    whole, part, again = network(), network(), network()
    expected = fit(whole, Stream(length), points(), config=FitConfig(**config))
    assert [row["step"] for row in expected.history] == [10, 20, 30]
    count = iter(range(100))
    stopped = fit(
        part,
        Stream(length),
        points(),
        config=FitConfig(**config),
        output_dir=tmp_path,
        should_stop=lambda: next(count) > 16,
    )
    assert 10 < stopped.steps < 20
    result = fit(again, Stream(length), points(), config=FitConfig(**config, num_workers=2), output_dir=tmp_path)
    assert result.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_an_iterable_data_set_needs_its_steps_and_a_beginning():
    with pytest.raises(InputError, match="give max_steps, or steps_per_epoch"):
        fit(network(), Stream(), config=FitConfig(**QUIET))
    result = fit(network(), Stream(), config=FitConfig(epochs=2, steps_per_epoch=3, batch_size=8, **QUIET))
    assert result.steps == 6
    with pytest.raises(InputError, match="gave 40 examples and none when it was started again"):
        fit(network(), iter(list(Stream(40))), config=FitConfig(max_steps=9, batch_size=8, **QUIET))
    with pytest.raises(InputError, match="val must be"):
        fit(network(), points(), Stream(), config=FitConfig(**QUIET))


def test_what_is_no_data_set_of_examples_is_refused():
    for wrong, advice in (("photos", "open_dataset"), (DataLoader(points()), r"pass its \.dataset"), (3, "not int")):
        with pytest.raises(InputError, match=advice):
            fit(network(), wrong, config=FitConfig(**QUIET))
    with pytest.raises(InputError, match="write FitConfig"):
        fit(network(), points(), config={"epochs": 3})
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        fit(lambda x: x, points())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "3"}, "epochs must be int"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        ({"lr": "1e-3"}, "lr must be float"),
        ({"lr": None}, "lr must be float"),
        ({"batch_size": True}, "batch_size must be int"),
        ({"drop_last": 1}, "drop_last must be bool"),
        ({"max_steps": float("inf")}, "max_steps must be a whole number"),
        ({"max_seconds": 0}, "max_seconds must be above 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1"),
        ({"lr": float("nan")}, "lr must be above 0"),
    ],
)
def test_settings_of_the_wrong_type_or_size_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FitConfig(**settings)


def test_settings_from_numpy_can_be_written_as_json():
    config = FitConfig(epochs=np.int64(3), lr=np.float32(0.5), batch_size=8.0)
    assert [type(v) for v in (config.epochs, config.lr, config.batch_size)] == [int, float, int]
    assert "max_seconds" not in config.identity()
    assert {"mixup", "cutmix", "mixup_prob", "steps_per_epoch", "ema_decay"} <= config.identity().keys()


def test_an_epoch_that_a_run_left_behind_in_its_data_does_not_make_it_another_run(tmp_path):
    class Told(list):
        def set_epoch(self, number):
            self.stage = number

    class Holder:
        def __init__(self, data):
            self.source = data

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return self.source[index]

        def set_epoch(self, number):
            self.stage = number

    data, config, count = Holder(Told(points())), FitConfig(epochs=2, batch_size=16, **QUIET), iter(range(100))
    fit(network(), data, config=config, output_dir=tmp_path, should_stop=lambda: next(count) >= 8)
    assert data.stage == data.source.stage == 1
    assert fit(network(), data, config=config, output_dir=tmp_path).stopped == "finished"


def test_data_without_attributes_can_be_continued(tmp_path):
    def endless():
        while True:
            yield from points()

    for name, data in (("range", range(64)), ("generator", endless())):
        config = FitConfig(max_steps=6, batch_size=8, **QUIET)
        loss_fn = (lambda model, batch: model(torch.ones(len(batch), 6)).sum()) if name == "range" else None
        result = fit(network(), data, loss_fn=loss_fn, config=config, output_dir=tmp_path / name)
        assert result.stopped == "finished"
