"""The folder of a run: what is saved there, and when it may be continued."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import CheckpointError, MMKitError, RunDiffersError
from mmkit.storage import runs as ckpt
from mmkit.storage.files import absolute
from mmkit.training.config import FitConfig
from mmkit.training.digest import FileDigests
from mmkit.training.ema import MovingAverage
from mmkit.training.identity import differences, read_details, run_identity, write_details
from mmkit.training.loading import epoch_listeners
from mmkit.training.progress import Progress


class Identity:
    """Everything that decides the result of a run, to be compared with the one that `folder` holds.

    Args:
        train, val: the data sets as the caller gave them.
        functions: loss, metrics and collate function by `fit`'s name for them.
        given: further facts of the caller.
        trainee: holds model and adapter, before they are sharded.
        settings: plain values by name.
    """

    def __init__(
        self,
        folder: Path | None,
        train: Any,
        val: Any,
        functions: Mapping[str, Any],
        given: Mapping[str, Any] | None,
        trainee: nn.Module,
        adapter: Any,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.details, self.files = read_details(folder) if folder is not None else ({}, FileDigests())
        shapes = sorted((k, tuple(p.shape)) for k, p in trainee.named_parameters() if p.requires_grad)
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:32]
        for data in (train, val):
            for tell in epoch_listeners(data):
                tell(0)  # an epoch that an earlier run left behind is no property of the data
        self.facts, self.rows = run_identity(
            train, val, functions, {**settings, "trained tensors": digest}, given, trainee, adapter, self.files
        )

    def write(self) -> None:
        """Keep the examples one by one, so that a later difference can be named."""
        if self.folder is not None:
            write_details(self.folder, self.rows, self.files)

    def compare(self, path: Path, saved: dict[str, Any], total: int) -> bool:
        """Raise `RunDiffersError` unless checkpoint `path` is of this run; returns whether it was finished and goes on."""
        progress = Progress.read(saved["progress"])
        rows = self.details if path.parent.parent == self.folder else read_details(path.parent.parent)[0]
        changes = differences(saved["run"], json.loads(json.dumps(self.facts)), rows, self.rows)
        lengths = changes.keys() & {"epochs", "max_steps"}
        if lengths == changes.keys() and progress.stopped == "finished" and total > progress.step:
            return bool(changes)
        for key in lengths:
            changes[key] += " (only a finished run can be given more)"
        if changes:
            finished = progress.stopped in ("finished", "early")
            raise RunDiffersError(path.parent.parent, changes, finished=finished)
        return False


class RunState:
    """All that a run has learnt, as it is saved and restored.

    Args:
        identity: of this run; None when nothing is saved or restored.
        inner: the trained module without what accelerate put around it; `names` of its trained parameters, in the order
            of `optimizer`'s groups.
        scheduler: a function of the step.
        ema: the moving average, if any.
        total: steps of the whole run.
    """

    def __init__(
        self,
        config: FitConfig,
        accelerator: Any,
        identity: Identity | None,
        progress: Progress,
        inner: nn.Module,
        names: list[str],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        ema: MovingAverage | None,
        total: int,
    ) -> None:
        self.config, self.accelerator, self.identity, self.progress = config, accelerator, identity, progress
        self.inner, self.names, self.optimizer, self.scheduler = inner, names, optimizer, scheduler
        self.ema, self.total = ema, total
        self.root = identity.folder / "checkpoints" if identity is not None and identity.folder is not None else None
        self.rank = accelerator.process_index

    def save(self, name: str) -> Path | None:
        """Write the checkpoint `name`; returns its folder. All processes must call it."""
        if self.root is None or self.identity is None:
            return None
        tensors, rest = ckpt.optimizer_tensors(self.names, self.optimizer)
        files: dict[str, dict[str, Tensor]] = {"weights": ckpt.module_tensors(self.inner), "optimizer": tensors}
        files["losses"] = {"losses": torch.tensor(self.progress.losses, dtype=torch.float64)}
        if self.progress.best:
            files["best"] = self.progress.best
        if self.ema:
            files["ema"] = self.ema.tensors()
        scaler = self.accelerator.scaler
        state = {
            "run": self.identity.facts,
            "progress": self.progress.saved(),
            "optimizer": rest,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        writer = ckpt.CheckpointWriter(self.root / name, self.rank, self.accelerator.wait_for_everyone)
        writer.write(files, state)
        if self.rank == 0:
            ckpt.prune_checkpoints(self.root, self.config.keep_checkpoints)
        return self.root / name

    def restore(self) -> None:
        """Load the newest usable checkpoint when `resume` and the folder say so."""
        resume, root, identity = self.config.resume, self.root, self.identity
        named = resume not in ("auto", True, False)
        source = absolute(resume) if named else root and root.parent  # type: ignore[arg-type]
        if root is not None and self.rank == 0:
            ckpt.clean_checkpoints(root)
        found = source is not None and resume is not False and self._load_newest(source)
        if named and not found:
            raise CheckpointError(f"resume: {source} holds no readable training checkpoint.")
        if root is not None and identity is not None and self.rank == 0:
            if named or not found:
                ckpt.remove_checkpoints(root, after=self.progress.step if found else -1)
            identity.write()
        self.accelerator.wait_for_everyone()

    def _load_newest(self, source: Path) -> bool:
        """Whether a checkpoint at `source` could be loaded; a damaged one gives way to the one before it."""
        assert self.identity is not None
        paths = ckpt.checkpoints_of(source)
        if paths:
            start = ckpt.module_tensors(self.inner), copy.deepcopy(self.optimizer.state_dict())
        for path in paths:
            try:
                saved, tensors = ckpt.read_checkpoint(path)
                longer = self.identity.compare(path, saved, self.total)
                self._load(path, saved, tensors)
            except RunDiffersError:
                raise
            except (MMKitError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                ckpt.passed_over(error if isinstance(error, MMKitError) else CheckpointError(f"{path}: {error!r}"))
                self.progress.take(Progress())
                continue
            if longer:
                self.progress.stopped = ""
            return True
        if paths:
            ckpt.load_module_tensors(self.inner, start[0], "the start")
            self.optimizer.load_state_dict(start[1])
        return False

    def _load(self, path: Path, saved: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        self.progress.take(Progress.read(saved["progress"]))
        self.progress.losses = tensors["losses"]["losses"].tolist()
        self.progress.best = tensors.get("best", {})
        ckpt.load_module_tensors(self.inner, tensors["weights"], str(path))
        ckpt.load_optimizer_tensors(self.names, self.optimizer, tensors["optimizer"], saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            self.ema.load(tensors["ema"])
        self.scheduler.step_update(self.progress.step)
