"""The flags of a federated run, shared by the commands case_study and federated."""

from absl import flags

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.case_study import mesh_of
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, check_model
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.fed.core.execution import default_clients_per_pass
from fmfl_jax.models.formats.checkpoint import open_checkpoint
from fmfl_jax.quant.awq import RECIPES, QuantConfig
from launch.flags.federation import federation_from_flags, server_from_flags
from launch.flags.fine_tuning import fine_tuning_from_flags
from launch.flags.network import network_from_flags

# Model and text.
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Base model: a Hugging Face folder (fp or 4-bit), a GGUF or a llama2.c file, or smollm2-135m."
)
_DEQUANTIZE = flags.DEFINE_bool("dequantize", False, "Unpack the checkpoint's 4-bit weights to --dtype first.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer file, where the checkpoint has none; 'bytes' for bytes.")
_TRAIN_TEXT = flags.DEFINE_string(
    "train_text", None, "The clients' text: a file, or a folder of text files; default: text that ships with CPython."
)
_EVAL_TEXT = flags.DEFINE_string("eval_text", None, "The text that perplexity is measured on.")
_CALIB_TEXT = flags.DEFINE_string(
    "calib_text",
    None,
    "The server's text, to calibrate AWQ on and start soft prompts from; default: the public or training text.",
)
_MODEL = flags.DEFINE_string("model", "mini", "Preset to pre-train where there is no --checkpoint: tiny or mini.")
_RANDOM_INIT = flags.DEFINE_bool(
    "random_init", False, "Take --model untrained, of any size (7b, ...): costs are measured, perplexities left out."
)
_REMAT = flags.DEFINE_bool("remat", False, "Compute each block again in the backward pass: less memory, more work.")
_PRETRAIN_STEPS = flags.DEFINE_integer("pretrain_steps", 700, "Steps of that pre-training.", lower_bound=1)
_PRETRAIN_BATCH = flags.DEFINE_integer("pretrain_batch_size", 16, "Windows per pre-training step.", lower_bound=1)
_PRETRAIN_LR = flags.DEFINE_float("pretrain_lr", 3e-3, "Peak learning rate of the pre-training.", lower_bound=0)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens per window.", lower_bound=1)
_MAX_EVAL = flags.DEFINE_integer("max_eval_windows", None, "Evaluate on the first so many windows only.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "Compute dtype, and the stored dtype of unquantized weights.",
)

# Quantization.
_RECIPE = flags.DEFINE_enum(
    "recipe", "clip", RECIPES, "AWQ's searches: as published, or with ours of the clip (docs/results/awq.md)."
)
_BITS = flags.DEFINE_integer("bits", 4, "Bits of quantized weights: 4 or 3.")
_GROUP_SIZE = flags.DEFINE_integer(
    "group_size",
    None,
    "Weights per scale, along the input; -1 for one per column; default: 128, or the largest power of two below that "
    "divides the model's dimensions.",
)

_HEAD = flags.DEFINE_enum(
    "head", "fp", ["fp", "int8", "int4"], "Head of 4-bit models: as it is, or rounded to 8 or 4 bits (--bits)."
)

# The federation.
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 20, "Clients that the training text is dealt to.", lower_bound=1)
_COHORT = flags.DEFINE_integer("cohort_size", None, "Clients drawn per round; default: all.", lower_bound=1)
_NUM_ROUNDS = flags.DEFINE_integer("num_rounds", 15, "Federated rounds.", lower_bound=1)
_LOCAL_STEPS = flags.DEFINE_integer("local_steps", 4, "Steps of a client per round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Windows per step.", lower_bound=1)
_PARTITION = flags.DEFINE_enum(
    "partition",
    "random",
    ["random", "dirichlet", "document", "quantity"],
    "How the text is dealt: windows at random; documents spread by Dirichlet(--alpha); whole "
    "documents; log-normal sizes with --skew.",
)
_ALPHA_DIRICHLET = flags.DEFINE_float("alpha", 0.5, "Concentration of the Dirichlet partition.")
_SKEW = flags.DEFINE_float("skew", 1.0, "Standard deviation of the log of the clients' sizes.")
_PER_PASS = flags.DEFINE_integer(
    "clients_per_pass",
    None,
    "Clients of a device that train side by side; default: 1 on a CPU, all on an accelerator.",
    lower_bound=1,
)
_MODEL_PARALLEL = flags.DEFINE_integer(
    "model_parallel",
    1,
    "Devices that the base's heads and hidden units are cut over; clients train side by side on the others.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)

# The run.
_EVAL_EVERY = flags.DEFINE_integer("eval_every", 1, "Rounds between evaluations.", lower_bound=1)
_CHECKPOINT_EVERY = flags.DEFINE_integer("checkpoint_every", 5, "Rounds between checkpoints.", lower_bound=1)


def config_from_flags(*, peft: list[str], weights: list[str]) -> CaseStudyConfig:
    """The flags as a checked configuration; --peft and --weights are those of the command."""
    checkpoint = _CHECKPOINT.value
    config = CaseStudyConfig(
        checkpoint=checkpoint,
        dequantize=_DEQUANTIZE.value,
        head=_HEAD.value,
        tokenizer=_TOKENIZER.value,
        model=None if checkpoint is not None else llama_preset(_MODEL.value, dtype=_DTYPE.value),
        pretrain=PretrainConfig(
            num_steps=_PRETRAIN_STEPS.value,
            batch_size=_PRETRAIN_BATCH.value,
            learning_rate=_PRETRAIN_LR.value,
            seed=_SEED.value,
        ),
        dtype=_DTYPE.value,
        text=TextConfig(
            train=_TRAIN_TEXT.value,
            eval=_EVAL_TEXT.value,
            calib=_CALIB_TEXT.value,
            seq_len=_SEQ_LEN.value,
            max_eval_windows=_MAX_EVAL.value,
        ),
        partition=PartitionConfig(
            kind=_PARTITION.value, num_clients=_NUM_CLIENTS.value, alpha=_ALPHA_DIRICHLET.value, skew=_SKEW.value
        ),
        rounds=RoundsConfig(
            num_rounds=_NUM_ROUNDS.value,
            cohort_size=_COHORT.value or _NUM_CLIENTS.value,
            local_steps=_LOCAL_STEPS.value,
            batch_size=_BATCH_SIZE.value,
            seed=_SEED.value,
            clients_per_pass=_PER_PASS.value or default_clients_per_pass(),
            eval_every=_EVAL_EVERY.value,
            checkpoint_every=_CHECKPOINT_EVERY.value,
        ),
        server=server_from_flags(),
        quant=QuantConfig(bits=_BITS.value, group_size=_GROUP_SIZE.value, recipe=_RECIPE.value),
        fine_tuning=fine_tuning_from_flags(peft),
        weights=tuple(weights),
        federation=federation_from_flags(),
        network=network_from_flags(),
        random_init=_RANDOM_INIT.value,
        remat=_REMAT.value,
        model_parallel=_MODEL_PARALLEL.value,
    )
    mesh_of(config)  # refused before the run claims its folder, as what follows
    if checkpoint is not None:
        check_model(config, open_checkpoint(checkpoint).config)
    return config
