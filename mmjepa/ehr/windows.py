"""Windows of hours inside a stay (arXiv 2605.10840)."""


def windows(hours: int, length: int = 72, stride: int = 12) -> list[tuple[int, int]]:
    """Half-open windows (start, stop) in hours: starts 0, stride, 2 stride, ... while start + length <= hours.

    A stay shorter than ``length`` gives one window of its own length; one without hours gives none.
    """
    if length < 1 or stride < 1:
        raise ValueError("length and stride must be at least 1")
    if hours < length:
        return [(0, hours)] if hours > 0 else []
    return [(start, start + length) for start in range(0, hours - length + 1, stride)]
