# SPDX-License-Identifier: Apache-2.0
"""The step that loads the drivers anew."""

from __future__ import annotations

from typing import Any

from chaos.experiment import steps as s
from chaos.linux import modules
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed

DRIVERS = ("kvm_amd", "ccp")


def reload(executor: Executor, step: s.ReloadStep) -> None:
    """Whoever has /dev/kvm or /dev/sev open keeps them loaded: the VMMs end before it and are started anew, and the
    runner lets go of its own."""
    guests, vmms = executor.guests, executor.vmms
    executor.none_under_way("the drivers are in use")
    there = [vm.name for vm in guests.all if vm.created and vm.vmm.alive]
    if there:
        raise StepFailed(f"the drivers are in use: {', '.join(there)} is there; close it, or let its VMM end")
    for name in guests.experiment.vmms:
        vmms.end(vmms[name])
    platform = executor.ctx.firmware.platform
    parameters: dict[str, Any] = {**guests.experiment.ccp, **step.ccp}
    platform.close()
    try:
        executor.log.record("reload", lambda: modules.reload(DRIVERS, parameters), **parameters)
    except OSError as error:
        raise StepFailed(f"the drivers could not be loaded anew: {error.strerror}") from error
    finally:
        platform.reopen()
    for name in guests.experiment.vmms:
        guests.restart(name)
