from __future__ import annotations

from collections.abc import Generator

from ray_soup.io.progress import drain, labelled


def work() -> Generator[tuple[int, int], None, str]:
    yield 1, 2
    yield 2, 2
    return "value"


def test_drain_returns_the_value_of_a_generator() -> None:
    assert drain(work()) == "value"


def test_labelled_adds_the_label_and_keeps_the_value() -> None:
    seen = []

    def outer() -> Generator[None, None, str]:
        labelled_work = labelled("copying", work())
        while True:
            try:
                seen.append(next(labelled_work))
            except StopIteration as stop:
                return str(stop.value)
            yield

    assert drain(outer()) == "value"
    assert seen == [("copying", 1, 2), ("copying", 2, 2)]
