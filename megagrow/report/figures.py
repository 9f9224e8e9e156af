"""Draws the loss curves as SVG that takes its colors from the page.

matplotlib draws each role (validation, training, ink, grid) in a placeholder color, which is then replaced by one of
the page's CSS variables, so one drawing works in light and dark mode. Text stays text: it has the page's font and can
be searched. pyplot is not used, because its figures are global state.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from megagrow.report.collect import FamilyResult, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

XAxis = Literal["flops", "tokens"]

_INK, _MUTED, _GRID, _BAND, _TRAINING, _VALIDATION = (f"#0{digit}010{digit}" for digit in "123456")
_CSS_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _BAND: "--band",
    _TRAINING: "--training",
    _VALIDATION: "--validation",
}
_AXIS_LABELS = {"flops": "training FLOPs of the family", "tokens": "training tokens of the family"}
_MAX_POINTS = 400  # per stage; more would not be visible and would make the page large


def loss_curves(result: FamilyResult, axis: XAxis) -> str:
    """Return an inline `<svg>` with the losses of all stages over the family's FLOPs or tokens.

    Requires `has_curves(result)`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "megagrow", "font.size": 9.5, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.4, 3.9))
        axes = figure.add_axes((0.065, 0.13, 0.925, 0.78))
        _draw_stages(axes, result, axis)
        _draw_frame(axes, result, axis)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), axis)


def has_curves(result: FamilyResult) -> bool:
    """Whether any loss was recorded after the first step."""
    return any(point.flops > 0 for stage in result.stages for point in (*stage.training, *stage.validation))


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Exponential mean over about `window` steps; the first values average only the losses so far, not zeros."""
    keep = 1 - 1 / max(window, 1)
    total, weight, means = 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        means.append(total / weight)
    return means


def _draw_stages(axes: "Axes", result: FamilyResult, axis: XAxis) -> None:
    for index, stage in enumerate(result.stages):
        first = index == 0
        means = smoothed([point.loss for point in stage.training], window=max(1, len(stage.training) // 60))
        stride = max(1, math.ceil(len(means) / _MAX_POINTS))
        xs = [getattr(point, axis) for point in stage.training]
        axes.plot(
            xs[::stride],
            means[::stride],
            color=_TRAINING,
            linewidth=1.1,
            solid_joinstyle="round",
            label="training, smoothed" if first else None,
        )
        # the loss before the first step is at 0 FLOPs, which a log axis cannot show
        points = [point for point in stage.validation if point.flops > 0]
        axes.plot(
            [getattr(point, axis) for point in points],
            [point.loss for point in points],
            color=_VALIDATION,
            linewidth=1.8,
            marker="o",
            markersize=3.2,
            markevery=max(1, math.ceil(len(points) / 40)),
            label="validation" if first else None,
        )


def _draw_frame(axes: "Axes", result: FamilyResult, axis: XAxis) -> None:
    bounds = _bounds(result, axis)
    left, right = bounds[0][0], bounds[-1][1]
    if axis == "flops" and len(bounds) > 1 and right > 6 * bounds[0][1]:
        axes.set_xscale("log")
        left = bounds[0][1] / (right / bounds[0][1]) ** (1 / (len(bounds) - 1))
        right *= (right / left) ** 0.01  # so that the last marker is not cut off
    else:
        right += 0.01 * (right - left)
    axes.set_xlim(left, right)
    axes.set_ylim(*_loss_range(result, axis, left))
    _mark_growth(axes, [stage.plan.name for stage in result.stages], bounds)
    _style(axes)
    axes.set_xlabel(_AXIS_LABELS[axis], color=_MUTED)
    axes.set_ylabel("loss, nats per token", color=_MUTED)
    _format_ticks(axes, axis)
    axes.legend(loc="upper right", frameon=False, labelcolor=_INK, handlelength=1.6, borderaxespad=0.2)


def _bounds(result: FamilyResult, axis: XAxis) -> list[tuple[float, float]]:
    """Start and end, on the axis, of each stage that has started."""
    bounds: list[tuple[float, float]] = []
    for stage in result.stages:
        reached = [float(getattr(point, axis)) for point in (*stage.training, *stage.validation)]
        if reached:
            start = bounds[-1][1] if bounds else 0.0
            bounds.append((start, max(start, *reached)))
    return bounds


def _loss_range(result: FamilyResult, axis: XAxis, left: float) -> tuple[float, float]:
    """The range of losses to show: all but the first fall, which would compress the rest."""
    first: list[Point] = next(list(s.training or s.validation) for s in result.stages if s.training or s.validation)
    fall_end = max(left, getattr(first[len(first) // 8], axis))
    shown = [
        point.loss
        for stage in result.stages
        for point in (*stage.training, *stage.validation)
        if point.flops > 0 and getattr(point, axis) >= fall_end
    ]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + 2 * margin


def _mark_growth(axes: "Axes", names: list[str], bounds: list[tuple[float, float]]) -> None:
    """Shade every other stage, draw a line at each growth step, and write the names of the stages above."""
    transform = axes.get_xaxis_transform()
    for index, (name, (start, end)) in enumerate(zip(names, bounds, strict=False)):
        if index % 2:
            axes.axvspan(start, end, color=_BAND, linewidth=0, zorder=0)
        if index:
            label = "growth" if index == 1 else None
            axes.axvline(start, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1, label=label)
        low, high = axes.transData.transform([(max(start, axes.get_xlim()[0]), 0), (end, 0)])[:, 0]
        middle = axes.transData.inverted().transform(((low + high) / 2, 0))[0]
        # in pixels at 100 dpi; if names are crowded, every other one is written below the upper edge
        crowded = high - low < 7 * len(name)
        height, side = (1.02, "bottom") if not crowded or index % 2 else (0.98, "top")
        axes.text(middle, height, name, transform=transform, ha="center", va=side, color=_INK, fontweight="bold")


def _style(axes: "Axes") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, length=3, width=0.7, labelcolor=_MUTED, which="both")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _format_ticks(axes: "Axes", axis: XAxis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from megagrow.report.tables import human

    tick_format: Literal["flops", "count"] = "flops" if axis == "flops" else "count"
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        wide = math.log10(high / low) > 3
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.?0+e", "e", human(value, tick_format))))


def _inline(svg: str, prefix: str) -> str:
    """Return only the `<svg>` element, with the page's colors and with ids that are unique on the page."""
    svg = svg[svg.index("<svg") :]
    for color, variable in _CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" ', r"<svg \1\2", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="loss against {prefix}" ', 1)
