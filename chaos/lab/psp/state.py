# SPDX-License-Identifier: Apache-2.0
"""What the firmware remembers, as values that can be written down and read back.

Everything here is a msgspec Struct, so that a snapshot of the lab can carry the firmware as plain JSON (`Saved`), and
everything but the random generator is immutable: a command replaces a guest, it never edits one.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, Literal

import msgspec

from chaos.lab.psp.buffers import Buffer
from chaos.lab.psp.numbers import MAX_GUESTS, FirmwareStatus, GuestState, PlatformState

ZERO_KEY: Final = bytes(16)


class CommandRefused(Exception):
    """The firmware says no. `reply` is written back over the command buffer: that is how lengths are asked for."""

    def __init__(self, status: FirmwareStatus, reply: Buffer | None = None) -> None:
        super().__init__(status.name)
        self.status = status
        self.reply = reply


class Rng(msgspec.Struct):
    """Random bytes from a seed: HMAC-SHA-256 of a counter. Saved with the state, so a restored lab repeats itself."""

    key: bytes
    counter: int = 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        out = b""
        while len(out) < length:
            out += hmac.digest(self.key, self.counter.to_bytes(8, "little"), hashlib.sha256)
            self.counter += 1
        return out[:length]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine the firmware finds itself on; nothing a command can change.

    ASIDs 1 to `es_asids` are for SEV-ES guests only, the next `sev_asids` for plain SEV guests only, as with the
    lowest plain-SEV ASID in EDX and the highest in ECX of CPUID 0x8000001F.
    """

    es_asids: int
    sev_asids: int
    seed: int = 0
    c_bit: int = 51  # where CPUID 0x8000001F says the encryption bit of an address is
    max_guests: int = MAX_GUESTS
    # A software PSP cannot see the WBINVD instruction. By default each DF_FLUSH takes it as done; with this set it is
    # done only when the control channel says so, and DF_FLUSH without it is refused with WBINVD_REQUIRED.
    sees_wbinvd: bool = False
    # The API asks for a DF_FLUSH before any used ASID is used again. Newer firmware (AMD-ASPFW) lets one pass whose
    # guest never came as far as LAUNCH_FINISH. The stricter rule is the default: it refuses what any firmware may.
    forgive_unrun: bool = False

    def __post_init__(self) -> None:
        if self.es_asids < 0 or self.sev_asids < 0 or self.es_asids + self.sev_asids == 0:
            raise ValueError("es_asids and sev_asids must not be negative, and not both 0")
        if not 1 <= self.max_guests <= MAX_GUESTS:
            raise ValueError(f"max_guests must be 1 to {MAX_GUESTS}")

    @property
    def max_asid(self) -> int:
        return self.es_asids + self.sev_asids

    @property
    def min_sev_asid(self) -> int:
        return self.es_asids + 1

    @property
    def chip(self) -> bytes:
        """The chip's own secret, 32 bytes: what fuses hold in a real one."""
        return hashlib.sha256(b"sevchaos chip %d" % self.seed).digest()


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the firmware keeps in flash: private keys as 48-byte big-endian scalars of P-384.

    Certificates are computed from them when asked for; ECDSA is deterministic here, so they always come out the same.
    After PEK_CERT_IMPORT the owner's two certificates are kept, and `oca` is empty: the owner has that key.
    """

    oca: bytes
    pek: bytes
    pdh: bytes
    pek_cert: bytes = b""
    oca_cert: bytes = b""

    @property
    def externally_owned(self) -> bool:
        return bool(self.oca_cert)


class FirmwareGuest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A guest context. `asid` 0: not active.

    The data of LAUNCH_UPDATE_* is kept until LAUNCH_MEASURE and hashed then, because a half-done SHA-256 of hashlib
    cannot be written into a snapshot. It costs the size of the launched image, for the time of the launch.

    Without a session the transport keys are all zero: that is what AMD's firmware leaves there (its LAUNCH_START fills
    them only from a session), and it makes the measurement of such a guest something anybody can check.
    """

    handle: int
    policy: int
    state: GuestState
    asid: int = 0
    tek: bytes = ZERO_KEY
    tik: bytes = ZERO_KEY
    measured: tuple[bytes, ...] = ()
    digest: bytes = bytes(32)
    measurement: bytes = bytes(32)


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A firmware at rest. One that other code saved in another form has another version, and does not decode."""

    version: Literal[2]
    config: Config
    platform: PlatformState
    es_enabled: bool
    guests: tuple[FirmwareGuest, ...]
    dirty: tuple[int, ...]
    wbinvd_done: bool
    identity: Identity | None
    flash: Identity | None
    nv_address: int
    tmr: tuple[int, int] | None
    rng: Rng
