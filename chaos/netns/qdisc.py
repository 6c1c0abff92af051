# SPDX-License-Identifier: Apache-2.0
"""The messages about a netem qdisc: numbers as the kernel has them in, numbers as the kernel has them out.

pyroute2 has messages for netem too, but they know neither times in nanoseconds nor the seed, and its `tc` sends no
attribute for what is zero. The kernel leaves as they were those parameters that a change has no attribute for
(netem_change, net/sched/sch_netem.c): corruption that was set to nothing would go on. So the messages are described
here, to pyroute2's engine, and each has every attribute in it.

pyroute2 keeps what it has worked out about a class of messages in that class, where subclasses find it and believe
that it is theirs; therefore nothing here is derived from its own messages for the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# include/uapi/linux: pkt_sched.h, rtnetlink.h, netlink.h
ROOT = 0xFFFFFFFF  # TC_H_ROOT
RTM_NEWQDISC = 36
RTM_DELQDISC = 37
RTM_GETQDISC = 38
REQUEST = 0x1 | 0x4  # NLM_F_REQUEST | NLM_F_ACK
CREATE = REQUEST | 0x200 | 0x400  # NLM_F_EXCL | NLM_F_CREATE
DUMP = 0x1 | 0x300  # NLM_F_REQUEST | NLM_F_DUMP

HANDLE = 0x5EC0_0000  # ours: tc shows it as "5ec0:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Parameters in the kernel's units: nanoseconds, packets, bytes a second, and probabilities of which 2^32 - 1 is
    one. `seed` is None where the kernel has none (before 6.6), or is to choose."""

    delay: int
    jitter: int
    loss: int
    duplicate: int
    reorder: int
    corrupt: int
    rate: int
    limit: int
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """struct gnet_stats_basic and gnet_stats_queue. netem counts in `requeues` what it put in front of others."""

    bytes: int
    packets: int
    qlen: int
    drops: int
    requeues: int


def create(route: Any, index: int, options: Options) -> None:
    """Raises NetlinkError: EEXIST if the link has a qdisc, ENOENT if the kernel has no netem."""
    _send(route, RTM_NEWQDISC, CREATE, index, options)


def change(route: Any, index: int, options: Options) -> None:
    """Raises NetlinkError: EINVAL if what is there is no netem of ours, ENOENT if nothing is."""
    _send(route, RTM_NEWQDISC, REQUEST, index, options)


def delete(route: Any, index: int) -> None:
    """Raises NetlinkError: EINVAL if what is there has another handle, ENOENT if nothing is."""
    _send(route, RTM_DELQDISC, REQUEST, index, None)


def find(route: Any, index: int) -> tuple[Options, Counters] | None:
    """The netem of ours at the root of the link, None if there is none."""
    for message in _dump(route):
        ours = (message["index"], message["parent"], message["handle"]) == (index, ROOT, HANDLE)
        if ours and message.get_attr("TCA_KIND") == "netem":
            return _options(message.get_attr("TCA_OPTIONS")), _counters(message.get_attr("TCA_STATS2"))
    return None


def _send(route: Any, kind: int, flags: int, index: int, options: Options | None) -> None:
    message = _message()()
    message.update(family=0, index=index, handle=HANDLE, parent=ROOT)
    message["attrs"] = [("TCA_KIND", "netem")]
    if options is not None:
        message["attrs"].append(("TCA_OPTIONS", _attributes(options)))
    route.nlm_request(message, kind, flags)


def _dump(route: Any) -> Iterator[Any]:
    # The socket is ours alone; what it knows about messages is shared with all others, and replaced, not changed.
    route.marshal.msg_map = {**route.marshal.msg_map, RTM_NEWQDISC: _message()}
    yield from route.nlm_request(_message()(), RTM_GETQDISC, DUMP)


def _attributes(options: Options) -> dict[str, Any]:
    attributes: list[tuple[str, Any]] = [
        ("TCA_NETEM_CORR", {"delay_corr": 0, "loss_corr": 0, "dup_corr": 0}),
        ("TCA_NETEM_REORDER", {"probability": options.reorder, "correlation": 0}),
        ("TCA_NETEM_CORRUPT", {"probability": options.corrupt, "correlation": 0}),
        ("TCA_NETEM_RATE", {"rate": options.rate, "packet_overhead": 0, "cell_size": 0, "cell_overhead": 0}),
        ("TCA_NETEM_LATENCY64", options.delay),
        ("TCA_NETEM_JITTER64", options.jitter),
    ]
    if options.seed is not None:
        attributes.append(("TCA_NETEM_PRNG_SEED", options.seed))
    return {
        "delay": 0,  # in ticks; the nanoseconds above override it
        "limit": options.limit,
        "loss": options.loss,
        "gap": 1 if options.reorder else 0,  # 1: every packet may be the one that skips the delay
        "duplicate": options.duplicate,
        "jitter": 0,
        "attrs": attributes,
    }


def _options(options: Any) -> Options:
    reorder = options.get_attr("TCA_NETEM_REORDER") or {}
    corrupt = options.get_attr("TCA_NETEM_CORRUPT") or {}
    rate = options.get_attr("TCA_NETEM_RATE") or {}
    return Options(
        delay=int(options.get_attr("TCA_NETEM_LATENCY64") or 0),
        jitter=int(options.get_attr("TCA_NETEM_JITTER64") or 0),
        loss=options["loss"],
        duplicate=options["duplicate"],
        reorder=reorder.get("probability", 0) if options["gap"] else 0,
        corrupt=corrupt.get("probability", 0),
        rate=rate.get("rate", 0),
        limit=options["limit"],
        seed=options.get_attr("TCA_NETEM_PRNG_SEED"),
    )


def _counters(stats: Any) -> Counters:
    basic = stats.get_attr("TCA_STATS_BASIC")
    queue = stats.get_attr("TCA_STATS_QUEUE")
    return Counters(
        bytes=basic["bytes"],
        packets=basic["packets"],
        qlen=queue["qlen"],
        drops=queue["drops"],
        requeues=queue["requeues"],
    )


@cache
def _message() -> Any:
    """struct tcmsg with its attributes, as a class of pyroute2's."""
    from pyroute2.netlink import nla, nlmsg

    class NetemOptions(nla):  # type: ignore[misc]
        fields = (("delay", "I"), ("limit", "I"), ("loss", "I"), ("gap", "I"), ("duplicate", "I"), ("jitter", "I"))
        nla_map = (
            (1, "TCA_NETEM_CORR", "correlation"),
            (3, "TCA_NETEM_REORDER", "chance"),
            (4, "TCA_NETEM_CORRUPT", "chance"),
            (6, "TCA_NETEM_RATE", "rate"),
            (10, "TCA_NETEM_LATENCY64", "int64"),
            (11, "TCA_NETEM_JITTER64", "int64"),
            (14, "TCA_NETEM_PRNG_SEED", "uint64"),
        )

        class correlation(nla):  # type: ignore[misc]  # noqa: N801 - pyroute2 finds it by this name
            fields = (("delay_corr", "I"), ("loss_corr", "I"), ("dup_corr", "I"))

        class chance(nla):  # type: ignore[misc]  # noqa: N801
            fields = (("probability", "I"), ("correlation", "I"))

        class rate(nla):  # type: ignore[misc]  # noqa: N801
            fields = (("rate", "I"), ("packet_overhead", "i"), ("cell_size", "I"), ("cell_overhead", "i"))

    class NetlinkMessage(nlmsg):  # type: ignore[misc]
        fields = (
            ("family", "B"),
            ("pad1", "B"),
            ("pad2", "H"),
            ("index", "i"),
            ("handle", "I"),
            ("parent", "I"),
            ("info", "I"),
        )
        nla_map = ((1, "TCA_KIND", "asciiz"), (2, "TCA_OPTIONS", "options"), (7, "TCA_STATS2", "stats2"))

        @staticmethod
        def options(message: Any, *_: Any, **__: Any) -> Any:
            return NetemOptions if message.get_attr("TCA_KIND") == "netem" else nla.hex

        class stats2(nla):  # type: ignore[misc]  # noqa: N801
            nla_map = ((1, "TCA_STATS_BASIC", "basic"), (3, "TCA_STATS_QUEUE", "queue"))

            class basic(nla):  # type: ignore[misc]  # noqa: N801
                fields = (("bytes", "Q"), ("packets", "I"))

            class queue(nla):  # type: ignore[misc]  # noqa: N801
                fields = (("qlen", "I"), ("backlog", "I"), ("drops", "I"), ("requeues", "I"), ("overlimits", "I"))

    return NetlinkMessage
