"""Perplexity of a model on a text, as one JSON line.

python -m launch.evaluate --checkpoint=DIR --text=FILE [--peft_dir=DIR]
"""

import json

from absl import flags

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.batches import evaluation_windows
from fmfl_jax.data.corpora import load_documents
from fmfl_jax.experiment.evaluation.perplexity import make_evaluator
from fmfl_jax.parallel import replicate
from fmfl_jax.peft.split import PeftConfig, check_context, num_virtual_tokens
from launch import app
from launch.flags import checkpoint as checkpoint_flags

_TEXT = flags.DEFINE_string("text", None, "The text: a file, or a folder of text files.", required=True)
_SEQ_LEN = flags.DEFINE_integer(
    "seq_len",
    None,
    "Tokens per window; default: the model's context (less a tuned prompt's tokens), at most 512.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Windows per device at a time. Default: 8, or on a CPU about 1,024 tokens.", lower_bound=1
)


def _seq_len(config: LlamaConfig, peft: PeftConfig) -> int:
    return _SEQ_LEN.value or max(1, min(config.max_seq_len - num_virtual_tokens(peft), 512))


def main():
    config, model, tokenizer, peft, _ = checkpoint_flags.load_model(
        lambda config, peft: check_context(config, peft, _seq_len(config, peft))
    )
    seq_len = _seq_len(config, peft)
    data = evaluation_windows(tokenizer, load_documents(_TEXT.value), seq_len, add_bos=True, add_eos=True)
    evaluate = make_evaluator(model.merge, data, batch_size=_BATCH_SIZE.value)
    app.say(
        json.dumps(
            evaluate(replicate(model.trainable), replicate(model.frozen, copy=False))._asdict() | {"seq_len": seq_len}
        )
    )


if __name__ == "__main__":
    app.run(main, checkpoint_flags)
