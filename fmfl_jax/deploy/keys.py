"""Keys of a federation on real machines: an authority, a certificate, an identity of every node and client."""

import datetime
import ipaddress
import json
import os
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fmfl_jax.fed.secure import crypto

_PRIVATE = serialization.PrivateFormat
_PEM = serialization.Encoding.PEM


def write(path: pathlib.Path, data: bytes, *, secret: bool = False) -> None:
    """A new file; a secret one for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)


def certificate(
    subject: str, key, issuer: str, issuer_key, *, days: int, authority: bool, names: list[str]
) -> x509.Certificate:
    """An X.509 certificate, of an authority or of a server with these names."""
    name = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), critical=False)
    signs = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage = x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **signs)
    return builder.add_extension(usage, critical=True).sign(issuer_key, hashes.SHA256())


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def private_pem(key) -> bytes:
    """The key's file: PEM, PKCS 8, not encrypted."""
    return key.private_bytes(_PEM, _PRIVATE.PKCS8, serialization.NoEncryption())


def make_keys(folder: pathlib.Path, hosts: list[str], *, num_nodes: int, num_clients: int, days: int) -> None:
    """folder/server, folder/node0 ... and folder/ca.key, which signs further certificates. Client c belongs to node c
    modulo num_nodes. Raises ValueError where the folder exists, without hosts, and for a node without clients."""
    if folder.exists():
        raise ValueError(f"keys={folder} exists: keys are not overwritten")
    if not all(hosts) or not hosts:
        raise ValueError(f"host={','.join(hosts)}: expected names or addresses")
    if num_nodes > num_clients:
        raise ValueError(f"num_nodes={num_nodes} is more than num_clients={num_clients}: a node would have none")
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    title = "fmfl federation"
    root = certificate(title, authority, title, authority, days=days, authority=True, names=[])
    leaf = certificate(hosts[0], server, title, authority, days=days, authority=False, names=hosts)
    write(folder / "ca.key", private_pem(authority), secret=True)
    for place in ("server", *(f"node{i}" for i in range(num_nodes))):
        write(folder / place / "ca.pem", root.public_bytes(_PEM))
    signing = {client: os.urandom(32) for client in range(num_clients)}
    verify = {client: crypto.verify_key(key).hex() for client, key in signing.items()}
    write(folder / "server" / "verify.json", json.dumps(verify).encode())
    write(folder / "server" / "server.pem", leaf.public_bytes(_PEM))
    write(folder / "server" / "server.key", private_pem(server), secret=True)
    for i in range(num_nodes):
        key, node = ec.generate_private_key(ec.SECP384R1()), folder / f"node{i}"
        openssh = key.private_bytes(_PEM, _PRIVATE.OpenSSH, serialization.NoEncryption())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write(node / "node.key", openssh, secret=True)
        write(folder / "server" / "nodes" / f"node{i}.pub", public)
        own = {client: key.hex() for client, key in signing.items() if client % num_nodes == i}
        write(node / "signing.json", json.dumps(own).encode(), secret=True)
        write(node / "verify.json", json.dumps(verify).encode())
