"""Numbers with their intervals as text, and what an interval allows to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sparsify_vlm.analysis.tables import Estimate

Verdict = Literal["above", "below", "none", "unknown", "undefined"]
"""Of an estimate against a null value: its interval lies above it, lies below it or holds it; or
there is no interval; or there is no estimate."""

UNDEFINED = "undefined"


def verdict(estimate: Estimate | None, null: float = 0.0) -> Verdict:
    """What the 95 % interval of an estimate says about it being `null`."""
    if estimate is None or estimate.value is None:
        return "undefined"
    if estimate.low is None or estimate.high is None:
        return "unknown"
    if estimate.low > null:
        return "above"
    return "below" if estimate.high < null else "none"


def percent(value: float | None) -> str:
    """0.1234 -> "12.3 %"; shares below 1 % keep two figures."""
    return UNDEFINED if value is None else f"{_hundredths(value)} %"


def points(value: float | None) -> str:
    """A difference of shares, in percentage points, without the unit: 0.1234 -> "12.3"."""
    return UNDEFINED if value is None else _hundredths(value)


def _hundredths(value: float) -> str:
    size = abs(100 * value)
    if size < 1e-6:
        return "0"
    return f"{100 * value:.1f}" if size >= 0.995 else f"{100 * value:#.2g}"


def number(value: float | None) -> str:
    """Three significant figures, without exponent where that is readable."""
    if value is None:
        return UNDEFINED
    size = abs(value)
    if value == 0 or 0.01 <= size < 1e5:
        places = 3 if size < 1 else 2 if size < 100 else 0
        return f"{value:.{places}f}"
    return f"{value:.2g}" if 1e-4 <= size < 1 else f"{value:.2e}"


def interval(estimate: Estimate | None, form: Callable[[float | None], str] = number) -> str:
    """`0.412 [0.401, 0.423]`, `41.2 % [40.1, 42.3]`; the value alone where there is no interval."""
    if estimate is None or estimate.value is None:
        return UNDEFINED
    if estimate.low is None or estimate.high is None:
        return form(estimate.value)
    end = points if form is percent else form
    return f"{form(estimate.value)} [{end(estimate.low)}, {end(estimate.high)}]"


def in_points(difference: Estimate | None) -> str:
    """A difference of shares with its interval: `15.0 [14.0, 16.0] points`."""
    text = interval(difference, points)
    return text if text == UNDEFINED else f"{text} points"


def over(estimate: Estimate | None) -> str:
    """Of what the interval is: "100 samples"."""
    if estimate is None or estimate.low is None or estimate.n is None:
        return ""
    return f"{estimate.n} {estimate.over or 'values'}"


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
