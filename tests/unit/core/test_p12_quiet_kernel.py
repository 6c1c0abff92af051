# SPDX-License-Identifier: Apache-2.0
"""P12: what the kernel says when something is wrong, and what it says every day."""

from __future__ import annotations

from errno import EBUSY

import msgspec
import pytest

from chaos.history.records import Console, Kernel
from chaos.judge import findings
from chaos.judge.checkers import CHECKERS
from chaos.judge.checkers.p12_quiet_kernel import PATTERNS, report
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE

SPLATS = {
    "WARNING: CPU: 1 PID: 402 at kernel/cgroup/misc.c:98 misc_cg_cancel_charge+0x58/0x60": "warn:misc_cg_cancel_charge",
    "WARNING: kernel/cgroup/misc.c:98 at misc_cg_cancel_charge+0x58/0x60, CPU#1: sevchaos/402": (
        "warn:misc_cg_cancel_charge"
    ),
    "WARNING: CPU: 0 PID: 1 at 0xffffffff81000000": "warn:0xffffffff81000000",
    "WARNING: possible circular locking dependency detected": "lockdep",
    "WARNING: possible recursive locking detected": "lockdep",
    "WARNING: inconsistent lock state": "lockdep",
    "WARNING: suspicious RCU usage": "lockdep",
    "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected": "lockdep",
    "BUG: MAX_LOCKDEP_CHAINS too low!": "lockdep",
    "BUG: kernel NULL pointer dereference, address: 0000000000000008": "bug:kernel-NULL-pointer-dereference",
    "BUG: unable to handle page fault for address: ffffc90000e3ffd8": "bug:unable-to-handle-page-fault",
    "BUG: Bad page state in process sevchaos  pfn:3fe01": "bug:Bad-page-state",
    "BUG: sleeping function called from invalid context at mm/util.c:1": (
        "bug:sleeping-function-called-from-invalid-context"
    ),
    "BUG: KASAN: slab-use-after-free in sev_migrate_from+0x1c/0x90 [kvm_amd]": "sanitizer:sev_migrate_from",
    "UBSAN: array-index-out-of-bounds in arch/x86/kvm/svm/sev.c:12:3": "sanitizer:array-index-out-of-bounds",
    "kernel BUG at arch/x86/kvm/svm/sev.c:1978!": "bug:arch/x86/kvm/svm/sev.c",
    "list_del corruption. prev->next should be ffff8881, but was 0": "corruption:list_del",
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP": "gpf",
    "Oops: general protection fault, maybe for address 0x0: 0000 [#1] PREEMPT SMP NOPTI": "gpf",
    "invalid opcode: 0000 [#1] PREEMPT SMP": "oops",
    "Oops: 0002 [#1] PREEMPT SMP": "oops",
    "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [sevchaos:402]": "lockup",
    "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0": "lockup",
    "INFO: task vcpu:402 blocked for more than 120 seconds.": "hung-task",
    "rcu: INFO: rcu_preempt self-detected stall on CPU": "stall",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:": "stall",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }": "stall",
    "Kernel panic - not syncing: Fatal exception": "panic",
    # From here on as Linux 6.12.117 prints them: lib/, mm/ and kernel/ of its source.
    "BUG kmalloc-192 (Not tainted): Poison overwritten": "slub:kmalloc-192",
    "BUG kmalloc-rnd-03-64 (Tainted: G    B   W  OE     ): Right Redzone overwritten": "slub:kmalloc-rnd-03-64",
    "BUG kvm_vcpu (Tainted: G           OE      6.12.117+deb12-amd64): Object already free": "slub:kvm_vcpu",
    "BUG kmalloc-32 (Not tainted): Objects remaining on __kmem_cache_shutdown()": "slub:kmalloc-32",
    "FIX kmalloc-192: Restoring Poison 0x00000000f3d2b6a1-0x00000000a8d7be5c=0x6b": "slub:kmalloc-192",
    "=== kvm_vcpu: Objects remaining in kvm_vcpu on __kmem_cache_shutdown()": "slub:kvm_vcpu",
    "Object already free": "slub",
    "kmem_cache_destroy kvm_vcpu: Slab cache still has objects when called from kvm_exit+0x2a/0x40 [kvm]": "slub",
    "usercopy: Kernel memory overwrite attempt detected to SLUB object 'kmalloc-64' (offset 0, size 80)!": "usercopy",
    "refcount_t: saturated; leaking memory.": "refcount:saturated",
    "refcount_t: addition on 0; use-after-free.": "refcount:addition-on-0",
    "refcount_t: underflow; use-after-free.": "refcount:underflow",
    "refcount_t: decrement hit 0; leaking memory.": "refcount:decrement-hit-0",
    "ODEBUG: free active (active state 0) object: 000000006a5b5b4c object type: timer_list hint: fn+0x0/0x10": (
        "object:free"
    ),
    "ODEBUG: init destroyed (active state 0) object: 000000006a5b5b4c object type: work_struct hint: fn+0x0/0x10": (
        "object:init-destroyed"
    ),
    "ODEBUG: object ffffc900003f7d90 is on stack ffffc900003f4000, but NOT annotated.": "object:is-on-stack",
    "INFO: trying to register non-static key.": "lockdep",
    "WARNING: bad contention detected!": "lockdep",
    "WARNING: chain_key collision": "lockdep",
    "WARNING: python3/402 still has locks held!": "lockdep",
    "WARNING: circular locking deadlock detected!": "lockdep",
    "WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected": "lockdep",
    "WARNING: lock held when returning to user space!": "lockdep",
    "[ BUG: Invalid wait context ]": "bug:Invalid-wait-context",
    "BUG: KASAN: double-free in sev_vm_destroy+0x11c/0x220 [kvm_amd]": "sanitizer:sev_vm_destroy",
    "KASAN: null-ptr-deref in range [0x0000000000000000-0x0000000000000007]": "sanitizer:null-ptr-deref",
    "BUG: KCSAN: data-race in sev_unlock_two_vms / sev_vm_move_enc_context_from": "sanitizer:sev_unlock_two_vms",
    "BUG: KMSAN: uninit-value in kvm_vm_ioctl+0x1c/0x90 [kvm]": "sanitizer:kvm_vm_ioctl",
    "BUG: KFENCE: use-after-free read in sev_migrate_from+0x1c/0x90 [kvm_amd]": "sanitizer:sev_migrate_from",
    "UBSAN: shift-out-of-bounds in arch/x86/kvm/svm/sev.c:12:3": "sanitizer:shift-out-of-bounds",
    "CFI failure at kvm_vm_ioctl+0x1c/0x90 [kvm] (target: fn+0x0/0x10; expected type: 0x8d6ee3a5)": (
        "sanitizer:CFI-failure"
    ),
    "list_add corruption. next->prev should be prev (ffff8881), but was 0000. (next=ffff8882).": "corruption:list_add",
    "list_add double add: new=ffff8881, prev=ffff8881, next=ffff8882.": "corruption:list_add",
    "list_del corruption, ffff8881->next is LIST_POISON1 (dead000000000100)": "corruption:list_del",
    "INFO: task khungtaskd test:402 blocked for more than 6 seconds.": "hung-task",
    "INFO: task python3:402 blocked in I/O wait for more than 6 seconds.": "hung-task",
    "BUG: workqueue lockup - pool cpus=1 node=0 flags=0x0 nice=0 stuck for 31s!": "lockup",
    "BUG: workqueue leaked atomic, lock or RCU: kworker/1:0[24]": "bug:workqueue-leaked-atomic",
    "rcu: INFO: rcu_preempt detected stall, but suppressed full report due to a stuck CSD-lock.": "stall",
}
ORDINARY = [
    "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable because the skew is too large:",
    "unchecked MSR access error: RDMSR from 0xc0010117 at rIP: 0xffffffff81070f54 (native_read_msr+0x4/0x20)",
    "ccp 0000:00:05.0: sev command 0x31 timed out, disabling PSP",
    "kvm_amd: TSC scaling supported",
    "hrtimer: interrupt took 5104321 ns",
    "SEV: DF_FLUSH failed, ret=-16, error=0x0",
    "sevchaos[402]: segfault at 0 ip 0000000000000000 sp 00007ffd error 14",
    "traps: sevchaos[402] general protection fault ip:55d0c0a0 sp:7ffd0010 error:0 in python3.11[55d0c000+2a0000]",
    "traps: sevchaos[402] trap invalid opcode ip:55d0c0a0 sp:7ffd0010 error:0 in python3.11[55d0c000+2a0000]",
    "ODEBUG: Out of memory. ODEBUG disabled",
    "INFO: lockdep is turned off.",
    "BUGS: none",
]


@pytest.mark.parametrize(("text", "signature"), SPLATS.items())
def test_p12_reports_of_defects(text: str, signature: str) -> None:
    b = Builder()
    b.kernel(text)
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)
    assert text.split("; ", maxsplit=1)[0] in verdict.reason


@pytest.mark.parametrize("text", ORDINARY)
def test_p12_ordinary_lines(text: str) -> None:
    assert report(Kernel(t=0, level=3, text=text)) == ""


def test_p12_every_pattern_is_tested_and_has_its_reason() -> None:
    found = [next(pattern for _, pattern, _ in PATTERNS if pattern.search(text)) for text in SPLATS]
    assert {pattern.pattern for _, pattern, _ in PATTERNS} == {pattern.pattern for pattern in found}
    assert all(reason for _, _, reason in PATTERNS)


@pytest.mark.parametrize("level", range(8))
def test_p12_a_report_counts_at_any_level(level: int) -> None:
    """The head of an oops and the text of a WARN have the default level, which a kernel may have set to any."""
    assert report(Kernel(t=0, level=level, text="Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI")) == "oops"
    assert report(Kernel(t=0, level=level, text="refcount_t: underflow; use-after-free.")) == "refcount:underflow"


@pytest.mark.parametrize("text", ORDINARY)
def test_p12_what_userspace_brings_upon_itself_does_not_count(text: str) -> None:
    assert report(Kernel(t=0, level=6, text=text)) == ""


def test_p12_what_was_said_between_two_runs_is_nobodys() -> None:
    b = Builder()
    b.kernel("WARNING: CPU: 1 PID: 402 at a.c:1 b+0x1/0x2")
    b.records[-1] = msgspec.structs.replace(b.records[-1], t=b.records[0].t - 1)
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "before this run, after an earlier one had closed the log, the kernel said: WARNING" in verdict.reason
    assert verdict.records == (1,)
    b.records[1] = msgspec.structs.replace(b.records[1], t=b.records[0].t)
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.BROKEN  # the run had begun


def test_p12_what_was_said_before_a_run_hides_nothing_of_what_is_said_in_it() -> None:
    b = Builder()
    b.kernel("WARNING: CPU: 1 PID: 402 at a.c:1 b+0x1/0x2")
    b.records[-1] = msgspec.structs.replace(b.records[-1], t=b.records[0].t - 1)
    b.kernel("Oops: 0002 [#1] PREEMPT SMP")
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "oops+part-unknown")
    assert verdict.reason.startswith("the kernel said: Oops: 0002 [#1] PREEMPT SMP; before this run")


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(("seconds", "began_before"), [(5, True), (1, False)])
def test_p12_what_hung_before_this_run_began_is_not_known_to_be_its_own(
    earlier: int, seconds: int, *, began_before: bool
) -> None:
    """In a lab that nobody used before there is nobody else whose it could be."""
    b = Builder()
    b.records[0] = msgspec.structs.replace(b.records[0], earlier=earlier)
    b.t += 4_000_000_000
    b.kernel(f"INFO: task vcpu:402 blocked for more than {seconds} seconds.")
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    unknown = bool(earlier) and began_before
    assert verdict.outcome is (Outcome.UNKNOWN if unknown else Outcome.BROKEN), verdict.reason
    assert ("had begun before this run" in verdict.reason) == unknown


PATIENT = {"hung task": 120, "soft lockup": 20, "hard lockup": 0, "RCU stall": 21}
SHORT = {"hung task": 5, "soft lockup": 20, "hard lockup": 10, "RCU stall": 5}


@pytest.mark.parametrize(
    ("patience", "seconds", "told"),
    [
        ({}, 10, "after how long this kernel reports what hangs was not recorded"),
        (PATIENT, 10, "in 10 s this kernel cannot report hung tasks (after 120 s), soft lockups (after 20 s), RCU"),
        (PATIENT, 10, "and it never reports hard lockups"),
        (SHORT, 10, "in 10 s this kernel cannot report soft lockups (after 20 s)"),
        (SHORT, 100, "whatever hung for long would have been reported"),
    ],
)
def test_p12_says_what_it_could_not_have_seen(patience: dict[str, int], seconds: int, told: str) -> None:
    b = Builder()
    b.records[0] = msgspec.structs.replace(b.records[0], patience=patience)
    b.t += seconds * 1_000_000_000
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert verdict.outcome is Outcome.KEPT
    assert told in verdict.reason


@pytest.mark.parametrize(
    ("f", "key", "to", "kind"),
    [
        ("move", "sev_es", "destination", "move-of-sev_es-across"),
        ("move", "sev_es", "source", "move-of-sev_es"),  # where nothing is uncharged
        ("move", "sev", "destination", "move"),
        ("close", "sev_es", "destination", "close"),
    ],
)
def test_p12_the_warning_of_finding_0002_is_that_of_a_moved_sev_es_context_alone(
    f: str, key: str, to: str, kind: str
) -> None:
    """A planted defect that leaves a charge of a plain SEV guest out ends in the same line of the kernel's."""
    b = Builder()
    b.begin()
    b.launch("old", "source", key)
    b.launch("new", to)
    b.do("send_fd", "source", vm="old", to=to)
    invoke = b.invoke(f, to, vm="new", source="old")
    b.kernel("WARNING: CPU: 0 PID: 190 at kernel/cgroup/misc.c:119 misc_cg_uncharge+0x84/0x90")
    b.done(invoke)
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert verdict.signature == f"warn:misc_cg_uncharge-in-{kind}"
    found = findings.matching(verdict, "6.12.117", findings.load())
    assert (found.id if found is not None else "") == ("0002" if kind.endswith("-across") else "")


@pytest.mark.parametrize(("f", "error", "kind"), [("move", EBUSY, "move-of-sev_es"), ("close", 0, "close")])
def test_p12_the_warning_of_finding_0002_comes_out_of_a_move_that_succeeded_and_of_no_later_call(
    f: str, error: int, kind: str
) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev_es")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    if f == "close":
        b.move("old", "new", "destination")
    invoke = b.invoke(f, "destination", vm="new", source="old")
    b.kernel("WARNING: CPU: 0 PID: 190 at kernel/cgroup/misc.c:119 misc_cg_uncharge+0x84/0x90")
    b.done(invoke, "fail" if error else "ok", error=error)
    assert CHECKERS["P12"](shipped(MOVE), b.end()).signature == f"warn:misc_cg_uncharge-in-{kind}"


def test_p12_a_kernels_last_words_come_from_the_console_and_name_what_was_under_way() -> None:
    b = Builder()
    b.spawn("destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    last = b.console("[    7.406251] Kernel panic - not syncing: Fatal exception")
    verdict = CHECKERS["P12"](shipped(MOVE), b.history())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "panic")
    assert verdict.reason == f"the kernel said: {last.text} (during move of new)"
    assert verdict.records == (invoke.seq, last.seq)


@pytest.mark.parametrize("text", ORDINARY)
def test_p12_ordinary_lines_of_the_console(text: str) -> None:
    assert report(Console(t=0, text=f"[    1.000000] {text}")) == ""


def test_p12_a_witness_that_was_lost_without_a_name_may_be_this_one() -> None:
    b = Builder()
    b.note("something is gone")
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.UNKNOWN


def test_p12_a_log_that_nobody_is_known_to_have_read() -> None:
    """Its reader hears a line of its own first; without that no lines are no quiet kernel."""
    b = Builder()
    b.records[0] = msgspec.structs.replace(b.records[0], log_ahead=None)
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert verdict.outcome is Outcome.UNKNOWN
    assert verdict.reason == "nothing shows that the kernel's log was read"


def test_p12_a_lost_witness() -> None:
    b = Builder()
    b.note("the firmware's count of guests, which the kernel's log does not have", "guests")
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.KEPT
    b.note("what was said went by too fast", "log")  # the words are for people
    verdict = CHECKERS["P12"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "too fast" in verdict.reason and "guests" not in verdict.reason
    assert verdict.records == (b.records[-1].seq,)
    b.kernel("Oops: 0002 [#1] PREEMPT SMP")
    assert CHECKERS["P12"](shipped(MOVE), b.end()).outcome is Outcome.BROKEN
