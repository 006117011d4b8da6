"""The order of examples: a permutation each epoch, the same however it is split."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mmkit.training.loading import SeededExamples, StepSampler, isolated_rng, mix_seed


@pytest.mark.parametrize("length", [1, 7, 16, 33])
@pytest.mark.parametrize("world,accum", [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_every_example_once_per_epoch_and_weights_sum_to_one(length, world, accum):
    samplers = [StepSampler(length, 2, grad_accum=accum, world=world, rank=r, seed=5) for r in range(world)]
    whole = StepSampler(length, 2 * accum * world, seed=5)
    assert whole.steps_per_epoch == samplers[0].steps_per_epoch
    for epoch in range(2):
        seen = []
        for step in range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch):
            parts = [s.micro_batches(step) for s in samplers]
            assert len({len(p) for p in parts}) == 1  # all processes make the same number of passes
            assert all(indices for p in parts for indices, _ in p)
            counted = [i for p in parts for indices, weight in p if weight for i in indices]
            assert sorted(counted) == sorted(whole.examples(step))
            assert sum(weight for p in parts for _, weight in p) / world == pytest.approx(1)
            for p in parts:
                for indices, weight in p:
                    assert weight in (0, pytest.approx(len(indices) * world / len(counted)))
            seen += counted
        assert sorted(seen) == list(range(length))


def test_epochs_and_seeds_differ():
    sampler = StepSampler(50, 50)
    orders = {tuple(sampler.order(e)) for e in range(4)} | {tuple(StepSampler(50, 50, seed=1).order(0))}
    assert len(orders) == 5


def test_drop_last():
    sampler = StepSampler(10, 4, drop_last=True)
    assert sampler.steps_per_epoch == 2
    assert len(set(sampler.examples(0) + sampler.examples(1))) == 8
    assert sampler.examples(2) == sampler.order(1)[:4]


def test_each_example_has_its_own_randomness():
    class Noise:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    data = SeededExamples(Noise(), seed=1)
    before = random.getstate(), torch.get_rng_state()
    first = [data[0, i] for i in range(4)]
    assert first == [data[0, i] for i in range(4)]
    assert first != [data[1, i] for i in range(4)]
    assert len(set(first)) == 4
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_isolated_rng_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated_rng(3):
        torch.rand(5).view(1 // 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({mix_seed(0, e, i) for e in range(50) for i in range(50)}) == 2500
