"""Small, calm plots as inline SVG: curves over steps, and the calibration of the reward model."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Axis = Literal["free", "zero", "share"]
INK, MUTED, GRID = "#1d2129", "#6b7280", "#e7e5df"
COLOURS = ("#0f766e", "#b08968", "#7c8a9e")  # the thing itself, then what is shown beside it
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "rlaif-lite", "font.family": "sans-serif", "font.size": 9}


def curve(series: dict[str, tuple[Sequence[float], Sequence[float]]], axis: Axis = "free") -> str:
    """Lines over steps, {label: (steps, values)}, the last value written at each end; labelled when there are several.

    Many steps are drawn pale, with a moving average over a twentieth of them on top. `axis`: `zero` keeps 0 in view,
    `share` goes from 0 to 1.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.5, 2.0)
        for colour, (label, (steps, values)) in zip(COLOURS, series.items(), strict=False):
            kernel = np.ones(max(1, len(values) // 20))  # a centred mean; at the ends, of what is there
            smooth = np.convolve(np.asarray(values, dtype=float), kernel, "same")
            smooth = smooth / np.convolve(np.ones(len(values)), kernel, "same")
            if len(values) >= 40:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth, color=colour, linewidth=1.8, solid_capstyle="round", label=label)
            axes.plot(steps[-1:], smooth[-1:], "o", color=colour, markersize=4)
            end, last = (steps[-1], smooth[-1]), smooth[-1]
            text = f"{last:.0f}" if abs(last) >= 100 else f"{last:.2g}" if abs(last) < 0.1 else f"{last:.3g}"
            axes.annotate(text.replace("-", "−"), end, (7, 0), textcoords="offset points", va="center", color=colour)
        axes.margins(x=0.02, y=0.12)
        if axis == "zero":
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if axis == "share":
            axes.set_ylim(0.0, 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=MUTED, handlelength=1.2, loc="best", borderaxespad=0)
        return _svg(figure)


def calibration(bins: Sequence[dict]) -> str:
    """P(chosen wins) as predicted against the share in which it did, dots sized by how many pairs they stand for."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.5, 3.0)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        largest = max(b["count"] for b in bins)
        axes.plot(predicted, observed, color=COLOURS[0], linewidth=1, alpha=0.5)
        axes.scatter(predicted, observed, s=[12 + 90 * b["count"] / largest for b in bins], color=COLOURS[0], zorder=3)
        low = min(0.5, *predicted, *observed) - 0.05
        axes.set_xlim(low, 1.03)
        axes.set_ylim(low, 1.05)
        axes.set_xlabel("predicted", color=MUTED, fontsize=8)
        axes.set_ylabel("observed", color=MUTED, fontsize=8)
        return _svg(figure)


class Spread(NamedTuple):
    """One figure in one setting of a sweep."""

    label: str
    values: Sequence[float]  # one per seed
    mean: float | None
    low: float | None
    high: float | None


def panels(drawn: Sequence[tuple[str, Sequence[Spread]]], stem: Path) -> None:
    """Writes `stem`.svg and .png: a panel per figure of a sweep, settings from top to bottom, a dot per seed, their
    mean with its interval."""
    with matplotlib.rc_context(STYLE):
        names = [spread.label for spread in drawn[0][1]]
        columns, height = 3, 0.75 + 0.24 * len(names)
        rows = -(-len(drawn) // columns)
        left = 0.3 + 0.065 * max(map(len, names))  # inches for the settings' names
        figure = Figure(figsize=(left + 3.3 * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, (title, spreads) in zip(grid.flat, drawn, strict=False):
            axes.set_title(title, loc="left", fontsize=9, color=INK)
            for place, (_, values, mean, low, high) in enumerate(spreads):
                axes.plot(values, [place + 0.24] * len(values), "o", color=COLOURS[1], markersize=4, alpha=0.8, mew=0)
                if low is not None:
                    axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
                if mean is not None:
                    axes.plot([mean, mean], [place - 0.28, place + 0.28], color=COLOURS[0], linewidth=2)
            if "policy - SFT" in title:
                axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(length=0, colors=MUTED, labelsize=8)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            axes.spines[:].set_visible(False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        figure.get_layout_engine().set(h_pad=0.09)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.14, 0.73, 0.8))
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9c6bd")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    return figure, axes


def _svg(figure: Figure) -> str:
    "The <svg> element alone, as wide as its place, with neither a date nor a fixed size."
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    width, height = (72 * size for size in figure.get_size_inches())
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", body)  # figure_1, ... would repeat from plot to plot
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="0 0 {width:g} {height:g}" role="img">{body}'
