"""Log files of a run: `log.csv` (one row per step), `history.csv` (one row per evaluation), optional TensorBoard."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

from mmkit.errors import BackendUnavailableError
from mmkit.storage import atomic_write
from mmkit.storage.files import writing


class RunLog:
    """Append rows to CSV files in `folder`; after a resume, rows beyond `step` are dropped first.

    Raises `BackendUnavailableError` when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BackendUnavailableError("TensorBoard logs need `pip install tensorboard`.") from None
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._rows: dict[str, Any] = {}
        for name in ("log", "history"):
            _drop_rows(folder / f"{name}.csv", step)

    def add(self, name: str, row: dict[str, float]) -> None:
        """Append `row` to `<name>.csv`; the first row decides the columns. A crash loses no flushed row."""
        with writing(self.folder / f"{name}.csv"):
            if name not in self._rows:
                self._open(name, list(row))
            file, writer = self._rows[name]
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
        if self._writer is not None:
            for key, value in row.items():
                if key not in ("step", "epoch"):
                    self._writer.add_scalar(f"{name}/{key}", value, int(row["step"]))

    def _open(self, name: str, columns: list[str]) -> None:
        path = self.folder / f"{name}.csv"
        known = _columns(path)
        file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - closed by close()
        writer = csv.DictWriter(file, known or columns, extrasaction="ignore")
        if not known:
            writer.writeheader()
        self._rows[name] = (file, writer)

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._rows.values():
            with contextlib.suppress(OSError):  # add() has flushed every row, or said why it could not
                file.close()
        self._rows = {}
        if self._writer is not None:
            self._writer.close()


def _columns(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader(file), [])


def _drop_rows(path: Path, step: int) -> None:
    """Keep the rows up to `step`; a row torn by a crash goes as well. At step 0 the file is removed."""
    columns = _columns(path)
    if "step" not in columns or step == 0:
        with writing(path):
            path.unlink(missing_ok=True)
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        whole = [r for r in csv.DictReader(file) if None not in r.values() and r["step"].isdecimal()]
    rows = [r for r in whole if int(r["step"]) <= step]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
