"""Several machines meet before torchrun starts: what is missing is said, and the wait has an end.

torchrun waits in silence, for ten minutes, whatever the configuration says.
"""

import json
import math
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchtitan_flux.launching.settings import Settings

INTERVAL = 30.0
"""Seconds between two lines about who is there."""

BEAT, ALIVE = 0.5, 3.0
"""Seconds between two signs of a machine that waits, and without one until it counts as gone: less
than a launcher that is started again takes to get here."""


class NotJoined(RuntimeError):
    """The machines did not meet; the message says who is missing, or what they disagree about."""


def join(
    settings: Settings,
    timeout: float,
    say: Callable[[str], None],
    interval: float = INTERVAL,
) -> Store:
    """Wait until a launcher runs on each machine.

    Args:
        settings: of this machine; more than one is to meet.
        timeout: seconds to wait at most.
        say: gets a line every `interval` seconds.
        interval: seconds.

    Returns:
        the store they met at. torchrun meets there too, so it has to be kept while it does.

    Raises:
        NotJoined: after `timeout`, or as soon as it can be seen that they never will.
    """
    begin = time.monotonic()
    lines = 0
    meeting = _Meeting(settings)
    while True:
        state = meeting.look()
        if state is None:
            assert meeting.server is not None
            return meeting.server
        waited = time.monotonic() - begin
        if waited >= timeout:
            raise NotJoined(
                f"{state}; waited {waited:.0f} s (comm.init_timeout_seconds). Each machine needs "
                f"the same command with NNODES = {settings.nodes} and RDZV_ENDPOINT = "
                f"{settings.endpoint}, and has to reach that port"
            )
        if waited >= (lines + 1) * interval:
            lines += 1
            say(f"{state}; waiting, {timeout - waited:.0f} s more at most")
        time.sleep(min(BEAT, interval))


class _Meeting:
    """One machine's view of who has come to the endpoint."""

    def __init__(self, settings: Settings):
        self.server: Store | None = None
        """Connection to the store at the endpoint, once there is one."""
        self._settings = settings
        self._launcher = uuid.uuid4().hex
        self._number = settings.node_rank
        self._signs: dict[int, tuple[int, float]] = {}  # of each machine: how many, since when

    def look(self) -> str | None:
        """Give a sign, and count those of the others; None once all are there.

        Raises:
            NotJoined: they never will be.
        """
        s = self._settings
        try:
            if self.server is None:
                self.server = self._connect()
                store = PrefixStore("torchtitan-flux/joining", self.server)
                if store.check(["complete"]):
                    raise NotJoined(
                        f"{s.nodes} machines have met at {s.endpoint} before: end that run, or "
                        "choose another port for RDZV_ENDPOINT"
                    )
                if s.node_rank is None:
                    self._number = store.add("machines", 1) - 1
                store.set(f"machine-{self._number}", json.dumps(self._introduction))
            return self._count(PrefixStore("torchtitan-flux/joining", self.server))
        except NotJoined:
            raise
        except (OSError, RuntimeError) as error:  # torch's DistError is one
            self.server = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return f"no launcher answers at {s.endpoint} ({reason}), where {s.nodes} machines meet"

    @property
    def _introduction(self) -> dict[str, str | int]:
        s = self._settings
        return {"launcher": self._launcher, "NNODES": s.nodes, "NGPU": s.ranks_per_node}

    def _connect(self) -> Store:
        host, _, port = self._settings.endpoint.rpartition(":")
        more = {"wait_for_workers": False, "timeout": timedelta(seconds=30)}
        numbered = self._settings.node_rank is not None
        if self._settings.node_rank == 0 or (not numbered and _is_here(host)):
            try:
                return TCPStore("localhost", int(port), is_master=True, multi_tenant=True, **more)
            except RuntimeError:
                if numbered:
                    raise
                # unnumbered launchers on one machine: another was faster
        socket.create_connection((host, int(port)), timeout=5).close()  # fails faster than a store
        return TCPStore(host, int(port), is_master=False, **more)

    def _count(self, store: Store) -> str | None:
        s, now = self._settings, time.monotonic()
        assert self._number is not None
        store.add(f"signs-{self._number}", 1)
        others = range(s.nodes) if s.node_rank is not None else range(store.add("machines", 0))
        for number in others:
            signs = store.add(f"signs-{number}", 0)
            before, _ = self._signs.setdefault(number, (signs, -math.inf))  # by one long gone?
            if signs != before:
                self._signs[number] = signs, now
        here = {number for number, (_, since) in self._signs.items() if now - since < ALIVE}
        for number in here:
            self._compare(number, json.loads(store.get(f"machine-{number}")))
        if len(here) >= s.nodes:
            store.set("complete", "")
        if store.check(["complete"]):
            return None
        missing = ""
        if s.node_rank is not None:
            absent = [str(number) for number in others if number not in here]
            missing = f" (NODE_RANK {', '.join(absent)} missing)"
        return f"{len(here)} of {s.nodes} machines have joined at {s.endpoint}{missing}"

    def _compare(self, number: int, theirs: dict[str, str | int]) -> None:
        ours = self._introduction
        if number == self._number and theirs["launcher"] != self._launcher:
            raise NotJoined(f"NODE_RANK = {number} was given to two machines")
        for name in ("NNODES", "NGPU"):
            if theirs[name] != ours[name]:
                raise NotJoined(
                    f"{name} = {ours[name]} here, and {theirs[name]} on another machine at "
                    f"{self._settings.endpoint}: all need the same"
                )


def _is_here(host: str) -> bool:
    """Whether an address of this name is one of this machine."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as tried:
            try:
                tried.bind(address)
            except OSError:
                continue
            return True
    return False
