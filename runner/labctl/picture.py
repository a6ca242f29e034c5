"""A set as one self-contained HTML page: the class distribution as bars, sample images, the numbers as a table."""

from __future__ import annotations

from html import escape

from labctl.dataset import Inspection

#: One hue a split, apart from each other for most kinds of colour vision (Okabe and Ito's set).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
ROW, BAR, LEFT, WIDTH = 34, 20, 220, 900

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}tr:last-child td{font-weight:600}
figure{display:inline-block;margin:.2rem}figure img{height:96px;border-radius:4px;display:block}
h3{margin:.9rem 0 .1rem}small{color:#666}.warn{background:#fff3cd;padding:.5rem .8rem}
"""


def page(found: Inspection) -> str:
    """The page. It loads nothing: the images are in it."""
    manifest = found.manifest or {}
    name = str(manifest.get("dataset") or found.container)
    facts = [f"container {found.container}"]
    if manifest:
        facts += [f"layout {manifest['layout']}", f"version {manifest['version']}"]
    else:
        facts.append("no manifest: not loaded by labctl")
    if found.other_files:
        facts.append(f"{found.other_files} other files, not shown")
    warning = f'<p class="warn">{escape(found.mismatch)}</p>' if found.mismatch else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
        f"<h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p>{warning}"
        f"<h2>Images by class</h2>{_bars(found)}<h2>Samples</h2>{_samples(found)}"
        f"<h2>Numbers</h2>{_table(found)}</html>\n"
    )


def _bars(found: Inspection) -> str:
    """The distribution: a bar a class, a part of it a split."""
    sums = {folder: sum(found.files(split, folder)[0] for split in found.folders) for folder in found.classes}
    scale = (WIDTH - LEFT - 70) / max(1, *sums.values(), 1)
    parts = []
    for number, folder in enumerate(found.classes):
        y, x = 30 + number * ROW, float(LEFT)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(found.title(folder))}</text>')
        for place, split in enumerate(found.folders):
            width = found.files(split, folder)[0] * scale
            colour = COLOURS[place % len(COLOURS)]
            tip = f"<title>{escape(split)}: {found.files(split, folder)[0]}</title>"
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}">{tip}</rect>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{sums[folder]}</text>')
    for place, split in enumerate(found.folders):
        x = LEFT + place * 160
        parts.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{COLOURS[place % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 18}" y="15">{escape(split)}</text>')
    height = 40 + len(found.classes) * ROW
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" font-size="13" role="img">{"".join(parts)}</svg>'


def _samples(found: Inspection) -> str:
    parts = []
    for folder in found.classes:
        title = found.title(folder)
        parts.append(f"<h3>{escape(title)} <small>{escape(folder) if title != folder else ''}</small></h3>")
        for one in found.samples.get(folder, []):
            source = f"data:{one['type']};base64,{one['base64']}"
            parts.append(f'<figure><img src="{source}" alt="{escape(one["name"], quote=True)}"></figure>')
    return "".join(parts)


def _table(found: Inspection) -> str:
    head, *rows = found.rows()
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
