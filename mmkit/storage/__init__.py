"""Every file and folder that is written or read back: whole or not at all, checked when read, nothing ever unpickled.

- `files`: single files, JSON, sha256.  `tensors`: tensor files.  `folders`: folders of one kind with a manifest.
- `lock`: one run per folder.  `runs`: the training checkpoints of `fit`.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.storage.files import (
        atomic_write as atomic_write,
        clean as clean,
        read_json as read_json,
        sha256_file as sha256_file,
        temporary_name as temporary_name,
        write_json as write_json,
    )
    from mmkit.storage.folders import (
        new_folder as new_folder,
        open_folder as open_folder,
        require_folder as require_folder,
    )
    from mmkit.storage.lock import folder_lock as folder_lock
    from mmkit.storage.tensors import (
        load_state as load_state,
        read_metadata as read_metadata,
        read_tensors as read_tensors,
        write_safetensors as write_safetensors,
    )

__getattr__, __dir__, __all__ = door(__name__)
