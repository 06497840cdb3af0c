"""A fine-tuned LLaMA over the mesh axis "model": the base is cut, what is tuned is whole on every device.

The tuned parameters stay as they are everywhere else (aggregated, counted, saved whole), and each device takes its part
of them while it runs: the columns of a LoRA's B for its heads or hidden units, the rows of an A that reads those, the
kv heads of a prefix. The gradient of each is summed over the axis (`parallel.enter_cut`), so every device has the whole
one. Adapters and soft prompts act on the whole residual stream, alike on all devices.

    >>> mesh = model_mesh(4)
    >>> model = split_cut(config, params, LoraConfig(), mesh, key=key)
    >>> # inside of shard_map over the mesh, with model.frozen placed by CUT_FROZEN:
    >>> model.merge(model.trainable, model.frozen)(tokens)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.tensor_parallel import VOCABULARY, cut_config, cut_params, kv_heads_of, own_params, part_columns
from fmfl_jax.parallel import MODEL_AXIS, enter_cut
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import FullConfig, PeftConfig, Split, split

_ROW_PARTS = ("o_proj", "down_proj")


def split_cut(config: LlamaConfig, params: dict, peft: PeftConfig, mesh: Mesh, *, key, prompt_start=None) -> Split:
    """As `peft.split.split`, with frozen cut over the mesh; merge works inside of shard_map only.

    Raises ValueError as `check_cut`.
    """
    parts = mesh.shape[MODEL_AXIS]
    check_cut(config, peft, parts)
    configs = config, cut_config(config, parts)
    whole, local = (split(c, params, peft, key=key, prompt_start=prompt_start) for c in configs)
    cuts = {name: _cut(config, parts, name, value) for name, value in whole.trainable.items()}

    def merge(trainable, frozen):
        own = {name: cuts[name](value) for name, value in trainable.items()}
        model = local.merge(own, own_params(frozen))
        for block in model.layers:
            block.is_cut = True
        embedding, head = (name in frozen["cut"] for name in VOCABULARY)
        model.embed_tokens.is_cut, model.head_is_cut = embedding, embedding if config.tie_embeddings else head
        return model

    return Split(merge, whole.trainable, cut_params(config, params, mesh))


def check_cut(config: LlamaConfig, peft: PeftConfig, parts: int) -> None:
    """Raises ValueError where the model does not fit an axis of `parts` devices (`cut_config`), for full fine-tuning,
    whose gradient would be whole on every device, and for LoRA's dropout, whose mask would be another."""
    cut_config(config, parts)
    if isinstance(peft, FullConfig):
        raise ValueError("model_parallel is for frozen bases: full fine-tuning would hold all weights on each device")
    if isinstance(peft, LoraConfig) and peft.dropout > 0:
        raise ValueError(f"model_parallel draws no dropout: got LoRA's dropout={peft.dropout:g}")


def _cut(config: LlamaConfig, parts: int, name: str, value):
    """What a device takes of a tuned parameter, as a function of it: all, where it is used outside of what is cut."""
    if ".prefix." in name:
        return lambda x: _taken(enter_cut(x), kv_heads_of(config, parts), axis=1)  # [P, K, H]
    if ".lora." not in name:
        return lambda x: x
    *_, projection, factor = name.split(".")
    if projection in _ROW_PARTS:
        if factor == "lora_b":
            return enter_cut
        rows = np.arange(value.shape[0]).reshape(parts, -1)
        return lambda x: _taken(enter_cut(x), rows, axis=0)
    if factor == "lora_a":
        return enter_cut
    columns = part_columns(config, parts)[projection]
    return lambda x: _taken(enter_cut(x), columns, axis=1)


def _taken(x, places: np.ndarray, *, axis: int):
    """x at this device's row of places int [parts, n]."""
    own = jnp.asarray(places, jnp.int32)[jax.lax.axis_index(MODEL_AXIS)]
    return jnp.take(x, own, axis=axis)
