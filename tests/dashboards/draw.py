#!/usr/bin/env python3
"""Draws Grafana dashboards from a Prometheus, without a Grafana: one SVG a dashboard, every panel at its place.

    draw.py --prometheus http://HOST:9090 --dashboards FOLDER --out FOLDER --set namespace=team --minutes 3

Only what our dashboards use is drawn: numbers, lines, tables. Nothing but Python's own library is needed.
"""

import argparse
import html
import json
import math
import pathlib
import time
import urllib.parse
import urllib.request

CELL_WIDTH, CELL_HEIGHT = 50, 30  # of Grafana's grid, in pixels
POINTS = 120  # samples a line
LINES_MAX = 8
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]


def ask(server, path, **parameters):
    url = f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def shown(value, unit):
    """A number as a person reads it, with Grafana's unit."""
    if not math.isfinite(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        for name in ["B", "KiB", "MiB", "GiB"]:
            if abs(value) < 1024:
                return f"{value:.4g} {name}"
            value /= 1024
        return f"{value:.4g} TiB"
    if unit == "s" and abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text if unit == "short" else f"{text} {unit}"


def legend(template, labels):
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template or ", ".join(f"{name}={value}" for name, value in labels.items()) or "value"


def text(x, y, words, size=11, anchor="start", colour="#222", weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{html.escape(words)}</text>'
    )


def draw_stat(panel, series, box):
    x, y, width, height = box
    values = [float(one["values"][-1][1]) for one in series]
    words = shown(values[0], panel["unit"]) if values else "no data"
    return [text(x + width / 2, y + height * 0.68, words, 22, "middle", "#1f77b4", "bold")]


def draw_table(panel, series, box):
    x, y, width, height = box
    columns = sorted({name for one in series for name in one["metric"]})
    rows = [[one["metric"].get(column, "") for column in columns] for one in series]
    if not rows:
        return [text(x + width / 2, y + height / 2, "no rows", 12, "middle", "#888")]
    parts, step = [], width / len(columns)
    for line, row in enumerate([columns] + sorted(rows)[:8]):
        for column, words in enumerate(row):
            weight = "bold" if line == 0 else "normal"
            parts.append(text(x + 8 + column * step, y + 42 + 18 * line, words[:28], 11, weight=weight))
    return parts


def draw_lines(panel, series, box):
    x, y, width, height = box
    left, right, top, bottom = x + 92, x + width - 10, y + 30, y + height - 40
    finite = [float(v) for one in series for _, v in one["values"] if math.isfinite(float(v))]
    if not finite:
        return [text(x + width / 2, y + height / 2, "no data", 12, "middle", "#888")]
    most = max(finite) * 1.1 or 1.0
    first = min(one["values"][0][0] for one in series)
    last = max(one["values"][-1][0] for one in series)
    parts = []
    for share in (0, 0.5, 1):
        level = bottom - share * (bottom - top)
        parts.append(f'<path d="M{left} {level:.1f}H{right}" stroke="#ddd"/>')
        parts.append(text(left - 6, level + 4, shown(most * share, panel["unit"]), 10, "end", "#666"))
    for index, one in enumerate(series[:LINES_MAX]):
        colour, path, pen = COLOURS[index % len(COLOURS)], "", "M"
        for at, value in one["values"]:
            value = float(value)
            if not math.isfinite(value):
                pen = "M"
                continue
            across = left + (right - left) * (at - first) / max(last - first, 1)
            path += f"{pen}{across:.1f} {bottom - (bottom - top) * value / most:.1f}"
            pen = "L"
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        place = left + (index % 4) * (right - left) / 4
        parts.append(text(place, bottom + 18 + 14 * (index // 4), "▬ " + one["legend"][:26], 10, colour=colour))
    return parts


def draw_panel(server, panel, variables, minutes):
    place = panel["gridPos"]
    box = (place["x"] * CELL_WIDTH, place["y"] * CELL_HEIGHT, place["w"] * CELL_WIDTH, place["h"] * CELL_HEIGHT)
    end, series = time.time(), []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "30s")
        for name, value in variables.items():
            query = query.replace("$" + name, value)
        if panel["type"] == "table":
            found = ask(server, "query", query=query)
        else:
            step = max(60 * minutes / POINTS, 1)
            found = ask(server, "query_range", query=query, start=end - 60 * minutes, end=end, step=step)
        series += [one | {"legend": legend(target["legendFormat"], one["metric"])} for one in found]
    x, y, width, height = box
    about = {"unit": panel["fieldConfig"]["defaults"]["unit"]}
    draw = {"stat": draw_stat, "table": draw_table, "timeseries": draw_lines}[panel["type"]]
    frame = f'<rect x="{x + 3}" y="{y + 3}" width="{width - 6}" height="{height - 6}" fill="white" stroke="#ccc" rx="3"/>'
    return [frame, text(x + 12, y + 20, panel["title"], 12, weight="bold")] + draw(about, series, box)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", required=True)
    parser.add_argument("--dashboards", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], metavar="VARIABLE=VALUE")
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args()
    variables = dict(pair.split("=", 1) for pair in options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(options.dashboards.glob("*.json")):
        dashboard = json.loads(file.read_text())
        width = 24 * CELL_WIDTH
        height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"]) * CELL_HEIGHT
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>',
        ]
        for panel in dashboard["panels"]:
            parts += draw_panel(options.prometheus, panel, variables, options.minutes)
        out = options.out / file.with_suffix(".svg").name
        out.write_text("\n".join(parts + ["</svg>\n"]))
        print(out)


if __name__ == "__main__":
    main()
