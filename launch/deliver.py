"""Delivers a model: packed, signed, served by ranges of bytes, fetched with resume, verified before it is decoded.

  python -m launch.deliver pack --checkpoint=DIR --out=model.fmw --key=publisher.pem [--cast=bfloat16]
  python -m launch.deliver serve --container=model.fmw --public_key=publisher.pem.pub --port=8765
  python -m launch.deliver fetch --url=http://HOST:8765/ --public_key=publisher.pem.pub --out=model
  python -m launch.deliver inspect --container=model.fmw --public_key=publisher.pem.pub
  python -m launch.deliver pack --checkpoint=TUNED --base=model.fmw --model_version=2 --out=delta.fmw --key=...
  python -m launch.deliver fetch --url=... --base=model --public_key=... --out=tuned

pack makes the key where there is none. A checkpoint is a folder or a file; what arrives are the same files, byte for
byte (after the cast). A fetch that was stopped, at any byte, goes on with the same command; FOLDER appears when all of
it is there.
"""

import concurrent.futures
import functools
import os
import pathlib
import tempfile
import time
from collections import Counter

from absl import flags
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fmfl_jax.experiment.delivery.sources import cast_safetensors, sources
from fmfl_jax.experiment.delivery.streamed import Arrivals, next_token
from fmfl_jax.transport.weights.container import Container, pack
from fmfl_jax.transport.weights.http import fetch, make_server
from fmfl_jax.transport.weights.manifest import read_public_key
from fmfl_jax.transport.weights.receive import Unpacked, part_folder
from launch import app

COMMANDS = ("pack", "serve", "fetch", "inspect")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "pack: the folder or file to be delivered.")
_CAST = flags.DEFINE_enum("cast", None, ["bfloat16"], "pack: float32 tensors of safetensors files in bfloat16.")
_KEY = flags.DEFINE_string(
    "key", None, "pack: the publisher's private Ed25519 key (PEM), made where there is none, its public key beside it."
)
_VERSION = flags.DEFINE_integer("model_version", 1, "pack: number in the manifest.", lower_bound=0)
_CHUNK = flags.DEFINE_integer("chunk_bytes", 2**18, "pack: of a chunk, 64 KiB to 1 MiB.")
_BASE = flags.DEFINE_string("base", None, "pack, fetch: the container or fetched folder that deltas are against.")
_OUT = flags.DEFINE_string("out", None, "pack: the container to write; fetch: the folder.")
_CONTAINER = flags.DEFINE_string("container", None, "serve, inspect: the container.")
_PUBLIC_KEY = flags.DEFINE_string(
    "public_key", None, "serve, fetch, inspect: the publisher's key, a file or 64 hexadecimal digits."
)
_URL = flags.DEFINE_string("url", None, "fetch: where the container is served.")
_PROMPT = flags.DEFINE_string(
    "prompt", None, "fetch: says the next token after this text, computed layer by layer while the model arrives."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at; 0.0.0.0 for all.")
_PORT = flags.DEFINE_integer("port", 8765, "serve: the port; 0 for any.", lower_bound=0, upper_bound=65535)
_RATE = flags.DEFINE_float("rate_bps", None, "serve: bit/s to each client at most; default: no limit.", lower_bound=1)


def main(command: str):
    {"pack": _pack, "serve": _serve, "fetch": _fetch, "inspect": _inspect}[command]()


def _pack():
    path, out, key = (_needed(flag) for flag in (_CHECKPOINT, _OUT, _KEY))
    private = _private_key(pathlib.Path(key))
    base = _open_base(private.public_key())
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=pathlib.Path(out).absolute().parent) as folder:
        cast = cast_safetensors(path, pathlib.Path(folder)) if _CAST.value else path
        manifest = pack(
            sources(cast),
            out,
            private,
            name=pathlib.Path(path).name,
            version=_VERSION.value,
            chunk_bytes=_CHUNK.value,
            base=base,
        )
    took = time.perf_counter() - began
    app.say(_summary(manifest) + f", {took:.1f} s")
    app.say(f"public key: {private.public_key().public_bytes_raw().hex()}, in {key}.pub")


def _serve():
    container = Container(_needed(_CONTAINER), _public_key())
    server = make_server(container, _HOST.value, _PORT.value, rate_bps=_RATE.value)
    app.say(_summary(container.manifest))
    app.say(f"served at http://{_HOST.value}:{server.server_port}/ until Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        app.say("stopped")


def _fetch():
    url, out, key = _needed(_URL), _needed(_OUT), _public_key()
    base, arrivals, answer = _open_base(key), Arrivals(in_use=_PROMPT.value is not None), None
    receive = functools.partial(fetch, url, key, out, base=base, on_part=arrivals.on_part)
    if _PROMPT.value is None:
        done = receive()
    else:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            received = thread.submit(receive)
            received.add_done_callback(lambda future: arrivals.fail() if future.exception() else None)
            try:
                answer = next_token(part_folder(out), _PROMPT.value, arrivals)
            except ConnectionError:
                received.result()  # why nothing came
            finally:
                arrivals.release()
            done = received.result()
    took = arrivals.now()
    again = f" ({done.resumed_bytes:,} from an earlier attempt)" if done.resumed_bytes else ""
    app.say(_summary(done.manifest))
    app.say(f"received {done.received_bytes:,} bytes{again} in {took:.2f} s")
    ready = sorted(arrivals.seconds.items())
    if len(ready) > 2:
        app.say(f"the first layer was ready after {ready[1][1]:.2f} s, the last after {ready[-2][1]:.2f} s")
    if answer is not None:
        app.say(f"layer 0 began after {answer.begin_s:.2f} s; after {answer.end_s:.2f} s: {_PROMPT.value}{answer.text}")
    app.say(f"verified: {out}/")


def _inspect():
    container = Container(_needed(_CONTAINER), _public_key())
    manifest = container.manifest
    app.say(_summary(manifest))
    app.say(f"root {manifest.root}\ncontent {manifest.content}")
    if manifest.base is not None:
        app.say(f"deltas against content {manifest.base}")
    decoded, coded, parts = Counter(), Counter(), Counter()
    for part in manifest.parts:
        kind = (part.coder, part.dtype or "other bytes")
        decoded[kind] += part.nbytes
        coded[kind] += part.coded_bytes
        parts[kind] += 1
    app.say(f"{'coder':8}{'dtype':14}{'parts':>7}{'bytes':>16}{'coded':>16}{'share':>8}")
    for kind in sorted(decoded, key=lambda k: -decoded[k]):
        share = coded[kind] / max(decoded[kind], 1)
        app.say(f"{kind[0]:8}{kind[1]:14}{parts[kind]:7}{decoded[kind]:16,}{coded[kind]:16,}{share:8.3f}")
    container.coded(0, manifest.coded_bytes)
    app.say(f"all {len(manifest.chunks)} chunks are whole")


def _summary(manifest) -> str:
    share = manifest.coded_bytes / max(manifest.decoded_bytes, 1)
    return (
        f"{manifest.name}, version {manifest.version}: {manifest.decoded_bytes:,} bytes in {len(manifest.files)} "
        f"file{'s'[: len(manifest.files) != 1]}, coded {manifest.coded_bytes:,} ({share:.4f}) in "
        f"{len(manifest.chunks)} chunks of {manifest.chunk_bytes // 2**10} KiB"
    )


def _needed(flag) -> str:
    if not flag.value:
        raise ValueError(f"--{flag.name} is needed: {flags.FLAGS[flag.name].help.split(': ', 1)[1]}")
    return flag.value


def _open_base(key: Ed25519PublicKey) -> Container | Unpacked | None:
    if _BASE.value is None:
        return None
    return Unpacked(_BASE.value, key) if pathlib.Path(_BASE.value).is_dir() else Container(_BASE.value, key)


def _private_key(path: pathlib.Path) -> Ed25519PrivateKey:
    """Of the file; a new one, readable by its owner only, where there is none."""
    if path.exists():
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # no PEM, one with a password, one of another kind
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"key={path}: expected a PEM file with an Ed25519 private key, without a password")
    else:
        key = Ed25519PrivateKey.generate()
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(*pem))
    public = path.with_name(path.name + ".pub")
    public.write_text(key.public_key().public_bytes_raw().hex() + "\n", encoding="ascii")
    return key


def _public_key() -> Ed25519PublicKey:
    given = _needed(_PUBLIC_KEY)
    try:
        return read_public_key(given)
    except ValueError as error:
        raise ValueError(f"public_key={error}") from None


if __name__ == "__main__":
    app.run(main, commands=COMMANDS)
