"""Many clients' adapters in one batch give what each gives alone, over float and over 4-bit bases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.generate import NO_TOKEN, Sampling, generate
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize
from fmfl_jax.models.serve import answer_one_by_one, kept_tokens, make_server
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig
from fmfl_jax.peft.split import split
from fmfl_jax.quant.awq import QuantConfig

CONFIG = llama_preset("tiny", num_layers=2, embed_dim=32, hidden_dim=64, num_heads=2, num_kv_heads=1)
PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_clients_answers_as_each_alone(packed):
    params = init_params(CONFIG, jax.random.key(0))
    if packed:
        calib = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)
        params = quantize(CONFIG, params, calib, QuantConfig(group_size=32, method="rtn"))
    model = split(CONFIG, params, LoraConfig(rank=2), key=jax.random.key(1))
    rng = np.random.default_rng(2)
    adapters = [
        {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in model.trainable.items()}
        for _ in PROMPTS
    ]
    # client 1's first token ends its row
    stop = int(
        next(
            generate(
                CONFIG,
                model.merge,
                adapters[1],
                model.frozen,
                [PROMPTS[1]],
                max_new_tokens=1,
                sampling=Sampling(),
                key=jax.random.key(0),
            )
        )[0, 0]
    )
    sampling = Sampling(stop_tokens=(stop,))
    serve = make_server(CONFIG, model.merge, max_prompt_tokens=6, max_new_tokens=8, sampling=sampling)
    rows = np.asarray(serve(jax.tree.map(lambda *x: jnp.stack(x), *adapters), model.frozen, PROMPTS, jax.random.key(0)))
    alone = []
    for adapter, prompt in zip(adapters, PROMPTS):
        chunks = generate(
            CONFIG,
            model.merge,
            adapter,
            model.frozen,
            [prompt],
            max_new_tokens=8,
            sampling=sampling,
            key=jax.random.key(0),
        )
        alone.append([int(token) for chunk in chunks for token in chunk[0] if token != NO_TOKEN])
    assert [kept_tokens(row) for row in rows] == alone
    assert answer_one_by_one(CONFIG, model.merge, model.frozen, adapters, PROMPTS, [8] * 3, sampling, chunk=3) == alone
    assert len({tuple(row) for row in alone}) == 3 and len(alone[1]) == 1
    with pytest.raises(ValueError, match="1 to 6 tokens"):
        serve(jax.tree.map(lambda *x: jnp.stack(x), *adapters), model.frozen, [[1] * 7] * 3, jax.random.key(0))


def test_virtual_tokens_count():
    """A prompt of 3, 8 new ones and 4 virtual ones do not fit a context of 14, but one of 15."""
    for context, refused in ((14, True), (15, False)):
        config = dataclasses.replace(CONFIG, max_seq_len=context)
        params = init_params(config, jax.random.key(0))
        model = split(config, params, PrefixConfig(num_tokens=4), key=jax.random.key(1))
        serve = make_server(config, model.merge, max_prompt_tokens=3, max_new_tokens=8, sampling=Sampling())
        ask = lambda: serve(jax.tree.map(lambda x: x[None], model.trainable), model.frozen, [[1, 2]], jax.random.key(0))
        if refused:
            with pytest.raises(ValueError, match="3 prompt tokens . 8 new ones . 4 tuned ones exceed .* 14"):
                ask()
        else:
            assert ask().shape == (1, 8)
