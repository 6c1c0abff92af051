# SPDX-License-Identifier: Apache-2.0
"""The network of a run, with VMMs in it."""

from __future__ import annotations

import errno
import os

import pytest

from chaos.errors import CleanupFailed, UsageError
from chaos.netns import link
from chaos.netns.space import Namespace
from chaos.runner.network import Network, between
from chaos.runner.vmms import StepFailed, VmmProcesses
from tests.unit.host.conftest import nowhere

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")


def test_a_link_for_each_two_that_migrate_whoever_is_named_first() -> None:
    moves = [("old", "new"), ("new", "old"), ("new", "third"), ("old", "new")]
    assert between(moves) == (("new", "old"), ("new", "third"))
    assert between([]) == ()


def test_without_migrations_there_is_no_network() -> None:
    network = Network.lay(())
    assert network.space("old") is None
    network.give_up()


def test_more_links_than_addresses() -> None:
    with pytest.raises(UsageError, match="65 pairs"):
        Network.lay([(str(number), "hub") for number in range(65)])


@needs_root
def test_vmms_live_in_their_namespaces_and_these_go_with_them(vmms: VmmProcesses) -> None:
    laid = Network.lay(between([("old", "new"), ("new", "third")]))
    spaces = {name: laid.space(name) for name in ("old", "new", "third")}
    spawned = {name: vmms.spawn(name, nowhere(), network=space) for name, space in spaces.items()}
    for name, space in spaces.items():
        assert space is not None and space.residents() == (spawned[name].pid,)
    assert laid.address("old", "new") == "192.0.2.2"
    addresses = [link.look(laid.interfaces["new", peer].end).addresses for peer in ("old", "third")]
    assert addresses == [("192.0.2.1/30",), ("192.0.2.5/30",)]
    for vmm in spawned.values():
        vmms.end(vmm)
    laid.give_up()


@needs_root
def test_a_namespace_that_stays_is_told_with_who_keeps_it(vmms: VmmProcesses) -> None:
    laid = Network.lay([("new", "old")])
    vmm = vmms.spawn("old", nowhere(), network=laid.space("old"))
    # Within so long a worker of the kernel's takes the other one down, on a busy machine too.
    with pytest.raises(CleanupFailed, match=rf"1 of 2 .* processes {vmm.pid} are still in it"):
        laid.give_up(within=3.0)


@needs_root
def test_a_vmm_whose_namespace_is_none_does_not_start(vmms: VmmProcesses) -> None:
    with (
        Namespace(os.open(os.devnull, os.O_RDONLY)) as nothing,
        pytest.raises(StepFailed, match="its network: Invalid"),
    ):
        vmms.spawn("old", nowhere(), network=nothing)


@needs_root
def test_what_cannot_be_laid_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(link, "lay", fail)
    with pytest.raises(OSError, match="no"):
        Network.lay([("new", "old")])
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
