"""The launchers of several machines meet at a store that the first one serves, before any rank
starts; the ranks use the same store."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchtitan_flux.launching.settings import Settings

PERIOD = 0.5


class NotJoined(Exception):
    """The machines did not meet; the message says why."""


def join(settings: Settings, timeout: float, say: Callable[[str], None]) -> Store:
    """Wait until a launcher runs on each machine; `say` is told who is missing, once.

    Returns:
        the store they met at, to be kept.

    Raises:
        NotJoined: after `timeout` seconds, or because two were started in different ways.
    """
    s, end, said, store = settings, time.monotonic() + timeout, "", None
    mine, way = str(s.node_rank), f"NNODES = {s.nodes}, NGPU = {s.ranks_per_node}"
    me = f"{way}, {socket.gethostname()}:{os.getpid()}"
    try:
        while True:
            try:
                store = store or _connect(s)
                names = [str(number) for number in range(s.nodes)]
                there = {name: store.get(name).decode() for name in names if store.check([name])}
                other = [text for text in there.values() if not text.startswith(f"{way}, ")]
                if not other:  # else nobody need see this one, which leaves
                    there[mine] = store.compare_set(mine, "", me).decode()
                    if there[mine] != me:
                        other = [f"NODE_RANK = {mine}, {there[mine]}"]
                if other:
                    raise NotJoined(f"{s.endpoint}: {me} here, but there is {other[0]}")
                absent = [name for name in names if name not in there]
                if not absent:
                    return store.underlying_store
                state = f"NODE_RANK {', '.join(absent)} missing at {s.endpoint}"
            except (OSError, RuntimeError) as error:  # torch's DistError is one
                store = None
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                state = f"no launcher answers at {s.endpoint} ({reason})"
            if time.monotonic() > end:
                raise NotJoined(f"{state}; waited {timeout:.0f} s (comm.init_timeout_seconds)")
            if state != said:
                say(f"{state}; waiting, {timeout:.0f} s at most")
            said = state
            time.sleep(PERIOD)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # started again, it may come with other settings
            if store and store.check([mine]) and store.get(mine).decode() == me:
                store.delete_key(mine)
        raise


def leave_together(store: Store, nodes: int, timeout: float = 30.0) -> None:
    """Wait for the launchers of the other machines: one of them serves the store."""
    end = time.monotonic() + timeout
    with contextlib.suppress(RuntimeError):  # it has gone
        store.add("torchtitan-flux/left", 1)
        while store.add("torchtitan-flux/left", 0) < nodes and time.monotonic() < end:
            time.sleep(0.1)


def _connect(s: Settings) -> PrefixStore:
    host, _, port = s.endpoint.rpartition(":")
    if s.node_rank > 0:  # fails faster than a store
        socket.create_connection((host, int(port)), timeout=5).close()
    store = TCPStore(
        host if s.node_rank else "localhost", int(port), is_master=s.node_rank == 0,
        wait_for_workers=False, timeout=timedelta(seconds=30),
    )  # fmt: skip
    return PrefixStore("torchtitan-flux", store)
