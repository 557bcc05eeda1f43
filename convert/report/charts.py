"""Charts as SVG. Pure.

A chart is as wide as the page lets it be, while its text keeps its size: shapes stand in an inner drawing that is
stretched, and labels in the outer one, at percentages. Colors are classes, which the page's style sheet defines for
light and dark. Each chart has its content in words too, for those who do not see it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

# The size of the inner drawing: only a scale for coordinates, since it is stretched.
_WIDTH, _HEIGHT = 1000, 100

# Steps of an axis of time, in seconds, that people count in.
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)

# So that labels do not touch on a narrow page.
_MOST_TICKS = 6

# Room at the bottom for the labels of the axis, in pixels.
_AXIS_PIXELS = 18

# As high as small letters of the text beside it.
_BAR_PIXELS = 9


@dataclass(frozen=True)
class Axis:
    """An axis of time.

    Attributes:
        seconds: Its length.
        breaks: Where another run begins.
    """

    seconds: float
    breaks: tuple[float, ...] = ()

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round times, few enough to be read."""
        step = next((step for step in _STEPS if self.seconds / step <= _MOST_TICKS), _STEPS[-1] * 7)
        return tuple(step * i for i in range(int(self.seconds / step) + 1))


@dataclass(frozen=True)
class Frame:
    """How a chart over time is drawn.

    Attributes:
        title: What it shows, in words.
        pixels: Its height without the labels of the axis.
        top: The value at the upper edge.
        label: What stands at the upper edge, in words; "" for nothing.
        times: Whether the axis has its times.
    """

    title: str
    pixels: int
    top: float
    label: str = ""
    times: bool = False


def area(values: Sequence[float], axis: Axis, frame: Frame, kind: str) -> Markup:
    """One quantity over time, as steps over a filled area.

    Args:
        values: A value for each bucket.
        axis: The axis of time.
        frame: How it is drawn.
        kind: The class of the shape, for its color.
    """
    svg, plot = _figure(axis, frame)
    outline = _outline(values, frame.top)
    _shape(
        plot, "path", d=f"M0 {_HEIGHT}{outline.replace('M', 'L', 1)}L{_WIDTH} {_HEIGHT}Z", **{"class": f"{kind} area"}
    )
    _shape(plot, "path", d=outline, **{"class": f"{kind} line"})
    return _markup(svg)


def lines(series: Sequence[Sequence[float | None]], limits: Sequence[float | None], axis: Axis, frame: Frame) -> Markup:
    """Like quantities over time, each a line, under a limit.

    Args:
        series: The lines; None where there is nothing to show.
        limits: The limit for each bucket; not shown where it is above the chart.
        axis: The axis of time.
        frame: How they are drawn.
    """
    svg, plot = _figure(axis, frame)
    for values in series:
        _shape(plot, "path", d=_outline(values, frame.top), **{"class": "memory line"})
    shown = [limit if limit is not None and limit <= frame.top else None for limit in limits]
    _shape(plot, "path", d=_outline(shown, frame.top), **{"class": "limit line"})
    return _markup(svg)


def bar(share: float, *, title: str, kind: str) -> Markup:
    """A part of a whole.

    Args:
        share: The part, of 1.
        title: What it shows, in words.
        kind: The class of the shape, for its color.
    """
    svg = _drawing(title, "bar", _BAR_PIXELS)
    _shape(svg, "rect", width="100%", height="100%", **{"class": "whole"})
    _shape(svg, "rect", width=_percent(min(max(share, 0.0), 1.0)), height="100%", **{"class": kind})
    return _markup(svg)


def _figure(axis: Axis, frame: Frame) -> tuple[ElementTree.Element, ElementTree.Element]:
    """The drawing, with its axis, and the stretched part of it."""
    bottom = str(frame.pixels)
    svg = _drawing(frame.title, "chart", frame.pixels + (_AXIS_PIXELS if frame.times else 0))
    for tick in axis.ticks:
        at = _percent(tick / axis.seconds)
        _shape(svg, "line", x1=at, x2=at, y1="0", y2=bottom, **{"class": "grid"})
        if frame.times:
            anchor = "start" if tick == 0 else "end" if tick > 0.94 * axis.seconds else "middle"
            _text(svg, clock(tick), x=at, y=str(frame.pixels + 13), **{"text-anchor": anchor})
    for place in axis.breaks:
        at = _percent(place / axis.seconds)
        _shape(svg, "line", x1=at, x2=at, y1="0", y2=bottom, **{"class": "break"})
    plot = _shape(
        svg,
        "svg",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        width="100%",
        height=bottom,
    )
    _shape(svg, "line", x1="0", x2="100%", y1=bottom, y2=bottom, **{"class": "base"})
    if frame.label:
        _shape(svg, "line", x1="0", x2="100%", y1="0", y2="0", **{"class": "grid"})
        _text(svg, frame.label, x="3", y="12")
    return svg, plot


def _drawing(title: str, kind: str, pixels: int) -> ElementTree.Element:
    attributes = {"class": kind, "role": "img", "aria-label": title, "width": "100%", "height": str(pixels)}
    return ElementTree.Element("svg", attributes)


def _text(parent: ElementTree.Element, text: str, **attributes: str) -> None:
    _shape(parent, "text", **attributes, **{"class": "tick"}).text = text


def _shape(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, attributes)


def _outline(values: Sequence[float | None], top: float) -> str:
    """The path along the tops of the buckets; with gaps where there is no value."""
    width = _WIDTH / len(values)
    return "".join(_steps(values, width, top))


def _steps(values: Sequence[float | None], width: float, top: float) -> Iterator[str]:
    before = None
    for i, value in enumerate(values):
        if value is not None and value != before:
            y = _number(_HEIGHT * (1 - min(value / top, 1.0))) if top else str(_HEIGHT)
            yield f"{'M' if before is None else 'H'}{_number(i * width)}"
            yield f" {y}" if before is None else f"V{y}"
        if value is None and before is not None:
            yield f"H{_number(i * width)}"
        before = value
    if before is not None:
        yield f"H{_WIDTH}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _markup(svg: ElementTree.Element) -> Markup:
    # ElementTree has escaped whatever came from outside.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def clock(seconds: float) -> str:
    """A time on the axis, as minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d}" if hours else f"{minutes}:{rest:02d}"


def round_top(value: float) -> float:
    """The next round number above a value: the upper edge of a chart."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= value * 0.9999
    )
