"""Requests that come and go in slots get what each gets alone: float and 4-bit bases, adapters and prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize
from fmfl_jax.models.serve import answer_one_by_one
from fmfl_jax.models.slots import RequestEngine, SlotEngine
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.quant.awq import QuantConfig
from fmfl_jax.services.scheduling.batching import Batching
from fmfl_jax.services.scheduling.live import WorkClock, serve_live
from fmfl_jax.services.scheduling.policies import Fcfs
from fmfl_jax.services.scheduling.requests import Requests

CONFIG = llama_preset("tiny", num_layers=2, embed_dim=32, hidden_dim=64, num_heads=2, num_kv_heads=1)
SIZES = dict(num_slots=3, slot_tokens=40, chunk_tokens=4)


@pytest.mark.parametrize(
    "peft, packed", [(NoPeftConfig(), False), (LoraConfig(rank=2), True), (PrefixConfig(num_tokens=3), False)]
)
def test_answers_are_those_of_one_at_a_time(peft, packed):
    params = init_params(CONFIG, jax.random.key(0))
    if packed:
        calib = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)
        params = quantize(CONFIG, params, calib, QuantConfig(group_size=32, method="rtn"))
    model, rng, n = split(CONFIG, params, peft, key=jax.random.key(1)), np.random.default_rng(2), 9
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    adapters = [{name: draw(x) for name, x in model.trainable.items()} for _ in range(n)]
    prompts = [rng.integers(0, 256, length).tolist() for length in [1, 4, 5, 13, 2, 9, 20, 1, 6]]
    most = [7, 1, 12, 3, 16, 5, 9, 2, 8]
    alone = answer_one_by_one(CONFIG, model.merge, model.frozen, adapters, prompts, most, Sampling())
    assert len({tuple(answer) for answer in alone}) == n
    engine = SlotEngine(CONFIG, model.merge, model.frozen, adapters[0], sampling=Sampling(), **SIZES)
    for static in (False, True):
        served = serve_live(
            Requests(arrivals_s=np.arange(n) * 1e-4),
            prompts,
            most,
            RequestEngine(engine, adapters),
            engine.start(),
            Fcfs(),
            Batching(num_slots=3, chunk_tokens=4, static=static),
            stop_tokens=[],
            clock=WorkClock(),
        )
        assert served.tokens == alone
        assert served.step_rows.max() == 3  # they did share steps
        assert engine.programs() == (2 if isinstance(peft, NoPeftConfig) else 3)  # whatever came and went


def test_a_step_leaves_idle_slots_as_they_are():
    """One whose prompt is half read waits through the others' steps."""
    model = split(CONFIG, init_params(CONFIG, jax.random.key(0)), NoPeftConfig(), key=jax.random.key(1))
    engine = SlotEngine(CONFIG, model.merge, model.frozen, {}, sampling=Sampling(), **SIZES)
    slots = engine.read(engine.start(), 0, [1, 2, 3, 4], 0)
    before = np.asarray(slots.cache.keys[1]).copy()
    slots, _ = engine.step(slots, np.array([0, 9, 0], np.int32), np.array([-1, 0, -1], np.int32))
    after = np.asarray(slots.cache.keys[1])
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert before[0].any() and (after[1] != before[1]).any()


def test_bad_input():
    model = split(CONFIG, init_params(CONFIG, jax.random.key(0)), NoPeftConfig(), key=jax.random.key(1))
    make = lambda sampling, tokens: SlotEngine(
        CONFIG, model.merge, model.frozen, {}, num_slots=1, slot_tokens=tokens, chunk_tokens=4, sampling=sampling
    )
    with pytest.raises(ValueError, match="greedily"):
        make(Sampling(temperature=0.5), 40)
    with pytest.raises(ValueError, match=f"slots of {CONFIG.max_seq_len + 1} tokens exceed the model"):
        make(Sampling(), CONFIG.max_seq_len + 1)
