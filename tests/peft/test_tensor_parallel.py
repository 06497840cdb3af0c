"""A model cut over 2, 4 and 8 devices equals the whole one: logits, gradients, greedy text, a federated round."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fmfl_jax.config import llama_preset
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import lay_out
from fmfl_jax.fed.core.execution import execution_of, pmap_round, shard_map_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.models.generate import DecodeState, Sampling, generate, init_cache, jit_generator
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import init_params, projections
from fmfl_jax.models.quantize import quantize, quantize_head
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.models.tensor_parallel import CUT_FROZEN, cut_config, cut_params
from fmfl_jax.parallel import model_mesh, replicate
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import FullConfig, NoPeftConfig, split
from fmfl_jax.peft.tensor_parallel import split_cut
from fmfl_jax.quant.awq import QuantConfig
from kernels.w4a16.cpu import product as cpu

CONFIG = llama_preset(
    "tiny", num_layers=1, hidden_dim=96, num_heads=8, num_kv_heads=4, max_seq_len=48, tie_embeddings=False
)
EVERYWHERE = tuple(sorted({name.rpartition(".")[2] for name in projections(CONFIG)}))
TUNINGS = {
    "lora": LoraConfig(rank=2, targets=EVERYWHERE),
    "adapter": AdapterConfig(),
    "prompt": PromptConfig(num_tokens=3),
    "prefix": PrefixConfig(num_tokens=3),
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 13)).astype(np.int32)
KEY = jax.random.key(1)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """The reference, in float32: a CPU's kernel rounds x by 128 rows of K, which are others where K is cut."""
    monkeypatch.setattr(cpu, "available", lambda: False)


TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


@functools.cache
def base_params(packed, config=CONFIG):
    params = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, init_params(config, jax.random.key(0)))
    # Groups of 32: of 128 rows of o_proj over 8 devices and of 96 of down_proj over 4, groups straddle the cuts.
    return quantize(config, params, None, QuantConfig(method="rtn", group_size=32)) if packed else params


def tuned(trainable):
    """At random values: zero factors would hide a part that is left out."""
    return {
        name: 0.2 * jax.random.normal(jax.random.fold_in(KEY, i), x.shape, x.dtype)
        for i, (name, x) in enumerate(sorted(trainable.items()))
    }


def over(mesh, fn):
    """fn(trainable, frozen) on the mesh."""
    specs = dict(in_specs=(PartitionSpec(), CUT_FROZEN), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(jax.shard_map(fn, mesh=mesh, **specs))


def loss_of(merge):
    return lambda trainable, frozen: token_nll(merge(trainable, frozen), TOKENS).mean()


@functools.cache
def whole_gradients(name, packed, config):
    s = split(config, base_params(packed, config), TUNINGS[name], key=KEY)
    return jax.jit(jax.value_and_grad(loss_of(s.merge)))(tuned(s.trainable), s.frozen)


@pytest.mark.parametrize(
    "name, packed, parts, config",
    [
        ("lora", False, 2, TIED),
        ("lora", True, 8, CONFIG),
        ("adapter", True, 4, CONFIG),
        ("prompt", False, 2, TIED),
        ("prefix", True, 8, CONFIG),
        ("prefix", False, 2, dataclasses.replace(CONFIG, vocab_size=257)),  # 2 divides neither head nor embedding
    ],
)
def test_loss_and_gradients_of_every_tuning(name, packed, parts, config):
    """8 devices hold 4 kv heads: each is on two, and their gradients add up."""
    mesh = model_mesh(parts)
    s = split_cut(config, base_params(packed, config), TUNINGS[name], mesh, key=KEY)
    trainable = tuned(s.trainable)
    loss, gradients = over(mesh, jax.value_and_grad(loss_of(s.merge)))(trainable, s.frozen)
    expected_loss, expected = whole_gradients(name, packed, config)
    assert set(gradients) == set(trainable) == set(expected)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for leaf, gradient in expected.items():
        scale = float(jnp.abs(gradient).max())
        assert scale > 0, leaf
        np.testing.assert_allclose(gradients[leaf], gradient, atol=2e-5 * scale, err_msg=leaf)


def text_of(config, s, mesh):
    options = dict(max_new_tokens=9, sampling=Sampling(), key=jax.random.key(0), chunk=4, mesh=mesh)
    prompts = [[7, 1, 200, 4, 9, 30], [5], [90, 91, 17]]
    chunks = generate(config, s.merge, tuned(s.trainable), s.frozen, prompts, **options)
    return np.concatenate(list(chunks), axis=1)


@pytest.mark.parametrize(
    "packed, parts, config, head", [(False, 2, TIED, 16), (True, 8, CONFIG, 4), (True, 4, TIED, 8)]
)
def test_greedy_text_is_the_same(packed, parts, config, head):
    """head: bits of it; a tied one of 8 bits is the embedding too."""
    params = base_params(packed, config)
    if head < 16:
        config, params = quantize_head(config, params, bits=head, group_size=32)
    mesh = model_mesh(parts)
    found = text_of(config, split_cut(config, params, TUNINGS["lora"], mesh, key=KEY), mesh)
    assert len(np.unique(found)) > 3
    np.testing.assert_array_equal(found, text_of(config, split(config, params, TUNINGS["lora"], key=KEY), None))


def test_logits_have_the_gradient_of_whole_ones():
    """Through `Llama.logits`, which the loss goes around."""
    mesh, weights = model_mesh(4), jax.random.normal(KEY, (2, 13, CONFIG.vocab_size))
    score_of = lambda merge: lambda trainable, frozen: (merge(trainable, frozen)(TOKENS) * weights).sum()
    cut, whole = (
        make(CONFIG, base_params(False), LoraConfig(rank=2), *on, key=KEY)
        for make, on in ((split_cut, (mesh,)), (split, ()))
    )
    trainable = tuned(whole.trainable)
    found = over(mesh, jax.grad(score_of(cut.merge)))(trainable, cut.frozen)
    expected = jax.jit(jax.grad(score_of(whole.merge)))(trainable, whole.frozen)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=2e-5 * float(jnp.abs(gradient).max()))


@pytest.mark.parametrize("mode", ["scan", "vmap"])
def test_a_federated_lora_round_is_the_same(mode):
    """5 clients on a mesh of 4 x 2 devices, against all on one device."""
    config = LoraConfig(rank=2)
    windows = np.random.default_rng(1).integers(0, 256, (5, 2, 2, 9)).astype(np.int32)  # [K, S, B, T + 1]
    cohort = Cohort(np.arange(5, dtype=np.int32), np.arange(1, 6).astype(np.float32), windows)
    mesh, results = model_mesh(2), []
    for cut in (False, True):
        make = functools.partial(split_cut, mesh=mesh) if cut else split
        s = make(CONFIG, base_params(True), config, key=KEY)

        def loss(trainable, frozen, batch, key, s=s):
            return token_nll(s.merge(trainable, frozen), batch).mean()

        algorithm = fed_opt(jax.value_and_grad(loss), optax.sgd(0.5), optax.sgd(1.0))
        parts = make_round(algorithm, execution=execution_of(mode))
        state = parts.init(tuned(s.trainable), 3)
        if cut:
            step, clients = shard_map_round(parts, mesh, CUT_FROZEN), 4
        else:
            step, clients = pmap_round(parts), 1
        state, metrics, _ = step(state, s.frozen, lay_out(cohort, num_devices=clients))
        results.append((state.params, metrics))
    (expected, expected_metrics), (found, metrics) = results
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-4)
    moved = 0.0
    for name, start in tuned(split(CONFIG, base_params(True), config, key=KEY).trainable).items():
        moved = max(moved, float(jnp.abs(expected[name] - start).max()))
        np.testing.assert_allclose(found[name], expected[name], atol=2e-4)
    assert moved > 0.02


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="model_parallel=3 does not divide 8 heads"):
        cut_config(CONFIG, 3)
    odd = llama_preset("tiny", num_heads=12, num_kv_heads=4, hidden_dim=96)
    with pytest.raises(ValueError, match="model_parallel=6 does not divide 12 heads, 4 kv heads"):
        cut_config(odd, 6)
    with pytest.raises(ValueError, match="model_parallel=3 needs so many devices"):
        model_mesh(3)
    with pytest.raises(ValueError, match="model_parallel=16 needs so many devices"):
        model_mesh(16, num_devices=16)
    mesh, params = model_mesh(2), base_params(False)
    with pytest.raises(ValueError, match="full fine-tuning"):
        split_cut(CONFIG, params, FullConfig(), mesh, key=KEY)
    with pytest.raises(ValueError, match=r"no dropout: got LoRA's dropout=0\.1"):
        split_cut(CONFIG, params, LoraConfig(dropout=0.1), mesh, key=KEY)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)"
)
def test_a_cut_model_lowers_for_cuda_with_the_kernels(monkeypatch):
    """8 fake devices. A decode step has the same four Triton calls a layer as without a cut, and two all-reduces. LoRA
    of two clients side by side has the way back besides."""
    from kernels.w4a16 import launch

    monkeypatch.setattr(launch, "call", functools.partial(launch.call, compute_capability=90))
    config = llama_preset("mini", num_layers=2, num_heads=8, num_kv_heads=2, hidden_dim=1024, dtype="bfloat16")
    mesh = model_mesh(8)
    params = random_int4_params(config, jax.random.key(0), group_size=128, head=False)
    s = split_cut(config, params, NoPeftConfig(), mesh, key=KEY)
    _, decode_fn = jit_generator(s.merge, Sampling(), mesh=mesh)
    zeros = jnp.zeros(1, jnp.int32)
    cache = init_cache(config, 1, 64, mesh=mesh)
    state = DecodeState(cache, zeros, zeros, zeros.astype(bool), jax.random.key(0))
    traced = decode_fn.trace(s.trainable, s.frozen, state, 4)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 4 * config.num_layers
    assert text.count("stablehlo.all_reduce") == 2 * config.num_layers + 1  # and the tokens' rows
    assert text.count("stablehlo.all_gather") == 1  # logits
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()

    s = split_cut(config, params, LoraConfig(), mesh, key=KEY)
    loss = loss_of(s.merge)
    two = lambda trainable, frozen: jax.vmap(jax.value_and_grad(loss), (0, None))(trainable, frozen)
    doubled = jax.tree.map(lambda x: jnp.stack([x, x]), s.trainable)
    text = over(mesh, two).trace(doubled, s.frozen).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") >= 8 * config.num_layers - 1  # as without a cut: test_decode_lowering.py
    assert text.count("stablehlo.all_reduce") >= 4 * config.num_layers - 1


def test_every_device_holds_its_share_of_the_blocks():
    """Bytes on one device: the blocks' packed weights over 4, nothing of the rest twice."""
    mesh, params = model_mesh(4), base_params(True)
    frozen = cut_params(CONFIG, params, mesh)
    on_one = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(frozen["cut"]))
    whole = sum(x.nbytes for name in frozen["cut"] for x in jax.tree.leaves(params[name]))
    assert on_one < 0.5 * whole  # padding of small shards, no more
    assert set(frozen["cut"]) | set(frozen["whole"]) == set(params)
    assert replicate(frozen["whole"], copy=False).keys() == frozen["whole"].keys()
