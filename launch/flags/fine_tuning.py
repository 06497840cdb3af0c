"""The flags of the ways of fine-tuning."""

from absl import flags

from fmfl_jax.experiment.config.case_study import FineTuning
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import FullConfig

_RANK = flags.DEFINE_integer("lora_rank", 8, "LoRA rank.")
_ALPHA = flags.DEFINE_float("lora_alpha", 16.0, "LoRA alpha; the factor is alpha / rank.")
_DROPOUT = flags.DEFINE_float("lora_dropout", 0.0, "LoRA dropout.")
_TARGETS = flags.DEFINE_list("lora_targets", ["q_proj", "v_proj"], "Projections, or patterns over their full names.")
_ADAPTER_DIM = flags.DEFINE_integer("adapter_dim", 16, "Width of the adapters.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 20, "Length of the soft prompt, and of the prefix.")
_LRS = {
    name: flags.DEFINE_float(f"{name}_lr", default, f"Learning rate of the clients' AdamW, {name}.", lower_bound=0)
    for name, default in (("lora", 3e-3), ("adapter", 3e-3), ("prompt", 1e-1), ("prefix", 3e-2), ("full", 3e-4))
}


def fine_tuning_from_flags(names: list[str]) -> dict[str, FineTuning]:
    """The asked-for ways of fine-tuning, by --peft's names."""
    known = {
        "lora": lambda: LoraConfig(
            rank=_RANK.value, alpha=_ALPHA.value, dropout=_DROPOUT.value, targets=tuple(_TARGETS.value)
        ),
        "adapter": lambda: AdapterConfig(bottleneck_dim=_ADAPTER_DIM.value),
        "prompt": lambda: PromptConfig(num_tokens=_PROMPT_TOKENS.value),
        "prefix": lambda: PrefixConfig(num_tokens=_PROMPT_TOKENS.value),
        "full": FullConfig,
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--peft={unknown[0]}: expected some of {', '.join(known)}")
    return {name: FineTuning(peft=known[name](), learning_rate=_LRS[name].value) for name in names}
