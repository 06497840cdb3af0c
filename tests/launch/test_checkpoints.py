"""launch.export and launch.generate on one model as a GGUF file and as the folder that export makes of it."""

import pathlib

import numpy as np
import pytest

from fmfl_jax.data import gguf_export, tokenizers
from tests.commands import run
from tests.golden import gguf_case

TOKENIZERS = pathlib.Path(__file__).parent.parent / "golden" / "tokenizers"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with the tokenizer "smollm", as a GGUF file."""
    arrays = gguf_case.tensors("gqa_tied")
    tokenizer = TOKENIZERS / "smollm"
    vocab_size = tokenizers.load_tokenizer(tokenizer).vocab_size
    rng = np.random.default_rng(0)
    arrays["token_embd.weight"] = rng.standard_normal((vocab_size, 32)).astype(np.float32)
    metadata = gguf_case.metadata("gqa_tied") | gguf_export.tokenizer_metadata(tokenizer / "tokenizer.json")
    return gguf_case.write(tmp_path_factory.mktemp("gguf") / "model.gguf", metadata, arrays)


def test_exported_model_says_the_same(model, tmp_path):
    folder = tmp_path / "folder"
    status, said, _ = run("launch.export", f"--checkpoint={model}", "--to=huggingface", f"--out={folder}")
    assert (status, said) == (0, f"wrote {folder}\n")
    chat = ["--chat", "--system=Be brief.", "--prompt=Why?", "--temperature=0", "--max_new_tokens=12"]
    answers = [run("launch.generate", f"--checkpoint={path}", *chat) for path in (model, folder)]
    assert answers[0][0] == 0 and len(answers[0][1].strip()) > 3
    assert answers[0] == answers[1]
    plain = ["--prompt=Why?", "--temperature=0", "--max_new_tokens=12", f"--checkpoint={folder}"]
    never, always = (run("launch.generate", *plain, f"--bos={bos}")[1] for bos in ("never", "always"))
    assert never.startswith("Why?") and never != always


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        ("generate", ["--system=x", "--prompt=y"], "--system needs --chat"),
        ("generate", ["--prompt="], "--prompt is empty and the checkpoint puts no token"),
        ("generate", ["--chat", "--tokenizer=bytes"], "--chat: bytes has no chat template"),
        ("export", ["--to=gguf", "--dtype=float16", "--out=x"], "--dtype=float16 does not belong to --to=gguf"),
    ],
)
def test_mistakes_are_one_line(module, flags, expected, model):
    status, _, errors = run(f"launch.{module}", f"--checkpoint={model}", *flags)
    assert status == 2 and errors.count("\n") == 1 and expected in errors
