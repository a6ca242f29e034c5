"""The commands that read the set: `labctl prefetch` and, in the group of `labctl etl`, `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from labctl.cli.core import context, emit, err, options

app = typer.Typer()


def event(document: dict[str, Any]) -> None:
    """One line of progress, for a program: on stderr, so that stdout holds the result alone."""
    err.print(json.dumps(document), markup=False, highlight=False, soft_wrap=True)


@app.command()
def prefetch() -> None:
    """Fill the server's cache with the dataset ahead of a run. Safe to run again: what is there isn't fetched again."""
    from labctl import dataset

    done = dataset.prefetch(context(), event if options.as_json else None)
    emit(done, f"{dataset.words({**done, 'seconds_left': None})}, in {done['seconds']:.1f} s.")


def inspect(
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="the page to write; default: DATASET.html")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, max=20, help="images of each class on the page")] = 5,
) -> None:
    """Show classes, counts and sizes of the dataset, and write them with sample images as one HTML page."""
    from labctl import dataset
    from labctl import picture as pictures

    found = dataset.inspect(context(), samples)
    name = (found.manifest or {}).get("dataset") or found.container
    target = picture or Path(f"{name}.html")
    target.write_text(pictures.page(found), encoding="utf-8")
    lines = _aligned(found.rows())
    if found.mismatch:
        lines.append(f"WARNING: {found.mismatch}")
    emit({**found.as_dict(), "picture": str(target)}, "\n".join([*lines, f"{target} has the picture."]))


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
