import numpy as np
import pytest

from mmjepa.evaluate.collapse import collapse_panel, effective_rank, rankme
from mmjepa.refusal import Refusal

CLASSES, VIEWS, D = 512, 4, 256


def planted(case):
    random = np.random.default_rng(0)
    sample = np.repeat(random.normal(size=(CLASSES, D)), VIEWS, axis=0)
    noise = random.normal(size=(CLASSES * VIEWS, D))
    healthy = 0.9 * sample + np.sqrt(0.19) * noise
    if case == "offset":
        return healthy + 10
    if case == "rank 8":
        return healthy[:, :8] @ random.normal(size=(8, D)) / np.sqrt(8)
    if case == "dead":
        return np.where(np.arange(D) < 64, healthy, 1e-3 * noise)
    if case == "collapse":
        return random.normal(size=D) + 1e-3 * noise
    if case == "batch norm":
        return noise * 1e-3 / np.sqrt(1e-6 + 1e-5)
    return noise if case == "noise" else healthy


# the table of the method's description: RankMe, centred rank, std mean, std q05, cosine, LiDAR, mean eigenvalue, warnings
TABLE = {
    "healthy": (246.0, 212.9, 1.00, 0.96, 0.00, 183.6, 5.4, set()),
    "offset": (54.3, 212.9, 1.00, 0.96, 0.99, 183.6, 5.4, set()),
    "rank 8": (8.2, 7.8, 0.97, 0.58, 0.00, 7.9, 0.14, {"LOW_RANK"}),
    "dead": (66.0, 61.0, 0.25, 0.001, 0.00, 61.1, 1.2, {"STD_FELL"}),
    "collapse": (1.2, 240.3, 0.001, 0.001, 1.00, 198.9, 0.0025, {"STD_FELL", "NO_CLASS_SIGNAL"}),
    "batch norm": (254.8, 240.4, 0.30, 0.29, 0.00, 183.5, 0.30, {"NO_CLASS_SIGNAL"}),
    "noise": (254.8, 240.5, 1.00, 0.97, 0.00, 183.3, 0.30, {"NO_CLASS_SIGNAL"}),
}


@pytest.mark.parametrize("case", TABLE)
def test_planted_collapse_reads_as_in_the_table_and_warns_as_it_should(case):
    panel = collapse_panel(planted(case), np.repeat(np.arange(CLASSES), VIEWS), initial_std_q05=0.96)
    *expected, warnings = TABLE[case]
    names = ("rankme", "effective_rank", "std_mean", "std_q05", "mean_cosine", "lidar", "lidar_mean_eigenvalue")
    for name, value in zip(names, expected, strict=True):
        assert panel[name] == pytest.approx(value, rel=0.12, abs=0.012), name
    assert set(panel["warnings"]) == warnings
    assert panel["not_checked"] == []


def test_what_cannot_be_checked_is_said():
    z = np.random.default_rng(0).normal(size=(50, 8))
    for classes in (None, np.arange(50), np.zeros(50, int)):
        panel = collapse_panel(z, classes)
        assert set(panel["not_checked"]) == {"STD_FELL", "NO_CLASS_SIGNAL"}
        assert panel["lidar"] is None


def test_orthogonal_rows_have_full_rank_and_equal_rows_rank_one():
    assert rankme(np.eye(64)) == pytest.approx(64, rel=0.02)
    signs = np.concatenate([np.eye(32), -np.eye(32)])
    assert effective_rank(signs) == pytest.approx(32)
    assert effective_rank(np.ones((10, 5))) == 1


def test_lidar_reads_classes_by_id_and_not_by_row_order():
    z, classes = planted("healthy")[:400], np.repeat(np.arange(100), 4)
    order = np.random.default_rng(1).permutation(400)
    a, b = collapse_panel(z, classes), collapse_panel(z[order], classes[order])
    assert a["lidar"] == pytest.approx(b["lidar"])


def test_bad_input_is_refused():
    for z, classes in ((np.full((3, 2), np.nan), None), (np.zeros((1, 2)), None), (np.zeros((4, 2)), np.zeros(3))):
        with pytest.raises(Refusal) as caught:
            collapse_panel(z, classes)
        assert caught.value.code == "COLLAPSE_INPUT"
