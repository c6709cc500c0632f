"""Arms by knob, as specified; and the controls that would cry leak."""

import json
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import expit

from mmjepa.refusal import Refusal
from synthetic import arms, oracle, safeguards, shift
from synthetic.draws import by_row, normals, uniforms
from synthetic.presets import PRESETS, Site, find_preset, find_site
from synthetic.ranking import auc
from synthetic.world import MODALITIES, World

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")
SEEDS = 8
FIVE = ("image", "ehr", "fusion_weak", "fusion_tuned", "jepa")
# means of eight seeds, image / EHR / weak / tuned / JEPA; marked: re-measured over 32 seeds
ARMS = {
    "100 labels, internal": (0.707, 0.886, 0.801, 0.908, 0.894),  # JEPA
    "100 labels, external": (0.731, 0.679, 0.698, 0.783, 0.694),  # JEPA
    "200 labels, internal": (0.751, 0.895, 0.814, 0.921, 0.899),
    "200 labels, external": (0.756, 0.672, 0.672, 0.785, 0.686),
    "400 labels, internal": (0.765, 0.907, 0.868, 0.929, 0.906),
    "400 labels, external": (0.752, 0.674, 0.716, 0.788, 0.683),
}
KNOBS = {
    "internal": (0.751, 0.896, 0.812, 0.923, 0.899),
    "rho=0": (0.702, 0.717, 0.679, 0.775, 0.727),  # JEPA
    "rho=-0.4": (0.677, 0.592, 0.601, 0.663, 0.576),
    "code_shift=0.15": (0.751, 0.879, 0.777, 0.913, 0.882),
    "code_shift=0.5": (0.751, 0.839, 0.697, 0.881, 0.837),
    "ehr_missing=0.3": (0.751, 0.824, 0.765, 0.875, 0.857),
    "ehr_missing=1": (0.751, 0.500, 0.623, 0.710, 0.727),
    "noise_image=2": (0.679, 0.896, 0.772, 0.918, 0.854),
    "spec=1.4": (0.795, 0.885, 0.828, 0.932, 0.901),
    "bias_shift=-2": (0.766, 0.903, 0.822, 0.929, 0.905),
}
# image / tuned / JEPA
STRUCTURE = {
    "no shared biology, internal": (0.735, 0.928, 0.842),  # image
    "no shared biology, external": (0.776, 0.805, 0.570),
    "redundant, internal": (0.830, 0.918, 0.917),
    "redundant, external": (0.802, 0.768, 0.765),
    "pathway not in the image, internal": (0.721, 0.923, 0.884),
    "pathway not in the image, external": (0.770, 0.789, 0.807),
    "no pathway link, internal": (0.721, 0.828, 0.775),
    "no pathway link, external": (0.770, 0.837, 0.747),
    "irrelevant factors fill the code, internal": (0.729, 0.918, 0.558),
    "irrelevant factors fill the code, external": (0.729, 0.774, 0.533),
}
MISPAIRED = {
    "mispair=0.25, internal": 0.888,
    "mispair=0.25, external": 0.695,
    "mispair=0.75, internal": 0.731,
    "mispair=0.75, external": 0.620,  # 24 seeds
}
# JEPA / tuned / PCA
BASE = {
    "100 labels, internal": (0.873, 0.853, None),  # both
    "500 labels, internal": (0.891, 0.900, 0.817),
    "500 labels, external": (0.713, 0.751, 0.591),
    "large nuisance, internal": (0.890, None, 0.521),
    "redundant, internal": (0.908, 0.901, None),
    "redundant, external": (0.801, 0.763, None),
}


def gathered(preset, wanted):
    """{row: {name: values over seeds}} of the wanted rows of the suite."""
    rows = [row for row in shift.settings(preset) if row.row in wanted]
    assert {row.row for row in rows} == set(wanted)
    found = oracle.over_seeds(partial(shift.measure, rows, 4000), SEEDS, 1, preset)
    return {
        row.row: {name: np.array([seed[i][name] for seed in found]) for name in found[0][i]}
        for i, row in enumerate(rows)
    }


@pytest.fixture(scope="module")
def measured():
    return gathered("li2025", [*ARMS, *KNOBS, *STRUCTURE, *MISPAIRED])


@pytest.fixture(scope="module")
def base():
    return gathered("base", BASE)


def near(values, expected):
    """A mean of eight seeds: within the larger of .015 and 1.5 standard deviations."""
    return abs(values.mean() - expected) <= max(0.015, 1.5 * values.std(ddof=1))


def misses(measured, table, names):
    return {
        (row, name): (measured[row][name].mean().round(3), value)
        for row, values in table.items()
        for name, value in zip(names, values, strict=True)
        if value is not None and not near(measured[row][name], value)
    }


def test_arms_score_as_specified_at_every_number_of_labels(measured):
    assert misses(measured, ARMS, FIVE) == {}


def test_arms_respond_to_every_knob_as_specified(measured):
    assert misses(measured, KNOBS, FIVE) == {}


def test_arms_follow_the_structure_of_the_world_as_specified(measured):
    assert misses(measured, STRUCTURE, ("image", "fusion_tuned", "jepa")) == {}
    assert misses(measured, {row: (value,) for row, value in MISPAIRED.items()}, ["jepa"]) == {}


def test_the_base_world_scores_as_specified(base):
    assert misses(base, BASE, ("jepa", "fusion_tuned", "pca")) == {}
    few = base["100 labels, internal"]
    assert (few["jepa"] > few["fusion_tuned"]).sum() >= 7


@pytest.mark.parametrize(("labels", "outside"), [(200, 5), (400, 7)])
def test_the_published_ordering_appears_and_so_does_its_confound(measured, labels, outside):
    inner, outer = measured[f"{labels} labels, internal"], measured[f"{labels} labels, external"]
    assert ((inner["jepa"] > inner["fusion_weak"]) & (inner["fusion_weak"] > inner["image"])).sum() >= 7
    assert (inner["fusion_tuned"] > inner["jepa"]).sum() >= 7
    assert (outer["image"] > outer["jepa"]).sum() >= outside
    assert outer["image"].mean() > outer["jepa"].mean() + 0.02


def test_no_arm_passes_env_bayes_anywhere(measured, base):
    settings = [*measured.values(), *base.values()]
    assert len(settings) >= 20
    for found in settings:
        for arm in arms.ARMS:
            error = np.sqrt((found[f"excess_se_{arm}"] ** 2).sum()) / SEEDS
            assert found[f"excess_{arm}"].mean() <= 3 * error


def test_oracles_of_shifted_sites_are_as_specified(measured):
    expected = {"env_bayes": (0.774, 0.814, 0.877), "source_bayes": (0.738, 0.719, 0.806)}
    for name, values in expected.items():
        for view, value in zip(("image", "ehr", "both"), values, strict=True):
            found = measured["rho=0"][f"{name}_{view}"].mean()
            assert found == pytest.approx(value, abs=0.015 if view == "image" else 0.01), (name, view)
    expected = {
        "env_bayes": (0.797, 0.850, 0.902),
        "source_bayes": (0.695, 0.573, 0.697),
        "c_blind": (0.783, 0.816, 0.881),
    }
    for name, values in expected.items():
        for view, value in zip(("image", "ehr", "both"), values, strict=True):
            assert near(measured["rho=-0.4"][f"{name}_{view}"], value), (name, view)


def test_labels_that_were_shuffled_teach_nothing():
    found = [shift.shuffled("li2025", 4000, seed) for seed in range(4)]
    for arm in arms.ARMS:
        values = np.concatenate([seed[arm] for seed in found])
        assert abs(values.mean() - 0.5) < 3 * values.std(ddof=1) / np.sqrt(len(values))


def test_the_jepa_code_keeps_what_is_shared_and_drops_what_is_not():
    found = [shift.code("li2025", 4000, seed) for seed in range(SEEDS)]
    expected = {"s": 0.88, "u_image": 0.10, "u_ehr": 0, "b": 0.86, "n_image": 0.01, "n_ehr": 0, "c": 0.86}
    for block, value in expected.items():
        assert np.mean([seed["R^2"][block] for seed in found]) == pytest.approx(value, abs=0.03), block
    for i, value in enumerate((0.80, 0.77, 0.65, 0.58, 0.48)):  # the fifth over 24 seeds
        assert np.mean([seed["canonical r"][str(i + 1)] for seed in found]) == pytest.approx(value, abs=0.03), i


def test_mispairing_lowers_the_leading_canonical_correlation():
    found = []
    for share in (0.0, 0.25, 0.75):
        site = replace(INTERNAL, mispair=share)
        found.append(np.mean([arms.pretrain(World.named("li2025", seed), site).canonical[0] for seed in range(4)]))
    assert found[1:] == pytest.approx([0.60, 0.31], abs=0.04)  # .80 times the share of true pairs, and the noise floor
    assert found[0] > found[1] > found[2]


def test_decorrelated_auc_foretells_the_loss_and_weighted_heads_and_erasure_lessen_it():
    warned = [safeguards.warning("li2025", 4000, seed) for seed in range(SEEDS)]
    drop, warning = [], []
    for arm in arms.ARMS:
        mean = {name: np.mean([seed[arm][name] for seed in warned]) for name in warned[0][arm]}
        drop.append(mean["internal"] - mean["unlinked"])
        warning.append(mean["internal"] - mean["decorrelated_c"])
        assert mean["internal"] > mean["decorrelated_tag"] > mean["decorrelated_c"]
        assert mean["decorrelated_c"] == pytest.approx(mean["unlinked"], abs=0.05)
    assert np.corrcoef(drop, warning)[0, 1] > 0.95
    expected = {
        "fusion_tuned, plain": (0.929, 0.788),
        "fusion_tuned, weighted by c": (0.889, 0.840),
        "fusion_tuned, weighted by noisy tag": (0.920, 0.822),
        "fusion_tuned, erase tag given y": (0.907, 0.813),
        "fusion_tuned, erase c marginally": (0.722, 0.848),  # 24 seeds
        "jepa, plain": (0.906, 0.683),
        "jepa, weighted by c": (0.845, 0.763),
        "jepa, weighted by noisy tag": (0.892, 0.733),
        "jepa, erase tag given y": (0.814, 0.768),
        "jepa, erase c marginally": (0.679, 0.756),
    }
    found = [safeguards.mitigation("li2025", 4000, seed) for seed in range(SEEDS)]
    for head, values in expected.items():
        for site, value in zip(("internal", "external"), values, strict=True):
            assert near(np.array([seed[head][site] for seed in found]), value), (head, site)


@pytest.mark.parametrize(
    ("knob", "values", "name", "sign"),
    [
        ("rho", (0.8, 0.4, 0.0, -0.4), "source_bayes_both", -1),
        ("rho", (0.8, 0.4, 0.0, -0.4), "fusion_tuned", -1),
        ("rho", (0.8, 0.4, 0.0), "env_bayes_both", -1),
        ("code_shift", (0.0, 0.15, 0.5), "jepa", -1),
        ("ehr_missing", (0.0, 0.3, 0.6, 1.0), "env_bayes_both", -1),
        ("ehr_missing", (0.0, 0.3, 0.6, 1.0), "fusion_tuned", -1),
        ("noise_image", (0.5, 1.0, 2.0, 4.0), "env_bayes_image", -1),
        ("spec", (0.7, 1.0, 1.4, 2.0), "env_bayes_image", 1),
        ("label_flip", (0.0, 0.1, 0.3), "jepa", -1),
        ("follow_up_days", (365, 180, 90), "jepa", -1),
    ],
)
def test_the_response_to_a_knob_is_monotone(knob, values, name, sign):
    preset = find_preset("li2025")
    rows = [
        shift.Setting("", "", preset, INTERNAL, INTERNAL, replace(INTERNAL, **{knob: value}), 200) for value in values
    ]
    found = np.array([[row[name] for row in shift.measure(rows, 2000, seed)] for seed in (0, 1)]).mean(0)
    assert all(sign * (b - a) > 0 for a, b in pairwise(found))


def test_a_constant_offset_is_no_shift_for_linear_arms():
    rows = [
        shift.Setting("", "", find_preset("li2025"), INTERNAL, INTERNAL, site, 200)
        for site in (INTERNAL, replace(INTERNAL, c_mean=2.0), replace(INTERNAL, group_shift=2.0))
    ]
    plain, *offset = shift.measure(rows, 2000, 0)
    for row in offset:
        assert [row[arm] for arm in arms.ARMS] == pytest.approx([plain[arm] for arm in arms.ARMS], abs=1e-4)


# the parts of a subject that a turned knob changes; nothing else may move by a bit
READOUTS = {"theta_ehr", "t_ehr"}, {"theta_image", "t_image"}
BOTH = READOUTS[0] | READOUTS[1]
CHANGES = {
    "rho": (0.3, {"c", *BOTH}),
    "c_mean": (1.0, {"c", *BOTH}),
    "spec": (1.4, {"z", "eta", "y", "label", "c", *BOTH}),
    "bias_shift": (-2.0, {"eta", "y", "label", "c", *BOTH}),
    "w_u_ehr_factor": (-10.0, {"eta", "y", "label", "c", *BOTH}),
    "group_shift": (1.0, {"z", *BOTH}),
    "label_flip": (0.1, {"label"}),
    "follow_up_days": (180, {"label"}),
    "code_shift": (0.5, READOUTS[0]),
    "ehr_missing": (0.3, {"seen_ehr", *READOUTS[0]}),
    "noise_image": (2.0, READOUTS[1]),
    "gain": (1.1, set()),
    "hu_bias": (30.0, set()),
    "cup_hu": (30.0, set()),
    "kernel_mix": ((1.0, 0.0, 0.0), set()),
    "thick_mm": (5.0, set()),
    "voxel_mm": (0.7, set()),
    "vocabulary_split": (0.2, set()),
    "vocabulary_merge": (0.2, set()),
    "lab_unit": (0.5, set()),
    "coding_delay_days": (30, set()),
    "mispair": (0.5, set()),
    "unpaired": (0.5, set()),
}


def parts(subjects):
    flat = {}
    for field in fields(subjects):
        value = getattr(subjects, field.name)
        flat |= {f"{field.name}_{m}": v for m, v in value.items()} if isinstance(value, dict) else {field.name: value}
    return {name: value.tobytes() for name, value in flat.items()}


@pytest.mark.parametrize("knob", [field.name for field in fields(Site) if field.name not in ("name", "offset")])
def test_a_knob_changes_what_it_is_about_and_not_a_bit_else(knob):
    world, (value, expected) = World.named("li2025", 0), CHANGES[knob]
    before, after = (parts(world.sample(site, 0, 300)) for site in (INTERNAL, replace(INTERNAL, **{knob: value})))
    assert {name for name in before if before[name] != after[name]} == expected


def test_at_neutral_values_no_knob_takes_part_in_the_arithmetic():
    world, preset, n = World.named("li2025", 4), find_preset("li2025"), 200
    found = world.sample(INTERNAL, 0, n)
    z = np.concatenate([normals(4, f"latent/{name}", 0, n, k) for name, k in preset.blocks.items()], axis=1)
    eta = preset.bias + (z * world.w).sum(1)
    y = uniforms(4, "label", 0, n, 1)[:, 0] < expit(eta)
    c = normals(4, "latent/c", 0, n, 1) + 0.8 * (2.0 * y - 1)[:, None]
    assert (found.z.tobytes(), found.eta.tobytes(), found.c.tobytes()) == (z.tobytes(), eta.tobytes(), c.tobytes())
    assert (found.label == y).all()
    for m in MODALITIES:
        theta = by_row(world.A[m], z) + by_row(world.B[m], c) + normals(4, f"noise/{m}", 0, n, len(world.A[m]))
        assert found.theta[m].tobytes() == theta.tobytes()


@pytest.fixture(scope="module")
def small():
    return shift.run("li2025", seeds=2, patients=400)


def test_the_suite_is_plain_json_with_intervals_and_every_table(small):
    assert json.loads(json.dumps(small, allow_nan=False)) == small
    assert [len(small["tables"][name]) for name in ("arms", "training", "structure")] == [6, 12, 10]
    assert set(shift.KNOBS) == {row["row"].split("=")[0] for row in small["tables"]["knobs"]} - {"internal"}
    for rows in small["tables"].values():
        for row in rows:
            assert set(row["arms"]) == set(arms.ARMS)
            assert {
                f"{name}_{view}" for name in ("env_bayes", "source_bayes", "c_blind") for view in oracle.VIEWS
            } < set(row["oracles"])
            for found in (*row["arms"].values(), *row["oracles"].values()):
                assert found["low"] <= found["mean"] <= found["high"]
                assert len(found["values"]) == 2
            assert all(0 <= count <= 2 for count in row["orderings"].values())


def test_no_number_depends_on_workers():
    job = partial(shift.measure, shift.settings("li2025")[:3], 300)
    assert oracle.over_seeds(job, 2, 1, "one") == oracle.over_seeds(job, 2, 2, "two")


def test_the_text_has_a_line_for_every_setting_and_names_leaks(small):
    text = shift.lines(small)
    for rows in small["tables"].values():
        for row in rows:
            assert sum(line.startswith(f"{row['row']} ") for line in text) >= 1
    leaking = json.loads(json.dumps(small))
    leaking["tables"]["arms"][0]["above_env_bayes"] = ["jepa"]
    assert sum("above env-Bayes: jepa" in line for line in shift.lines(leaking)) == 1


def test_an_arm_that_knows_the_label_is_flagged():
    world = World.named("li2025", 0)
    rows = [shift.Setting("leak", "row", world.preset, INTERNAL, INTERNAL, INTERNAL, 100)]
    honest = shift.measure(rows, 1000, 0)
    assert shift._aggregate(rows[0], honest)["above_env_bayes"] == []
    subjects = world.sample(INTERNAL, arms.TEST, 1000)
    peeking = oracle.env_bayes(world, INTERNAL, subjects, "both") + 1.0 * subjects.y
    excess, error = shift.paired_difference(subjects.y, peeking, oracle.env_bayes(world, INTERNAL, subjects, "both"))
    leak = honest[0] | {"jepa": auc(subjects.y, peeking), "excess_jepa": excess, "excess_se_jepa": error}
    assert shift._aggregate(rows[0], [leak])["above_env_bayes"] == ["jepa"]


def test_every_preset_has_a_suite_and_nonsense_is_refused():
    for preset in PRESETS:
        assert {row.table for row in shift.settings(preset)} == {"arms", "knobs", "training", "structure"}
    with pytest.raises(Refusal, match="li2025"):
        shift.run("li2026", seeds=1)
    with pytest.raises(Refusal, match="outside"):
        shift.run("li2025", seeds=0)
