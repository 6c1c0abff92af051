# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of sessions against vectors from elsewhere.

The vectors are those of the tests of `virtee/sev` (`src/session/key.rs` and `src/session/mod.rs`, Apache-2.0). The
measurement is one a real Naples machine gave, with API 0.18 build 15.
"""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.lab.psp import curve, sessions
from chaos.lab.psp.state import CommandRefused, Rng

ZERO = bytes(16)


def test_kdf() -> None:
    assert sessions.kdf(ZERO, b"sev-master-secret", ZERO).hex() == "ab4d269fcc62bedb4511d56c386ce706"


def test_kdf_of_more_than_one_block_begins_differently() -> None:
    """The length goes into every block, so a longer key is no continuation of a shorter one."""
    long = sessions.kdf(ZERO, b"label", length=56)
    assert len(long) == 56
    assert long[:16] != sessions.kdf(ZERO, b"label")
    assert long[:32] != long[24:]


def test_session() -> None:
    """With zeros for Z, nonce, IV, TEK, TIK and policy, as in `initialized::session`."""
    master = sessions.kdf(ZERO, b"sev-master-secret", ZERO)
    wrapped = curve.aes_ctr(sessions.kdf(master, b"sev-kek"), ZERO, bytes(32))
    assert wrapped.hex() == "2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4"
    assert (
        sessions.mac(sessions.kdf(master, b"sev-kik"), wrapped).hex()
        == "3176c0752738bd9d5e86689534020f528c088f16238826b000b327dee6aeed7d"
    )
    assert (
        sessions.mac(ZERO, struct.pack("<I", 0)).hex()
        == "aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af"
    )


def test_measurement_of_a_real_machine() -> None:
    found = sessions.measurement(
        bytes.fromhex("66320db73158a35a255d051758e95ed4"),
        (0, 0x12, 0x0F),
        0,
        hashlib.sha256(b"").digest(),
        bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554"),
    )
    assert found.hex() == "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


def test_packets_open_only_as_they_were_sealed() -> None:
    channel = sessions.SessionKeys(b"t" * 16, b"i" * 16)
    header, data = sessions.seal(channel, b"plain text 16 by", Rng(b"seed"))
    assert sessions.unseal(channel, header, data, context=sessions.DATA) == b"plain text 16 by"
    for context, packet in ((sessions.SECRET, data), (sessions.DATA, bytes(16))):
        with pytest.raises(CommandRefused, match="BAD_MEASUREMENT"):
            sessions.unseal(channel, header, packet, context=context)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=curve.SEED_SIZE, max_size=curve.SEED_SIZE))
def test_scalars_are_private_keys(seed: bytes) -> None:
    key = curve.scalar(seed)
    assert len(key) == 48
    assert curve.valid(curve.public(key))


@pytest.mark.parametrize("seed", [bytes(56), b"\xff" * 56])
def test_scalars_at_the_ends(seed: bytes) -> None:
    assert curve.valid(curve.public(curve.scalar(seed)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, (1 << 576) - 1), st.integers(0, (1 << 576) - 1))
def test_points_that_are_none(x: int, y: int) -> None:
    """72 bytes hold far larger numbers than the curve has; none of them may be anything but invalid."""
    assert not curve.valid((x, y))


def test_agreement_is_mutual() -> None:
    first, second = (curve.scalar(bytes([n]) * 56) for n in (1, 2))
    assert curve.agree(first, curve.public(second)) == curve.agree(second, curve.public(first))
    assert len(curve.agree(first, curve.public(second))) == 48
