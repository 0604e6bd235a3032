"""TensorBoard's event files of a run -> one series for each tag."""

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]

_LARGEST = 2**16
"""Records of more bytes hold pictures; no scalar needs a hundredth of it."""

OTHER_RANK = re.compile(r"rank_0*[1-9]\d*")


@dataclass(frozen=True)
class Series:
    """Values of one tag, by ascending step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass(frozen=True)
class Session:
    """What one start of the run logged.

    Attributes:
        begin, end: seconds since the epoch, of the first and the last value.
        scalars: of each tag, (step, value) in the order written.
    """

    begin: float
    end: float
    scalars: Mapping[str, list[tuple[int, float]]]

    @property
    def first_step(self) -> int:
        return min(step for values in self.scalars.values() for step, _ in values)

    def redid(self, step: int, at: float) -> bool:
        """Whether what was there `at` a time (seconds) of a step was done again, or taken back."""
        return at < self.begin and step > self.first_step


def event_files(folder: Path) -> list[Path]:
    """Event files below a folder; of ranks that log side by side, those of rank 0."""
    paths = sorted(folder.rglob("events.out.tfevents.*")) if folder.is_dir() else []
    return [
        path
        for path in paths
        if not any(OTHER_RANK.fullmatch(part) for part in path.relative_to(folder).parts)
    ]


def read_session(path: Path) -> Session | None:
    """What an event file holds; None where it holds no scalar yet.

    A last record cut short by a crash, or being written, is passed over.
    """
    scalars: dict[str, list[tuple[int, float]]] = {}
    times = []
    for event in _events(path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
                times.append(event.wall_time)
    return Session(min(times), max(times), scalars) if times else None


def _events(path: Path) -> Iterator[Event]:
    """Events of a file, pictures left out.

    TensorBoard's EventAccumulator takes ten times as long, and a second for 8 MB of pictures: it
    computes checksums in Python.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(12)) == 12:  # length and its checksum
            (length,) = struct.unpack_from("<Q", head)
            if file.tell() + length + 4 > size:
                return
            if length > _LARGEST:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            try:
                yield Event.FromString(file.read(length))
            except DecodeError:  # nobody knows where the next one begins
                return
            file.seek(4, os.SEEK_CUR)


def joined(sessions: Iterable[Session]) -> dict[str, Series]:
    """Series of a run that was continued, by tag.

    A later session takes over from its first step on: what an earlier one logged further on belongs
    to steps that were done again, or that the run went back from. At that step itself only the
    tags that are logged again: a finished run that is started again scores its last step anew.
    """
    points: dict[str, dict[int, float]] = {}
    for session in sorted(sessions, key=lambda session: session.begin):
        first = session.first_step
        points = {tag: {s: v for s, v in old.items() if s <= first} for tag, old in points.items()}
        for tag, new in session.scalars.items():
            points[tag] = points.get(tag, {}) | dict(new)
    return {
        tag: Series(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for tag, values in points.items()
        if values
    }
