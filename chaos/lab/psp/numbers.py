# SPDX-License-Identifier: Apache-2.0
"""The SEV firmware's numbers: command ids, status codes, states, policy bits, registers and sizes.

Sources: AMD publication 55766 (the SEV API, here version 0.24), and for what the publication leaves open AMD's own
firmware, published as `amd/AMD-ASPFW` (facts were taken from it, no code). The kernel's view of the same numbers is
`include/linux/psp-sev.h` and `include/uapi/linux/psp-sev.h`; the registers are those of the device 1022:14ca
(`pspv4` and `sevv2` in `drivers/crypto/ccp/sp-pci.c`).

Imports nothing of ours: every other module of the software PSP may import this one.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


class FirmwareCommand(IntEnum):
    """What bits 26:16 of the command register may hold."""

    INIT = 0x001
    SHUTDOWN = 0x002
    FACTORY_RESET = 0x003
    PLATFORM_STATUS = 0x004
    PEK_GEN = 0x005
    PEK_CSR = 0x006
    PEK_CERT_IMPORT = 0x007
    PDH_CERT_EXPORT = 0x008
    PDH_GEN = 0x009
    DF_FLUSH = 0x00A
    DOWNLOAD_FIRMWARE = 0x00B
    GET_ID = 0x00C
    INIT_EX = 0x00D
    NOP = 0x00E
    RING_BUFFER = 0x00F

    DECOMMISSION = 0x020
    ACTIVATE = 0x021
    DEACTIVATE = 0x022
    GUEST_STATUS = 0x023
    COPY = 0x024
    ACTIVATE_EX = 0x025

    LAUNCH_START = 0x030
    LAUNCH_UPDATE_DATA = 0x031
    LAUNCH_UPDATE_VMSA = 0x032
    LAUNCH_MEASURE = 0x033
    LAUNCH_UPDATE_SECRET = 0x034
    LAUNCH_FINISH = 0x035
    ATTESTATION_REPORT = 0x036

    SEND_START = 0x040
    SEND_UPDATE_DATA = 0x041
    SEND_UPDATE_VMSA = 0x042
    SEND_FINISH = 0x043
    SEND_CANCEL = 0x044

    RECEIVE_START = 0x050
    RECEIVE_UPDATE_DATA = 0x051
    RECEIVE_UPDATE_VMSA = 0x052
    RECEIVE_FINISH = 0x053

    DBG_DECRYPT = 0x060
    DBG_ENCRYPT = 0x061

    SWAP_OUT = 0x070
    SWAP_IN = 0x071

    SNP_INIT = 0x081
    SNP_SHUTDOWN = 0x082
    SNP_PLATFORM_STATUS = 0x083
    SNP_DF_FLUSH = 0x084
    SNP_INIT_EX = 0x085
    SNP_SHUTDOWN_EX = 0x086
    SNP_DECOMMISSION = 0x090
    SNP_ACTIVATE = 0x091
    SNP_GUEST_STATUS = 0x092
    SNP_GCTX_CREATE = 0x093
    SNP_GUEST_REQUEST = 0x094
    SNP_ACTIVATE_EX = 0x095
    SNP_LAUNCH_START = 0x0A0
    SNP_LAUNCH_UPDATE = 0x0A1
    SNP_LAUNCH_FINISH = 0x0A2
    SNP_DBG_DECRYPT = 0x0B0
    SNP_DBG_ENCRYPT = 0x0B1
    SNP_PAGE_SWAP_OUT = 0x0C0
    SNP_PAGE_SWAP_IN = 0x0C1
    SNP_PAGE_MOVE = 0x0C2
    SNP_PAGE_MD_INIT = 0x0C3
    SNP_PAGE_SET_STATE = 0x0C6
    SNP_PAGE_RECLAIM = 0x0C7
    SNP_PAGE_UNSMASH = 0x0C8
    SNP_CONFIG = 0x0C9
    SNP_DOWNLOAD_FIRMWARE_EX = 0x0CA
    SNP_COMMIT = 0x0CB
    SNP_VLEK_LOAD = 0x0CD
    SNP_FEATURE_INFO = 0x0CE


class FirmwareStatus(IntEnum):
    """What bits 15:0 of the command register hold after a command. Names are the kernel's, spelt right."""

    SUCCESS = 0
    INVALID_PLATFORM_STATE = 1
    INVALID_GUEST_STATE = 2
    INVALID_CONFIG = 3  # the kernel's header says INAVLID_CONFIG
    INVALID_LEN = 4
    ALREADY_OWNED = 5
    INVALID_CERTIFICATE = 6
    POLICY_FAILURE = 7
    INACTIVE = 8
    INVALID_ADDRESS = 9
    BAD_SIGNATURE = 10
    BAD_MEASUREMENT = 11
    ASID_OWNED = 12
    INVALID_ASID = 13
    WBINVD_REQUIRED = 14
    DFFLUSH_REQUIRED = 15
    INVALID_GUEST = 16
    INVALID_COMMAND = 17
    ACTIVE = 18
    HWERROR_PLATFORM = 19
    HWERROR_UNSAFE = 20
    UNSUPPORTED = 21
    INVALID_PARAM = 22
    RESOURCE_LIMIT = 23
    SECURE_DATA_INVALID = 24
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27


class PlatformState(IntEnum):
    """PSTATE of the API: WORKING as soon as one guest context exists."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class GuestState(IntEnum):
    """GSTATE of the API, as GUEST_STATUS reports it. UNINIT is the answer for a handle nobody has."""

    UNINIT = 0
    LAUNCH_UPDATE = 1
    LAUNCH_SECRET = 2
    RUNNING = 3
    SEND_UPDATE = 4
    RECEIVE_UPDATE = 5
    SENT = 6


class GuestPolicy(IntFlag):
    """Guest policy. Bits 23:16 and 31:24 are the lowest API major and minor the owner accepts."""

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3
    DOMAIN = 1 << 4
    SEV = 1 << 5


POLICY_RESERVED: Final = 0xFFC0

# The version reported by PLATFORM_STATUS and mixed into measurements: the last one before SNP, so that the command
# set is exactly the legacy one and SNP commands are unknown to it, as on a Rome machine.
API_MAJOR: Final = 0
API_MINOR: Final = 24
BUILD: Final = 15

# Registers: offsets into BAR 2, 32 bits each.
CMDRESP: Final = 0x10980
CMDBUFF_LO: Final = 0x109E0
CMDBUFF_HI: Final = 0x109E4
FEATURE: Final = 0x109FC
INTSTS: Final = 0x10694

RESPONSE_BIT: Final = 1 << 31
INTERRUPT_ON_COMPLETION: Final = 1 << 0
COMMAND_SHIFT: Final = 16
COMMAND_MASK: Final = 0x7FF
COMMAND_COMPLETE: Final = 1 << 1  # in INTSTS
FEATURE_SEV: Final = 1 << 0  # in FEATURE

MAILBOX_SIZE: Final = 1 << 20
VECTORS: Final = 2

CONFIG_ES: Final = 1 << 0  # in the flags of INIT
TMR_SIZE: Final = 1 << 20  # size and alignment of the trusted memory region
NV_SIZE: Final = 32 * 1024  # INIT_EX's stand-in for the flash
INIT_EX_LENGTH: Final = 0x24
MAX_GUESTS: Final = 1024
PAGE_SIZE: Final = 4096

CERT_SIZE: Final = 0x824
CHAIN_SIZE: Final = 3 * CERT_SIZE  # PEK, OCA, CEK
ID_SIZE: Final = 64
SESSION_SIZE: Final = 128
PACKET_HEADER_SIZE: Final = 52
MEASUREMENT_SIZE: Final = 48
REPORT_SIZE: Final = 0xD0
# The longest packet of the SECRET, SEND and RECEIVE commands. The real limit is the size of the firmware's scratch
# buffer, which no document gives; KVM never sends more than a page except for secrets, and those at most 16 KiB.
PACKET_MAX: Final = 16 * 1024
