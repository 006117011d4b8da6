"""Making label trees: grouped by a language model with a critic that repairs its answers, or offline by likeness of names or embeddings.

Nothing here is needed at run time. The critic is that of arXiv 2409.12518, section III-A: invented items are struck out, forgotten ones are
asked for again with the groups so far, until none is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmkit.errors import InputError
from mmkit.pointcloud.slam.tree import SemanticTree

Proposer = Callable[[list[str], list[str] | None], Mapping[str, Sequence[str]]]
"""Groups items: (items, groups so far or `None`) -> {group: items in it}. New groups are welcome. A language model in JSON mode fits."""


def build_tree(
    labels: Sequence[str], propose: Proposer, *, max_rounds: int = 10, top: int = 4, ids: Sequence[int] | None = None
) -> SemanticTree:  # fmt: skip
    """A tree from the leaves up: items are grouped, groups become the items of the next level, until at most `top` are left.

    Args:
        labels: names of the classes, each different.
        propose: the grouping; see `Proposer`.
        max_rounds: questions a level; what is still missing then is put beside the names it is most like.
        top: number of groups at which to stop.
        ids: of the classes in label pictures.

    Raises:
        InputError: names that come twice, or a proposer that answers with something else than groups, or that does not group.

    Example:
        >>> from mmkit.pointcloud.slam import build_tree
        >>> def propose(items, groups):
        ...     return {"seats": [i for i in items if i in ("chair", "sofa")], "room": ["wall", "a dragon"]}
        >>> tree = build_tree(["chair", "sofa", "wall"], propose)
        >>> tree.node_names(0), tree.paths.tolist()
        (['seats', 'seats', 'room'], [[0, 0], [0, 1], [1, 0]])
    """
    items = [str(x) for x in labels]
    if len(set(items)) != len(items) or not items:
        raise InputError("Labels must be different names, at least one.")
    levels: list[dict[str, list[str]]] = []
    while len(items) > top or not levels:
        groups = _criticised(items, propose, max_rounds)
        if len(groups) >= len(items) > top:
            raise InputError(f"The proposer made {len(groups)} groups of {len(items)} items; a level must have fewer.")
        levels.append(groups)
        items = list(groups)
    return _assembled([str(x) for x in labels], levels, ids)


def _criticised(items: list[str], propose: Proposer, max_rounds: int) -> dict[str, list[str]]:
    """Groups that hold every item once."""
    groups: dict[str, list[str]] = {}
    missing = list(items)
    for turn in range(max_rounds):
        answer = propose(list(missing), list(groups) if turn else None)
        if not isinstance(answer, Mapping):
            raise InputError(f"The proposer must return {{group: [items]}}; it returned {type(answer).__name__}.")
        open_ = set(missing)
        for group, members in answer.items():
            for item in [members] if isinstance(members, str) else list(members):
                if item in open_:  # neither invented nor grouped already
                    open_.discard(item)
                    groups.setdefault(str(group), []).append(item)
        missing = [i for i in missing if i in open_]
        if not missing:
            return groups
    if not groups:
        raise InputError(f"The proposer grouped none of the items in {max_rounds} rounds.")
    vectors = {name: name_vector(name) for name in items}
    for item in missing:
        likeness = {g: max(float(vectors[item] @ vectors[m]) for m in members) for g, members in groups.items()}
        groups[max(likeness, key=lambda g: likeness[g])].append(item)
    return groups


def _assembled(labels: list[str], levels: list[dict[str, list[str]]], ids: Sequence[int] | None) -> SemanticTree:
    """The tree of groupings, given from the leaves up."""
    parents = [{item: group for group, members in level.items() for item in members} for level in levels]
    chains = []
    for label in labels:
        chain = [label]
        for parent in parents:
            chain.append(parent[chain[-1]])
        chains.append(chain[::-1])
    paths, nodes = [], []
    seen: dict[tuple[str, ...], dict[str, int]] = {}
    for chain in chains:
        path = []
        for depth, node in enumerate(chain):
            brothers = seen.setdefault(tuple(chain[:depth]), {})
            path.append(brothers.setdefault(node, len(brothers)))
        paths.append(path)
        nodes.append(chain)
    return SemanticTree(paths, labels, ids, nodes)


def balanced_proposer(size: int = 4) -> Proposer:
    """Groups of `size` neighbours in alphabetical order: a stand-in that needs no model."""
    if size < 2:
        raise InputError(f"A group holds at least 2 items, not {size}.")

    def propose(items: list[str], groups: list[str] | None) -> dict[str, list[str]]:
        ordered = sorted(items)
        parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return {f"{part[0]} to {part[-1]}" if len(part) > 1 else part[0]: part for part in parts}

    return propose


def cluster_tree(
    labels: Sequence[str], embeddings: np.ndarray | None = None, *, levels: int = 3, ids: Sequence[int] | None = None
) -> SemanticTree:  # fmt: skip
    """A tree by agglomerative clustering (mean linkage, cosine distance).

    Args:
        labels: names of the K classes.
        embeddings: (K, E), for example of a text encoder; default: pieces of the names.
        levels: of the tree; each has about the K^(1/levels)-fold number of groups of the one above.
        ids: of the classes in label pictures.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    names = [str(x) for x in labels]
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError("Labels must be different names, at least two.")
    vectors = np.stack([name_vector(n) for n in names]) if embeddings is None else np.asarray(embeddings, np.float64)
    if vectors.ndim != 2 or len(vectors) != len(names) or not np.isfinite(vectors).all():
        raise InputError(f"embeddings must be finite numbers ({len(names)}, E); got shape {vectors.shape}.")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    merges = linkage(vectors, "average")
    chains: list[list[str]] = [[] for _ in names]
    for level in range(1, levels):
        count = max(1, round(len(names) ** (level / levels)))
        cluster = fcluster(merges, count, "maxclust")
        for k, c in enumerate(cluster):
            chains[k].append(f"group {c}")
    grouped: dict[tuple[str, ...], int] = {}
    paths = []
    seen: dict[tuple[str, ...], dict[str, int]] = {}
    for chain in chains:
        path = []
        for depth, node in enumerate(chain):
            brothers = seen.setdefault(tuple(chain[:depth]), {})
            path.append(brothers.setdefault(node, len(brothers)))
        place = grouped.get(tuple(chain), 0)
        grouped[tuple(chain)] = place + 1
        paths.append([*path, place])
    return SemanticTree(paths, names, ids, [[*c, n] for c, n in zip(chains, names, strict=True)])


def name_vector(name: str, size: int = 256) -> np.ndarray:
    """A name as hashed pieces of three letters, of length 1: alike for names that share words or parts of words."""
    out = np.zeros(size)
    text = f"  {name.lower()} "
    for i in range(len(text) - 2):
        digest = hashlib.sha256(text[i : i + 3].encode()).digest()
        out[int.from_bytes(digest[:4], "little") % size] += 1
    return out / max(float(np.linalg.norm(out)), 1e-12)
