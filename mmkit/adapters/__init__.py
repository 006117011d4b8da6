"""Adapters: small sets of parameters that change what a frozen model does.

Every method attaches, trains, saves, loads, merges and detaches the same way:

    adapter = apply_adapter(model, SSFConfig())      # model is frozen, its keys and tensors stay as they are
    ... train adapter.parameters() ...
    save_adapter(adapter, "my_adapter")              # adapter_config.json + adapter_model.safetensors
    adapter.merge()                                  # plain weights again, no overhead
"""

from mmkit.adapters.core import (
    Adapter,
    AdapterConfig,
    apply_adapter,
    attached_adapters,
    list_adapters,
    register_adapter,
)
from mmkit.adapters.files import load_adapter, save_adapter
from mmkit.adapters.sites import SiteAdapter

__all__ = [
    "Adapter",
    "AdapterConfig",
    "SiteAdapter",
    "apply_adapter",
    "attached_adapters",
    "list_adapters",
    "load_adapter",
    "register_adapter",
    "save_adapter",
]
