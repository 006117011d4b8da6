"""Adapters: small sets of parameters that change what a frozen model does.

Every method attaches, trains, saves, loads, merges and detaches the same way:

    adapter = apply_adapter(model, SSFConfig())      # model is frozen, its keys and tensors stay as they are
    ... train adapter.parameters() ...
    save_adapter(adapter, "my_adapter")              # adapter_config.json + adapter_model.safetensors
    adapter.merge()                                  # plain weights again, no overhead
"""

from mmkit.adapters.api import (
    apply_adapter,
    list_adapters,
    load_adapter,
    merge_adapters,
    register_adapter,
    save_adapter,
    set_active_adapters,
)
from mmkit.adapters.config import AdapterConfig, Edit
from mmkit.adapters.context import ForwardContext, current_context, forward_context
from mmkit.adapters.core import Adapter
from mmkit.adapters.sites import SiteAdapter
from mmkit.adapters.stack import ModuleGroup, attached_adapters

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Edit",
    "ForwardContext",
    "ModuleGroup",
    "SiteAdapter",
    "apply_adapter",
    "attached_adapters",
    "current_context",
    "forward_context",
    "list_adapters",
    "load_adapter",
    "merge_adapters",
    "register_adapter",
    "save_adapter",
    "set_active_adapters",
]
