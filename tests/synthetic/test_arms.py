"""The closed-form arms against independent implementations."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from synthetic import arms, shift
from synthetic.presets import Preset, find_site
from synthetic.world import MODALITIES, World

INTERNAL = find_site("li2025", "internal")
SMALL = Preset(d_image=9, d_ehr=11, k_n_image=2, k_n_ehr=2, n_unlabelled=300, rank=3)


@pytest.fixture(scope="module")
def world():
    return World(SMALL, INTERNAL, 3)


@pytest.fixture(scope="module")
def labelled(world):
    subjects = world.sample(INTERNAL, arms.LABELLED, 120)
    return subjects.theta_of(MODALITIES), subjects.label


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 60), st.integers(1, 20), st.sampled_from([0.01, 0.3, 10.0]), st.integers(0, 999), st.booleans())
def test_ridge_equals_scikit_learn_on_standardised_features(n, d, penalty, seed, weighted):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, d)) * draw.uniform(0.1, 9, d) + draw.uniform(-5, 5, d)
    y = draw.random(n) < 0.5
    weight = draw.uniform(0.1, 3, n) if weighted else np.ones(n)
    weight /= weight.mean()
    model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * n))
    model.fit(x, y.astype(float), standardscaler__sample_weight=weight, ridge__sample_weight=weight)
    coefficients, intercepts = arms.ridge(x, y, [penalty, 1.0], weight if weighted else None)
    np.testing.assert_allclose(x @ coefficients[0] + intercepts[0], model.predict(x), atol=1e-8)


def test_a_feature_that_never_varies_gets_no_weight(labelled):
    x, y = labelled
    coefficients, _ = arms.ridge(np.column_stack([x, np.full(len(x), 7.0)]), y, [0.1])
    assert coefficients[0, -1] == 0
    np.testing.assert_allclose(coefficients[0, :-1], arms.ridge(x, y, [0.1])[0][0], rtol=1e-9)


def test_the_tuned_penalty_wins_on_pooled_scores_out_of_four_interleaved_folds(world):
    chosen = set()
    for first in range(0, 480, 40):
        subjects = world.sample(INTERNAL, arms.LABELLED + first, 40)
        x, y = subjects.theta_of(MODALITIES), subjects.label
        folds, found = PredefinedSplit(np.arange(40) % 4), {}
        for penalty in (0.01, 0.1, 1.0, 10.0):
            # of 40 subjects 30 are in each fold's training part
            model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * 30))
            found[penalty] = roc_auc_score(y, cross_val_predict(model, x, y.astype(float), cv=folds))
        best = max(found, key=found.__getitem__)
        chosen.add(best)
        model = make_pipeline(StandardScaler(), Ridge(alpha=best * 40)).fit(x, y.astype(float))
        score = x @ arms.tuned(x, y)
        np.testing.assert_allclose(score - score.mean(), model.predict(x) - model.predict(x).mean(), atol=1e-9)
    assert len(chosen) > 1


def test_cca_solves_the_generalised_eigenproblem_with_white_codes():
    draw = np.random.default_rng(0)
    shared = draw.standard_normal((500, 2))
    image = shared @ draw.standard_normal((2, 6)) + draw.standard_normal((500, 6)) + 3
    ehr = shared @ draw.standard_normal((2, 8)) + draw.standard_normal((500, 8))
    encoder, r = arms.cca(image, ehr, 3)
    S = np.cov(image.T, ehr.T, bias=True) + 0.01 * np.eye(14)
    S[:6, 6:], S[6:, :6] = S[:6, 6:], S[6:, :6]
    xx, yy, xy = S[:6, :6], S[6:, 6:], S[:6, 6:]
    squared = eigh(xy @ np.linalg.solve(yy, xy.T), xx, eigvals_only=True)[::-1]
    np.testing.assert_allclose(r, np.sqrt(np.maximum(squared, 0)), atol=1e-7)
    code = encoder @ S @ encoder.T
    np.testing.assert_allclose(code[:3, :3], np.eye(3), atol=1e-8)
    np.testing.assert_allclose(code[3:, 3:], np.eye(3), atol=1e-8)
    np.testing.assert_allclose(code[:3, 3:], np.diag(r[:3]), atol=1e-8)


def test_pca_spans_scikit_learns_components_of_either_modality(world):
    theta = world.sample(INTERNAL, 0, 300).theta
    encoder = arms.pca(theta["image"], theta["ehr"], 4)
    for part, columns, m in ((slice(0, 4), slice(0, 9), "image"), (slice(4, 8), slice(9, 20), "ehr")):
        components = PCA(4).fit(theta[m]).components_
        np.testing.assert_allclose(np.abs(encoder[part, columns] @ components.T), np.eye(4), atol=1e-6)


def test_pairs_are_own_and_complete_without_knobs_and_follow_the_record():
    seen = np.random.default_rng(0).random(50) < 0.5
    image, ehr = arms.pairs(INTERNAL, 0, seen)
    np.testing.assert_array_equal(image, np.flatnonzero(seen))
    np.testing.assert_array_equal(ehr, np.flatnonzero(seen))


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_the_mispaired_get_somebody_elses_image_and_nobodys_is_lost(share):
    image, ehr = arms.pairs(replace(INTERNAL, mispair=share), 1, np.ones(4000, bool))
    np.testing.assert_array_equal(ehr, np.arange(4000))
    np.testing.assert_array_equal(np.sort(image), np.arange(4000))
    assert (image != ehr).mean() == pytest.approx(share, abs=0.03)


def test_the_unpaired_are_dropped_and_mispairing_is_a_draw_of_its_own():
    everyone = np.ones(4000, bool)
    image, ehr = arms.pairs(replace(INTERNAL, mispair=0.5, unpaired=0.4), 1, everyone)
    whole, _ = arms.pairs(replace(INTERNAL, mispair=0.5), 1, everyone)
    assert len(ehr) == pytest.approx(2400, abs=100)
    np.testing.assert_array_equal(image, whole[ehr])


def test_training_faults_reach_the_codes_and_leave_the_test_subjects_alone(world):
    clean = arms.pretrain(world, INTERNAL)
    for knob in ({"mispair": 0.5}, {"unpaired": 0.5}, {"ehr_missing": 0.5}):
        faulty = arms.pretrain(world, replace(INTERNAL, **knob))
        assert not np.allclose(clean.encoders["jepa"], faulty.encoders["jepa"])
    np.testing.assert_array_equal(
        world.sample(replace(INTERNAL, mispair=0.5, unpaired=0.5), arms.TEST, 50).theta["ehr"],
        world.sample(INTERNAL, arms.TEST, 50).theta["ehr"],
    )


def test_arms_see_what_their_name_says_and_few_labels_are_among_many(world):
    many, few = arms.train(world, INTERNAL, [60, 120]), arms.train(world, INTERNAL, [60])
    for arm in arms.ARMS:
        assert many[60][arm].tobytes() == few[60][arm].tobytes()
    assert (many[120]["image"][9:] == 0).all()
    assert (many[120]["ehr"][:9] == 0).all()
    assert all(many[120][arm][:9].any() and many[120][arm][9:].any() for arm in ("fusion_weak", "jepa", "pca"))


def test_pretraining_labelled_and_test_subjects_never_meet(monkeypatch):
    drawn = []
    sample = World.sample
    monkeypatch.setattr(
        World, "sample", lambda self, site, first, n: drawn.append((first, n)) or sample(self, site, first, n)
    )
    world = World(replace(SMALL, n_unlabelled=5000), INTERNAL, 0)
    arms.train(world, INTERNAL, [100, 300])
    arms.ceiling(world, INTERNAL, [50, 4000])
    shift.measure([shift.Setting("", "", SMALL, INTERNAL, INTERNAL, INTERNAL, 100)], 4000, 0)
    kinds = {}
    for first, n in drawn:
        kinds.setdefault(first, set()).update(range(first, first + n))
    assert [len(kind) for _, kind in sorted(kinds.items())] == [5000, 4000, 4000]
    assert len(set.union(*kinds.values())) == 13_000


def test_block_r2_is_one_for_what_the_code_holds_and_the_statistic_keeps_all_that_loads():
    preset = Preset(tau=1e-4, k_n_image=2, k_n_ehr=2)
    world = World(preset, INTERNAL, 0)
    subjects = world.sample(INTERNAL, 0, 500)
    found = arms.block_r2(world, subjects, arms.statistic(world))
    assert min(found.values()) > 0.999
    image_alone = arms.statistic(world)
    image_alone[:, preset.d_image :] = 0
    found = arms.block_r2(world, subjects, image_alone)
    assert found["u_image"] > 0.999
    assert found["u_ehr"] < 0.1
