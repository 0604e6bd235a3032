"""Runs the table of integration_tests/table.py, on CPUs or GPUs:

    python -m tests.integration_tests.run_tests OUT --ngpu 8
    python -m tests.integration_tests.run_tests OUT --ngpu 8 --test_name hsdp_cp

Each row goes through the launcher into OUT/<name>. It passes when every start ends with status 0,
the losses of all steps are there, finite and those of one rank, the checkpoints are complete and
the pictures exist. Prints a table; the exit status is 1 when a row failed.
"""

import argparse
import math
import runpy
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from torchtitan_flux.checkpoint.folder import step_folder, verify

from . import OverrideDefinitions, Start
from .table import BASE, REFERENCE, STEPS, build_flux_tests_list

REPO = Path(__file__).resolve().parents[2]
_compare = runpy.run_path(str(REPO / "scripts" / "loss_compare.py"))
launch, read_losses, relative = (_compare[n] for n in ("launch", "read_losses", "relative"))


@dataclass(frozen=True)
class Result:
    """What came of a row."""

    row: OverrideDefinitions
    wrong: list[str]
    losses: dict[int, float]
    worst: float
    """Largest relative difference from the losses of one rank."""
    seconds: float

    @property
    def line(self) -> str:
        state = "FAILED" if self.wrong else "ok"
        return (
            f"{self.row.test_name:18} {self.row.ngpu:5}  {state:6}  {self.worst:9.1e}  "
            f"{self.row.tolerance:9.0e}  {self.seconds:5.0f}  {self.row.test_descr}"
        )


HEAD = "name               ranks  state   worst      tolerance  secs   what it shows"


def arguments(row: OverrideDefinitions, start: Start, dump: Path) -> list[str]:
    """Command line of one start, after the launcher's command."""
    return [*BASE, "--job.dump_folder", str(dump), *start.overrides]


def run_row(row: OverrideDefinitions, out: Path, reference: dict[int, float] | None) -> Result:
    """Run one row and look at what it left.

    Args:
        row: of the table.
        out: its dump folder is made in here.
        reference: losses to hold its own against; None for the row that they come from.
    """
    dump, begin = out / row.test_name, time.monotonic()
    wrong = []
    for number, start in enumerate(row.starts):
        words = arguments(row, start, dump)
        print(f"  NGPU={row.ranks(start)} {start.command} {shlex.join(words)}", flush=True)
        status, output = launch(start.command, row.ranks(start), words)
        (out / f"{row.test_name}-{number}.log").write_text(output)
        if status != 0:
            wrong.append(f"start {number} ended with status {status}:\n{tail(output)}")
            break
    losses = read_losses(dump)
    worst = math.nan
    if not wrong:
        wrong += [*losses_wrong(losses), *checkpoints_wrong(row, dump), *pictures_wrong(row, dump)]
    if not wrong:
        wanted = losses if reference is None else reference
        worst = max(relative(wanted[step], losses[step]) for step in losses)
        if not worst <= row.tolerance:
            wrong.append(f"its losses differ from those of {REFERENCE} by {worst:.1e}: {losses}")
    return Result(row, wrong, losses, worst, time.monotonic() - begin)


def tail(output: str, lines: int = 25) -> str:
    return "\n".join(f"    {line}" for line in output.splitlines()[-lines:])


def losses_wrong(losses: dict[int, float]) -> list[str]:
    if list(losses) != list(range(1, STEPS + 1)):
        return [f"losses of steps {list(losses)}, not of 1 to {STEPS}"]
    return [f"step {s}: the loss is {x}" for s, x in losses.items() if not math.isfinite(x)]


def checkpoints_wrong(row: OverrideDefinitions, dump: Path) -> list[str]:
    """Every byte is held against the manifest."""
    found = []
    for step in row.saved:
        manifest, problem = verify(step_folder(dump / "checkpoint", step))
        if manifest is None:
            found.append(f"checkpoint of step {step}: {problem}")
    return found


def pictures_wrong(row: OverrideDefinitions, dump: Path) -> list[str]:
    wanted = sum(s.overrides.count("--prompt") for s in row.starts if s.command == "infer")
    found = sorted((dump / "inference_results").glob("*.png"))
    if len(found) != wanted:
        return [f"{len(found)} pictures, not {wanted}"]
    for path in found:
        with Image.open(path) as picture:
            if len(set(picture.convert("L").tobytes())) < 2:
                return [f"{path} is of one colour"]
    return []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, nargs="?", help="empty or new")
    parser.add_argument("--ngpu", type=int, default=8, help="rows that need more are left out")
    parser.add_argument("--test_name", nargs="+", default=["all"])
    parser.add_argument("--list", action="store_true", help="show the table and leave")
    options = parser.parse_args()
    table = build_flux_tests_list()
    if options.list:
        for row in table:
            print(f"{row.test_name:18} {row.ngpu:3}  {row.test_descr}")
        return
    names = {row.test_name for row in table}
    if unknown := [n for n in options.test_name if n != "all" and n not in names]:
        parser.error(f"--test_name {' '.join(unknown)}: known are all, {', '.join(sorted(names))}")
    if options.output_dir is None:
        parser.error("name a folder for what the runs leave")
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        parser.error(f"{options.output_dir} is not empty")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    sys.exit(run_tests(table, options.test_name, options.ngpu, options.output_dir))


def run_tests(table: list[OverrideDefinitions], names: list[str], ngpu: int, out: Path) -> int:
    """Run the rows that are asked for, the reference before them.

    Args:
        table: all rows, the reference first.
        names: which to run, or "all".
        ngpu: ranks that there are; rows that need more are left out.
        out: folder for what the runs leave.

    Returns:
        exit status.
    """
    assert table[0].test_name == REFERENCE
    chosen = [row for row in table if {"all", row.test_name} & set(names)]
    results: list[Result] = []
    for row in dict.fromkeys([table[0], *chosen]):
        need = max(row.ranks(start) for start in row.starts)
        if need > ngpu:
            print(f"{row.test_name}: left out, it needs {need} ranks (--ngpu {ngpu})")
            continue
        print(f"{row.test_name}: {row.test_descr}", flush=True)
        results.append(run_row(row, out, results[0].losses if results else None))
        for line in results[-1].wrong:
            print(f"  FAILED: {line}", flush=True)
        if results[0].wrong:
            print(f"{REFERENCE} failed: there is nothing to hold the others against")
            break
    print("\n".join([HEAD, *(result.line for result in results)]))
    failed = [result.row.test_name for result in results if result.wrong]
    print(f"{len(results) - len(failed)} of {len(results)} passed")
    return int(bool(failed))


if __name__ == "__main__":
    main()
