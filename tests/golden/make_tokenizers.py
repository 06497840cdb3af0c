"""Makes tokenizers/: five small tokenizers in the manner of five families, and what transformers makes of texts with
them: the ids of a prompt (special tokens as the checkpoint has them), and of a conversation by its chat template.

    /tmp/golden/bin/pip install torch==2.14.1 transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
    cd tests/golden && /tmp/golden/bin/python make_tokenizers.py

llama2: SentencePiece's BPE as a tokenizer.json, a space before every stretch of text, bos by the post-processor.
mistral: the same with a space before the first stretch only.
llama3: byte-level BPE of its own regular expression, whole words looked up first; bos by the post-processor, whatever
  add_bos_token says.
smollm: byte-level BPE with digits apart, a bos that is not put before texts (add_bos_token false).
qwen2: byte-level BPE on normalized text, no bos at all, the end of an answer is not the end of a text.
"""

import json
import pathlib
import shutil

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then they're gone. It's 2024; I'll count 1234567 words.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n\n\nassert f(3)[2] == 4\n",
    "Der Übermut tut selten gut. Élan vital! Привет, мир. 日本語のテキスト。",
] * 3
TEXTS = [
    "The capital of France is",
    " leading space,  two spaces\n\n\nand\ttabs  ",
    "It's they'LL 12345 + 6789 = 2024!?",
    "Cafe\u0301 \u00dcber \u65e5\u672c\u8a9e \U0001f999 \u041f\u0440\u0438\u0432\u0435\u0442",
    "then they're gone: words jumps over lazy dog",
    "x",
    "",
]
CHAT = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Why is 2 + 2 = 4?\nSay why."}]
SPECIAL = {
    "llama2": ["<unk>", "<s>", "</s>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "llama2": {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": (
            "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% for m in messages[1:] %}\n"
            "    {{ bos_token + '[INST] ' + system + m['content'] | trim + ' [/INST]' }}\n{% endfor %}"
        ),
    },
    "mistral": {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": (
            "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ bos_token }}"
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
            "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        ),
    },
    "llama3": {
        "add_bos_token": False,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": (
            "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
            "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}"
            "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        ),
    },
    "smollm": {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML,
    },
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def sentencepiece_kind(family: str) -> tokenizers.Tokenizer:
    """BPE over characters with the bytes as a fallback."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    if family == "llama2":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = SPECIAL[family] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    words = [" ".join(text.split()) for text in CORPUS]  # no merge over a line's end
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    trained.train_from_iterator(words, trainer)
    content = json.loads(made.to_str())
    content["model"] |= {key: json.loads(trained.to_str())["model"][key] for key in ("vocab", "merges")}
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL[family]])
    return made


def byte_level_kind(family: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    if family == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        regex = LLAMA3 if family == "llama3" else LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
        split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.normalizer = normalizers.NFC() if family == "qwen2" else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL[family], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if family == "llama3":  # words that no merge gives any more are found whole
        content = json.loads(made.to_str())
        content["model"]["merges"] = content["model"]["merges"][:-60]
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
    return made


def make(family: str, folder: pathlib.Path) -> None:
    """The folder's tokenizer.json, tokenizer_config.json and expected.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = sentencepiece_kind(family) if family in ("llama2", "mistral") else byte_level_kind(family)
    if family in ("llama2", "mistral", "llama3"):
        bos = SPECIAL[family][family != "llama3"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
        )
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | CONFIG[family]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    expected = {
        "texts": TEXTS,
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "messages": CHAT,
        "chat": chat,
        "chat_ids": tokenizer(chat, add_special_tokens=False).input_ids,
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    for family in SPECIAL:
        make(family, pathlib.Path(__file__).parent / "tokenizers" / family)
