# SPDX-License-Identifier: Apache-2.0
"""Which of a kernel's modules come into the lab, and under what names the kernel may call for them."""

from __future__ import annotations

from pathlib import Path

from chaos.lab.image import ModuleTree


def tree(path: Path) -> ModuleTree:
    (path / "modules.dep").write_text(
        "kernel/net/sched/sch_netem.ko.xz:\nkernel/drivers/net/veth.ko:\nkernel/drivers/net/dummy.ko:\n"
    )
    (path / "modules.builtin").write_text("kernel/net/ipv4/tunnel4.ko\n")
    return ModuleTree.read(path)


def test_only_names_of_modules_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "modules.alias").write_text(
        "# Aliases extracted from modules themselves.\n"
        "alias rtnl-link-veth veth\nalias net-sch-netem sch_netem\nalias rtnl-link-dummy dummy\n"
    )
    wanted = ["kernel/net/sched/sch_netem.ko", "kernel/drivers/net/veth.ko"]
    assert tree(tmp_path).aliases(wanted) == "alias rtnl-link-veth veth\nalias net-sch-netem sch_netem\n"


def test_a_tree_without_aliases(tmp_path: Path) -> None:
    assert tree(tmp_path).aliases(["kernel/drivers/net/veth.ko"]) == ""
