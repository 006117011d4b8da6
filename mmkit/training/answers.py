"""What a classifier gets right and wrong, class by class: the numbers that every task's report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import InputError

MOST_CLASSES = 100
"""With more classes the confusion matrix is left out of reports; the most frequent confusions stay."""


@dataclass
class Answers:
    """Probabilities beside the truth.

    Attributes:
        probabilities: (N, K), rows sum to 1. labels: (N,) int. class_names: K names. names: N names of the examples.
    """

    probabilities: Tensor
    labels: Tensor
    class_names: Sequence[str]
    names: Sequence[str]

    def __post_init__(self) -> None:
        count, classes = self.probabilities.shape
        if not len(self.labels) == len(self.names) == count or len(self.class_names) != classes:
            raise InputError(
                f"{count} answers, {len(self.labels)} labels and {len(self.names)} names, or {classes} probabilities and "
                f"{len(self.class_names)} classes, do not fit together."
            )

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each example, (N,)."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return float((self.predicted == self.labels).double().mean())

    def confusion(self) -> Tensor:
        """(K, K) counts: row is the truth, column the answer."""
        k = len(self.class_names)
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).reshape(k, k)

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: name, n, precision, recall and f1 in 0..1; `None` where there is nothing to divide by."""
        table = self.confusion().double()
        right, truth, told = table.diag(), table.sum(1), table.sum(0)
        rows = []
        for i, name in enumerate(self.class_names):
            precision = float(right[i] / told[i]) if told[i] else None
            recall = float(right[i] / truth[i]) if truth[i] else None
            f1 = float(2 * right[i] / (told[i] + truth[i])) if told[i] + truth[i] else None
            rows.append({"class": str(name), "n": int(truth[i]), "precision": precision, "recall": recall, "f1": f1})
        return rows

    def most_wrong(self, count: int = 24) -> list[int]:
        """Indices of wrong answers, the surest first."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        return wrong[self.probabilities[wrong].amax(1).argsort(descending=True, stable=True)][:count].tolist()

    def report(self) -> dict[str, Any]:
        """All of it as JSON takes it: n, accuracy, macro_f1, per_class, confusion, confused and most_wrong."""
        table, rows = self.confusion(), self.per_class()
        off = table - torch.diag(table.diag())
        pairs = off.flatten().argsort(descending=True, stable=True)[:10].tolist()
        k = len(self.class_names)
        known = [r["f1"] for r in rows if r["n"] and r["f1"] is not None]
        return {
            "n": len(self.labels),
            "accuracy": self.accuracy,
            "macro_f1": sum(known) / len(known) if known else None,
            "per_class": rows,
            "confusion": table.tolist() if k <= MOST_CLASSES else None,
            "confused": [
                {
                    "truth": str(self.class_names[p // k]),
                    "answer": str(self.class_names[p % k]),
                    "n": int(off.flatten()[p]),
                }
                for p in pairs
                if off.flatten()[p]
            ],
            "most_wrong": [self._wrong(i) for i in self.most_wrong()],
        }

    def _wrong(self, index: int) -> dict[str, Any]:
        truth, answer = int(self.labels[index]), int(self.predicted[index])
        return {
            "file": str(self.names[index]),
            "truth": str(self.class_names[truth]),
            "answer": str(self.class_names[answer]),
            "score": round(float(self.probabilities[index, answer]), 4),
            "score_of_truth": round(float(self.probabilities[index, truth]), 4),
        }


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of several folds as one."""
    return Answers(
        torch.cat([p.probabilities for p in parts]),
        torch.cat([p.labels for p in parts]),
        parts[0].class_names,
        [n for p in parts for n in p.names],
    )
