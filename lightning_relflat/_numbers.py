"""How numbers and their standard errors are written in tables."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Return a number with four digits.

    Args:
        value: the number, or ``None``.

    Returns:
        Its text; a dash for what is no number.

    Examples:
        >>> from lightning_relflat._numbers import number
        >>> number(0.123456), number(123456.0), number(3.0), number(float("nan"))
        ('0.1235', '1.235e+05', '3', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def with_error(value: float, error: float) -> str:
    """Return a number and its standard error, which has two digits.

    Args:
        value: the number.
        error: the standard error.

    Returns:
        Their text; a dash for a value that is not known.

    Examples:
        >>> from lightning_relflat._numbers import with_error
        >>> with_error(12.3456, 0.0234), with_error(1234.5, 67.8), with_error(0.5, 0.0)
        ('12.346 ± 0.023', '1234 ± 68', '0.5 ± 0')
    """
    if math.isnan(value):
        return "–"
    if not (math.isfinite(error) and math.isfinite(value) and error > 0):
        return f"{number(value)} ± {number(error)}"
    digits = 1 - math.floor(math.log10(error))
    if digits > 5 or digits < -3:  # neither many zeros nor many digits without a meaning
        return f"{value:.3e} ± {error:.1e}"
    return f"{value:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"
