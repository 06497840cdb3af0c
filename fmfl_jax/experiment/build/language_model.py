"""A LLaMA and its clients' text as a federation sees them: the view of the model, the batches, the held-out windows."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.batches import client_batches, poisson_capacity, poisson_client_batches
from fmfl_jax.experiment.build.federation import Learner, client_extras
from fmfl_jax.experiment.config.case_study import FineTuning
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.loop.rounds import Batches, Source
from fmfl_jax.experiment.methods.aggregators import FLTrust
from fmfl_jax.experiment.methods.attacks import LabelFlip
from fmfl_jax.fed import attacks
from fmfl_jax.fed.algorithms.lora.ffa_lora import freeze_a
from fmfl_jax.fed.algorithms.lora.flora import Target, split_params
from fmfl_jax.fed.algorithms.partial import join_ranks, split_ranks
from fmfl_jax.fed.core.types import Params
from fmfl_jax.fed.privacy.dp_sgd import MaskedBatch
from fmfl_jax.models.llama import Merge
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import projections
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import Split


class ClientData(NamedTuple):
    """windows: int32 [W, T+1]. client_indices: for each client, the numbers of its windows."""

    windows: np.ndarray
    client_indices: list[np.ndarray]

    @property
    def sizes(self) -> np.ndarray:
        """int [num_clients], windows of each."""
        return np.asarray([len(indices) for indices in self.client_indices])


class View(NamedTuple):
    """A model as an algorithm sees it. merge(params, frozen) -> the model that is differentiated; evaluate: the same of
    what `algorithm.shared` or `.personal` gives. tuned(params) -> these in the names of the fine-tuning method, for
    export. targets: FLoRA's."""

    merge: Merge
    trainable: Params
    frozen: dict
    evaluate: Merge
    tuned: Callable[[Params], dict]
    targets: tuple[Target, ...] = ()


def view_of(fed: FederationConfig, model: Split, model_config: LlamaConfig) -> View:
    """FFA-LoRA freezes the A's; FLoRA trains beside the adapted base matrices, in float32; a private LoRA has its last
    ranks under other names."""
    if fed.algorithm.lora_view == "b_only":
        merge, trainable, frozen = freeze_a(model.merge, model.trainable, model.frozen)
        fixed = {name: value for name, value in model.trainable.items() if name not in trainable}
        return View(merge, trainable, frozen, merge, lambda params: params | fixed)
    if fed.algorithm.lora_view == "with_base":
        return _flora_view(model, model_config)
    if fed.personalization is not None and fed.personalization.private_rank:
        shared, private = split_ranks(model.trainable, fed.personalization.private_rank)
        merge = lambda params, frozen: model.merge(join_ranks(params), frozen)
        return View(merge, shared | private, model.frozen, merge, join_ranks)
    return View(model.merge, model.trainable, model.frozen, model.merge, lambda params: params)


def _flora_view(model: Split, model_config: LlamaConfig) -> View:
    targets = []
    for name, p in projections(model_config).items():
        stem = f"{p.matrix}.lora.{name.rpartition('.')[2]}"
        if f"{stem}.lora_a" in model.trainable:
            columns = p.columns
            targets.append(
                Target(f"{stem}.lora_a", f"{stem}.lora_b", f"{p.matrix}.weight", columns.start, columns.stop)
            )
    targets = tuple(targets)
    names = {target.weight for target in targets}
    weights = {name: model.frozen[name].astype("float32") for name in names}
    frozen = {name: value for name, value in model.frozen.items() if name not in names}

    def evaluate(params, frozen):
        factors, weights = split_params(params, targets)
        return model.merge(factors, frozen | weights)

    return View(model.merge, model.trainable | weights, frozen, evaluate, lambda params: params, targets)


def make_learner(view: View, fine_tuning: FineTuning, *, num_layers: int, remat: bool) -> Learner:
    """The mean loss per token of a batch of windows."""

    def loss_fn(trainable, frozen, windows, key):
        return token_nll(view.merge(trainable, frozen), windows, dropout_key=key, remat=remat).mean()

    prefixes = [f"layers.{i}." for i in range(num_layers)]
    return Learner(
        loss_fn=loss_fn,
        trainable=view.trainable,
        learning_rate=fine_tuning.learning_rate,
        layers=tuple(tuple(name for name in view.trainable if name.startswith(prefix)) for prefix in prefixes),
        targets=view.targets,
        scale=fine_tuning.peft.scale if isinstance(fine_tuning.peft, LoraConfig) else 1.0,
    )


def make_source(
    fed: FederationConfig, rounds: RoundsConfig, data: ClientData, vocab_size: int, *, server_windows: np.ndarray
) -> Source:
    """The clients' windows. server_windows: int32 [W, T+1], the server's data, for aggregators that compare with
    them."""
    extras = client_extras(fed, rounds, len(data.client_indices))
    batches = _poisson_batches(rounds, data) if "dp_sgd" in fed.privacy else window_batches(rounds, data)
    if isinstance(fed.attack, LabelFlip):
        batches = _in_cipher(batches, extras["malicious"], vocab_size, rounds.seed)
    server_batches = None
    if isinstance(fed.aggregator, FLTrust):
        of_server = window_batches(rounds, ClientData(server_windows, [np.arange(len(server_windows))]))
        server_batches = lambda r: of_server(np.zeros(1, np.int64), r)[0][0]
    return Source(
        sizes=data.sizes,
        batches=batches,
        extras=extras,
        server_batches=server_batches,
        tokens_per_client=rounds.local_steps * rounds.batch_size * (data.windows.shape[1] - 1),
    )


def window_batches(rounds: RoundsConfig, data: ClientData) -> Batches:
    """local_steps x batch_size of each client's windows, int32 [K, S, B, T+1]."""

    def batches(client_ids, r):
        drawn = client_batches(
            data.windows,
            data.client_indices,
            client_ids=client_ids,
            round=r,
            seed=rounds.seed,
            local_steps=rounds.local_steps,
            batch_size=rounds.batch_size,
        )
        return drawn.tokens, None

    return batches


def _poisson_batches(rounds: RoundsConfig, data: ClientData) -> Batches:
    """MaskedBatch of Poisson samples, for private examples."""
    capacity = poisson_capacity(
        data.sizes.tolist(), batch_size=rounds.batch_size, num_steps=rounds.num_rounds * rounds.local_steps
    )

    def batches(client_ids, r):
        drawn = poisson_client_batches(
            data.windows,
            data.client_indices,
            client_ids=client_ids,
            round=r,
            seed=rounds.seed,
            local_steps=rounds.local_steps,
            batch_size=rounds.batch_size,
            capacity=capacity,
        )
        return MaskedBatch(drawn.tokens, drawn.mask), None

    return batches


def _in_cipher(batches: Batches, malicious: np.ndarray, vocab_size: int, seed: int) -> Batches:
    """The malicious clients' text in a cipher."""

    def ciphered(client_ids, r):
        made, num_steps = batches(client_ids, r)
        permute = lambda tokens: attacks.permute_vocabulary(tokens, malicious[client_ids], vocab_size, seed)
        if isinstance(made, MaskedBatch):
            return made._replace(examples=permute(made.examples)), num_steps
        return permute(made), num_steps

    return ciphered
