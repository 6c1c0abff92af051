# SPDX-License-Identifier: Apache-2.0
"""What the command line process and the agent inside the lab say to each other.

Four virtio-serial ports. `control` carries JSON, a message a line. The other three carry the plain bytes of one
program at a time, each with its own back-pressure; where a stream ends is said on `control` as a count of bytes,
since a port has no end of file:

    host                                agent
    Hello  ─────────────────────────▶   sets its clock, stirs its random pool
                                   ◀──  Ready
    Ping ───────────────────────────▶
                                   ◀──  Pong
    Execute ────────────────────────▶
                                   ◀──  Started
    bytes on stdin, then StdinEnd(n) ▶  bytes on stdout and stderr
    Signal, Resize  ────────────────▶
                                   ◀──  Exited(code, stdout=n, stderr=n)
    StdinEnd(n), if not yet sent ───▶   drops what the program left unread

After that the next Execute may come.
"""

from __future__ import annotations

from typing import Final

import msgspec

PORTS: Final = ("control", "stdin", "stdout", "stderr")


def port_name(port: str) -> str:
    """Name of a port as QEMU gives it and sysfs shows it."""
    return f"sevchaos.{port}"


class _Message(msgspec.Struct, frozen=True, tag=True, tag_field="type"):
    pass


class LabHello(_Message, frozen=True):
    """`realtime` in nanoseconds since the epoch; `entropy` any bytes. `warm` asks the agent to import first what warm
    programs need: worth its seconds when the lab is about to be saved."""

    realtime: int
    entropy: bytes
    warm: bool = False


class Ping(_Message, frozen=True):
    """What does the lab's clock say? Answered with Pong at once."""


class Pong(_Message, frozen=True):
    """`monotonic` is CLOCK_MONOTONIC of the lab in nanoseconds."""

    monotonic: int


class Terminal(msgspec.Struct, frozen=True):
    rows: int
    columns: int


class Execute(_Message, frozen=True):
    """Run a program. With `terminal` it gets a pseudo-terminal, and its stderr comes out on stdout.

    `warm` runs `python3 -m NAME` for the module named by `argv[0]`, which the agent has already imported: its
    `main(argv[1:])` is called in a fork, which spares it a Python start.
    """

    argv: tuple[str, ...]
    environment: dict[str, str] = {}
    directory: str = "/copy"
    terminal: Terminal | None = None
    warm: bool = False


class StdinEnd(_Message, frozen=True):
    """No more input; `count` bytes were sent in all since Execute."""

    count: int


class Signal(_Message, frozen=True):
    number: int


class Resize(_Message, frozen=True):
    terminal: Terminal


class LabReady(_Message, frozen=True):
    """`version` is what /proc/version says; `sev` whether /dev/sev is there."""

    release: str
    version: str
    sev: bool


class Started(_Message, frozen=True):
    pid: int


class ProgramExited(_Message, frozen=True):
    """`code` as a shell gives it: 128 + n after signal n, 127 if there was no such program, 126 if it would not
    run. `stdout` and `stderr` count the bytes written to the ports since Execute."""

    code: int
    stdout: int
    stderr: int
    reason: str = ""


ToAgent = LabHello | Ping | Execute | StdinEnd | Signal | Resize
FromLabAgent = LabReady | Pong | Started | ProgramExited

_encoder = msgspec.json.Encoder()
_to_agent: msgspec.json.Decoder[ToAgent] = msgspec.json.Decoder(ToAgent)
_from_agent: msgspec.json.Decoder[FromLabAgent] = msgspec.json.Decoder(FromLabAgent)


def encode(message: ToAgent | FromLabAgent) -> bytes:
    return _encoder.encode(message) + b"\n"


def decode_to_agent(line: bytes) -> ToAgent:
    return _to_agent.decode(line)


def decode_from_agent(line: bytes) -> FromLabAgent:
    return _from_agent.decode(line)
