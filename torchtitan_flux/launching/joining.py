"""The launchers of several machines rendezvous at one store before any rank starts, with a timeout
and a line about who is missing. The ranks use the same store."""

import contextlib
import json
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchtitan_flux.launching.settings import Settings

PERIOD = 0.5
INTERVAL = 30.0
"""Seconds between two lines about who is missing."""


class NotJoined(RuntimeError):
    """The machines did not meet; the message says who is missing, or what they disagree about."""


class Disagreement(NotJoined):
    """Two machines were started in different ways."""


def join(
    settings: Settings, timeout: float, say: Callable[[str], None], interval: float = INTERVAL
) -> tuple[Store, int]:
    """Wait until a launcher runs on each machine; `say` gets a line every `interval` seconds.

    Returns:
        (the store they met at, to be kept; number of this machine).

    Raises:
        NotJoined: after `timeout` seconds, or as soon as it can be seen that they never will.
    """
    s, begin, lines = settings, time.monotonic(), 0
    mine = {"NNODES": s.nodes, "NGPU": s.ranks_per_node, "name": uuid.uuid4().hex}
    store, number = None, -1
    try:
        while True:
            try:
                if store is None:
                    store = PrefixStore("torchtitan-flux", _connect(s))
                    number = _take_number(store, s, mine)
                state = _missing(store, s, mine)
                if not state:
                    return store.underlying_store, number
            except (OSError, RuntimeError) as error:  # torch's DistError is one
                if isinstance(error, NotJoined):
                    raise
                store = None
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                state = f"no launcher answers at {s.endpoint} ({reason})"
            waited = time.monotonic() - begin
            if waited >= timeout:
                raise NotJoined(
                    f"{state}; waited {waited:.0f} s (comm.init_timeout_seconds). Each machine "
                    f"needs the same command with NNODES = {s.nodes} and RDZV_ENDPOINT = "
                    f"{s.endpoint}, and has to reach that port"
                )
            if waited >= (lines + 1) * interval:
                lines += 1
                say(f"{state}; waiting, {timeout - waited:.0f} s more at most")
            time.sleep(min(PERIOD, interval))
    except BaseException as error:
        if store is not None and number >= 0 and not isinstance(error, Disagreement):
            with contextlib.suppress(RuntimeError):  # the server has gone first
                store.delete_key(str(number))  # another launcher may have it
        raise


def leave_together(store: Store, nodes: int, timeout: float = 30.0) -> None:
    """Wait for the launchers of the other machines: one of them serves the store."""
    end = time.monotonic() + timeout
    with contextlib.suppress(RuntimeError):  # it has gone
        store.add("torchtitan-flux/left", 1)
        while store.add("torchtitan-flux/left", 0) < nodes and time.monotonic() < end:
            time.sleep(0.1)


def _take_number(store: Store, s: Settings, mine: dict[str, str | int]) -> int:
    """The configured number, or the first that is free."""
    for number in range(s.nodes) if s.node_rank is None else [s.node_rank]:
        if json.loads(store.compare_set(str(number), "", json.dumps(mine))) == mine:
            return number
    taken = f"{s.nodes} machines" if s.node_rank is None else f"NODE_RANK = {s.node_rank}"
    raise NotJoined(
        f"{taken} joined at {s.endpoint} before: end that launcher, or choose another port for "
        "RDZV_ENDPOINT"
    )


def _missing(store: Store, s: Settings, mine: dict[str, str | int]) -> str:
    """Who has come, as long as somebody is missing."""
    absent = [str(number) for number in range(s.nodes) if not store.check([str(number)])]
    for number in range(s.nodes):
        theirs = mine if str(number) in absent else json.loads(store.get(str(number)))
        for name in ("NNODES", "NGPU"):
            if theirs[name] != mine[name]:
                raise Disagreement(  # and the other one has to see it too
                    f"{name} = {mine[name]} here, and {theirs[name]} on another machine at "
                    f"{s.endpoint}: all need the same"
                )
    if not absent:
        return ""
    which = "" if s.node_rank is None else f" (NODE_RANK {', '.join(absent)} missing)"
    return f"{s.nodes - len(absent)} of {s.nodes} machines have joined at {s.endpoint}{which}"


def _connect(s: Settings) -> Store:
    """The store at the endpoint, served here where the endpoint is this machine."""
    host, _, port = s.endpoint.rpartition(":")
    more = {"wait_for_workers": False, "timeout": timedelta(seconds=30)}
    if s.node_rank == 0 or (s.node_rank is None and _is_here(host)):
        try:
            return TCPStore("localhost", int(port), is_master=True, **more)
        except RuntimeError:
            if s.node_rank == 0:
                raise
            # unnumbered launchers on one machine: another was faster
    socket.create_connection((host, int(port)), timeout=5).close()  # fails faster than a store
    return TCPStore(host, int(port), is_master=False, **more)


def _is_here(host: str) -> bool:
    """Whether an address of this name is one of this machine."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.bind(address)
            return True
    return False
