"""Draws time series as an SVG: panels below each other, with bands behind them."""

import html
import math

WIDTH, LEFT, RIGHT = 960, 80, 20
TOP, HEAD, PANEL, GAP, BOTTOM = 84, 24, 110, 16, 40
ROW = 15
BANDS = ("#eef3fb", "#fdf1e3", "#f6e9f6", "#eaf6ec")
COLOURS = ("#2563c9", "#d9571e", "#2e9e4f", "#8a3ffc")
VALUES, TIMES = 4, 16


def ticks(low, high, count):
    """At most `count` + 1 ticks, 1, 2 or 5 times a power of ten apart."""
    power = 10 ** math.floor(math.log10((high - low) / count))
    every = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= high - low)
    first = math.ceil(low / every)
    return [every * n for n in range(first, math.floor(high / every) + 1)]


def number(value):
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1g}"


class Drawing:
    def __init__(self, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                      f'height="{height}" font-family="sans-serif" font-size="12">',
                      f'<rect width="{WIDTH}" height="{height}" fill="white"/>']

    def text(self, x, y, text, anchor="start", **more):
        self.add("text", html.escape(text), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **{"fill": "#222", **more})

    def line(self, x1, y1, x2, y2, colour):
        self.add("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", stroke=colour)

    def add(self, name, content="", **attributes):
        written = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        self.parts.append(f"<{name}{written}>{content}</{name}>")

    def done(self):
        return "\n".join([*self.parts, "</svg>", ""])


def draw(title, span, bands, panels, axis="seconds since the replica was started again", marks=None):
    """`bands` are (name, from, to) in seconds, `panels` are (name, {line: [(seconds, value)]}), and `marks` are
    {name: [(from, to)]}, above the panels."""
    marks = marks or {}
    top = TOP + (len(marks) * ROW + GAP if marks else 0)
    height = top + len(panels) * (HEAD + PANEL + GAP) + BOTTOM
    drawing = Drawing(height)
    low, high = span

    def x(seconds):
        return LEFT + (seconds - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    drawing.text(LEFT, 26, title, font_size=16)
    bottom = height - BOTTOM - GAP
    for n, (_, begin, end) in enumerate(bands):
        begin, end = max(begin, low), min(end, high)
        drawing.add("rect", x=f"{x(begin):.1f}", y=TOP - 24, width=f"{x(end) - x(begin):.1f}", height=bottom - TOP + 24,
                    fill=BANDS[n % len(BANDS)])
    named_to, raised = 0, False
    for name, begin, _ in bands:
        # A label that would overlap the previous one is placed above it.
        raised = x(begin) < named_to and not raised
        drawing.text(x(begin) + 3, TOP - (28 if raised else 10), name, font_size=11)
        named_to = x(begin) + 8 + 6 * len(name)
    for n, (name, times) in enumerate(marks.items()):
        y = TOP + n * ROW
        drawing.line(LEFT, y, WIDTH - RIGHT, y, "#eee")
        drawing.text(LEFT - 6, y + 4, name, "end", font_size=11)
        for begin, end in times:
            drawing.add("rect", x=f"{x(begin):.1f}", y=y - 4, width=f"{max(x(end) - x(begin), 2):.1f}", height=8,
                        fill="#b3261e")
    for n, (name, lines) in enumerate(panels):
        panel(drawing, name, lines, top + n * (HEAD + PANEL + GAP) + HEAD, x, span)
    for seconds in ticks(low, high, TIMES):
        drawing.line(x(seconds), bottom, x(seconds), bottom + 5, "#222")
        drawing.text(x(seconds), bottom + 18, number(seconds), "middle")
    drawing.text(WIDTH - RIGHT, height - 6, axis, "end")
    return drawing.done()


def panel(drawing, name, lines, top, x, span):
    low, high = span
    lines = {of: [(at, value) for at, value in points if low <= at <= high] for of, points in lines.items()}
    highest = max((value for points in lines.values() for _, value in points), default=0) * 1.05 or 1

    def y(value):
        return top + PANEL - value / highest * PANEL

    drawing.text(LEFT, top - 8, name, font_weight="bold")
    for value in ticks(0, highest, VALUES):
        drawing.line(LEFT, y(value), WIDTH - RIGHT, y(value), "#ccc")
        drawing.text(LEFT - 6, y(value) + 4, number(value), "end")
    legend = WIDTH - RIGHT
    for n, (of, points) in reversed(list(enumerate(lines.items()))):
        colour = COLOURS[n % len(COLOURS)]
        drawing.add("polyline", points=" ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points), fill="none",
                    stroke=colour, stroke_width=1.6)
        if len(lines) > 1:
            drawing.text(legend, top - 8, of, "end", fill=colour)
            legend -= 14 + 6.5 * len(of)
