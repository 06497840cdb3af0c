"""The case study of the paper (Table II): LLaMA + {adapter, LoRA, prompt} x {fp, AWQ int4} over many clients.

A base model (a checkpoint, or one pre-trained on the spot) is quantized, tuned in federated rounds by every asked-for
combination, and measured: fine-tuning time per client and round, latency per token, perplexity, memory, bytes sent.
Every stage leaves its result in the output folder, so the same command continues a run that was stopped.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data import corpora, partition
from fmfl_jax.data.batches import EvaluationWindows, TokenWindows, evaluation_windows, token_windows
from fmfl_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, model_tokenizer
from fmfl_jax.experiment.air import predicted_s, timeline
from fmfl_jax.experiment.air import start as start_air
from fmfl_jax.experiment.config import CaseStudyConfig, PartitionConfig, check_contexts
from fmfl_jax.experiment.evaluate import make_evaluator
from fmfl_jax.experiment.federation import Federation, make_federation
from fmfl_jax.experiment.latency import decode_latency
from fmfl_jax.experiment.pretrain import pretrain
from fmfl_jax.experiment.records import write_json
from fmfl_jax.experiment.rounds import ClientData, RoundsResult, open_store, run_rounds
from fmfl_jax.experiment.workload import make_air
from fmfl_jax.fed.sharding import replicate
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params, is_weight, num_bytes, param_specs
from fmfl_jax.models.quantize import quantize, with_group_size
from fmfl_jax.peft.export import save_peft
from fmfl_jax.peft.split import FullConfig, NoPeftConfig, PeftConfig, split
from fmfl_jax.progress import Progress


class Base(NamedTuple):
    """The model before quantization and tuning, and the texts. calib: int32 [W, T] for AWQ; root: int32 [W, T+1], the
    same windows as the server's own data."""

    config: LlamaConfig
    params: dict
    tokenizer: Tokenizer
    train: TokenWindows
    eval: EvaluationWindows
    calib: np.ndarray
    root: np.ndarray


_MOST_SAVED = 100  # clients whose own models are exported
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
) -> list[dict]:
    """Runs what is missing of the case study in `directory` and returns the table's rows.

    Each row is also in directory/setups/NAME/row.json, with the tuned parameters in the same folder's peft/ and, with a
    network, the last round's timeline.json. on_evaluation: see `run_rounds`.
    """
    directory = pathlib.Path(directory)
    base = prepare_base(config, directory, say)
    indices = deal(config.partition, base.train, seed=config.rounds.seed)
    data = ClientData(base.train.windows, indices)
    say(
        f"{len(indices)} clients hold {min(map(len, indices))} to {max(map(len, indices))} windows of "
        f"{config.text.seq_len} tokens; {int(base.eval.mask.sum())} tokens for evaluation"
    )
    rows = []
    for weights in config.weights:
        setups = {name: directory / "setups" / f"{name}-{weights}" for name in config.tunings}
        done = {
            name: json.loads((folder / "row.json").read_text(encoding="utf-8"))
            for name, folder in setups.items()
            if (folder / "row.json").exists()
        }
        if len(done) == len(setups):
            rows += done.values()
            continue
        params = replicate(quantized(config, base, weights, say), copy=False)
        plain = split(base.config, params, NoPeftConfig(), key=jax.random.key(0))
        before = make_evaluator(plain.merge, base.eval)(plain.trainable, plain.frozen)
        shown = "random" if config.random_init else f"perplexity {before.ppl:.3f} before tuning"
        say(f"{weights}: {shown}, weights {num_bytes(params):,} bytes")
        for name, folder in setups.items():
            if name not in done:
                row = run_setup(config, base, data, params, name, weights, folder, on_evaluation)
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


def prepare_base(config: CaseStudyConfig, directory: pathlib.Path, say) -> Base:
    """Loads or pre-trains the base model and cuts the texts into windows."""
    text = config.text
    if config.checkpoint is not None:
        checkpoint = open_checkpoint(config.checkpoint, dtype=config.dtype, dequantize=config.dequantize)
        check_contexts(config, checkpoint.config)
    if text.train is None:
        public, private = corpora.split_documents(corpora.python_topics(), 0.5, seed=0)
        train, held_out = corpora.split_documents(private, 0.9, seed=1)
        calib = public
    else:
        train, held_out = corpora.load_documents(text.train), corpora.load_documents(text.eval)
        public, calib = train, train
    if text.calib is not None:
        calib = corpora.load_documents(text.calib)
    saved = directory / "base"
    if config.checkpoint is not None:
        model = dataclasses.replace(checkpoint.config, dtype=config.dtype)
        params = dict(checkpoint.params)
        tokenizer = model_tokenizer(
            config.tokenizer or checkpoint.tokenizer_path, vocab_size=model.vocab_size, model_name=config.checkpoint
        )
    else:
        tokenizer = byte_tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
        model = config.model
        if not config.random_init and not saved.exists():
            windows = _windows(tokenizer, public, text.seq_len).windows
            params = pretrain(model, config.pretrain, windows, directory=directory / "pretrain")
            save_checkpoint(saved, model, params)
        if config.random_init:
            params = init_params(model, jax.random.key(config.pretrain.seed), dtype=config.dtype)
        else:
            params = load_checkpoint(saved, dtype=config.dtype).params
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {model.vocab_size}"
        )
    held_out = evaluation_windows(tokenizer, held_out, text.seq_len, add_bos=True, add_eos=True)
    if text.max_eval_windows is not None:
        held_out = _first_windows(held_out, text.max_eval_windows)
    calib = _windows(tokenizer, calib, text.seq_len).windows
    order = np.random.default_rng(config.rounds.seed).permutation(len(calib))[: text.calib_windows]
    say(
        f"base model: {sum(x.size for x in params.values()):,} parameters, {model.num_layers} layers; "
        f"tokenizer {tokenizer.name}"
    )
    own = calib[order]
    return Base(model, params, tokenizer, _windows(tokenizer, train, text.seq_len), held_out, own[:, :-1], own)


def deal(config: PartitionConfig, train: TokenWindows, *, seed: int) -> list[np.ndarray]:
    """Window numbers per client."""
    num_windows, n = len(train.windows), config.num_clients
    match config.kind:
        case "random":
            return partition.random_partition(num_windows, n, rng=seed)
        case "dirichlet":
            return partition.dirichlet_partition(train.document_id, n, alpha=config.alpha, rng=seed)
        case "document":
            return partition.document_partition(train.document_id, n, rng=seed)
        case "quantity":
            return partition.quantity_skew_partition(
                num_windows, n, distribution="lognormal", skew=config.skew, rng=seed
            )


def quantized(config: CaseStudyConfig, base: Base, weights: str, say: Callable[[str], None]) -> dict:
    """The base parameters in the format `weights`; a checkpoint that is 4-bit already stays as it is."""
    packed = any(map(is_weight, base.params.values()))
    if weights == "fp" and packed:
        raise ValueError(
            f"{config.checkpoint} holds 4-bit weights: weights=fp needs them dequantized, or use weights=awq"
        )
    if weights == "fp" or packed:
        return base.params
    quant = with_group_size(dataclasses.replace(config.quant, method=weights), base.config, say)
    progress = Progress(base.config.num_layers, label=weights, unit="block")
    params = quantize(base.config, base.params, base.calib, quant, on_block=lambda done: progress.advance())
    progress.close()
    return params


def run_setup(
    config: CaseStudyConfig,
    base: Base,
    data: ClientData,
    params: dict,
    name: str,
    weights: str,
    folder: pathlib.Path,
    on_evaluation: Callable[[dict], None] | None = None,
) -> dict:
    """Tunes and measures one combination; the row of the table without its first three columns."""
    tuning, rounds = config.tunings[name], config.rounds
    model = split(base.config, params, tuning.peft, key=jax.random.key(rounds.seed))
    federation = make_federation(config, tuning, model, base.config, data, root=base.root)
    parts = federation.parts
    if config.air is not None:
        parts = dataclasses.replace(
            parts,
            air=make_air(
                config.air,
                base.config,
                params,
                model.trainable,
                tuning.peft,
                num_clients=config.partition.num_clients,
                local_steps=rounds.local_steps,
                batch_size=rounds.batch_size,
                seq_len=config.text.seq_len,
                uplink_bits=federation.uplink_bits,
                downlink_bits=federation.downlink_bits,
                remat=config.remat,
            ),
        )
        if parts.turns is not None:  # asynchronous: the network gives the durations, the schedule who is heard
            network = start_air(parts.air, rounds.seed)
            durations = predicted_s(parts.air, network, rounds.cohort_size)
            parts = dataclasses.replace(
                parts, air=None, turns=dataclasses.replace(parts.turns, durations_s=durations, start_s=network.seconds)
            )
    result = run_rounds(
        rounds,
        federation.algorithm,
        federation.trainable,
        federation.frozen,
        federation.data,
        make_evaluator(federation.merge, base.eval),
        directory=folder,
        label=f"{name} x {weights}",
        parts=parts,
        on_evaluation=on_evaluation,
    )
    shared, last = federation.algorithm.shared(result.state.params), result.history[-1]
    round_s = [record["round_s"] for record in result.history if "round_s" in record]
    prompt = base.eval.windows[0, : min(16, config.text.seq_len)]
    latency = decode_latency(base.config, federation.merge, shared, federation.frozen, prompt)
    tuned = federation.tuned(shared)
    if jax.process_index() == 0:
        save_tuned(folder, tuning.peft, tuned, federation.frozen, base, base_model_name=config.checkpoint or "base")
    if federation.algorithm.personal is not None and parts.evaluate_clients is not None:
        save_personal(
            folder,
            tuning.peft,
            federation,
            result.state.params,
            base,
            step=rounds.num_rounds,
            base_model_name=config.checkpoint or "base",
        )
    if parts.air is not None and result.outcome is not None:
        write_json(folder / "timeline.json", timeline(parts.air, result.outcome))
    return (
        {
            "base_params": sum(math.prod(spec.shape) for spec in param_specs(base.config).values()),
            "trainable_params": sum(x.size for x in model.trainable.values()),
            "fine_tune_s_per_client_round": float(np.median(round_s)) / rounds.cohort_size,
            "fine_tune_repeats": len(round_s),
            "latency_ms_per_token": latency.ms_per_token,
            "latency_repeats": latency.repeats,
            "ppl": last["ppl"],
            "bits_per_byte": last["bits_per_byte"],
            "weight_bytes": num_bytes(params),
            "uplink_bytes_per_client_round": float(np.mean(federation.uplink_bits)) / 8,
            "downlink_bytes_per_client_round": federation.downlink_bits / 8,
            "peak_memory_bytes": result.memory_bytes,
        }
        | {name: last[name] for name in FEDERATION_COLUMNS if name in last}
        | ({} if parts.air is None else air_columns(result, rounds.cohort_size))
    )


def save_personal(
    folder: pathlib.Path,
    peft: PeftConfig,
    federation: Federation,
    params: dict,
    base: Base,
    *,
    step: int,
    base_model_name: str,
) -> None:
    """folder/personal/CLIENT: every client's own model, in Hugging Face PEFT's format; of the first 100 clients."""
    num_clients = len(federation.data.client_indices)
    if isinstance(peft, FullConfig):
        return
    store = open_store(federation.algorithm, federation.trainable, num_clients, folder, step)
    for client in range(min(num_clients, _MOST_SAVED)):
        state = jax.tree.map(lambda x: x[0], store.gather([client]))
        tuned = federation.tuned(federation.algorithm.personal(jax.device_get(params), state))
        save_peft(
            folder / "personal" / str(client), peft, jax.device_get(tuned), base.config, base_model_name=base_model_name
        )


def air_columns(result: RoundsResult, cohort_size: int) -> dict:
    """What a network adds to a row: means over the rounds, totals, and the delivery of the base model."""
    rounds = result.history[1:]
    mean = {
        name: float(np.mean([record[name] for record in rounds]))
        for name in ("latency_s", "energy_j", "participation", "outage", "cannot_hold")
    }
    return {
        "air_s_per_round": mean["latency_s"],
        "energy_j_per_client_round": mean["energy_j"] / cohort_size,
        "participation": mean["participation"],
        "outage": mean["outage"],
        "cannot_hold": mean["cannot_hold"],
        "base_delivery_s": sum(record["base_delivery_s"] for record in result.history),
        "base_unreached": rounds[-1]["base_unreached"],
    } | {name: rounds[-1][name] for name in ("seconds", "joules", "total_uplink_bytes")}


def save_tuned(
    folder: pathlib.Path, peft: PeftConfig, tuned: dict, frozen: dict, base: Base, *, base_model_name: str
) -> None:
    """folder/peft in Hugging Face PEFT's format, or folder/model where the base's own parameters were trained."""
    if any(name in param_specs(base.config) for name in tuned):
        changed = {name: value for name, value in (frozen | tuned).items() if name in param_specs(base.config)}
        save_checkpoint(folder / "model", base.config, changed)
    else:
        save_peft(folder / "peft", peft, jax.device_get(tuned), base.config, base_model_name=base_model_name)


def _windows(tokenizer: Tokenizer, documents: list[str], seq_len: int) -> TokenWindows:
    return token_windows(tokenizer, documents, seq_len, add_bos=True, add_eos=True)


def _first_windows(data: EvaluationWindows, count: int) -> EvaluationWindows:
    """The first windows; the bytes are those of the whole text in proportion to the tokens."""
    share = data.mask[:count].sum() / data.mask.sum()
    return EvaluationWindows(data.windows[:count], data.mask[:count], round(data.num_bytes * float(share)))
