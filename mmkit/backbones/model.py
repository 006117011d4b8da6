"""The base class of every model mmkit defines, and the list of their named constructors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from mmkit.errors import CheckpointError, InputError, MMKitError
from mmkit.registry import MODEL_CLASSES, MODELS
from mmkit.storage import load_state, new_folder, open_folder, read_json, read_tensors, write_json, write_safetensors
from mmkit.storage.files import expanded

_HUB_ERRORS = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError)


class Model(nn.Module, PyTorchModelHubMixin):
    """A `nn.Module` whose constructor keywords are its configuration.

    Subclasses take JSON-friendly keywords only; `self.config` holds them. `save_pretrained(folder)` writes `config.json` and
    `model.safetensors`; `from_pretrained(folder_or_hub_id)` restores both; `push_to_hub` is huggingface_hub's.
    A subclass that can read the authors' files overrides `official_state(state)` to map their keys to its own.
    """

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inner = cls.__init__
        signature = inspect.signature(inner)

        def __init__(self: Model, *args: Any, **kw: Any) -> None:
            if "config" not in self.__dict__:  # the outermost constructor records what it was given
                bound = signature.bind(self, *args, **kw)
                bound.apply_defaults()
                given = {k: v for k, v in bound.arguments.items() if k != "self"}
                self.__dict__["config"] = json.loads(json.dumps(given, default=dataclasses.asdict))
            inner(self, *args, **kw)

        __init__.__wrapped__ = inner  # type: ignore[attr-defined]
        __init__.__doc__ = inner.__doc__
        __init__.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[assignment]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card; the folder appears complete or not at all.

        Raises `InputError` when the folder holds anything else, `StorageError` when it cannot be written.
        """
        with new_folder(save_directory, kind="model") as draft:
            super().save_pretrained(draft, **kwargs)
        return self.push_to_hub(repo_id or Path(save_directory).name) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        write_json(save_directory / "config.json", {"model": type(self).__name__, "config": self.config})
        write_safetensors(save_directory / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **overrides: Any) -> Self:  # type: ignore[override]
        """Load a folder written by `save_pretrained`, or a hub repository of that layout (needs the network).

        Raises `CheckpointError` when files are missing, damaged or belong to another model class.
        """
        folder = expanded(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = hub_folder(str(pretrained_model_name_or_path))
        open_folder(folder, "model", required=False)
        saved = _config_of(folder)
        if not isinstance(saved, dict) or saved.get("model") != cls.__name__:
            found = saved.get("model") if isinstance(saved, dict) else type(saved).__name__
            raise CheckpointError(f"{folder} holds a {found!r}, not a {cls.__name__!r}.")
        try:
            model = cls(**{**saved["config"], **overrides})
        except MMKitError:
            raise
        except Exception as error:  # the file can hold values of any type and size
            raise CheckpointError(f"{folder}/config.json does not fit {cls.__name__}: {error!r}") from error
        load_state(model, read_tensors(folder / "model.safetensors"), source=str(folder / "model.safetensors"))
        return model.eval()

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Map the keys of the authors' released files to this class's keys; the identity unless overridden."""
        return state


def is_model_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a `Model` of mmkit was saved there."""
    path = expanded(folder) / "config.json"
    saved = read_json(path) if path.is_file() else None
    return isinstance(saved, dict) and saved.keys() == {"model", "config"}


def _config_of(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no model: it has no config.json. Give a folder written by save_pretrained."
        )
    return read_json(folder / "config.json")


def open_model(folder: str | os.PathLike[str]) -> Model:
    """The model of a folder written by `save_pretrained`, whatever its class. Raises `CheckpointError` for anything else."""
    saved = _config_of(expanded(folder))
    kind = saved.get("model") if isinstance(saved, dict) else None
    if kind not in MODEL_CLASSES.names():
        raise CheckpointError(f"{folder} holds no model of mmkit: its config.json names the class {kind!r}.")
    model: Model = MODEL_CLASSES.get(kind).from_pretrained(folder)
    return model


def load_official_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load the authors' weight file into `model`; missing and unexpected keys raise `CheckpointError`, nothing is ignored."""
    load_state(model, model.official_state(read_tensors(path)), source=str(path))
    return model.eval()


def hub_folder(repo_id: str, **kwargs: Any) -> Path:
    """The local copy of a hub repository, downloading it when allowed.

    Raises `CheckpointError` with what to do when the hub cannot be reached or offline mode is on.
    """
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{repo_id!r} is neither an existing folder nor a hub id of the form 'owner/name'.")
    try:
        return Path(snapshot_download(repo_id, **kwargs))
    except _HUB_ERRORS as error:
        raise CheckpointError(
            f"{repo_id!r} is not a local folder and the hub could not be reached ({type(error).__name__}). "
            "Download it on a machine with a network, then pass the folder's path."
        ) from error


def list_models(pattern: str = "") -> list[str]:
    """Names of the models `create_model` builds; `pattern` is a substring or wildcard."""
    return MODELS.names(pattern)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a named variant with random weights, for example `create_model("lightm_unet_2d", num_classes=2)`.

    Raises `InputError` with the nearest names when `name` is unknown.
    """
    try:
        return MODELS.get(name)(**overrides)
    except TypeError as error:
        raise InputError(f"create_model({name!r}): {error}") from error
