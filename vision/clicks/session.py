"""The history of a session: what was asked so far, what came out, and the way back and forth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from mmkit.vision.clicks.predictor import Offer
from mmkit.vision.clicks.prompts import Prompt
from mmkit.vision.clicks.result import Mask


@dataclass(frozen=True)
class Step:
    """One state of a session: everything asked, the mask that came out, and the masks it was chosen from."""

    prompt: Prompt = field(default_factory=Prompt)
    mask: Mask | None = None
    offer: Offer | None = None

    @property
    def low(self) -> Tensor | None:
        """Low-resolution logits `(1, h, w)` of the mask."""
        return None if self.offer is None else self.offer.previous()

    def with_click(self, click: Prompt) -> Prompt:
        """This step's prompt and another click."""
        before = self.prompt
        return replace(before, points=(*before.points, *click.points), labels=(*before.labels, *click.labels))


class History:
    """Steps with a place among them: `push` replaces what was undone."""

    def __init__(self) -> None:
        self.steps = [Step()]
        self.place = 0

    @property
    def now(self) -> Step:
        """The present step."""
        return self.steps[self.place]

    def push(self, step: Step) -> None:
        """Append a step in place of all that were undone."""
        self.steps = [*self.steps[: self.place + 1], step]
        self.place += 1

    def undo(self) -> Step:
        """Go back one step, at most to the empty first one."""
        self.place = max(0, self.place - 1)
        return self.now

    def redo(self) -> Step:
        """Go forward again, at most to the last step."""
        self.place = min(len(self.steps) - 1, self.place + 1)
        return self.now
