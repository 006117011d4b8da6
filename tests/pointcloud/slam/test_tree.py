"""Label trees and what is learned on them: no rendering, so fast."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmkit.errors import InputError
from mmkit.pointcloud.slam import (
    HierarchicalSemanticLoss,
    SemanticHead,
    SemanticTree,
    balanced_proposer,
    build_tree,
    cluster_tree,
)


@pytest.mark.parametrize("levels", [2, 3, 4, 6])
@pytest.mark.parametrize("classes", [2, 9, 40, 600])
def test_every_class_is_encoded_and_decoded_in_random_trees(levels, classes):
    tree = SemanticTree.random(classes, levels, seed=levels * classes)
    leaves = torch.arange(classes)
    code = tree.encode(leaves)
    assert code.shape == (classes, tree.code_dim)
    for part in tree.split(code):
        assert torch.equal(part.sum(-1), torch.ones(classes))
    assert torch.equal(tree.decode(code, "argmax"), leaves)
    assert torch.equal(tree.decode(9 * code, "closest"), leaves)
    assert math.prod(tree.level_sizes) >= classes
    assert tree.code_dim == sum(tree.level_sizes)


@pytest.mark.parametrize(
    ("name", "dim", "classes"), [("replica", 26, 102), ("scannet", 16, 41), ("scannet_large", 74, 549)]
)
def test_sizes_of_the_published_trees(name, dim, classes):
    tree = SemanticTree.shape_like(name)
    assert (tree.code_dim, tree.num_classes) == (dim, classes)
    if name == "replica":
        assert tree.storage() == {
            "tree_bytes": 152,
            "flat_bytes": 456,
            "ratio": pytest.approx(1 / 3, abs=1e-3),
            "semantic_ratio": 26 / 102,
        }


def test_places_that_are_no_class_are_told_or_brought_to_the_closest():
    tree = SemanticTree.from_paths({"wall": (0, 0), "floor": (0, 1), "chair": (1, 0)})
    code = torch.tensor([0.1, 3.0, 1.0, 2.0])  # (1, 1) is nobody's path
    assert int(tree.decode(code, "argmax")) == -1
    assert int(tree.decode(code, "closest")) == 2
    with pytest.raises(InputError, match="4 channels"):
        tree.decode(code[:3])
    with pytest.raises(InputError, match="'closest'"):
        tree.decode(code, "best")


def test_pixel_values_become_classes_by_look_up():
    tree = SemanticTree([[0], [1], [2]], ["a", "b", "c"], ids=[7, 3, 40])
    assert tree.leaf_of(torch.tensor([[3, 7], [40, 0], [-1, 999]])).tolist() == [[1, 0], [2, -1], [-1, -1]]
    assert tree.level_labels(torch.tensor([-1, 2])).tolist() == [[-1], [2]]
    assert tree.encode(torch.tensor([-1])).tolist() == [[0, 0, 0]]
    with pytest.raises(InputError, match="leaf_of"):
        tree.encode(torch.tensor([3]))


def test_a_tree_is_written_and_read_back(tmp_path):
    tree = SemanticTree.from_dict({"3_office_chair": [{"0": "things"}, {"1": "seats"}], "1_wall": [{"1": "room"}]})
    assert tree.names == ["office_chair", "wall"]
    assert tree.paths.tolist() == [[0, 1], [1, 0]]
    tree.to_json(tmp_path / "tree.json")
    assert SemanticTree.from_json(tmp_path / "tree.json") == tree
    assert tree.node_names(0) == ["things", "room"]
    assert tree.groups(1).tolist() == [0, 1]


def test_scannet_tables_are_read(tmp_path):
    head = "\t".join(f"c{i}" for i in range(17)) + "\tl0\tn0\tl1\tn1\n"
    cells = [[str(i), "raw", name, "0", nyu, "0", "0", nyu_name, *["x"] * 9, *tree] for i, name, nyu, nyu_name, tree in (
        (1, "wall", "1", "wall", ["0", "room", "0", "sides"]), (2, "armchair", "5", "chair", ["1", "thing", "0", "seat"]),
        (9, "stool", "5", "chair", ["1", "thing", "0", "seat"]),
    )]  # fmt: skip
    path = tmp_path / "labels.tsv"
    path.write_text(head + "\n".join("\t".join(row) for row in cells))
    tree = SemanticTree.from_scannet_tsv(path)
    assert (tree.ids, tree.names, tree.paths.tolist()) == ([1, 5], ["wall", "chair"], [[0, 0], [1, 0]])
    with pytest.raises(InputError, match="share one of the paths"):
        SemanticTree.from_scannet_tsv(path, large=True)
    path.write_text(head + "1\tx\n")
    with pytest.raises(InputError, match="19 and more"):
        SemanticTree.from_scannet_tsv(path)
    with pytest.raises(InputError, match="not a readable table"):
        SemanticTree.from_scannet_tsv(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "label tree is an object"),
        ({"wall": [{"0": "a"}]}, '"<id>_<name>"'),
        ({"0_wall": [{"x": "a"}]}, "whole numbers"),
        ({"0_wall": []}, "one"),
        ({"0_wall": [{"0": "a"}], "1_floor": [{"0": "a"}]}, "share one of the paths"),
        ({"0_wall": [{"0": "a"}], "0_floor": [{"1": "a"}]}, "share one of the ids"),
    ],
)
def test_damaged_trees_are_refused(content, message, tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        SemanticTree.from_json(tmp_path / "tree.json")
    assert "tree.json" in str(caught.value)


def test_makers_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="hold 4 classes"):
        SemanticTree.balanced([str(i) for i in range(5)], (2, 2))
    with pytest.raises(InputError, match="at least 2"):
        SemanticTree.balanced(["a", "b"], 1)
    with pytest.raises(InputError, match="1 to"):
        SemanticTree([])
    assert SemanticTree.balanced([str(i) for i in range(60)], (4, 4, 2, 2)).level_sizes == (4, 4, 2, 2)


@pytest.fixture
def tree():
    return SemanticTree.random(24, 3, seed=1)


def test_the_loss_of_knowing_nothing(tree):
    code, labels = torch.zeros(50, tree.code_dim), torch.arange(50) % 24
    head = SemanticHead(tree.code_dim, 24)
    torch.nn.init.zeros_(head.bias)
    loss = HierarchicalSemanticLoss(tree)
    early = sum(math.log(n) for n in tree.level_sizes)
    assert float(loss(code, labels, head, 13)) == pytest.approx(early, rel=1e-5)
    assert loss(code, labels, head, 14).item() == pytest.approx(early + 5 * math.log(24), rel=1e-5)


def test_levels_know_no_offset_and_their_gradients_sum_to_nothing(tree):
    g = torch.Generator().manual_seed(0)
    code = torch.randn(40, tree.code_dim, generator=g, requires_grad=True)
    labels = torch.randint(24, (40,), generator=g)
    loss = HierarchicalSemanticLoss(tree)
    value = loss.levels(code, labels)
    (grad,) = torch.autograd.grad(value, code)
    for part in tree.split(grad):
        assert part.sum(-1).abs().max() < 1e-6
    moved = code.detach().clone()
    moved[:, : tree.level_sizes[0]] += 3
    assert float(loss.levels(moved, labels)) == pytest.approx(float(value.detach()), rel=1e-5)


def test_unknown_and_ignored_pixels_are_not_learned(tree):
    g = torch.Generator().manual_seed(0)
    code, head = torch.randn(6, tree.code_dim, generator=g), SemanticHead(tree.code_dim, 24, g)
    labels = torch.tensor([3, -1, 5, 0, -1, 0])
    loss = HierarchicalSemanticLoss(tree, ignore_index=0)
    kept = torch.tensor([0, 2])
    assert torch.allclose(loss(code, labels, head, 20), loss(code[kept], labels[kept], head, 20))
    assert float(loss(code, torch.full((6,), -1), head, 20)) == 0
    with pytest.raises(InputError, match="belong together"):
        loss(code, labels[:5], head)


def test_a_flat_tree_is_plain_cross_entropy(tree):
    g = torch.Generator().manual_seed(0)
    flat = tree.flat()
    code, labels = torch.randn(30, 24, generator=g), torch.randint(24, (30,), generator=g)
    assert flat.code_dim == 24
    assert torch.allclose(HierarchicalSemanticLoss(flat)(code, labels), torch.nn.functional.cross_entropy(code, labels))


NAMES = [f"{kind} {i}" for kind in ("chair", "wall", "lamp", "table") for i in range(6)]


def test_a_critic_repairs_what_a_proposer_invents_repeats_and_forgets():
    asked = []

    def propose(items, groups):
        asked.append((list(items), groups))
        kinds = {i.split()[0] for i in items}
        if any(" " in i for i in items):  # the leaves
            answer = {
                k: [i for i in items if i.startswith(k) and not (groups is None and i.endswith("3"))] for k in kinds
            }
            return {**answer, "dragons": ["a dragon"], "again": items[:1]}
        return {"things": [k for k in items if k != "wall"], "room": ["wall"]}

    tree = build_tree(NAMES, propose, top=2)
    assert [len(items) for items, _ in asked] == [24, 4, 4]
    assert asked[0][1] is None
    assert set(asked[1][1]) == {"chair", "wall", "lamp", "table"}
    assert tree.num_classes == 24
    assert tree.levels == 3
    assert set(tree.node_names(0)) == {"things", "room"}
    assert torch.equal(tree.decode(tree.encode(torch.arange(24)), "argmax"), torch.arange(24))


def test_what_stays_missing_goes_to_its_likes():
    tree = build_tree(
        ["arm chair", "wall", "chair"], lambda items, groups: {"seat": ["chair"], "room": ["wall"]}, max_rounds=3
    )
    assert tree.node_names(0) == ["seat", "room", "seat"]


def test_proposers_that_do_not_group_are_refused():
    with pytest.raises(InputError, match="none of the items"):
        build_tree(NAMES, lambda items, groups: {})
    with pytest.raises(InputError, match="must have fewer"):
        build_tree(NAMES, lambda items, groups: {i: [i] for i in items})
    with pytest.raises(InputError, match="it returned list"):
        build_tree(NAMES, lambda items, groups: items)
    with pytest.raises(InputError, match="different names"):
        build_tree(["a", "a"], balanced_proposer())


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_trees_grow_offline_too(levels):
    tree = cluster_tree(NAMES, levels=levels)
    assert tree.levels == levels
    assert torch.equal(tree.decode(tree.encode(torch.arange(24)), "argmax"), torch.arange(24))
    if levels == 2:  # about five groups: names that share a word are in one
        groups = dict(zip(NAMES, tree.node_names(0), strict=True))
        assert groups["chair 1"] == groups["chair 4"] != groups["lamp 1"]
    eye = cluster_tree(["a", "b", "c", "d"], [[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], levels=2)
    assert eye.node_names(0)[0] == eye.node_names(0)[1] != eye.node_names(0)[2]
    with pytest.raises(InputError, match="embeddings must be"):
        cluster_tree(NAMES, [[1.0]])
    assert build_tree(NAMES, balanced_proposer(4)).num_classes == 24
