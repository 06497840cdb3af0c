"""The work that a model asks of a device, counted on the actual model."""

import jax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.network.workload import deal_devices, make_job, make_workload, multiplied_params
from fmfl_jax.experiment.plan import abstract_params, abstract_trainable
from fmfl_jax.models.params import init_params, num_bytes
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PromptConfig
from fmfl_jax.peft.split import FullConfig
from fmfl_jax.wireless.compute import training_flops_per_token


def test_the_workload_counts_the_actual_model():
    config = llama_preset("tiny")
    params = init_params(config, jax.random.key(0), dtype="float32")
    trainable = abstract_trainable(config, params, LoraConfig(rank=8, targets=("q_proj", "v_proj")))
    work = make_workload(config, params, trainable, LoraConfig(rank=8), batch_size=2, seq_len=32)
    # 2 layers of q, k, v, o, gate, up, down at 64 / 192 with half the heads for k and v; the tied head of 256
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 192 * 3)
    assert multiplied_params(config) == work.base_params == matrices + 256 * 64
    assert work.trainable_params == 2 * 8 * (64 + 64 + 64 + 32) and work.weight_bytes == num_bytes(params)
    attention = 3 * 2 * 2 * 64 * 32  # three passes' worth of 2 L N H keys
    assert training_flops_per_token(work) == 4 * work.base_params + 6 * work.trainable_params + attention
    full = make_workload(config, params, params, FullConfig(), batch_size=2, seq_len=32)
    assert training_flops_per_token(full) == 6 * full.base_params + attention
    again = make_workload(config, params, trainable, LoraConfig(), batch_size=2, seq_len=32, remat=True)
    assert again.activation_bytes < work.activation_bytes


def test_seven_billion_fit_a_phone_in_int4_only():
    """The paper's point: 13.6 GB of fp16 weights against 3.7 GB, for a device with 8 GB."""
    config, peft = llama_preset("7b", dtype="float16"), PromptConfig(num_tokens=4)
    able, bits = {}, {}
    for form in ("fp16", "int4"):
        params = abstract_params(config, form)
        job = make_job(
            NetworkConfig(network="facts_20", devices=("phone", "edge_box")),
            config,
            params,
            abstract_trainable(config, params, peft),
            peft,
            num_clients=4,
            local_steps=1,
            batch_size=1,
            seq_len=64,
        )
        able[form], bits[form] = job.able.tolist(), job.base_bits
        assert job.compute_s[1] < job.compute_s[0]
    assert able == {"fp16": [False, True, False, True], "int4": [True] * 4}
    assert bits["fp16"] / 8 == pytest.approx(2 * 6.738e9, rel=1e-3) and bits["int4"] < 0.3 * bits["fp16"]


def test_devices_are_dealt_in_turn_and_their_names_checked():
    assert [device.name for device in deal_devices(("phone", "edge_box"), 3)] == ["phone", "edge_box", "phone"]
    with pytest.raises(ValueError, match="device=phone,fridge: expected some of phone"):
        deal_devices(("phone", "fridge"), 3)
