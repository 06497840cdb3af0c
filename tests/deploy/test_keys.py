"""The keys of a federation: who can read them, what is dealt to whom, and what is refused."""

import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fmfl_jax.deploy.keys import make_keys
from fmfl_jax.fed.secure import crypto


def test_every_client_has_its_key_on_one_node_and_all_know_the_public_ones(tmp_path):
    make_keys(tmp_path / "keys", ["fl.example.org", "10.0.0.1"], num_nodes=2, num_clients=5, days=3)
    dealt = [json.loads((tmp_path / "keys" / f"node{i}" / "signing.json").read_text()) for i in range(2)]
    assert [sorted(own) for own in dealt] == [["0", "2", "4"], ["1", "3"]]
    public = {client: crypto.verify_key(bytes.fromhex(key)).hex() for own in dealt for client, key in own.items()}
    for place in ("server", "node0", "node1"):
        assert json.loads((tmp_path / "keys" / place / "verify.json").read_text()) == public
    secret = [p for p in (tmp_path / "keys").rglob("*") if p.is_file() and p.stat().st_mode & 0o077 == 0]
    assert sorted(p.name for p in secret) == ["ca.key", "node.key", "node.key", "server.key"] + 2 * ["signing.json"]


def test_the_servers_certificate_is_the_authoritys_and_names_its_hosts(tmp_path):
    make_keys(tmp_path / "keys", ["fl.example.org", "10.0.0.1"], num_nodes=1, num_clients=1, days=3)
    read = lambda name: x509.load_pem_x509_certificate((tmp_path / "keys" / "server" / name).read_bytes())
    root, leaf = read("ca.pem"), read("server.pem")
    leaf.verify_directly_issued_by(root)
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["fl.example.org", "10.0.0.1"]


@pytest.mark.parametrize(
    ("hosts", "num_nodes", "says"),
    [([], 1, "host="), ([""], 1, "host="), (["a"], 3, "num_nodes=3 is more than num_clients=2")],
)
def test_keys_that_nobody_could_use_are_refused(hosts, num_nodes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        make_keys(tmp_path / "keys", hosts, num_nodes=num_nodes, num_clients=2, days=1)
    assert not (tmp_path / "keys").exists()


def test_keys_are_not_overwritten(tmp_path):
    (tmp_path / "keys").mkdir()
    with pytest.raises(ValueError, match="not overwritten"):
        make_keys(tmp_path / "keys", ["a"], num_nodes=1, num_clients=1, days=1)
