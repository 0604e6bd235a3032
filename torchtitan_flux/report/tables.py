"""The page's tables: items that could not be read, configuration, environment, checkpoints."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from torchtitan_flux.report.read import Run
from torchtitan_flux.report.settings import Setting
from torchtitan_flux.report.words import duration, plural, size_text, when

QUARANTINE_ROWS = 200


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "wide") -> str:
    """Cells are HTML."""
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{cell}</th>" if i == 0 else f"<td>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="card {kind}"><table>{top}<tbody>{body}</tbody></table></div>'


def quarantine(run: Run) -> str:
    """Items that could not be read; empty where all could."""
    if not run.quarantine:
        return ""
    rows = [
        [escape(str(one.get(key, ""))) for key in ("item", "reason", "used_for", "position")]
        for one in run.quarantine[:QUARANTINE_ROWS]
    ]
    more = len(run.quarantine) - len(rows)
    rest = f'<p class="soft">and {more:,} more in quarantine.jsonl</p>' if more else ""
    table = _table(("Item", "Reason", "Used for", "Position"), rows)
    return (
        f"<section><h2>{plural(len(run.quarantine), 'unreadable item')}</h2>"
        f"<p>Each was replaced by another one.</p>{table}{rest}</section>"
    )


def configuration(settings: Sequence[Setting]) -> str:
    """What differs from the defaults, then every key; empty where nothing is known."""
    if not settings:
        return ""
    differing = [
        [
            f"<code>{escape(one.key)}</code><small>{escape(one.meaning)}</small>",
            f"<code>{escape(one.value_text)}</code>",
            f"<code>{escape(one.default_text)}</code>",
        ]
        for one in settings
        if one.differs
    ]
    sections = []
    for name, group in groupby(settings, key=lambda one: one.key.rpartition(".")[0]):
        rows = [
            [
                f'<code title="{escape(one.meaning)}">{escape(one.key.rpartition(".")[2])}</code>',
                f'<code class="{"differs" if one.differs else "soft"}">'
                f"{escape(one.value_text)}</code>",
            ]
            for one in group
        ]
        sections.append(f"<div><h3><code>[{escape(name)}]</code></h3>{_table((), rows)}</div>")
    return (
        "<section><h2>Configuration</h2><p>What differs from the defaults:</p>"
        f"{_table(('Key', 'Value', 'Default'), differing, 'wide config')}"
        f"<details><summary>All {len(settings)} keys as resolved</summary>"
        f'<div class="two">{"".join(sections)}</div></details></section>'
    )


def environment(run: Run) -> str:
    """Machine and versions, starts, what the run is tied to, checkpoints: those that are known."""
    cards = []
    if run.environments:
        rows = _environment_rows(run.environments[-1])
        cards.append(_card("Latest start", rows))
    starts = [[when(begin), duration(end - begin)] for begin, end in run.sessions]
    if len(starts) > 1:
        table = _table(("Began", "Logged for"), starts)
        cards.append(f"<div><h3>Starts</h3>{table}</div>")
    if run.checkpoints:
        facts = next(iter(run.checkpoints.values())).facts
        rows = {
            "Seed": str(facts.seed),
            "Global batch": plural(facts.global_batch_size, "image"),
            "Text context, pooled text": f"{facts.context_in_dim}, {facts.vec_in_dim} wide",
            "Latent channels": str(facts.in_channels),
            "Randomness version": str(facts.randomness_version),
        }
        cards.append(_card("What the run is tied to", rows))
    if run.checkpoints or run.incomplete:
        saved = [
            [
                f"{step:,}",
                "weights alone" if one.kind == "model" else "complete",
                size_text(sum(file.size for file in one.files.values())),
                when(one.created),
            ]
            for step, one in run.checkpoints.items()
        ] + [[f"{step:,}", "not complete, never loaded", "", ""] for step in run.incomplete]
        table = _table(("Step", "State", "Size", "Saved"), saved, "wide short")
        cards.append(f"<div><h3>Checkpoints</h3>{table}</div>")
    if not cards:
        return ""
    return f'<section><h2>Environment</h2><div class="two">{"".join(cards)}</div></section>'


def _environment_rows(facts: dict[str, Any]) -> dict[str, str]:
    """Facts of one start in words; what it does not say is left out."""
    mesh, packages = facts.get("mesh") or {}, facts.get("packages") or {}
    ranks = facts.get("ranks")
    degrees = ", ".join(f"{name} {degree}" for name, degree in mesh.items())
    memory, started = facts.get("device_memory"), facts.get("started")
    rows = {
        "Began": when(started) if isinstance(started, int | float) else "",
        "Host": facts.get("host"),
        "Ranks": f"{ranks}{f' ({degrees})' if degrees else ''}" if ranks else "",
        "Device": f"{facts.get('device', '')}{f', {size_text(memory)}' if memory else ''}",
        "CUDA": facts.get("cuda"),
        "CPU cores, threads": f"{facts['cpus']}, {facts.get('threads', '?')}"
        if facts.get("cpus")
        else "",
        "System": facts.get("platform"),
        "Python": facts.get("python"),
        **{str(name): version for name, version in packages.items()},
    }
    return {name: str(value) for name, value in rows.items() if value}


def _card(title: str, rows: dict[str, str]) -> str:
    cells = [[escape(name), escape(value)] for name, value in rows.items()]
    return f"<div><h3>{escape(title)}</h3>{_table((), cells, 'wide pair')}</div>"


def missing(sentences: Sequence[str]) -> str:
    """What the page cannot show."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(one)}</li>" for one in sentences)
    return f'<section><h2>Not in this page</h2><ul class="soft">{items}</ul></section>'
