"""What quantization costs in perplexity: round-to-nearest and AWQ over bits and group sizes, as a markdown table.

  python -m launch.benchmark_awq --checkpoint=DIR --text=FILE

The text must be cut into documents by <|endoftext|> (TinyStories). Calibration windows come from the first
--calib_documents; perplexity is over documents --eval_start .. --eval_start + --eval_documents - 1, each on its own:
bos, then the document's tokens, cut to the context, no eos. On TinyStories-656K, 2 busy cores: 4 minutes.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from fmfl_jax.data.batches import token_windows
from fmfl_jax.data.corpora import load_documents
from fmfl_jax.data.tokenizers import load_tokenizer
from fmfl_jax.models.formats.checkpoint import load_checkpoint
from fmfl_jax.models.llama import abstract_llama
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import from_dict
from fmfl_jax.models.quantize import quantize
from fmfl_jax.peft.split import NoPeftConfig, check_context
from fmfl_jax.progress import Progress
from fmfl_jax.quant.awq import QuantConfig
from launch import app

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint with its tokenizer.", required=True)
_TEXT = flags.DEFINE_string("text", None, "Documents for calibration and evaluation.", required=True)
_BITS = flags.DEFINE_list("bits", ["4", "3"], "Bits to try.")
_GROUP_SIZES = flags.DEFINE_list("group_sizes", ["32", "64", "128"], "Group sizes to try.")
_CALIB_DOCUMENTS = flags.DEFINE_integer("calib_documents", 1000, "Documents for calibration.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens of a calibration window.", lower_bound=1)
_NUM_WINDOWS = flags.DEFINE_integer("num_windows", 128, "Calibration windows.", lower_bound=1)
_EVAL_START = flags.DEFINE_integer("eval_start", 1000, "First document to evaluate on.", lower_bound=0)
_EVAL_DOCUMENTS = flags.DEFINE_integer("eval_documents", 120, "Documents to evaluate on.", lower_bound=1)


def main():
    checkpoint = load_checkpoint(_CHECKPOINT.value, dequantize=True)
    if checkpoint.tokenizer_path is None:
        raise ValueError(f"{_CHECKPOINT.value} carries no tokenizer")
    config, tokenizer = checkpoint.config, load_tokenizer(checkpoint.tokenizer_path)
    check_context(config, NoPeftConfig(), _SEQ_LEN.value)
    documents = load_documents(_TEXT.value)
    evaluated = documents[_EVAL_START.value : _EVAL_START.value + _EVAL_DOCUMENTS.value]
    if _EVAL_START.value < _CALIB_DOCUMENTS.value or not evaluated:
        raise ValueError(
            f"--eval_start={_EVAL_START.value} must lie from --calib_documents="
            f"{_CALIB_DOCUMENTS.value} to the text's {len(documents)} documents"
        )
    windows = token_windows(tokenizer, documents[: _CALIB_DOCUMENTS.value], _SEQ_LEN.value, add_bos=True, add_eos=True)
    order = np.random.default_rng(0).permutation(len(windows.windows))[: _NUM_WINDOWS.value]
    calib = windows.windows[order, :-1]
    perplexity = make_perplexity(config, tokenizer, evaluated)
    fp = perplexity(checkpoint.params)
    rows = [
        f"fp {fp:.2f}; {calib.size} calibration tokens; {len(evaluated)} documents",
        "",
        "| bits | group | RTN | AWQ | recovered | AWQ, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    settings = list(itertools.product(map(int, _BITS.value), map(int, _GROUP_SIZES.value)))
    for bits, group_size in Progress(len(settings), label="AWQ", unit="setting").track(settings):
        found = {}
        for method in ("rtn", "awq"):
            start = time.perf_counter()
            quant = QuantConfig(method=method, bits=bits, group_size=group_size)
            packed = quantize(config, checkpoint.params, calib, quant)
            seconds = time.perf_counter() - start
            found[method] = perplexity(packed)
        recovered = (found["rtn"] - found["awq"]) / (found["rtn"] - fp)
        rows.append(
            f"| {bits} | {group_size} | {found['rtn']:.2f} | {found['awq']:.2f} | {recovered:.0%} | {seconds:.1f} |"
        )
    app.say("\n".join(rows))


def make_perplexity(config, tokenizer, documents):
    """params -> perplexity per token over the documents, each on its own (bos first; cut to the context)."""
    graphdef, state = nnx.split(abstract_llama(config))
    nll = jax.jit(lambda params, windows: token_nll(nnx.merge(graphdef, from_dict(state, params)), windows))
    rows = [
        np.concatenate([tokenizer.opening, tokenizer.encode(d)]).astype(np.int32)[: config.max_seq_len + 1]
        for d in documents
    ]
    rows.sort(key=len)  # documents of like length share a batch, its length a multiple of 64: few shapes to compile

    def perplexity(params) -> float:
        total, count = 0.0, 0
        for start in range(0, len(rows), 4):
            batch = rows[start : start + 4]
            length = -(-(len(batch[-1]) - 1) // 64) * 64
            windows = np.zeros((4, length + 1), np.int32)
            mask = np.zeros((4, length), bool)
            for i, row in enumerate(batch):
                windows[i, : len(row)], mask[i, : len(row) - 1] = row, True
            total += float(np.asarray(nll(params, jnp.asarray(windows)))[mask].sum(dtype=np.float64))
            count += int(mask.sum())
        return float(np.exp(total / count))

    return perplexity


if __name__ == "__main__":
    app.run(main)
