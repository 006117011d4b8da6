"""Reading: each epoch a permutation, the same examples and random numbers however the work is split."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from mmkit.errors import InputError
from mmkit.training.loading import Batches, Stream, train_batches
from mmkit.training.randomness import kept_rng, mix_seed, seed_everything
from mmkit.training.sampling import StepKeys, StepSampler


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


class Noise:
    """Examples that draw from all three global generators, and say in which epoch they were read."""

    def __init__(self, length: int = 12, every: int = 1) -> None:
        self.length, self.every, self.epoch, self.reads = length, every, -1, 0

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.reads += 1
        if index % self.every:
            return index, self.epoch
        return random.random(), float(np.random.rand()), float(torch.rand(())), self.epoch


def test_each_example_has_its_own_randomness_however_it_is_batched():
    one_by_one = Batches(Noise(), 1, list)
    first = [one_by_one[0, [i]][0] for i in range(12)]
    assert len(set(first)) == 12
    assert Batches(Noise(), 1, list)[0, range(12)] == first
    assert [e for part in (range(5), range(5, 12)) for e in one_by_one[0, part]] == first
    assert not {e[:3] for e in one_by_one[1, range(12)]} & {e[:3] for e in first}
    assert Batches(Noise(), 2, list)[0, range(12)] != first


def test_examples_that_draw_seldom_are_the_same_in_any_company():
    late = Batches(Noise(every=10), 1, list)
    assert late[0, [1, 2]] == [(1, 0), (2, 0)]
    assert not late.drawn
    tenth = late[0, [3, 10, 11]][1]
    assert late.drawn == {"python", "numpy", "torch"}
    assert Batches(Noise(every=10), 1, list)[0, [10]] == [tenth]


def test_a_data_set_that_draws_nothing_is_read_once_and_nothing_is_seeded_for_its_examples(monkeypatch):
    data = Noise(every=100)
    batches = Batches(data, 1, list)
    assert batches[0, range(1, 12)] == [(i, 0) for i in range(1, 12)]
    assert data.reads == 11
    assert batches.drawn == set()


def test_the_epoch_reaches_data_sets_inside_others_and_in_workers():
    class Wrapped:
        def __init__(self, data):
            self.parts = [data]

        def __len__(self):
            return len(self.parts[0])

        def __getitem__(self, index):
            return self.parts[0][index]

    for data in (
        Subset(ConcatDataset([Noise(4), Noise(4)]), range(8)),
        Wrapped(Wrapped(Noise(8))),
    ):
        for workers in (0, 2):
            keys = [(epoch, [1, 6]) for epoch in range(3)]
            found = [[e[-1] for e in batch] for batch in train_batches(Batches(data, 0, list), keys, workers)]
            assert found == [[0, 0], [1, 1], [2, 2]]


class Sometimes(Noise):
    def __getitem__(self, index):
        if index == 7:
            raise KeyError("lost")
        return index

    def describe(self, index):
        return f"clips/{index}.mp4"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_fails_is_told_by_the_name_of_the_example(workers):
    stream = train_batches(Batches(Sometimes(), 0, None), [(0, [1, 2]), (0, [6, 7]), (0, [3])], workers)
    assert next(stream).tolist() == [1, 2]
    with pytest.raises(InputError, match=r"^The data set failed at clips/7.mp4: KeyError: 'lost'"):
        next(stream)
    with pytest.raises(InputError, match=r"clips/7.mp4"):
        Batches(Subset(Sometimes(), [0, 7]), 0, None).examples(0, [1])


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_is_the_same_however_it_is_split_and_wherever_it_is_begun(workers):
    class Endless:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            for i in range(7):
                yield self.epoch, i, float(np.random.rand())

    def read(first, last, **split):
        keys = StepKeys(StepSampler(8, 4, stream=True, **split), first, last)
        return [
            tuple(e) for batch in train_batches(Batches(Stream(Endless(), 5), 5, list), keys, workers) for e in batch
        ]

    whole = read(0, 6)
    assert [e[:2] for e in whole] == [divmod(i, 7) for i in range(24)]
    assert len({e[2] for e in whole}) == 24
    assert read(3, 6) == whole[12:]
    parts = [StepSampler(8, 2, stream=True, world=2, rank=rank) for rank in range(2)]
    both = [
        [e for b in train_batches(Batches(Stream(Endless(), 5), 5, list), StepKeys(p, 0, 6), workers) for e in b]
        for p in parts
    ]
    assert sorted(both[0] + both[1]) == sorted(whole)


def test_a_generator_that_is_used_up_is_explained():
    batches = Batches(Stream(iter([1, 2, 3]), 0), 0, None)
    assert batches[0, range(2)].tolist() == [1, 2]
    assert "gave 3 examples and none when it was started again" in str(batches[0, range(2, 4)])


def test_tensors_are_indexed_by_the_batch():
    x, y = torch.randn(9, 2), torch.arange(9)
    found = Batches(TensorDataset(x, y), 0, None)[0, [4, 2]]
    assert torch.equal(found[0], x[[4, 2]])
    assert found[1].tolist() == [4, 2]


def test_lists_in_memory_are_stacked_once_and_batched_as_ever():
    examples = [(torch.randn(3), torch.arange(2), i, i / 2) for i in range(9)]
    batches = Batches(examples, 0, None)
    assert batches.columns is not None
    expected = default_collate([examples[4], examples[2]])
    found = batches[0, array("q", [4, 2])]
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for other in (
        [(torch.randn(3), 0), (torch.randn(3), 1.0)],
        [(torch.randn(3), 0), (torch.randn(3).double(), 1)],
        [(torch.randn(3), "cat")] * 2,
        [{"x": torch.randn(3)}] * 2,
        [(torch.randn(3), 0), (torch.randn(3),)],
        [(torch.zeros(1).expand(2**20), 0)] * 20,
    ):
        assert Batches(other, 0, None).columns is None
    assert Batches(examples, 0, list).columns is None


def test_what_a_collate_function_draws_depends_on_the_batch_alone():
    batches = Batches(list(range(8)), 0, lambda examples: float(torch.rand(())))
    first = batches[0, [1, 2]]
    torch.rand(5)
    assert batches[0, [1, 2]] == first
    assert len({first, batches[0, [3, 4]], batches[1, [1, 2]]}) == 3


def test_mixed_seeds_do_not_collide():
    assert len({mix_seed(0, e, i) for e in range(50) for i in range(50)}) == 2500


def test_the_callers_random_states_come_back_even_after_an_error():
    random.gauss(0, 1)
    np.random.standard_normal()
    states = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), kept_rng():
        seed_everything(1) or 1 / 0
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][0])
    assert np.random.get_state()[2:] == states[1][1:]
    assert torch.equal(torch.get_rng_state(), states[2])
