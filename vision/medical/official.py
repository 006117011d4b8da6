"""Checkpoints of the authors' code (MrBlankness/LightM-UNet), alone or written by nnU-Net's trainer."""

from __future__ import annotations

from typing import Any

from mmkit.errors import CheckpointError


def config_from_official(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' constructor arguments as keywords of `LightMUNet`."""
    names = {"in_channels": "in_chans", "out_channels": "num_classes"}
    return {names.get(key, key): value for key, value in config.items()}


def own_state(state: dict[str, Any]) -> dict[str, Any]:
    """An official state dict without the prefixes of wrappers and compilers; its keys are those of `LightMUNet`.

    Raises `CheckpointError` for files written by the code before 2024-03-29, a different network.
    """
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    if "convInit.conv.weight" in state:
        raise CheckpointError(
            "This checkpoint comes from LightM-UNet's first release (before 2024-03-29), whose decoder used plain 3x3 "
            "convolutions: another network. Retrain with the current code, or use the old one."
        )
    return state
