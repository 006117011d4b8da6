"""Label trees: every class is a path of small choices, so that a Gaussian stores a few numbers per level instead of one per class."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.storage import read_json, write_json

MAX_LEVELS, MAX_LEAVES = 32, 100_000


class SemanticTree:
    """K classes (leaves) under L levels (the root is not counted).

    `paths[k, l]` is the place of class k's node of level l AMONG ITS SIBLINGS, so the width n_l of a level is its largest fan-out and
    branches share the n_1 + ... + n_L channels of a code (arXiv 2409.12518, section III).

    Args:
        paths: (K, L) whole numbers; shorter paths are padded with 0.
        names: of the K classes.
        ids: of the K classes in label pictures; default 0 to K - 1.
        nodes: names of the nodes on each path, (K, L).

    Raises:
        InputError: two classes with one path, id or name, negative places, no class.

    Example:
        >>> from mmkit.pointcloud.slam import SemanticTree
        >>> tree = SemanticTree.from_paths({"wall": (0, 0), "floor": (0, 1), "chair": (1, 0)})
        >>> tree.level_sizes, tree.code_dim, tree.encode(torch.tensor([2])).tolist()
        ((2, 2), 4, [[0.0, 1.0, 1.0, 0.0]])
    """

    def __init__(
        self, paths: Sequence[Sequence[int]], names: Sequence[str] | None = None, ids: Sequence[int] | None = None,
        nodes: Sequence[Sequence[str]] | None = None,
    ):  # fmt: skip
        if not paths or len(paths) > MAX_LEAVES:
            raise InputError(f"A label tree has 1 to {MAX_LEAVES} classes, not {len(paths)}.")
        depth = max(len(p) for p in paths)
        if not 1 <= depth <= MAX_LEVELS:
            raise InputError(f"A label tree has 1 to {MAX_LEVELS} levels, not {depth}.")
        padded = [[int(x) for x in p] + [0] * (depth - len(p)) for p in paths]
        self.paths = torch.tensor(padded, dtype=torch.int64)
        self.names = [str(n) for n in names] if names is not None else [f"class {k}" for k in range(len(paths))]
        self.ids = [int(i) for i in ids] if ids is not None else list(range(len(paths)))
        filled = nodes if nodes is not None else [[str(x) for x in p] for p in padded]
        self.nodes = [[str(n) for n in row] + [self.names[k]] * (depth - len(row)) for k, row in enumerate(filled)]
        self.validate()
        self.level_sizes: tuple[int, ...] = tuple((self.paths.amax(0) + 1).tolist())
        self._leaves = {tuple(p): k for k, p in enumerate(self.paths.tolist())}
        self._leaf_of_id = {i: k for k, i in enumerate(self.ids)}

    def validate(self) -> None:
        """Raise `InputError` unless every class has a path, a name and an id of its own."""
        for what, values in (("paths", map(tuple, self.paths.tolist())), ("names", self.names), ("ids", self.ids)):
            seen: set[Any] = set()
            listed = list(values)
            if len(listed) != len(self.paths):
                raise InputError(f"The tree has {len(self.paths)} paths but {len(listed)} {what}.")
            for k, value in enumerate(listed):
                if value in seen:
                    raise InputError(
                        f"Two classes of the tree share one of the {what}: {value!r} ({self.names[k]!r} and before it)."
                    )
                seen.add(value)
        if (self.paths < 0).any():
            raise InputError("Places among siblings are counted from 0; a path of the tree holds a negative one.")
        if min(self.ids) < 0:
            raise InputError("Ids of classes are pixel values, from 0 on; the tree holds a negative one.")

    # ---------------------------------------------------------------------------------------------------------- sizes

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.names)

    @property
    def levels(self) -> int:
        """L."""
        return self.paths.shape[1]

    @property
    def code_dim(self) -> int:
        """D, the numbers a Gaussian carries."""
        return sum(self.level_sizes)

    def storage(self) -> dict[str, float]:
        """Bytes per Gaussian in float32, with a code of this tree and with one number per class, and their ratio."""
        tree, flat = 48 + 4 * self.code_dim, 48 + 4 * self.num_classes
        semantic = self.code_dim / self.num_classes
        return {"tree_bytes": tree, "flat_bytes": flat, "ratio": tree / flat, "semantic_ratio": semantic}

    def __len__(self) -> int:
        return self.num_classes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SemanticTree) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SemanticTree({self.num_classes} classes, level_sizes={self.level_sizes}, code_dim={self.code_dim})"

    def flat(self) -> SemanticTree:
        """The same classes in one level: a code with one number per class."""
        return SemanticTree([[k] for k in range(self.num_classes)], self.names, self.ids)

    # ---------------------------------------------------------------------------------------------- labels and codes

    def leaf_of(self, labels: Tensor) -> Tensor:
        """Class numbers 0 to K - 1 of pixel values (ids), -1 where the tree has no such id."""
        top = max(self.ids)
        table = torch.full((top + 2,), -1, dtype=torch.int64)
        table[torch.tensor(self.ids)] = torch.arange(self.num_classes)
        values = labels.long()
        return table.to(values.device)[torch.where((values < 0) | (values > top), top + 1, values)]

    def level_labels(self, leaves: Tensor) -> Tensor:
        """Places (..., L) on the paths of class numbers (...), -1 where the class is -1. A look-up: nothing is kept."""
        checked = self._checked(leaves)
        found = self.paths.to(leaves.device)[checked.clamp_min(0)]
        return torch.where((checked < 0).unsqueeze(-1), -1, found)

    def encode(self, leaves: Tensor) -> Tensor:
        """Codes (..., D) of class numbers (...): one 1 per level; zeros where the class is -1."""
        places = self.level_labels(leaves)
        slices = [
            torch.nn.functional.one_hot(places[..., l].clamp_min(0), n) * (places[..., l : l + 1] >= 0)
            for l, n in enumerate(self.level_sizes)
        ]
        return torch.cat(slices, -1).float()

    def split(self, code: Tensor) -> tuple[Tensor, ...]:
        """The slices (..., n_l) of codes (..., D), level by level."""
        if code.shape[-1] != self.code_dim:
            raise InputError(f"A code of this tree has {self.code_dim} channels; got {code.shape[-1]}.")
        return code.split(self.level_sizes, -1)

    def level_argmax(self, code: Tensor) -> Tensor:
        """The strongest place of each level, (..., L)."""
        return torch.stack([part.argmax(-1) for part in self.split(code)], -1)

    def leaf_of_levels(self, places: Tensor) -> Tensor:
        """Class numbers of places (..., L); -1 where they are no class's path."""
        strides = torch.ones(self.levels, dtype=torch.float64)
        for l in range(self.levels - 2, -1, -1):
            strides[l] = strides[l + 1] * self.level_sizes[l + 1]
        if float(strides[0]) * self.level_sizes[0] > 2**53:  # too many combinations for one number: compare paths
            equal = (places.unsqueeze(-2) == self.paths.to(places.device)).all(-1)
            return torch.where(equal.any(-1), equal.int().argmax(-1), -1)
        steps = strides.long().to(places.device)
        keys = (self.paths.to(places.device) * steps).sum(-1)
        order = keys.argsort()
        wanted = (places * steps).sum(-1)
        at = torch.searchsorted(keys[order], wanted).clamp_max(self.num_classes - 1)
        found = order[at]
        return torch.where((keys[found] == wanted) & (places >= 0).all(-1), found, -1)

    def decode(self, code: Tensor, decode: str = "closest") -> Tensor:
        """Class numbers (...) of codes (..., D) without a head.

        Args:
            decode: "argmax" looks up each level's strongest place, -1 where that is no class (the official way); "closest" takes the
                class with the largest sum of log-probabilities along its path.
        """
        if decode == "argmax":
            return self.leaf_of_levels(self.level_argmax(code))
        if decode != "closest":
            raise InputError(f"decode must be 'argmax' or 'closest', not {decode!r}.")
        return self.leaf_scores(code).argmax(-1)

    def leaf_scores(self, code: Tensor) -> Tensor:
        """Sums of log-probabilities (..., K) along the classes' paths."""
        parts = [part.log_softmax(-1) for part in self.split(code)]
        paths = self.paths.to(code.device)
        return sum((part[..., paths[:, l]] for l, part in enumerate(parts)), torch.zeros((), device=code.device))

    def _checked(self, leaves: Tensor) -> Tensor:
        if leaves.numel() and (int(leaves.max()) >= self.num_classes or int(leaves.min()) < -1):
            raise InputError(
                f"Class numbers run from 0 to {self.num_classes - 1} (-1: unknown); found {int(leaves.min())} to "
                f"{int(leaves.max())}. Pixel values become class numbers with `leaf_of`."
            )
        return leaves.long()

    def node_names(self, level: int) -> list[str]:
        """The group of every class at a level (0: coarsest), as a text that differs between groups."""
        if not 0 <= level < self.levels:
            raise InputError(f"The tree has levels 0 to {self.levels - 1}, not {level}.")
        return ["/".join(row[: level + 1]) for row in self.nodes]

    def groups(self, level: int) -> Tensor:
        """Numbers (K,) of the groups that the classes belong to at a level."""
        if not 0 <= level < self.levels:
            raise InputError(f"The tree has levels 0 to {self.levels - 1}, not {level}.")
        return torch.unique(self.paths[:, : level + 1], dim=0, return_inverse=True)[1]

    # ---------------------------------------------------------------------------------------------------------- files

    def to_dict(self) -> dict[str, list[dict[str, str]]]:
        """The authors' layout: {"<id>_<name>": [{"<place>": "<node>"}, ...]}."""
        return {
            f"{self.ids[k]}_{self.names[k]}": [
                {str(int(x)): self.nodes[k][l]} for l, x in enumerate(self.paths[k].tolist())
            ]
            for k in range(self.num_classes)
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the authors' layout."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> SemanticTree:
        """Read the authors' layout. A name may hold "_": only the first one parts it from the id."""
        if not isinstance(tree, Mapping) or not tree:
            raise InputError('A label tree is an object {"<id>_<name>": [{"<place>": "<node>"}, ...], ...}.')
        ids, names, paths, nodes = [], [], [], []
        for key, levels in tree.items():
            number, parted, name = str(key).partition("_")
            good = isinstance(levels, list) and all(isinstance(x, dict) and len(x) == 1 for x in levels) and levels
            if not (number.isdecimal() and parted and name and good):
                raise InputError(
                    f'{key!r} of the label tree is not "<id>_<name>" with a list of one {{"<place>": "<node>"}} a level.'
                )
            places = [str(next(iter(x))) for x in levels]
            if not all(p.isdecimal() and len(p) < 7 for p in places):
                raise InputError(f"{key!r} of the label tree has places {places}; whole numbers from 0 are expected.")
            ids.append(int(number))
            names.append(name)
            paths.append([int(p) for p in places])
            nodes.append([str(next(iter(x.values()))) for x in levels])
        return cls(paths, names, ids, nodes)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SemanticTree:
        """Read `info_semantic_tree.json`, or what `to_json` wrote."""
        try:
            return cls.from_dict(read_json(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_paths(cls, paths: Mapping[str, Sequence[int]], ids: Sequence[int] | None = None) -> SemanticTree:
        """A tree of name -> path."""
        return cls(list(paths.values()), list(paths), ids)

    @classmethod
    def from_scannet_tsv(cls, path: str | os.PathLike[str], *, large: bool = False) -> SemanticTree:
        """Read ScanNet's label table with the tree's columns behind it, pairs of (place, node) from the 18th column on.

        Args:
            large: classes are the raw categories (ids of the first column); else NYU40's (columns 5 and 8).

        Raises:
            InputError: no such table, or no such columns.
        """
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable table: {error}.") from error
        number, name = (0, 2) if large else (4, 7)
        found: dict[int, tuple[str, list[str]]] = {}
        for row in rows:
            if len(row) < 19:
                raise InputError(
                    f"{path} has a line of {len(row)} columns; the table with a tree has 19 and more (levels from the 18th on)."
                )
            if row[number].strip().isdecimal():
                found.setdefault(int(row[number]), (row[name], row[17:]))
        if not found:
            raise InputError(f"{path} holds no class.")
        ids = sorted(found)
        pairs = [found[i][1] for i in ids]
        for i, row in zip(ids, pairs, strict=True):
            if not all(x.strip().isdecimal() for x in row[: 2 * (len(row) // 2) : 2] if x.strip()):
                raise InputError(f"{path}: the levels of class {i} are not numbers.")
        paths = [[int(x) for x in row[: 2 * (len(row) // 2) : 2] if x.strip()] for row in pairs]
        nodes = [[y for x, y in zip(row[::2], row[1::2], strict=False) if x.strip()] for row in pairs]
        return cls(paths, _distinct([found[i][0] for i in ids]), ids, nodes)

    # ---------------------------------------------------------------------------------------------------------- makers

    @classmethod
    def balanced(
        cls, names: Sequence[str], fan_out: int | Sequence[int] = 4, ids: Sequence[int] | None = None
    ) -> SemanticTree:
        """The classes in order, spread evenly over levels of the given fan-outs (a number: as many levels as it takes)."""
        sizes = [fan_out] if isinstance(fan_out, int) else list(fan_out)
        if min(sizes) < 2:
            raise InputError(f"A fan-out is at least 2, not {min(sizes)}.")
        room = _product(sizes)
        while isinstance(fan_out, int) and room < len(names):
            sizes.append(fan_out)
            room *= fan_out
        if room < len(names):
            raise InputError(f"Levels of {sizes} hold {room} classes, not {len(names)}.")
        paths = []
        for k in range(len(names)):
            rest, path = k * room // len(names), []
            for n in reversed(sizes):
                rest, place = divmod(rest, n)
                path.append(place)
            paths.append(path[::-1])
        return cls(paths, names, ids)

    @classmethod
    def random(cls, num_classes: int, levels: int = 3, *, seed: int = 0) -> SemanticTree:
        """Classes with different random paths, in levels of about equal fan-out: a control, and for tests."""
        fan_out = max(2, round(num_classes ** (1 / levels) + 0.5))
        while fan_out**levels < num_classes:
            fan_out += 1
        g = torch.Generator().manual_seed(seed)
        chosen: set[tuple[int, ...]] = set()
        while len(chosen) < num_classes:
            chosen.add(tuple(torch.randint(fan_out, (levels,), generator=g).tolist()))
        rows = sorted(chosen)
        return cls([rows[i] for i in torch.randperm(num_classes, generator=g).tolist()])

    @classmethod
    def shape_like(cls, name: str) -> SemanticTree:
        """Random paths with as many classes, levels and channels as a published tree, whose own file is not distributed: "replica",
        "scannet", "scannet_large". How its channels are spread over the levels is a guess."""
        published = {
            "replica": (102, (4, 5, 6, 5, 6)), "scannet": (41, (4, 4, 4, 4)), "scannet_large": (549, (10, 14, 16, 16, 18)),
        }  # fmt: skip
        if name not in published:
            raise InputError(f"Unknown tree {name!r}; there are {', '.join(published)}.")
        count, sizes = published[name]
        paths = [[0] * len(sizes)] + [[k % n for n in sizes] for k in range(1, max(sizes))]
        taken = set(map(tuple, paths))
        g = torch.Generator().manual_seed(0)
        while len(paths) < count:
            path = [int(torch.randint(n, (), generator=g)) for n in sizes]
            if tuple(path) not in taken:
                taken.add(tuple(path))
                paths.append(path)
        return cls(paths)


def _product(sizes: Sequence[int]) -> int:
    out = 1
    for n in sizes:
        out *= n
    return out


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that come again."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return out
