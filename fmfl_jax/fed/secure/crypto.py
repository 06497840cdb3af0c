"""The primitives of the protocol, all from the package `cryptography`: X25519 and HKDF-SHA256 for keys,
ChaCha20-Poly1305 for shares on their way, Ed25519 for signatures, ChaCha20 to expand masks."""

import hashlib

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fmfl_jax.fed.secure.wire import ProtocolError

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16
_BLOCK = 2**16  # values expanded at a time: they stay in the cache


def public_key(private: bytes) -> bytes:
    """X25519."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, info: bytes, peer: int) -> bytes:
    """32 bytes that both owners can compute and nobody else. ProtocolError about the peer for a degenerate key."""
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError("its public key is not one", peer) from error
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(shared)


def check_public_key(public: bytes, peer: int):
    """ProtocolError about the peer for a point of low order: no exchange with it works, whatever the private key."""
    agree(bytes(range(KEY_BYTES)), public, b"", peer)


# A key seals one message only (it is fresh in every session and for each direction), so the nonce may be fixed.
_NONCE = bytes(12)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypted and authenticated; `associated` is authenticated only."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes, peer: int) -> bytes:
    """ProtocolError about the peer when the message was changed, or was for somebody else."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, associated)
    except InvalidTag as error:
        raise ProtocolError("its encrypted shares were tampered with", peer) from error


def verify_key(signing_key: bytes) -> bytes:
    """Ed25519."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def sign(signing_key: bytes, message: bytes) -> bytes:
    """The Ed25519 signature."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(message)


def verify(key: bytes, signature: bytes, message: bytes, peer: int):
    """ProtocolError about the peer unless it signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature as error:
        raise ProtocolError("its signature is wrong", peer) from error


def digest(*parts: bytes) -> bytes:
    """SHA-256 of the parts, each of a fixed size but the last."""
    return hashlib.sha256(b"".join(parts)).digest()


def add_mask(total: np.ndarray, seed: bytes, sign: int):
    """total += sign * PRG(seed) modulo 2^32, in place. total: uint32 [n]. A seed must serve for one mask only."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    zeros, buffer = bytes(4 * _BLOCK), bytearray(4 * _BLOCK)
    words = np.frombuffer(buffer, "<u4")
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        stream.update_into(memoryview(zeros)[: 4 * len(part)], buffer)
        combine(part, words[: len(part)], out=part)
