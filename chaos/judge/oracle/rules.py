# SPDX-License-Identifier: Apache-2.0
"""For each operation the reasons to refuse it, in the contract's order of checks.

`CHECKS` maps an operation to its checks. A check sees the state and the operation and gives a `Refusal`, or None where
it lets the operation pass. The first that is sure ends the list; those that are not leave both ways open. Success is
allowed if no check is sure. Numbers in brackets are the steps of part 1.2 of the contract, names in parentheses the
kernel's own.
"""

from __future__ import annotations

from errno import EBADF, EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENOENT, ENOMEM, ENOSPC, ENOTTY, EROFS, ETIMEDOUT

from chaos.history.reading import NO_LENGTH, argument, number
from chaos.history.records import Invoke
from chaos.judge.ledger.effects import region
from chaos.judge.ledger.world import Stage
from chaos.judge.oracle import taking
from chaos.judge.oracle.state import ES, OracleAnswer, Refusal, State, charge
from chaos.judge.oracle.state import maybe as _maybe
from chaos.judge.oracle.state import sure as _sure
from chaos.judge.oracle.surroundings import AROUND, Check, has

INIT2 = "init2"
DEBUG_SWAP = 1 << 5
GHCB_VERSION_MAX = 2

# Statuses of the firmware, part 5.5.
INVALID_PLATFORM_STATE = 1
INVALID_GUEST_STATE = 2
ASID_OWNED = 12
INVALID_GUEST = 16
INVALID_LEN = 4

# Bytes of a buffer for /dev/sev, part 6.
BLOB_MAX = 0x4000
ALWAYS_TO_BE_HAD = 8 * 4096  # PAGE_ALLOC_COSTLY_ORDER
CERTIFICATE = 0x824
NEEDED = {"PEK_CSR": (CERTIFICATE, CERTIFICATE), "GET_ID2": (64, 128)}
"""Least, and enough. Of the chain that PDH_CERT_EXPORT gives beside a certificate it is three of these."""

# Numbers of commands, part 3.2 of the contract.
NR_WITHOUT_INIT2 = 22
INITS = (0, 1, 22)
NEVER_WRITTEN = (10, 14, 19)
RECEIVE_UPDATE_DATA = 13
SNP_COMMANDS = (100, 101, 102)
OF_MIRRORS = (4, 16, 17, 18)  # LAUNCH_UPDATE_VMSA, GUEST_STATUS, DBG_DECRYPT, DBG_ENCRYPT


def _by_firmware(state: State, status: int, *, when: bool) -> Refusal | None:
    """A refusal by the firmware's own state machine. Of one that nobody watched nobody knows with which status."""
    return Refusal(OracleAnswer(EIO, firmware=True, status=status if state.obeys else 0)) if when else None


# -- every ioctl on a VM ----------------------------------------------------------------------------------


def _descriptor(state: State, op: Invoke) -> Refusal | None:
    """The caller has the VM open."""
    return _sure(EBADF, when=not has(state, op.agent, argument(op, "vm")))


def _alive(state: State, op: Invoke) -> Refusal | None:
    """[0] A dead VM answers EIO to everything, and every VM to a process that did not create it (kvm_vm_ioctl). A move
    makes its source dead last of all (kvm_vm_dead() after sev_migrate_from()): as long as it is under way, either."""
    name = argument(op, "vm")
    vm, dead = state.world.vm(name), name in state.world.dead
    if dead and name in state.dying and (vm is None or vm.agent == op.agent):
        return _maybe(EIO, when=True)
    return _sure(EIO, when=dead or (vm is not None and vm.agent != op.agent))


# -- eventfds and memory slots -----------------------------------------------------------------------------


def _raises_already(state: State, op: Invoke) -> Refusal | None:
    """The eventfd raises an interrupt of this VM already, or from 6.17 on of any VM that somebody has open, dead or not
    (kvm_irqfd_assign). An older kernel that has got this refuses as well: finding 0009 is mended by it."""
    vm, gsi = argument(op, "vm"), number(op, "gsi")
    bound = {name for name, of in state.world.irqfds if of == gsi} if number(op, "assign") else set()
    refuses = bool(bound & {vm}) or (bool(bound) and state.rules.irqfd_unique)
    return _sure(EBUSY, when=True) if refuses else _maybe(EBUSY, when=bool(bound))


def _signalled_already(state: State, op: Invoke) -> Refusal | None:
    """Writing to the port signals an eventfd already."""
    bound = (argument(op, "vm"), number(op, "port")) in state.world.ioeventfds
    return _sure(EEXIST, when=bool(number(op, "assign") and bound))


def _signals_nothing(state: State, op: Invoke) -> Refusal | None:
    """There is none to be taken away. KVM_IRQFD does not mind."""
    bound = (argument(op, "vm"), number(op, "port")) in state.world.ioeventfds
    return _sure(ENOENT, when=not (number(op, "assign") or bound))


def _no_slot(state: State, op: Invoke) -> Refusal | None:
    """Only a slot that is there can be taken away. Which of those behind the first are, nobody keeps count of."""
    return _maybe(EINVAL, when=number(op, "slot") != 0 and not number(op, "there"))


# -- creation, INIT and the launch ----------------------------------------------------------------------------------


def _no_types(state: State, op: Invoke) -> Refusal | None:
    """A type that the kernel does not know."""
    return _sure(EINVAL, when=number(op, "type") != 0 and not state.rules.vm_types)


def _no_command_of_a_mirror(state: State, op: Invoke) -> Refusal | None:
    """Before the command's data is read (sev_mem_enc_ioctl)."""
    return _sure(EINVAL, when=state.world.mirror(argument(op, "vm")) is not None)


def _mirror_may_not(state: State, op: Invoke) -> Refusal | None:
    """The same for a command by its number."""
    return _sure(EINVAL, when=state.world.mirror(argument(op, "vm")) is not None and number(op, "id") not in OF_MIRRORS)


def _no_such_command(state: State, op: Invoke) -> Refusal | None:
    """A number without a command, or one of a command that was never written (part 3.2)."""
    known = range(NR_WITHOUT_INIT2 + 1 if state.rules.vm_types else NR_WITHOUT_INIT2)
    which = number(op, "id")
    if which in SNP_COMMANDS:
        return _maybe(EINVAL, when=True)
    return _sure(EINVAL, when=which not in known or which in NEVER_WRITTEN)


def _command_without_context(state: State, op: Invoke) -> Refusal | None:
    """It has no context, which all but the INITs want."""
    which = number(op, "id")
    if which in INITS or state.world.shared(argument(op, "vm")) is not None:
        return None
    return _sure(EINVAL if which == RECEIVE_UPDATE_DATA else ENOTTY, when=True)


def _left_open(errno: int, *, firmware: bool = False) -> Check:
    """What a command without data says to a VM that may issue it is not in the contract."""

    def check(state: State, op: Invoke) -> Refusal | None:
        """Whatever the command says to having no data: not in the contract."""
        return _maybe(errno, firmware=firmware, when=True, left_open=True)

    return check


def _wrong_init(state: State, op: Invoke) -> Refusal | None:
    """INIT2 is for VMs with a type and the other two for those without (part 3.4). Before there were types, there was
    no INIT2."""
    vm = state.world.vm(argument(op, "vm"))
    typed = vm is not None and vm.type != 0
    return _sure(EINVAL, when=bool(argument(op, "command")) and typed != (argument(op, "command") == INIT2))


def _bad_arguments(state: State, op: Invoke) -> Refusal | None:
    """Of INIT2 (part 3.4): no flag means anything, and for SEV no feature and no version of the GHCB does. Of the
    features of SEV-ES a kernel may have DEBUG_SWAP; the others it does not know, or sets by itself."""
    es = argument(op, "key") == ES
    features, ghcb = number(op, "features"), number(op, "ghcb")
    bad = number(op, "flags") != 0 or ghcb > (GHCB_VERSION_MAX if es else 0) or features & ~(DEBUG_SWAP if es else 0)
    return _sure(EINVAL, when=True) if bad else _maybe(EINVAL, when=features != 0)


def _es_disabled(state: State, op: Invoke) -> Refusal | None:
    """A host without SEV-ES has no such command; part 3.4 gives other answers for a key without capacity as well."""
    return _maybe(ENOTTY, when=argument(op, "key") == ES and state.capacity_of(ES) == 0)


def _has_vcpus(state: State, op: Invoke) -> Refusal | None:
    """It has a vCPU already."""
    vm = state.world.vm(argument(op, "vm"))
    return _sure(EINVAL, when=vm is not None and vm.created > 0)


def _half_a_vcpu(state: State, op: Invoke) -> Refusal | None:
    """created_vcpus counts a vCPU from the beginning of its creation."""
    vm = state.world.vm(argument(op, "vm"))
    return _maybe(EINVAL, when=vm is not None and vm.creating is not None)


def _initialised(state: State, op: Invoke) -> Refusal | None:
    """It was initialised before; which errno says so differs by kernel."""
    errno = EINVAL if state.rules.second_init_invalid else EBUSY
    return _sure(errno, when=state.world.context(argument(op, "vm")) is not None)


def _no_range(state: State, op: Invoke) -> Refusal | None:
    """An empty range of ASIDs is found before the charge is tried, where its error is shown (sev_asid_new)."""
    return _maybe(ENOTTY, when=state.rules.init_errors_shown and state.capacity_of(argument(op, "key")) == 0)


def _charge_of_init(state: State, op: Invoke) -> Refusal | None:
    """The caller's cgroup pays, under the key of the context. Before 6.10 a key without capacity is EBUSY as well."""
    payer = state.world.home(op.agent)
    if payer is None:
        return None
    answer = charge(state, payer, argument(op, "key"))
    if answer.errno == EINVAL and not state.rules.init_errors_shown:
        answer = OracleAnswer(EBUSY)
    return Refusal(answer) if answer.errno else None


def _no_flush(state: State, op: Invoke) -> Refusal | None:
    """A freed ASID is of use only after DF_FLUSH, which a firmware may fail and a dead one never answers."""
    return _maybe(EBUSY, when=state.psp != "well" or not state.flushes)


def _no_context(state: State, op: Invoke) -> Refusal | None:
    """It has no context, its own or as a mirror."""
    return _sure(ENOTTY, when=state.world.shared(argument(op, "vm")) is None)


def _no_es(state: State, op: Invoke) -> Refusal | None:
    """It is no SEV-ES guest."""
    return _sure(ENOTTY, when=not taking.is_es(state, argument(op, "vm")))


def _sealing_while_creating(state: State, op: Invoke) -> Refusal | None:
    """A vCPU of it is half made."""
    vm = state.world.vm(argument(op, "vm"))
    creating = vm is not None and vm.creating is not None
    return _maybe(EBUSY, when=creating and state.rules.vmsa_creation_busy)


def _sealed_already(state: State, op: Invoke) -> Refusal | None:
    """Where the kernel does not look, the firmware may: it has its own idea of how often that may be done."""
    name, world = argument(op, "vm"), state.world
    holder, vm = world.mirror(name) or world.context(name), world.vm(name)
    sealed = holder is not None and holder.sealed and vm is not None and vm.created > 0
    return _sure(EINVAL, when=sealed and state.rules.vmsa_once)


def _not_started(state: State, op: Invoke) -> Refusal | None:
    """Without LAUNCH_START there is no handle, and no /dev/sev was remembered to send the command through."""
    context = state.world.shared(argument(op, "vm"))
    return _maybe(EBADF, when=context is not None and not context.launched)


def _cut_off(state: State, op: Invoke) -> Refusal | None:
    """The process has no /dev/sev any more to send the command through."""
    return _sure(EBADF, when=op.agent in state.world.cut_off)


def _no_guest(state: State, op: Invoke) -> Refusal | None:
    """There is no guest of handle 0; and while there is none at all, the platform is not working."""
    context = state.world.shared(argument(op, "vm"))
    status = INVALID_GUEST if state.world.guests else INVALID_PLATFORM_STATE
    return _by_firmware(state, status, when=context is not None and not context.launched)


def _started_twice(state: State, op: Invoke) -> Refusal | None:
    """The ASID is another guest's already: ACTIVATE answers ASID_OWNED."""
    context = state.world.context(argument(op, "vm"))
    return _by_firmware(state, ASID_OWNED, when=context is not None and context.launched)


def _untold(state: State, op: Invoke) -> Refusal | None:
    """The handle of the guest cannot be told: it is no guest then (sev_launch_start)."""
    return _sure(EFAULT, when=op.args.get("read_only") is True)


def _not_in(stage: Stage) -> Check:
    """The firmware carries the command out in this stage of the guest's launch only. What one that was tampered with
    takes for the stage, nobody can say."""

    def check(state: State, op: Invoke) -> Refusal | None:
        """The firmware has taken the guest's launch too far for the command, or not far
        enough (INVALID_GUEST_STATE)."""
        context = state.world.shared(argument(op, "vm"))
        wrong = state.obeys and context is not None and context.stage is not stage
        return _by_firmware(state, INVALID_GUEST_STATE, when=wrong)

    return check


def _no_vcpu(state: State, op: Invoke) -> Refusal | None:
    """The launch is past its registers (INVALID_GUEST_STATE). Where there is no vCPU the firmware is sent nothing."""
    vm = state.world.vm(argument(op, "vm"))
    context = state.world.shared(argument(op, "vm"))
    late = state.obeys and context is not None and context.stage is not Stage.UPDATE
    return _by_firmware(state, INVALID_GUEST_STATE, when=late and vm is not None and vm.created > 0)


def _noticed(state: State, op: Invoke) -> Refusal | None:
    """A firmware that does not answer: EBUSY for all commands after the one that found out. That may have been one that
    nobody made, like the DEACTIVATE of a VM that was closed."""
    return _maybe(EBUSY, when=True) if state.psp == "stalled" else _sure(EBUSY, when=state.psp == "dead")


def _firmware_refuses(state: State, op: Invoke) -> Refusal | None:
    """A firmware that nobody watched, or that was tampered with, may refuse any command for reasons of its own, and
    always says so with a status."""
    return _maybe(EIO, firmware=True, when=not state.obeys, left_open=True)


def _platform_refuses(state: State, op: Invoke) -> Refusal | None:
    """The first INIT on a platform that was shut down has the firmware initialised (sev_platform_init())."""
    return _maybe(EIO, firmware=True, when=state.psp == "well" and not state.obeys, left_open=True)


# What the file of the firmware's state answers, by what became of it. A write that comes to less than all is EIO.
_STORAGE = {"missing": (ENOENT,), "full": (ENOSPC, EIO), "read-only": (EROFS,)}


def _storage_refuses(errno: int) -> Check:
    def check(state: State, op: Invoke) -> Refusal | None:
        """The host cannot write the firmware's state down (init_ex_path): the INIT that initialises the platform may
        say so, and whatever gives it new keys."""
        spoiled = any(errno in _STORAGE.get(how, ()) for how in state.storage)
        return _maybe(errno, when=spoiled, left_open=True)

    return check


def _locks_memory(state: State, op: Invoke) -> Refusal | None:
    """Whether the memory of a process that was given a limit fits into RLIMIT_MEMLOCK, nobody recorded, unless nothing
    does (sev_pin_memory). Others may lock whatever they like."""
    limits = {limit for agent, limit in state.memlock if agent == op.agent}
    return _sure(ENOMEM, when=True) if limits == {0} else _maybe(ENOMEM, when=bool(limits))


def _no_region(state: State, op: Invoke) -> Refusal | None:
    """A region goes by its address in the process that registered it, and moves with the context (1.3). Of one whose
    address nobody recorded, nobody can say whether it is that of another."""
    context, which = state.world.context(argument(op, "vm")), region(op)
    if context is None or which in context.regions:
        return None
    if all(each.startswith("0x") for each in (which, *context.regions)) or not context.regions:
        return _sure(EINVAL, when=True)
    return _maybe(EINVAL, when=True, left_open=True)


def _nothing_to_debug(state: State, op: Invoke) -> Refusal | None:
    """A command to debug no bytes."""
    return _sure(EINVAL, when=number(op, "length") == 0)


# -- /dev/sev itself ----------------------------------------------------------------------------------------


def _too_long(state: State, op: Invoke) -> Refusal | None:
    """A certificate or a chain of them is at most 16 KiB (SEV_FW_BLOB_MAX_SIZE). Where one buffer has no length it is
    the lengths that are asked for, and they may not be looked at."""
    lengths = _lengths(op)
    too_long = argument(op, "command") != "GET_ID2" and max(lengths, default=0) > BLOB_MAX
    return _sure(EFAULT, when=True) if too_long and all(lengths) else _maybe(EFAULT, when=too_long)


def _no_buffer(state: State, op: Invoke) -> Refusal | None:
    """There may be no memory for a buffer as long as the caller's, which is no reason to warn (sev_ioctl_do_get_id2).
    Of what is 32 KiB or less there is some."""
    return _maybe(ENOMEM, when=argument(op, "command") == "GET_ID2" and number(op, "length") > ALWAYS_TO_BE_HAD)


def _too_short(state: State, op: Invoke) -> Refusal | None:
    """The firmware's answer does not fit (INVALID_LEN), as to whoever asks with length 0 how long it is. Of an ID only
    the least length is known."""
    needed = [NEEDED.get(argument(op, "command"), (CERTIFICATE, CERTIFICATE)), (3 * CERTIFICATE, 3 * CERTIFICATE)]
    given = list(zip(_lengths(op), needed, strict=False))
    if not state.obeys or all(length >= enough for length, (_, enough) in given):
        return None
    sure = any(length < least for length, (least, _) in given)
    return Refusal(OracleAnswer(EIO, firmware=True, status=INVALID_LEN), sure=sure)


def _lengths(op: Invoke) -> list[int]:
    """Those of the buffers that the command has beside its own."""
    command, both = argument(op, "command"), [number(op, "length"), number(op, "chain")]
    if command in NO_LENGTH:
        return []
    return both if command == "PDH_CERT_EXPORT" else both[:1]


def _keys_in_use(state: State, op: Invoke) -> Refusal | None:
    """A new platform endorsement key while the firmware has a guest (INVALID_PLATFORM_STATE)."""
    launched = any(context.launched or context.launching is not None for context in state.world.contexts)
    new = argument(op, "command") == "PEK_GEN"
    return _by_firmware(state, INVALID_PLATFORM_STATE, when=new and launched)


def _stalled(state: State, op: Invoke) -> Refusal | None:
    """The firmware does not answer, and this command is the one that finds out."""
    return _sure(ETIMEDOUT, when=state.psp == "stalled")


def _may_stall(state: State, op: Invoke) -> Refusal | None:
    """Of what asks the firmware only now and then."""
    return _maybe(ETIMEDOUT, when=state.psp == "stalled")


_IOCTL = (_descriptor, _alive)
_WITHOUT_DATA = (
    *(_left_open(errno) for errno in (EFAULT, EINVAL, EBADF, EBUSY, ENOTTY)),
    _left_open(EIO, firmware=True),
)
_COMMAND = (*_IOCTL, _no_command_of_a_mirror, _no_context)
_SENDS = (_cut_off, _not_started, _noticed, _stalled)
_ASKS = (*_SENDS, _no_guest)
_DEBUG = (*_IOCTL, _no_context, _nothing_to_debug, _locks_memory, *_ASKS, _firmware_refuses)
_UNWRITTEN = tuple(_storage_refuses(errno) for errno in (ENOENT, ENOSPC, EROFS, EIO))

CHECKS: dict[str, tuple[Check, ...]] = {
    **AROUND,
    "create": (_no_types,),
    "create_vcpu": _IOCTL,
    "set_memory": (*_IOCTL, _no_slot),
    "irqfd": (*_IOCTL, _raises_already),
    "ioeventfd": (*_IOCTL, _signalled_already, _signals_nothing),
    "init": (
        *_IOCTL,
        _es_disabled,
        _no_command_of_a_mirror,
        _wrong_init,
        _has_vcpus,
        _half_a_vcpu,
        _bad_arguments,
        _initialised,
        _no_range,
        _charge_of_init,
        _no_flush,
        _may_stall,
        _platform_refuses,
        *_UNWRITTEN,
    ),
    "launch_start": (*_COMMAND, _cut_off, _noticed, _stalled, _started_twice, _firmware_refuses, _untold),
    "launch_update_data": (*_COMMAND, _locks_memory, *_ASKS, _not_in(Stage.UPDATE), _firmware_refuses),
    "launch_measure": (*_COMMAND, *_ASKS, _not_in(Stage.UPDATE), _firmware_refuses),
    "launch_finish": (*_COMMAND, *_ASKS, _not_in(Stage.SECRET), _firmware_refuses),
    "launch_update_vmsa": (
        *_IOCTL,
        _no_es,
        _sealing_while_creating,
        _sealed_already,
        *_ASKS,
        _no_vcpu,
        _firmware_refuses,
    ),
    # Of a handle that nobody has GUEST_STATUS answers that it is UNINIT.
    "guest_status": (*_IOCTL, _no_context, *_SENDS, _firmware_refuses),
    "dbg_decrypt": _DEBUG,
    "dbg_encrypt": _DEBUG,
    "platform": (
        _cut_off,
        _too_long,
        _no_buffer,
        _noticed,
        _stalled,
        _too_short,
        _keys_in_use,
        _platform_refuses,
        *_UNWRITTEN,
    ),
    "command": (*_IOCTL, _mirror_may_not, _no_such_command, _command_without_context, _may_stall, *_WITHOUT_DATA),
    "register_region": (*_IOCTL, _no_context, _no_command_of_a_mirror, _locks_memory),
    "unregister_region": (*_IOCTL, _no_command_of_a_mirror, _no_context, _no_region),
    "mirror": (
        *_IOCTL,
        taking.flagged,
        taking.source_descriptor,
        taking.itself,
        taking.busy,
        taking.not_mirrorable,
        _half_a_vcpu,
    ),
    "move": (
        *_IOCTL,
        taking.flagged,
        taking.source_descriptor,
        taking.itself,
        taking.busy,
        taking.types_differ,
        taking.not_movable,
        taking.has_mirrors,
        taking.charge_of_move,
        taking.vcpu_creation,
        taking.vcpus_differ,
        taking.unsealed,
    ),
}
