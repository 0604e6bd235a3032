"""Kills a run again and again; started by the same command, it must end as if nothing had happened.

    python scripts/kill_test.py --kills 30 --inside 8

Trains flux-tiny on two ranks, saving every few steps, in the foreground and in the background by
turns. SIGKILL goes to the launcher alone, to one rank alone, or to everything at once, at random
moments, and at least `--inside` times while a checkpoint is being written, which then never gets
its name; a kill that was meant for a save and missed it is repeated. After each kill nothing may
be left running. The last checkpoint (weights, optimizer, position) must then equal that of an
uninterrupted run bit by bit.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from torchtitan_flux.checkpoint.storage import read_states

REPO = Path(__file__).resolve().parents[1]
TARGETS: tuple[str, ...] = ("launcher", "rank", "everything")
INTERVAL = 3
PERSISTENCE = 10  # kills in turn that may miss the save
PATIENCE = 120.0  # seconds for anything that must happen, before the test gives up


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--inside", type=int, default=8, help="how many while saving, at least")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    options = parser.parse_args()
    seed = random.randrange(2**31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_test(options.folder or Path(temporary), options.kills, options.inside, seed))


def kill_test(folder: Path, kills: int, inside: int, seed: int) -> str:
    """Run it.

    Args:
        folder: for the dump folders.
        kills: how many, at least.
        inside: how many of them cut the writing of a checkpoint off, at least.
        seed: of the random moments.

    Returns:
        a line of figures.

    Raises:
        AssertionError: something was left running, could not go on, or ended otherwise.
    """
    print(f"kill test: {kills} kills, {inside} while saving, seed {seed}", flush=True)
    rng = random.Random(seed)
    steps = INTERVAL * (4 + 2 * kills)
    reference = Life(folder / "reference", steps, "disabled")
    began = time.monotonic()
    _await_save(reference)
    start = time.monotonic() - began
    assert reference.wait() == 0, reference.output()

    moments = ["inside"] * inside + ["in its start", "in its steps"] * kills
    targets = [TARGETS[number % len(TARGETS)] for number in range(kills)]
    rng.shuffle(targets)
    plan = list(zip(moments[:kills], targets, strict=True))
    rng.shuffle(plan)
    modes = {mode: plan[i::2] for i, mode in enumerate(("disabled", "async"))}
    counts = dict.fromkeys(TARGETS, 0)
    cut = 0
    for mode, planned in modes.items():
        dump = folder / mode
        missed = 0
        while planned:
            moment, target = planned[0]
            life = Life(dump, steps, mode)
            if moment == "in its start":
                life.wait(rng.uniform(0.0, start))
            else:
                _await_save(life)
                time.sleep(rng.uniform(0.0, 0.03 if moment == "inside" else 2.0))
            step, unfinished = _kill(life, target, rng)
            cut += unfinished
            counts[target] += 1
            print(
                f"  {mode}: killed {target} {moment}, newest checkpoint {step}"
                + (", the next one was cut off" if unfinished else ""),
                flush=True,
            )
            if step == steps:  # this run was over before it was killed: another one
                _compare(dump, folder / "reference", steps)
                dump = folder / f"{mode}-{sum(counts.values())}"
            if unfinished or moment != "inside":
                planned = planned[1:]
                missed = 0
            else:  # a save is soon over: this kill came late, and is repeated
                missed += 1
                assert missed < PERSISTENCE, f"{missed} kills in turn missed the save"
        last = Life(dump, steps, mode)
        assert last.wait() == 0, last.output()
        _compare(dump, folder / "reference", steps)
    told = ", ".join(f"{count} {target}" for target, count in counts.items())
    return (
        f"survived {sum(counts.values())} kills ({told}), {cut} cut a save off; "
        f"equal bit by bit; seed {seed}"
    )


class Life:
    """One start of the run."""

    def __init__(self, dump: Path, steps: int, mode: str):
        dump.mkdir(parents=True, exist_ok=True)
        self.log = dump.with_suffix(".log")
        self.checkpoints = dump / "checkpoint"
        self._old = self._partials()
        environment = {
            **os.environ,
            "NGPU": "2",
            "CONFIG_FILE": "train_configs/debug_model.toml",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
        arguments = {
            "--job.dump_folder": dump,
            "--model.flavor": "flux-tiny",
            "--training.img_size": 64,
            "--training.local_batch_size": 1,
            "--training.steps": steps,
            "--training.dataloader.num_workers": 1,
            "--encoder.max_t5_encoding_len": 32,
            "--activation_checkpoint.mode": "none",
            "--lr_scheduler.warmup_steps": 2,
            "--checkpoint.interval": INTERVAL,
            "--checkpoint.keep_latest_k": 2,
            "--checkpoint.async_mode": mode,
            "--debug.seed": 7,
        }
        flags = ("--checkpoint.enable", "--checkpoint.no-last_save_model_only",
                 "--validation.no-enable", "--sampling.no-enable")  # fmt: skip
        words = [str(word) for pair in arguments.items() for word in pair]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(REPO / "run_train.sh"), *words, *flags],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit status, or None when the run goes on after these seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def descendants(self) -> list[int]:
        """Ranks and loader workers."""
        mark = f"FLUX_LAUNCHER={self.process.pid}".encode()
        return [pid for pid, environment in _environments() if mark in environment]

    def ranks(self) -> list[int]:
        """Children of the launcher."""
        return [pid for pid in self.descendants() if _parent(pid) == self.process.pid]

    def writing(self) -> set[str]:
        """Checkpoints that are being written; not those which the life before left unfinished."""
        partials = self._partials()
        self._old &= partials
        return partials - self._old

    def _partials(self) -> set[str]:
        return {path.stem for path in self.checkpoints.glob("*.partial")}

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                yield int(path.name), (path / "environ").read_bytes().split(b"\0")


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _await_save(life: Life) -> None:
    """Until a checkpoint is being written, or the run is over."""
    end = time.monotonic() + PATIENCE
    while life.wait(0.0) is None:
        if life.writing():
            return
        assert time.monotonic() < end, life.output()
        time.sleep(0.001)
    assert life.wait() == 0, life.output()


def _kill(life: Life, target: str, rng: random.Random) -> tuple[int, bool]:
    """SIGKILL the target; nothing may be left.

    Returns:
        the newest step that has its name, and whether one was being written and never got it.
    """
    pids = {
        "launcher": lambda: [life.process.pid],
        "rank": lambda: rng.sample(life.ranks(), 1) if life.ranks() else [life.process.pid],
        "everything": lambda: [life.process.pid, *life.descendants()],
    }[target]()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    writing = life.writing()
    status = life.wait(PATIENCE)
    assert status is not None, f"the launcher outlives its rank:\n{life.output()}"
    if target == "rank" and pids != [life.process.pid] and status != 0:
        assert "died of SIGKILL" in life.output(), life.output()
    end = time.monotonic() + PATIENCE
    while left := life.descendants():
        assert time.monotonic() < end, f"{left} outlive their launcher"
        time.sleep(0.05)
    named = {path.name for path in life.checkpoints.glob("step-*")}
    newest = max((int(name[5:]) for name in named if name[5:].isdecimal()), default=0)
    return newest, not writing <= named


def _compare(dump: Path, reference: Path, steps: int) -> None:
    found, wanted = (read_states(d / f"checkpoint/step-{steps}") for d in (dump, reference))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, f"{name} differs after the kills"


if __name__ == "__main__":
    main()
