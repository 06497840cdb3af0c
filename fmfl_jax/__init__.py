"""The public names: what the programs in examples/ need. Everything else is one import deeper.

They are looked up when asked for: a module of fed/ or wireless/ is imported without the model behind it.
"""

import importlib

_HOMES = {
    "config": ("LlamaConfig", "llama_preset"),
    "fed.algorithms.fed_opt": ("fed_opt",),
    "fed.attacks": ("scaling",),
    "fed.core.client": ("run_client",),
    "fed.core.cohort": ("put_on_devices",),
    "fed.core.execution": ("pmap_round",),
    "fed.core.round": ("Transport", "make_round"),
    "fed.core.types": ("Aggregate", "Aggregator", "ClientContext", "Cohort", "GatheredUpdates"),
    "models.loss": ("token_nll",),
    "models.params": ("init_params",),
    "parallel": ("replicate",),
    "peft.export": ("load_peft", "save_peft"),
    "peft.lora": ("LoraConfig",),
    "peft.split": ("split",),
    "transport.size": ("tree_bits",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
