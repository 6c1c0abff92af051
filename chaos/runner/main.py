# SPDX-License-Identifier: Apache-2.0
"""The runner: carries out experiments on the host it runs on.

It reads orders from standard input, one JSON object a line (`chaos.runner.order.Order`), and writes each run's
history to standard output, a record a line, flushed before the next thing happens. Nothing else is ever written there
but the questions of `chaos.runner.questions`, whose answers come on standard input. After the End of one run the next
order is read; at the end of the input the runner ends. In the lab and on a real host it is the same program.

A run, in its order:

    Header
    Filled start         how many contexts of each key can be had: all are taken once and given back
    Observation start    step -1; the cgroups of the VMMs exist, nothing lives in them
    spawn                the VMMs
    the script           steps 0 to n-1
    teardown             step n: faults undone, VMs closed, VMMs ended
    Observation end      the cgroups still exist
    Filled end           after they were removed: as many as at the start, or something leaked
    End

Whatever goes wrong, the rest is still done, and End says that it did. Where the kernel does not know what the
experiment is about, nothing is done at all: a Note "skipped" says why, and so does End. The runner ends with 0 if it
could say everything it had to, whether or not the runs were complete.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType

import msgspec

from chaos.errors import ExitCode, HostLacks
from chaos.history.records import End
from chaos.linux.process import be_told_of_parents_death
from chaos.native import library
from chaos.runner.kernel_objects import LeakWitness
from chaos.runner.order import Order
from chaos.runner.recorder import OutsideGone, Recorder
from chaos.runner.run import ExperimentRun, Interrupted
from chaos.runner.tracing import Tracer
from chaos.runner.uplink import Outside
from chaos.safety.warden import Warden
from chaos.vmm.server import ForkServer

# -- the program ------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Order)
SAYS_BEFORE = 5.0  # seconds before its time is over
_WANTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for wanted in _WANTED:  # once is enough, and the second would break the cleaning up
        signal.signal(wanted, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def main(argv: Sequence[str]) -> int:
    """Serve orders until there are no more; the exit code."""
    if argv:
        sys.stderr.write("the runner takes no arguments; it reads orders from its standard input\n")
        return ExitCode.USAGE
    recorder = Recorder(sys.stdout.fileno())
    for number in _WANTED:
        signal.signal(number, _interrupt)
    try:
        be_told_of_parents_death(signal.SIGTERM)  # or it would find out when it next has something to say
        with ExitStack() as stack:
            with contextlib.suppress(HostLacks):  # told when a run needs it
                library.load()
            # The runner has one thread here, and nothing open that its children should not have.
            warden = Warden()
            stack.callback(warden.dismiss)
            server = ForkServer()
            stack.callback(server.close)
            tracer = Tracer.open()
            stack.callback(tracer.close)
            return _serve(server, warden, recorder, Outside(recorder, sys.stdin.fileno()), tracer)
    except Interrupted as why:
        sys.stderr.write(f"interrupted by {why}\n")
        return ExitCode.INTERRUPTED
    except OutsideGone:
        return ExitCode.INTERRUPTED
    except Exception:
        traceback.print_exc()
        return ExitCode.INTERNAL


def _serve(server: ForkServer, warden: Warden, recorder: Recorder, outside: Outside, tracer: Tracer) -> int:
    leaks = LeakWitness()
    for earlier, line in enumerate(outside.orders()):
        try:
            order = _decoder.decode(line)
        except msgspec.DecodeError as error:
            sys.stderr.write(f"this is no order: {error}\n")
            return ExitCode.USAGE
        # Just before the controller gives up, so that a run that hangs says where, whatever it waits for. Said by the
        # thread itself, in a signal: another one that looked at its frames while it ran has crashed (status 139).
        faulthandler.register(signal.SIGALRM, all_threads=False)
        signal.setitimer(signal.ITIMER_REAL, max(order.timeout - SAYS_BEFORE, order.timeout / 2))
        try:
            ExperimentRun(order, server, warden, recorder, outside, tracer, leaks, earlier).carry_out()
        except Interrupted as why:
            recorder.write(End(t=recorder.now(), complete=False, reason=f"interrupted by {why}"))
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
