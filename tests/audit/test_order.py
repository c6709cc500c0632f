"""Numbers that mean nothing must not tell the label: the clock, an image's id, an image's size."""

import numpy as np
import pandas as pd
import pytest

from mmjepa.audit.labels import Task, order_tells

N = 200
T_US = pd.Timestamp("2100-01-01").value // 1000
DAY_US, SECOND_US = 86_400_000_000, 1_000_000


def planted(what: str | None) -> tuple[Task, pd.DataFrame]:
    """A task of N subjects with two images each, the later one after the prediction time; one number is tied to the label."""
    draw = np.random.default_rng(0)
    y = draw.random(N) < 0.5
    tied = np.argsort(np.argsort(y + 0.5 * draw.random(N)))  # ranks, those of true labels last
    free = draw.permutation(N)
    second = (tied if what == "second" else free) % N * 60 // N
    at = np.arange(N)
    task = Task(
        "t", at, T_US + draw.integers(9999, size=N) * 60 * SECOND_US + second * SECOND_US, y.astype(float), at, free
    )
    ids = {"first": tied if what == "image_id" else free, "later": tied}  # a later image may tell: it is not looked at
    images = [
        pd.DataFrame(
            {
                "image_id": [f"{number:04d}-{name}" for number in numbers],
                "subject_id": at,
                "time": pd.to_datetime(task.t_us + shift, unit="us"),
                "shape_x": 100 + (tied if what == "image size" else free),
                "shape_y": 512,
                "shape_z": 512,
            }
        )
        for (name, numbers), shift in zip(ids.items(), (-DAY_US, DAY_US), strict=True)
    ]
    return task, pd.concat(images)


@pytest.mark.parametrize("what", ["second", "image_id", "image size"])
def test_a_number_tied_to_the_label_fails(what):
    found = order_tells(*planted(what))
    assert (found.verdict, found.count) == ("fail", 1), found.sentence


def test_numbers_drawn_at_random_pass_and_images_after_the_time_are_not_looked_at():
    task, index = planted(None)
    assert order_tells(task, index).verdict == order_tells(task).verdict == "pass"
    assert "image size" in order_tells(task, index).sentence
    later = index[index["image_id"].str.endswith("later")]
    assert "image_id" not in order_tells(task, later).sentence
