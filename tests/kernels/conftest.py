"""What the disassembler says of a compiled kernel is kept from run to run, as XLA's programs and Triton's are."""

import hashlib
import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / ".pytest_cache" / "sass"


@pytest.fixture(scope="module")
def kept_listings():
    """`sass.build` reads listings that it made before. They depend on the binary and on Triton's tools alone, and take
    a third of a second each."""
    import triton

    from kernels.w4a16 import sass

    def kept(name: str, option: str, file: str) -> str:
        binary = pathlib.Path(file).read_bytes()
        path = FOLDER / hashlib.sha256(f"{triton.__version__} {name} {option} ".encode() + binary).hexdigest()
        if not path.is_file():
            FOLDER.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f"{path.name}.{os.getpid()}")
            written.write_text(tool(name, option, file), encoding="utf-8")
            written.replace(path)
        return path.read_text(encoding="utf-8")

    tool = sass._tool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sass, "_tool", kept)
        yield
