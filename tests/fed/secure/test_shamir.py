"""Secret sharing and packing: the polynomial by hand, any t shares, and that fewer say nothing."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fmfl_jax.fed.secure import shamir, wire

SECRET = bytes(range(200, 232))


def chunk(share: bytes, index: int) -> int:
    return int.from_bytes(share[4 * index : 4 * index + 4], "little")


def test_any_threshold_of_shares_give_the_secret_and_fewer_do_not():
    shares = shamir.split(SECRET, 3, 6, np.random.default_rng(0).bytes)
    for chosen in itertools.permutations(range(6), 3):
        assert shamir.join([i + 1 for i in chosen], [[shares[i] for i in chosen]]) == [SECRET]
    for chosen in itertools.combinations(range(6), 2):
        assert shamir.join([i + 1 for i in chosen], [[shares[i] for i in chosen]]) != [SECRET]


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, SECRET])
def test_extreme_secrets_and_thresholds(secret):
    for threshold, count in [(1, 1), (2, 2), (1, 4), (40, 60)]:
        shares = shamir.split(secret, threshold, count, np.random.default_rng(1).bytes)
        points = list(range(count - threshold + 1, count + 1))
        assert shamir.join(points, [[shares[p - 1] for p in points]]) == [secret]
    for threshold in (0, 5):
        with pytest.raises(ValueError, match="threshold"):
            shamir.split(secret, threshold, 4, np.random.default_rng(1).bytes)


def test_shares_lie_on_a_line_through_the_secret():
    # Threshold 2: share(x) = s + a x. The line through the shares at 1 and 2 gives all others, and s at 0.
    shares = shamir.split(SECRET, 2, 5, np.random.default_rng(2).bytes)
    number = int.from_bytes(SECRET, "little")
    for i in range(9):
        first, second = chunk(shares[0], i), chunk(shares[1], i)
        slope = second - first
        assert (first - slope) % (2**31 - 1) == number >> (30 * i) & (2**30 - 1)
        assert [chunk(share, i) for share in shares] == [(first + slope * k) % (2**31 - 1) for k in range(5)]


def test_two_shares_of_three_are_uniform_whatever_the_secret():
    for secret in (bytes(32), b"\xff" * 32):
        random = np.random.default_rng(3).bytes
        splits = [shamir.split(secret, 3, 4, random) for _ in range(1500)]
        pair = np.asarray([(chunk(s[0], 4), chunk(s[1], 4)) for s in splits], np.float64) / shamir.PRIME
        for column in (pair[:, 0], pair[:, 1], (pair[:, 0] + pair[:, 1]) % 1.0, (pair[:, 1] - 2 * pair[:, 0]) % 1.0):
            assert stats.kstest(column, "uniform").pvalue > 1e-4
        # Three shares do determine the secret: the same combination of all of them is constant.
        triple = [(3 * chunk(s[0], 4) - 3 * chunk(s[1], 4) + chunk(s[2], 4)) % shamir.PRIME for s in splits]
        assert len(set(triple)) == 1


def test_shares_of_different_secrets_are_noticed():
    one, two = (shamir.split(SECRET, 3, 3, np.random.default_rng(seed).bytes) for seed in (4, 5))
    assert shamir.join([1, 2, 3], [[one[0], two[1], one[2]], one]) == [None, SECRET]


def test_bits_are_packed_as_a_number_in_base_two():
    rng = np.random.default_rng(6)
    for bits in range(1, 33):
        for count in (1, 7, 8, 19):
            values = rng.integers(0, 2**bits, count, dtype=np.uint64).astype(np.uint32)
            packed = wire.pack_bits(values, bits)
            number = sum(int(v) << (bits * i) for i, v in enumerate(values))
            assert packed == number.to_bytes(-(-count * bits // 8), "little")
            np.testing.assert_array_equal(wire.unpack_bits(packed, count, bits), values)


def test_records_refuse_what_is_not_a_list_of_them():
    records = {7: b"abc", 3: b"xyz", 2**32 - 1: b"uvw"}
    packed = wire.pack_records(records)
    assert wire.unpack_records(packed, 3) == records and list(wire.unpack_records(packed, 3)) == sorted(records)
    for broken in (packed[:-1], packed[:7] + packed, packed[7:] + packed[:7]):
        with pytest.raises(wire.ProtocolError) as error:
            wire.unpack_records(broken, 3, peer=5)
        assert error.value.peer == 5
