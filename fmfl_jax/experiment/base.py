"""What a case study starts from: the base model, the texts cut into windows, their clients, the quantized weights."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fmfl_jax import streams
from fmfl_jax.config import LlamaConfig
from fmfl_jax.data import corpora, partition
from fmfl_jax.data.batches import EvaluationWindows, TokenWindows, evaluation_windows, token_windows
from fmfl_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, model_tokenizer
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, check_model
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.pretrain import pretrain
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params, is_weight, num_params
from fmfl_jax.models.quantize import quantize, quantize_head, with_group_size
from fmfl_jax.progress import Progress


class Base(NamedTuple):
    """The model before quantization and fine-tuning, and the texts. calib: int32 [W, T] for AWQ; root: int32 [W, T+1],
    the same windows as the data that the server holds."""

    config: LlamaConfig
    params: dict
    tokenizer: Tokenizer
    train: TokenWindows
    eval: EvaluationWindows
    calib: np.ndarray
    root: np.ndarray


class _Texts(NamedTuple):
    """Documents. public: to pre-train on. train, held_out: the clients', and to evaluate on. calib: for AWQ."""

    public: list[str]
    train: list[str]
    held_out: list[str]
    calib: list[str]


def prepare_base(config: CaseStudyConfig, directory: pathlib.Path, say: Callable[[str], None]) -> Base:
    """Loads or pre-trains the base model and cuts the texts into windows."""
    text, checkpoint = config.text, None
    if config.checkpoint is not None:
        checkpoint = open_checkpoint(config.checkpoint, dtype=config.dtype, dequantize=config.dequantize)
        check_model(config, checkpoint.config)
    documents = _read_texts(text)
    if checkpoint is None:
        model, params, tokenizer = _make_model(config, documents.public, directory)
    else:
        model, params = dataclasses.replace(checkpoint.config, dtype=config.dtype), dict(checkpoint.params)
        tokenizer = model_tokenizer(
            config.tokenizer or checkpoint.tokenizer_path,
            vocab_size=model.vocab_size,
            model_name=str(config.checkpoint),
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {model.vocab_size}"
        )
    held_out = evaluation_windows(tokenizer, documents.held_out, text.seq_len, add_bos=True, add_eos=True)
    if text.max_eval_windows is not None:
        held_out = _first_windows(held_out, text.max_eval_windows)
    calib = _windows(tokenizer, documents.calib, text.seq_len).windows
    order = streams.host_rng(streams.CALIBRATION, config.rounds.seed).permutation(len(calib))[: text.calib_windows]
    say(f"base model: {num_params(model):,} parameters, {model.num_layers} layers; tokenizer {tokenizer.name}")
    root = calib[order]
    train = _windows(tokenizer, documents.train, text.seq_len)
    return Base(model, params, tokenizer, train, held_out, root[:, :-1], root)


def _read_texts(text: TextConfig) -> _Texts:
    if text.train is None or text.eval is None:  # TextConfig refuses one without the other
        public, clients = corpora.split_documents(corpora.python_topics(), 0.5, seed=0)
        train, held_out = corpora.split_documents(clients, 0.9, seed=1)
        calib = public
    else:
        train, held_out = corpora.load_documents(text.train), corpora.load_documents(text.eval)
        public, calib = train, train
    if text.calib is not None:
        calib = corpora.load_documents(text.calib)
    return _Texts(public, train, held_out, calib)


def _make_model(
    config: CaseStudyConfig, public: list[str], directory: pathlib.Path
) -> tuple[LlamaConfig, dict, Tokenizer]:
    """The configured model, pre-trained unless that is done already, or at random."""
    model, saved = config.model, directory / "base"
    assert model is not None  # CaseStudyConfig has a model or a checkpoint
    tokenizer = byte_tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
    if config.random_init:
        return model, init_params(model, jax.random.key(config.pretrain.seed), dtype=config.dtype), tokenizer
    if not saved.exists():
        windows = _windows(tokenizer, public, config.text.seq_len).windows
        save_checkpoint(saved, model, pretrain(model, config.pretrain, windows, directory=directory / "pretrain"))
    return model, dict(load_checkpoint(saved, dtype=config.dtype).params), tokenizer


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
    raise ValueError(f"partition kind is {config.kind!r}")


def quantized(config: CaseStudyConfig, base: Base, weights: str, say: Callable[[str], None]) -> Base:
    """The base in the format `weights`; blocks that are 4-bit in the checkpoint already stay as they are. With a
    rounded head the model is not tied any more."""
    packed = any(map(is_weight, base.params.values()))
    if weights == "fp" and packed:
        raise ValueError(
            f"{config.checkpoint} holds 4-bit weights: weights=fp needs them dequantized, or use weights=awq"
        )
    if weights == "fp":
        return base
    quant, model, params = (
        with_group_size(dataclasses.replace(config.quant, method=weights), base.config, say),
        *base[:2],
    )
    if not packed:
        progress = Progress(model.num_layers, label=weights, unit="block")
        params = quantize(model, params, base.calib, quant, on_block=lambda done: progress.advance())
        progress.close()
    if config.head != "fp":
        bits = 8 if config.head == "int8" else quant.bits
        model, params = quantize_head(model, params, bits=bits, group_size=quant.known_group_size)
    return base._replace(config=model, params=params)


def _windows(tokenizer: Tokenizer, documents: list[str], seq_len: int) -> TokenWindows:
    return token_windows(tokenizer, documents, seq_len, add_bos=True, add_eos=True)


def _first_windows(data: EvaluationWindows, count: int) -> EvaluationWindows:
    """The first windows; the bytes are those of the whole text in proportion to the tokens."""
    share = data.mask[:count].sum() / data.mask.sum()
    return EvaluationWindows(data.windows[:count], data.mask[:count], round(data.num_bytes * float(share)))
