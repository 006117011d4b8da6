"""Every file and folder that is written or read back: whole or not at all, checked when read, nothing ever unpickled.

- `files`: single files, JSON, sha256.  `tensors`: tensor files.  `folders`: folders of one kind with a manifest.
- `lock`: one run per folder.  `runs`: the training checkpoints of `fit`.
"""

from __future__ import annotations

from mmkit.storage.files import atomic_write, clean, read_json, sha256_file, temporary_name, write_json
from mmkit.storage.folders import new_folder, open_folder, require_folder
from mmkit.storage.lock import folder_lock
from mmkit.storage.tensors import load_state, read_metadata, read_tensors, write_safetensors

__all__ = [
    "atomic_write",
    "clean",
    "folder_lock",
    "load_state",
    "new_folder",
    "open_folder",
    "read_json",
    "read_metadata",
    "read_tensors",
    "require_folder",
    "sha256_file",
    "temporary_name",
    "write_json",
    "write_safetensors",
]
