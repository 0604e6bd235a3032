"""Event files of a continued run give one series for each tag."""

import random
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from torchtitan_flux.report.events import Session, event_files, joined, read_session


def test_a_file_is_read_as_tensorboard_reads_it(tmp_path):
    """Several tags, and pictures between them; then cut short in the last record."""
    writer = EventFileWriter(str(tmp_path))
    rng = random.Random(0)
    tags = ["loss", "lr", "validation_metrics/loss_t=0.0625"]
    for step in range(100):
        values = [Summary.Value(tag=tag, simple_value=rng.gauss(0, 1)) for tag in tags]
        if step % 30 == 7:
            picture = Summary.Image(height=1, width=1, encoded_image_string=rng.randbytes(70_000))
            event = Event(wall_time=0.5, step=step)  # earlier than any value
            event.summary.value.add(tag="samples", image=picture)
            writer.add_event(event)
        event = Event(wall_time=100 + step, step=step, summary=Summary(value=values))
        writer.add_event(event)
    writer.close()
    (path,) = event_files(tmp_path)
    reference = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    assert sorted(reference.Tags()["scalars"]) == sorted(tags)
    assert reference.Tags()["images"] == ["samples"]
    session = read_session(path)
    assert session is not None
    assert session.scalars == {
        tag: [(event.step, event.value) for event in reference.Scalars(tag)] for tag in tags
    }
    assert (session.begin, session.end) == (100, 199)

    whole = path.read_bytes()
    for cut in (1, 4, 5, 30):
        path.write_bytes(whole[:-cut])
        shorter = read_session(path)
        assert shorter is not None
        assert shorter.scalars["lr"] == session.scalars["lr"][:-1]
    path.write_bytes(whole[:-60] + b"\xff" * 60)
    damaged = read_session(path)
    assert damaged is not None
    assert damaged.scalars["lr"][:98] == session.scalars["lr"][:98]


def test_a_file_without_values_is_no_session(tmp_path):
    EventFileWriter(str(tmp_path)).close()
    (path,) = event_files(tmp_path)
    assert read_session(path) is None
    path.write_bytes(b"")
    assert read_session(path) is None


def test_only_rank_0_is_read_where_all_ranks_log(tmp_path):
    for folder in ("now/rank_0", "now/rank_1", "now/rank_10", "then"):
        path = tmp_path / folder / "events.out.tfevents.1.host"
        path.parent.mkdir(parents=True)
        path.touch()
    found = {str(path.parent.relative_to(tmp_path)) for path in event_files(tmp_path)}
    assert found == {"now/rank_0", "then"}
    assert event_files(Path("/does/not/exist")) == []


def test_a_later_session_takes_over_from_its_first_value_on():
    first = Session(
        0.0, 9.0, {"loss": [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)], "lr": [(10, 0.1)]}
    )
    second = Session(20.0, 29.0, {"loss": [(20, 2.5), (30, 3.5)]})
    for order in ([first, second], [second, first]):
        series = joined(order)
        assert series["loss"].steps == (10, 20, 30), "40 belongs to what was given up"
        assert series["loss"].values == (1.0, 2.5, 3.5)
        assert series["lr"].steps == (10,)


def test_a_run_that_went_back_has_no_future_of_its_own():
    first = Session(0.0, 9.0, {"loss": [(400, 1.0), (1000, 0.5)], "score": [(1000, 99.0)]})
    back = Session(20.0, 29.0, {"loss": [(401, 1.1), (430, 1.0)]})
    series = joined([first, back])
    assert series["loss"].steps == (400, 401, 430)
    assert "score" not in series
    # and of pictures, those that were drawn before the run went back
    assert [back.redid(step, 9.0) for step in (400, 430, 1000)] == [False, True, True]
    assert not back.redid(430, 25.0)


def test_a_finished_run_started_again_loses_nothing():
    first = Session(0.0, 9.0, {"loss": [(10, 1.0), (20, 2.0)], "samples": [(20, 1.0)]})
    again = Session(20.0, 29.0, {"samples": [(20, 5.0)]})
    series = joined([first, again])
    assert series["loss"].values == (1.0, 2.0)
    assert series["samples"].values == (5.0,)
