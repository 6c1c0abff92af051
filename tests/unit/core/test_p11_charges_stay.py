# SPDX-License-Identifier: Apache-2.0
"""P11: a charge that followed its task."""

from __future__ import annotations

from chaos.history import History
from tests.unit.core.build import moved
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, begun, verdict_of


def went(charges: dict[str, int], *, look: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    if look:
        b.observe("went", charges, guests=1)
    return b.finish()


def test_p11() -> None:
    assert verdict_of("P11", went({"source": 1, "elsewhere": 0})).outcome is HELD
    verdict = verdict_of("P11", went({"source": 0, "elsewhere": 1}))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "charge-followed-task:sev")
    assert verdict_of("P11", went({"source": 2, "elsewhere": 0})).outcome is UNKNOWN
    assert verdict_of("P11", went({}, look=False)).outcome is UNKNOWN
    assert verdict_of("P11", moved()).outcome is UNKNOWN
    b = begun()
    b.do("enter", "source", cgroup="elsewhere")
    b.do("init", "source", vm="none", key="sev")
    assert "cannot be told" in verdict_of("P11", b.finish()).reason
