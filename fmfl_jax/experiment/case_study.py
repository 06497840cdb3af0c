"""The case study of the paper (Table II): LLaMA + {adapter, LoRA, prompt} x {fp, AWQ int4} over many clients.

A base model (a checkpoint, or one pre-trained on the spot) is quantized, fine-tuned in federated rounds by every
asked-for combination, and measured: fine-tuning time per client and round, latency per token, perplexity, memory, bytes
sent. Every stage leaves its result in the output folder, so the same command continues a run that was stopped.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fmfl_jax.data.batches import EvaluationWindows
from fmfl_jax.experiment.base import Base, deal, prepare_base, quantized
from fmfl_jax.experiment.build.contributions import Loss, totals
from fmfl_jax.experiment.build.federation import Federation, make_federation
from fmfl_jax.experiment.build.language_model import ClientData, View, make_learner, make_source, view_of
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, FineTuning
from fmfl_jax.experiment.config.client_counts import described
from fmfl_jax.experiment.evaluation.latency import decode_latency
from fmfl_jax.experiment.evaluation.per_client import hold_out, make_client_evaluator
from fmfl_jax.experiment.evaluation.perplexity import Evaluation, make_evaluator
from fmfl_jax.experiment.loop.market import payment_columns
from fmfl_jax.experiment.loop.records import write_json
from fmfl_jax.experiment.loop.rounds import (
    Callback,
    Callbacks,
    Elsewhere,
    RoundsResult,
    Source,
    open_store,
    run_rounds,
)
from fmfl_jax.experiment.network.rounds import NetworkJob, timeline
from fmfl_jax.experiment.network.workload import make_job
from fmfl_jax.experiment.report.delivery import delivery_rows, delivery_table
from fmfl_jax.fed.core.round import Round
from fmfl_jax.fed.core.types import Execution
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import num_bytes, num_params, param_specs
from fmfl_jax.parallel import model_mesh, replicate
from fmfl_jax.peft.export import save_peft
from fmfl_jax.peft.split import FullConfig, NoPeftConfig, PeftConfig, Split, split
from fmfl_jax.peft.tensor_parallel import split_cut

_MOST_SAVED = 100  # clients whose personal models are exported
_HELD_OUT, _MOST_HELD_OUT = 0.1, 16  # of a client's windows, to evaluate its personal model on
_MOST_VALUED = 64  # windows of the evaluation text that contributions are measured on: many models are
# Of the last round's record, in the row of a setup where the federation has them.
FEDERATION_COLUMNS = (
    "epsilon",
    "delta",
    "aggregation_bias",
    "client_ppl_mean",
    "client_ppl_worst_decile",
    "client_nats_std",
    "client_shared_ppl_mean",
    "secure_bytes_up",
    "sim_seconds",
    "entropy_bits",
)


def run_case_study(
    config: CaseStudyConfig,
    directory: str | pathlib.Path,
    *,
    say: Callable[[str], None] = print,
    on_evaluation: Callable[[dict], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> list[dict]:
    """Runs what is missing of the case study in `directory` and returns the table's rows.

    Each row is also in directory/setups/NAME/row.json, with the tuned parameters in the same folder's peft/ and, with a
    network, the last round's timeline.json. on_evaluation, elsewhere: see `run_rounds`.
    """
    directory = pathlib.Path(directory)
    base = prepare_base(config, directory, say)
    indices = deal(config.partition, base.train, seed=config.rounds.seed)
    data = ClientData(base.train.windows, indices)
    say(
        f"{len(indices)} clients hold {min(map(len, indices))} to {max(map(len, indices))} windows of "
        f"{config.text.seq_len} tokens; {int(base.eval.mask.sum())} tokens for evaluation"
    )
    counted = {"num_clients": len(indices), "cohort_size": config.rounds.cohort_size}
    for line in described(config.client_counts(), config.federation, **counted):
        say(line)
    rows = []
    for weights in config.weights:
        setups = {name: directory / "setups" / f"{name}-{weights}" for name in config.fine_tuning}
        done = {
            name: json.loads((folder / "row.json").read_text(encoding="utf-8"))
            for name, folder in setups.items()
            if (folder / "row.json").exists()
        }
        if len(done) == len(setups):
            rows += done.values()
            continue
        formed = quantized(config, base, weights, say)
        params = formed.params if config.model_parallel != 1 else replicate(formed.params, copy=False)
        before = _before(config, formed, params)
        shown = "random" if config.random_init else f"perplexity {before.ppl:.3f} before fine-tuning"
        say(f"{weights}: {shown}, weights {num_bytes(params):,} bytes")
        for name, folder in setups.items():
            if name not in done:
                row = run_setup(config, formed, data, params, name, weights, folder, say, on_evaluation, elsewhere)
                done[name] = {"weights": weights, "peft": name, "ppl_before": before.ppl} | row
                if config.random_init:
                    done[name] |= {"ppl_before": None, "ppl": None, "bits_per_byte": None}
                write_json(folder / "row.json", done[name])
                shown = "" if config.random_init else f"perplexity {row['ppl']:.3f}, "
                say(
                    f"{name} x {weights}: {shown}{row['fine_tune_s_per_client_round']:.4f} s per client and round, "
                    f"{row['latency_ms_per_token']:.3f} ms per token"
                )
            rows.append(done[name])
    return rows


def _before(config: CaseStudyConfig, base: Base, params: dict) -> Evaluation:
    """Of the base as it is."""
    mesh = mesh_of(config)
    plain = _split(base, params, NoPeftConfig(), mesh, seed=0)
    return make_evaluator(plain.merge, base.eval, mesh=mesh)(plain.trainable, plain.frozen)


def mesh_of(config: CaseStudyConfig) -> Mesh | None:
    """Where the model is cut; None where it is whole on every device. Raises ValueError as `model_mesh`, and with
    several processes."""
    if config.model_parallel == 1:
        return None
    if jax.process_count() > 1:
        raise ValueError(f"model_parallel={config.model_parallel} works in one process: there are several")
    return model_mesh(config.model_parallel)


def _split(
    base: Base, params: dict, peft: PeftConfig, mesh: Mesh | None, *, seed: int, prompt_start: np.ndarray | None = None
) -> Split:
    """params: on the devices, or anywhere where there is a mesh to cut them over. prompt_start: see `split`."""
    make = split if mesh is None else functools.partial(split_cut, mesh=mesh)
    return make(base.config, params, peft, key=jax.random.key(seed), prompt_start=prompt_start)


def _prompt_start(config: CaseStudyConfig, base: Base) -> np.ndarray | None:
    """int32 [n] tokens of the server's text, where a soft prompt does better from the first step than from random
    tokens (docs/results/case_study.md). None where that text is the clients' and they were promised privacy: everyone
    could read it in the prompt."""
    of_clients = config.text.train is not None and config.text.calib is None
    return None if of_clients and config.federation.privacy else base.root.reshape(-1)


class Setup(NamedTuple):
    """One combination before its rounds. held: each client's windows that it is evaluated on, where it has a personal
    model. job: the network's, None without. mesh: see `mesh_of`."""

    model: Split
    view: View
    federation: Federation
    source: Source
    held: ClientData | None
    job: NetworkJob | None
    mesh: Mesh | None


def form_setup(config: CaseStudyConfig, base: Base, data: ClientData, params: dict, name: str) -> Setup:
    """A combination from its parts. params: the formed base's, on the devices."""
    fine_tuning, rounds, fed = config.fine_tuning[name], config.rounds, config.federation
    mesh, held = mesh_of(config), None
    start = _prompt_start(config, base)
    model = _split(base, params, fine_tuning.peft, mesh, seed=rounds.seed, prompt_start=start)
    if fed.keeps_personal_models:
        data, held = hold_out(data, _HELD_OUT, most=_MOST_HELD_OUT, seed=rounds.seed)
    view = view_of(fed, model, base.config)
    job = network_job(config, base, params, model, fine_tuning)
    federation = make_federation(
        fed,
        rounds,
        config.server,
        make_learner(view, fine_tuning, num_layers=base.config.num_layers, remat=config.remat),
        sizes=data.sizes,
        execution=Execution(clients_per_pass=rounds.clients_per_pass, mesh=mesh),
        job=job,
        loss=None if fed.contribution is None else _contribution_loss(view, base, mesh),
    )
    source = make_source(fed, rounds, data, base.config.vocab_size, server_windows=base.root)
    return Setup(model, view, federation, source, held, job, mesh)


def run_setup(
    config: CaseStudyConfig,
    base: Base,
    data: ClientData,
    params: dict,
    name: str,
    weights: str,
    folder: pathlib.Path,
    say: Callable[[str], None],
    on_evaluation: Callable[[dict], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict:
    """Fine-tunes and measures one combination; the row of the table without its first three columns."""
    setup = form_setup(config, base, data, params, name)
    fine_tuning, rounds = config.fine_tuning[name], config.rounds
    model, view, federation, held = setup.model, setup.view, setup.federation, setup.held
    if setup.job is not None and setup.job.delivery is not None:
        compared = delivery_rows(setup.job, params, rounds.seed)
        write_json(folder / "delivery.json", compared)
        say(delivery_table(compared))
    algorithm = federation.round.algorithm
    result = run_rounds(
        rounds,
        federation.round,
        view.trainable,
        view.frozen,
        setup.source,
        federation.schedule,
        Callbacks(
            after_round=federation.after_round,
            at_evaluation=(*_evaluations(setup, base), *federation.at_evaluation),
            on_evaluation=on_evaluation,
            say=say,
        ),
        directory=folder,
        label=f"{name} x {weights}",
        elsewhere=elsewhere,
    )
    shared = algorithm.shared(result.state.params)
    prompt = base.eval.windows[0, : min(16, config.text.seq_len)]
    latency = decode_latency(base.config, view.evaluate, shared, view.frozen, prompt, mesh=setup.mesh)
    if jax.process_index() == 0:
        save_tuned(config, folder, fine_tuning.peft, view.tuned(shared), view.frozen, base)
    if held is not None:
        save_personal(config, folder, fine_tuning.peft, view, federation.round, result, base)
    if federation.job is not None and result.outcome is not None:
        write_json(folder / "timeline.json", timeline(federation.job, result.outcome))
    row = {
        "base_params": num_params(base.config),
        "trainable_params": sum(x.size for x in model.trainable.values()),
        "latency_ms_per_token": latency.ms_per_token,
        "latency_repeats": latency.repeats,
        "weight_bytes": num_bytes(params),
    }
    row |= config.client_counts().record() | round_columns(rounds.cohort_size, federation, result)
    if config.federation.contribution is not None:
        counted = {"num_clients": len(data.sizes), "seed": rounds.seed}
        row["contributions"] = totals(config.federation.contribution, result.history, **counted).tolist()
    return row


def _contribution_loss(view: View, base: Base, mesh: Mesh | None) -> Loss:
    """Nats a token on the first windows of the evaluation text."""
    windows, mask = base.eval.windows[:_MOST_VALUED], base.eval.mask[:_MOST_VALUED]
    evaluate = make_evaluator(view.evaluate, EvaluationWindows(windows, mask, base.eval.num_bytes), mesh=mesh)
    return lambda params, frozen: evaluate(params, frozen).nats_per_token


def _evaluations(setup: Setup, base: Base) -> tuple[Callback, ...]:
    """The shared model on the evaluation text and, where clients have personal ones, each on its client's."""
    evaluated, algorithm = setup.view.evaluate, setup.federation.round.algorithm
    perplexity = make_evaluator(evaluated, base.eval, mesh=setup.mesh)
    shared = lambda seen: perplexity(algorithm.shared(seen.state.params), seen.frozen)._asdict()
    return (shared,) if setup.held is None else (shared, make_client_evaluator(evaluated, algorithm, setup.held))


def network_job(
    config: CaseStudyConfig, base: Base, params: dict, model: Split, fine_tuning: FineTuning
) -> NetworkJob | None:
    """The network and what this fine-tuning asks of it; None without a network."""
    if config.network is None:
        return None
    return make_job(
        config.network,
        base.config,
        params,
        model.trainable,
        fine_tuning.peft,
        num_clients=config.partition.num_clients,
        local_steps=config.rounds.local_steps,
        batch_size=config.rounds.batch_size,
        seq_len=config.text.seq_len,
        remat=config.remat,
    )


def round_columns(cohort_size: int, federation: Federation, result: RoundsResult) -> dict:
    """What the rounds add to a row: the last evaluation, time, traffic, memory, and the network's figures."""
    last, round_s = result.history[-1], [record["round_s"] for record in result.history if "round_s" in record]
    columns = {
        "fine_tune_s_per_client_round": float(np.median(round_s)) / cohort_size,
        "fine_tune_repeats": len(round_s),
        "ppl": last["ppl"],
        "bits_per_byte": last["bits_per_byte"],
        "uplink_bytes_per_client_round": float(np.mean(federation.traffic.uplink_bits)) / 8,
        "downlink_bytes_per_client_round": federation.traffic.downlink_bits / 8,
        "peak_memory_bytes": result.memory_bytes,
    } | {name: last[name] for name in FEDERATION_COLUMNS if name in last}
    return columns if federation.job is None else columns | network_columns(result)


def save_personal(
    config: CaseStudyConfig,
    folder: pathlib.Path,
    peft: PeftConfig,
    view: View,
    parts: Round,
    result: RoundsResult,
    base: Base,
) -> None:
    """folder/personal/CLIENT: each client's personal model, in Hugging Face PEFT's format; of the first 100 clients."""
    if isinstance(peft, FullConfig):
        return
    params, num_clients = jax.device_get(result.state.params), config.partition.num_clients
    store = open_store(parts, view.trainable, num_clients, folder, config.rounds.num_rounds)
    personal = parts.algorithm.personal
    assert store is not None and personal is not None  # there are personal models, and they are kept
    for client in range(min(num_clients, _MOST_SAVED)):
        state = jax.tree.map(lambda x: x[0], store.gather([client]))
        tuned = jax.device_get(view.tuned(personal(params, state.algorithm)))
        name = config.checkpoint or "base"
        if jax.process_index() == 0:
            save_peft(folder / "personal" / str(client), peft, tuned, base.config, base_model_name=name)
    store.close()


def network_columns(result: RoundsResult) -> dict:
    """What a network adds to a row: means over the rounds, totals, the delivery of the base model, and payments."""
    rounds = result.history[1:]
    clients = float(np.mean([len(record["clients"]) for record in rounds]))  # an incentive takes on fewer or more
    mean = {
        name: float(np.mean([record[name] for record in rounds]))
        for name in ("latency_s", "energy_j", "participation", "outage", "cannot_hold")
    }
    return (
        {
            "air_s_per_round": mean["latency_s"],
            "energy_j_per_client_round": mean["energy_j"] / max(clients, 1.0),
            "participation": mean["participation"],
            "outage": mean["outage"],
            "cannot_hold": mean["cannot_hold"],
            "base_delivery_s": sum(record["base_delivery_s"] for record in result.history),
            "base_unreached": rounds[-1]["base_unreached"],
        }
        | {name: rounds[-1][name] for name in ("seconds", "joules", "total_uplink_bytes")}
        | payment_columns(rounds)
    )


def save_tuned(
    config: CaseStudyConfig, folder: pathlib.Path, peft: PeftConfig, tuned: dict, frozen: dict, base: Base
) -> None:
    """folder/peft in Hugging Face PEFT's format, or folder/model where the base's own parameters were trained."""
    if any(name in param_specs(base.config) for name in tuned):
        changed = {name: value for name, value in (frozen | tuned).items() if name in param_specs(base.config)}
        save_checkpoint(folder / "model", base.config, changed)
    else:
        name = config.checkpoint or "base"
        save_peft(folder / "peft", peft, jax.device_get(tuned), base.config, base_model_name=name)
