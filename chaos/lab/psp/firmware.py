# SPDX-License-Identifier: Apache-2.0
"""The firmware between commands: platform, guests, ASIDs, identity. Pure: no files, no clock, no other randomness.

The rules that hold at every moment:

* a handle names at most one guest, an ASID belongs to at most one;
* the platform is WORKING exactly as long as there is a guest;
* an ASID is *owned* (some guest's), *dirty* (was used, or never flushed since INIT) or clean, and only a clean one can
  be given out. INIT makes all of them dirty, DEACTIVATE the one it takes away, DF_FLUSH makes all dirty ones clean.

What commands do to this is in `platform_commands`, `guest_commands` and `transport_commands`; which exist, and how
their buffers travel, in `model`.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from chaos.lab.psp.memory import BadAddress, Memory
from chaos.lab.psp.numbers import FirmwareStatus, GuestPolicy, GuestState, PlatformState
from chaos.lab.psp.state import CommandRefused, Config, FirmwareGuest, Identity, Rng, Saved


class SoftwareFirmware:
    """One PSP. Attributes are its state; the methods are the questions that more than one command asks."""

    def __init__(self, memory: Memory, config: Config) -> None:
        self.memory = memory
        self.config = config
        self.platform = PlatformState.UNINIT
        self.es_enabled = False
        self.guests: dict[int, FirmwareGuest] = {}
        self.dirty: set[int] = set(range(1, config.max_asid + 1))
        self.wbinvd_done = False
        self.identity: Identity | None = None
        self.flash: Identity | None = None
        self.nv_address = 0  # 0: the identity is kept in flash, else in NV_SIZE bytes there
        self.tmr: range | None = None
        self.rng = Rng(hmac.digest(config.chip, b"rng", hashlib.sha256))

    def save(self) -> Saved:
        """All of it, but the memory."""
        return Saved(
            version=2,
            config=self.config,
            platform=self.platform,
            es_enabled=self.es_enabled,
            guests=tuple(self.guests.values()),
            dirty=tuple(sorted(self.dirty)),
            wbinvd_done=self.wbinvd_done,
            identity=self.identity,
            flash=self.flash,
            nv_address=self.nv_address,
            tmr=None if self.tmr is None else (self.tmr.start, self.tmr.stop),
            rng=Rng(self.rng.key, self.rng.counter),
        )

    @classmethod
    def load(cls, memory: Memory, saved: Saved) -> SoftwareFirmware:
        """The firmware that was saved, over `memory`."""
        firmware = cls(memory, saved.config)
        firmware.platform = saved.platform
        firmware.es_enabled = saved.es_enabled
        firmware.guests = {guest.handle: guest for guest in saved.guests}
        firmware.dirty = set(saved.dirty)
        firmware.wbinvd_done = saved.wbinvd_done
        firmware.identity = saved.identity
        firmware.flash = saved.flash
        firmware.nv_address = saved.nv_address
        firmware.tmr = None if saved.tmr is None else range(*saved.tmr)
        firmware.rng = Rng(saved.rng.key, saved.rng.counter)
        return firmware

    def reset(self) -> None:
        """Back to UNINIT: what SHUTDOWN does, and a failed INIT. The flash and the dirt on ASIDs stay."""
        for guest in self.guests.values():
            self._soil(guest)
        self.guests.clear()
        self.platform = PlatformState.UNINIT
        self.es_enabled = False
        self.identity = None
        self.nv_address = 0
        self.tmr = None

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the machine's memory. BadAddress outside of it, and in the TMR, which nobody may name."""
        return self.memory.read(self._reachable(address, length), length)

    def write(self, address: int, data: bytes) -> None:
        """The same, the other way."""
        self.memory.write(self._reachable(address, len(data)), data)

    def physical(self, address: int) -> int:
        """`address` without its C-bit, which is no part of it.

        KVM sets it on the guest addresses of SEND_ and RECEIVE_UPDATE_DATA whatever the state of SME (`sev_me_mask`).
        """
        return address & ~(1 << self.config.c_bit)

    def _reachable(self, address: int, length: int) -> int:
        address = self.physical(address)
        if self.tmr is not None and address < self.tmr.stop and address + length > self.tmr.start:
            raise BadAddress(address, length)
        return address

    def need(self, *states: PlatformState) -> None:
        """Refuse unless the platform is in one of `states`."""
        if self.platform not in states:
            raise CommandRefused(FirmwareStatus.INVALID_PLATFORM_STATE)

    def guest(self, handle: int, *states: GuestState) -> FirmwareGuest:
        """The guest of `handle`, refused if there is none or it is in none of `states` (none given: any will do)."""
        guest = self.guests.get(handle)
        if guest is None:
            raise CommandRefused(FirmwareStatus.INVALID_GUEST)
        if states and guest.state not in states:
            raise CommandRefused(FirmwareStatus.INVALID_GUEST_STATE)
        return guest

    def owner(self, asid: int) -> FirmwareGuest | None:
        """The guest that has `asid`, or None."""
        return next((guest for guest in self.guests.values() if guest.asid == asid), None)

    def _free_handle(self) -> int:
        """The lowest handle nobody has. Handles come back at once, as in AMD's firmware."""
        for handle in range(1, self.config.max_guests + 1):
            if handle not in self.guests:
                return handle
        raise CommandRefused(FirmwareStatus.RESOURCE_LIMIT)

    def admit(self, guest: FirmwareGuest, shared_handle: int) -> int:
        """Check a new guest against the platform and the guest whose key it wants, take it in, return its handle."""
        if shared_handle:
            shared = self.guest(shared_handle)
            if guest.policy != shared.policy or guest.policy & GuestPolicy.NOKS:
                raise CommandRefused(FirmwareStatus.POLICY_FAILURE)
        handle = self._free_handle()
        if guest.policy & GuestPolicy.ES and not self.es_enabled:
            raise CommandRefused(FirmwareStatus.UNSUPPORTED)
        self.guests[handle] = msgspec.structs.replace(guest, handle=handle)
        self.platform = PlatformState.WORKING
        return handle

    def known_identity(self) -> Identity:
        """The identity, which there is in every state but UNINIT."""
        assert self.identity is not None
        return self.identity

    def deactivate(self, guest: FirmwareGuest) -> FirmwareGuest:
        """`guest` without its ASID, which is dirty from now on."""
        self._soil(guest)
        released = msgspec.structs.replace(guest, asid=0)
        self.guests[guest.handle] = released
        return released

    def _soil(self, guest: FirmwareGuest) -> None:
        unrun = guest.state in (GuestState.LAUNCH_UPDATE, GuestState.LAUNCH_SECRET, GuestState.RECEIVE_UPDATE)
        if guest.asid and not (unrun and self.config.forgive_unrun):
            self.dirty.add(guest.asid)
            self.wbinvd_done = False
