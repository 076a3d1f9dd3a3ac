"""Load, replicas and time to first token of one run, as SVG.

    python3 tests/scaling/plot.py RUN.csv PLOT.svg "Title" [SLO_MS]

The CSV has the columns seconds, requests_per_second, desired, ready, ttft_ms. Nothing beyond Python itself is needed.
"""

import csv
import math
import sys

WIDTH, PANEL, LEFT, TOP, GAP = 860, 130, 70, 40, 34
PANELS = [
    ("requests/s", [("requests_per_second", "arriving", "#4878a8")]),
    ("replicas", [("desired", "desired", "#b04a3a"), ("ready", "ready", "#3a8a5a")]),
    ("TTFT p90, ms", [("ttft_ms", "TTFT p90", "#7a5aa0")]),
]


def nice(top):
    """A round number at or above the largest value."""
    if top <= 0:
        return 1.0
    scale = 10 ** math.floor(math.log10(top))
    return next(step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= top)


def line(points, colour, steps):
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (_, before), (x, y) in zip(points, points[1:]):
        path += f" L{x:.1f},{before:.1f} L{x:.1f},{y:.1f}" if steps else f" L{x:.1f},{y:.1f}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def panel(rows, index, slo):
    name, series = PANELS[index]
    y0 = TOP + index * (PANEL + GAP)
    end = max(row["seconds"] for row in rows) or 1
    top = nice(max(row[column] for row in rows for column, _, _ in series))
    x = lambda seconds: LEFT + (WIDTH - LEFT - 20) * seconds / end
    y = lambda value: y0 + PANEL * (1 - min(value, top) / top)
    out = [f'<text x="{LEFT}" y="{y0 - 8}">{name}</text>']
    for part in (0, 0.5, 1):
        value = top * part
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for place, (column, label, colour) in enumerate(series):
        points = [(x(row["seconds"]), y(row[column])) for row in rows]
        out.append(line(points, colour, steps=index == 1))
        out.append(f'<text x="{WIDTH - 20 - 80 * place}" y="{y0 - 8}" text-anchor="end" fill="{colour}">{label}</text>')
    if index == 2 and slo and slo <= top:
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(slo):.1f}" y2="{y(slo):.1f}" '
            'stroke="#b04a3a" stroke-dasharray="5 4"/>'
        )
    if index == len(PANELS) - 1:
        unit, name = (60, "min") if end > 600 else (1, "s")
        step = nice(end / unit / 8)
        for tick in range(int(end / unit / step) + 1):
            out.append(
                f'<text x="{x(tick * step * unit):.1f}" y="{y0 + PANEL + 18}" text-anchor="middle">{tick * step:g}</text>'
            )
        out.append(f'<text x="{WIDTH - 20}" y="{y0 + PANEL + 34}" text-anchor="end">{name}</text>')
    return "\n".join(out)


def main():
    source, target, title = sys.argv[1:4]
    slo = float(sys.argv[4]) if len(sys.argv) > 4 else None
    with open(source) as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    height = TOP + len(PANELS) * (PANEL + GAP) + 20
    parts = "\n".join(panel(rows, index, slo) for index in range(len(PANELS)))
    with open(target, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
            f'<text x="{LEFT}" y="18" font-size="14">{title}</text>\n{parts}\n</svg>\n'
        )


main()
