"""What goes wrong in the middle of a run is said in words that help."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from mmkit.errors import InputError, TrainingError
from mmkit.training import FitConfig, fit
from mmkit.training.metrics import CrossEntropyLoss

QUIET = {"progress": False, "device": "cpu"}
X = torch.randn(33, 10, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Named(list):
    """A list of examples with file names."""

    def describe(self, index):
        return f"photos/{index:03d}.png"


def labelled(wrong: int = -1, label=7, n: int = 32) -> Named:
    return Named((x, label if i == wrong else i % 3) for i, x in enumerate(X[:n]))


@pytest.mark.parametrize("label", [7, -1, -100])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_label_outside_the_classes_is_named_with_its_file(label, epoch):
    class Late(Named):
        def set_epoch(self, number):
            self.number = number

        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, (label if index == 21 and self.number == epoch else y)

    with pytest.raises(InputError, match=rf"Label {label} is outside 0..2, .*photos/021.png"):
        fit(network(), Late(labelled()), config=FitConfig(batch_size=8, **QUIET))


def test_a_wrong_label_of_the_validation_data_is_named_as_well():
    with pytest.raises(InputError, match=r"Label 7 .*photos/021.png"):
        fit(network(), labelled(), labelled(21), config=FitConfig(epochs=1, batch_size=8, **QUIET))
    part = Subset(labelled(21), [5, 21])
    with pytest.raises(InputError, match=r"photos/021.png"):
        fit(network(), part, config=FitConfig(epochs=1, batch_size=2, **QUIET))


@pytest.mark.parametrize("label", [1.0, torch.tensor([1]), torch.tensor(0.5)])
def test_labels_of_another_type_are_refused(label):
    with pytest.raises(InputError, match="expected integers"):
        fit(network(), [(x, label) for x in X[:8]], config=FitConfig(**QUIET))


def test_a_batch_of_one_with_batch_norm_names_the_remedy():
    with pytest.raises(InputError, match=r"micro-batch of one example \(step 3\).*drop_last=True"):
        fit(network(), labelled(n=33), config=FitConfig(epochs=1, batch_size=16, **QUIET))
    assert fit(network(), labelled(n=33), config=FitConfig(epochs=1, batch_size=16, drop_last=True, **QUIET)).steps == 2


@pytest.mark.parametrize("image", [X[0].double(), X[0].byte(), X[0, :4], torch.randn(3, 10, 10)])
def test_images_the_model_cannot_take_are_shown(image):
    with pytest.raises(InputError, match=r"cannot be trained on a batch of \[\(4, .*\(4,\) int64\] \(step 1\)"):
        fit(network(), [(image, 0)] * 4, config=FitConfig(**QUIET))
    with pytest.raises(InputError, match=r"cannot be .* a batch of \[\(4, .*\(4,\) int64\]"):
        fit(network(), labelled(), [(image, 0)] * 4, config=FitConfig(epochs=1, **QUIET))


def test_errors_of_the_callers_own_loss_stay_the_callers():
    def broken(model, batch):
        raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        fit(network(), labelled(), loss_fn=broken, config=FitConfig(**QUIET))


class Broken(Named):
    def __getitem__(self, index):
        if index == 17:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_data_set_is_named_with_the_example(workers):
    with pytest.raises(InputError, match=r"failed at photos/017.png: OSError: the disk is gone"):
        fit(network(), Broken(labelled()), config=FitConfig(batch_size=8, num_workers=workers, **QUIET))
    with pytest.raises(InputError, match=r"failed at photos/017.png"):
        fit(network(), labelled(), Broken(labelled()), config=FitConfig(epochs=1, num_workers=workers, **QUIET))


class Deadly(Named):
    def __getitem__(self, index):
        if index == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_names_the_remedy():
    with pytest.raises(TrainingError, match=r"process that reads data died.*lower num_workers"):
        fit(network(), Deadly(labelled()), config=FitConfig(batch_size=8, num_workers=1, **QUIET))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_remedy_in_training_and_evaluation(error):
    calls = iter(range(100))

    def loss_fn(model, batch):
        if next(calls) == 2:
            raise error
        return CrossEntropyLoss()(model, batch)

    with pytest.raises(TrainingError, match=r"Out of memory at step 3.*Lower batch_size and raise grad_accum") as info:
        fit(network(), labelled(), loss_fn=loss_fn, config=FitConfig(batch_size=8, **QUIET))
    assert info.value.step == 3
    assert info.value.__cause__ is error

    def metrics_fn(model, loader):
        raise error

    with pytest.raises(TrainingError, match="Out of memory at step 1"):
        fit(network(), labelled(), labelled(), metrics_fn=metrics_fn, config=FitConfig(**QUIET))
