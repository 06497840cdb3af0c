"""What a language model's local work asks of a client's device, and the network job of a federation.

The wireless side counts parameters, FLOPs and bytes; this file gets them from the actual model and PEFT configuration.
Shapes are enough: arrays may be jax.ShapeDtypeStruct.
"""

import math

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.network.delivery import make_delivery
from fmfl_jax.experiment.network.rounds import NetworkJob
from fmfl_jax.models.params import param_specs
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import FullConfig, PeftConfig
from fmfl_jax.transport.size import tree_bits
from fmfl_jax.wireless import compute
from fmfl_jax.wireless.compute import DeviceClass, Workload

DEVICES = {"phone": compute.phone, "vehicle": compute.vehicle, "edge_box": compute.edge_box}


def multiplied_params(config: LlamaConfig) -> int:
    """Parameters that every token is multiplied with: the blocks' matrices and the head. Not the embedding, which is
    looked up (unless it is the head), and not the norms."""
    shapes = {name: spec.shape for name, spec in param_specs(config).items() if len(spec.shape) == 2}
    looked_up = 0 if config.tie_embeddings else math.prod(shapes["embed_tokens.weight"])
    return sum(map(math.prod, shapes.values())) - looked_up


def sequence_tokens(peft: PeftConfig, seq_len: int) -> tuple[int, int]:
    """(positions that pass the blocks, keys that the last of them sees): a soft prompt adds to both, a prefix to the
    keys."""
    queries = seq_len + (peft.num_tokens if isinstance(peft, PromptConfig) else 0)
    return queries, queries + (peft.num_tokens if isinstance(peft, PrefixConfig) else 0)


def activation_bytes(config: LlamaConfig, *, batch_size: int, queries: int, keys: int, remat: bool) -> int:
    """What the backward pass keeps, estimated from above: per token and layer 4 D (residuals, norms), the projections
    (2 N + 2 K) H, 3 F of the MLP and the attention's weights, in the compute dtype. With rematerialization the blocks'
    inputs and one block's inside."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    inside = 4 * config.embed_dim + heads + 3 * config.hidden_dim + config.num_heads * keys
    width = 4 if config.dtype == "float32" else 2
    layers = config.num_layers
    values = layers * config.embed_dim + inside if remat else layers * inside
    return batch_size * queries * values * width


def make_workload(
    config: LlamaConfig,
    params: dict,
    trainable: dict,
    peft: PeftConfig,
    *,
    batch_size: int,
    seq_len: int,
    remat: bool = False,
) -> Workload:
    """The wireless side's view of training `trainable` beside `params` on batches of batch_size windows."""
    queries, keys = sequence_tokens(peft, seq_len)
    full = isinstance(peft, FullConfig)
    return Workload(
        base_params=multiplied_params(config),
        trainable_params=0 if full else sum(math.prod(x.shape) for x in jax.tree.leaves(trainable)),
        weight_bytes=tree_bits(params) / 8,
        # Scores and values are 2 FLOPs each per key and head dimension; a causal token sees half the keys on average.
        attention_flops=2.0 * config.num_layers * config.num_heads * config.head_dim * keys,
        rematerialize=remat,
        activation_bytes=activation_bytes(config, batch_size=batch_size, queries=queries, keys=keys, remat=remat),
    )


def deal_devices(names: tuple[str, ...], num_clients: int) -> list[DeviceClass]:
    """One device per client, dealt in turn. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in DEVICES]
    if unknown or not names:
        raise ValueError(f"device={','.join(names)}: expected some of {', '.join(DEVICES)}")
    return [DEVICES[names[i % len(names)]]() for i in range(num_clients)]


def make_job(
    config: NetworkConfig,
    model: LlamaConfig,
    params: dict,
    trainable: dict,
    peft: PeftConfig,
    *,
    num_clients: int,
    local_steps: int,
    batch_size: int,
    seq_len: int,
    remat: bool = False,
) -> NetworkJob:
    """The job of fine-tuning `trainable` beside `params`, over config's network and on config's devices.

    What a round sends is not filled in yet."""
    work = make_workload(model, params, trainable, peft, batch_size=batch_size, seq_len=seq_len, remat=remat)
    devices = compute.stack_devices(deal_devices(config.devices, num_clients))
    tokens = float(batch_size * sequence_tokens(peft, seq_len)[0])
    seconds = compute.training_time_s(devices, work, tokens, float(local_steps))
    delivery = None
    if config.delivery:
        forward_s = np.asarray(compute.forward_time_s(devices, work, tokens))
        delivery = make_delivery(params, config.delivery, forward_s=forward_s)
    return NetworkJob(
        network=config.make_network(num_clients),
        compute_s=np.asarray(seconds),
        compute_j=np.asarray(compute.active_energy_j(devices, seconds)),
        able=np.asarray(compute.fits(devices, compute.training_memory_bytes(work))),
        base_bits=tree_bits(params) if delivery is None else delivery.bits,
        delivery=delivery,
        aggregation=config.aggregation,
        rings=config.network == "facts_20",
    )
