# SPDX-License-Identifier: Apache-2.0
"""P14, within bounds: nobody writes behind the length that a caller told, the kernel not into its caller's memory, and
the firmware, on the kernel's behalf, not beyond the memory that it was to write to. Nor is it left any memory when the
driver goes that gave it: INIT and INIT_EX lend some for as long as the platform is initialised, and SHUTDOWN ends that.

Two witnesses. The caller's own buffer is longer than it tells, and what is behind or around that is read again
afterwards. And whoever stands between the driver and the firmware writes down the addresses and lengths of each command
to debug a guest: one goes to the end of its page at most, unless the next page of the machine's memory is the next one
that the caller named as well. KVM pins its caller's pages one at a time, and its own buffers are single pages. Nor is
a command given the address of a buffer that has no length: there is no such memory.

A caller that did not live to look, a buffer that cannot be looked behind and a command that nobody recorded leave the
promise unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from chaos.experiment.model import Experiment
from chaos.history.reading import NEW_KEYS, argument, number
from chaos.history.records import Done, Firmware, History, Invoke
from chaos.judge.evidence import RunEvidence
from chaos.judge.ledger.commands import DEBUGS
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P14"
PAGE = 4096
LOOKS_AT = {"platform": "behind", "dbg_decrypt": "outside", "dbg_encrypt": "outside"}
"""Of each operation in which bounds can be missed, what says by how much."""
_LENDS, _ENDS = ("INIT", "INIT_EX"), "SHUTDOWN"
BEYOND = "beyond-page"  # by which command, and read or written, hangs on which pages the machine had to give


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    asked = [(invoke, done) for invoke, done in evidence.operations if _has_a_buffer(invoke)]
    reloads = [(invoke, done) for invoke, done in evidence.operations if invoke.f == "reload"]
    if not asked and not reloads:
        return unknown(PROMISE, "nobody told the kernel the length of a buffer that is longer, or let the driver go")
    parts = [_looked(invoke, done) for invoke, done in asked]
    parts += [_handed_back(evidence, invoke, done) for invoke, done in reloads]
    parts += [part for record in evidence.contexts.seen for part in _of_no_length(record)]
    debugged = [(invoke, done) for invoke, done in asked if invoke.f in DEBUGS]
    if debugged:
        parts += _commands(evidence, debugged)
    return combine(PROMISE, parts)


def _has_a_buffer(invoke: Invoke) -> bool:
    return invoke.f in LOOKS_AT and argument(invoke, "command") not in NEW_KEYS


def _looked(invoke: Invoke, done: Done | None) -> Verdict:
    """Whether anything has changed around what the caller told."""
    what = LOOKS_AT[invoke.f]
    if done is None or done.outcome == "info":
        return unknown(PROMISE, f"who sent {_named(invoke)} did not live to look at its buffer", (invoke,))
    changed = done.value.get(what)
    if not isinstance(changed, int):
        return unknown(PROMISE, f"nobody could look {what} the buffer of {_named(invoke)}", (invoke, done))
    if not changed:
        return kept(PROMISE, f"{_kind(invoke)} wrote nothing {what} what it was told", (invoke, done))
    return broken(
        PROMISE,
        f"{_named(invoke)} was told no more, and {changed} bytes {what} that were written",
        (invoke, done),
        signature=f"written-{what}:{_kind(invoke)}",
        expected=f"nothing written {what} the buffer",
        seen=f"{changed} bytes written {what} it",
    )


def _handed_back(evidence: RunEvidence, invoke: Invoke, done: Done | None) -> Verdict:
    """Whether the platform was shut down before the driver went, and since it was initialised last."""
    if done is None or done.outcome != "ok":
        return unknown(PROMISE, "nobody can say whether the driver went", (invoke,))
    told = [r for r in evidence.contexts.seen if r.command in (*_LENDS, _ENDS) and not r.status and r.t <= done.t]
    lent = next((r for r in reversed(told) if r.command in _LENDS and r.t < invoke.t), None)
    ended = next((r for r in reversed(told) if r.command == _ENDS and (lent is None or r.t > lent.t)), None)
    if not evidence.contexts.whole:
        return unknown(PROMISE, "not every command to the firmware is on record", (invoke, done))
    if ended is not None:
        return kept(PROMISE, "the firmware was shut down before its driver went", (ended, invoke, done))
    if lent is None:
        text = "nobody saw the platform being initialised, nor shut down when the driver went"
        return unknown(PROMISE, text, (invoke, done))
    return broken(
        PROMISE,
        f"the driver went, and the firmware had the memory that it was lent by {lent.command}: no {_ENDS} came between",
        (lent, invoke, done),
        signature=f"lent-memory-of-no-driver:{lent.command}",
        expected=_ENDS,
        seen="none",
    )


def _of_no_length(record: Firmware) -> Iterator[Verdict]:
    """Whether the command was given an address of nothing. Of commands of which that is not on record nothing is said:
    that nothing was written there, the caller's own buffer shows."""
    for name, length in record.asked.items():
        start = record.asked.get(name.replace("length", "address"), 0)
        if name.endswith("length") and not length and start:
            yield broken(
                PROMISE,
                f"{record.command} was given the address {start:#x} for a buffer of no length",
                (record,),
                signature=f"address-of-nothing:{record.command}",
                expected="no address",
                seen=f"{start:#x}",
            )


def _commands(evidence: RunEvidence, debugged: Sequence[tuple[Invoke, Done | None]]) -> Iterator[Verdict]:
    """What the firmware was asked to read and to write."""
    header, sent = evidence.history.header, [r for r in evidence.contexts.seen if r.command in DEBUGS.values()]
    if not evidence.contexts.seen and header is not None and header.host == "local":
        yield skipped(PROMISE, "on a real host nobody stands between the driver and the firmware", what="firmware")
        return
    served = [done for _, done in debugged if done is not None and (done.outcome == "ok" or done.firmware)]
    # One operation sends as many as it needs, so only what was sent after all of them shows that none is missing.
    ended = max((done.t for done in served), default=0)
    goes_on = any(record.t > ended for record in evidence.contexts.seen)
    whole = evidence.contexts.whole and goes_on and len(sent) >= len(served)
    if not whole or not all(record.asked for record in sent):
        text = "not every command to debug a guest is on record with what it was given"
        yield unknown(PROMISE, text, (*served, *sent))
        return
    if not sent:
        yield unknown(PROMISE, "no command to debug a guest was sent", [invoke for invoke, _ in debugged])
        return
    named = [pages for _, done in debugged for pages in _pages(done)]
    known = all(named)
    together = {pair for pages in named for pair in pairwise(pages)}
    beyond = [part for record in sent for part in _beyond(record, together, known=known)]
    yield from beyond
    if not beyond:
        yield kept(PROMISE, f"{len(sent)} commands to debug a guest stayed within their pages", sent)


def _pages(done: Done | None) -> Iterator[list[int]]:
    """The pages that the operation named, to read and to write; an empty list if nobody could tell."""
    for side in ("read_pages", "written_pages"):
        value = None if done is None else done.value.get(side)
        yield [page for page in value if isinstance(page, int)] if isinstance(value, list) else []


def _beyond(record: Firmware, together: set[tuple[int, int]], *, known: bool) -> Iterator[Verdict]:
    """Where the command goes on in a page that does not follow, by what its caller named."""
    length = record.asked["length"]
    for side, verb in (("source", "read"), ("destination", "written")):
        start = record.asked[side]
        pages = range(start - start % PAGE, start + length, PAGE)
        if all((page, page + PAGE) in together for page in pages[:-1]):
            continue
        text = f"{record.command} of {length} bytes from {start:#x} on has more than a page {verb}"
        if not known:
            yield unknown(PROMISE, f"{text}, and which pages the caller has, nobody could tell", (record,))
            continue
        yield broken(
            PROMISE,
            f"{text}, and the next one is not that of its caller",
            (record,),
            signature=BEYOND,
            expected=f"at most {PAGE - start % PAGE} bytes of that page",
            seen=f"{length} bytes",
        )


def _kind(invoke: Invoke) -> str:
    return argument(invoke, "command") or invoke.f


def _named(invoke: Invoke) -> str:
    if invoke.f == "platform":
        lengths = [number(invoke, "length"), *([number(invoke, "chain")] if "chain" in invoke.args else [])]
        return f"{_kind(invoke)} with a buffer of {' and one of '.join(map(str, lengths))} bytes"
    read_at, write_at, length = (number(invoke, key) for key in ("read_at", "write_at", "length"))
    return f"{invoke.f} of {length} bytes from {read_at:#x} to {write_at:#x}"
