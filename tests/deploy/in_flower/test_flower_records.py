"""Envelopes in Flower's records, and what is none."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.flower import from_records, to_records


def test_an_envelope_comes_back_with_its_bytes():
    envelope = Envelope({"kind": "train", "round": 3}, {"message": b"\x00\xff" * 9, "": b""})
    assert from_records(to_records(envelope)) == envelope


@pytest.mark.parametrize("head", ['{"json"', "[1]", None])
def test_another_message_is_no_envelope(head):
    config = {} if head is None else {"head": ConfigRecord({"json": head})}
    with pytest.raises(ValueError):
        from_records(RecordDict(config | {"blobs": ArrayRecord()}))
