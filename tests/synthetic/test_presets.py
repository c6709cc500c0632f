"""Presets, sites and how knobs are turned."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.refusal import Refusal
from synthetic import oracle
from synthetic.presets import _RANGES, Site, find_preset, find_site, find_sites, turned
from synthetic.world import World

INTERNAL = find_site("li2025", "internal")


@given(st.sampled_from(sorted(_RANGES)), st.floats(0, 1))
def test_a_knob_takes_any_value_of_its_range_and_leaves_the_others(name, share):
    low, high = _RANGES[name]
    value = low + share * (high - low)
    value = round(value) if isinstance(getattr(INTERNAL, name), int) else value
    site = turned(INTERNAL, [f"{name}={value}"])
    assert getattr(site, name) == value
    assert replace(site, **{name: getattr(INTERNAL, name)}) == INTERNAL


@pytest.mark.parametrize(
    "knob",
    [
        "spec",
        "spec=",
        "spec=wide",
        "spec=1,2",
        "spec=nan",
        "spec=inf",
        "follow_up_days=90.5",
        "gain=9",
        "mispair=1.1",
        "mispair=-0.1",
        "label_flip=0.6",
        "kernel_mix=.5,.5",
        "kernel_mix=.9,.9,.9",
        "kernel_mix=nan,.5,.5",
    ],
)
def test_no_other_value_is_taken(knob):
    with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
        turned(INTERNAL, [knob])


def test_an_unknown_knob_is_refused_with_the_nearest():
    with pytest.raises(Refusal, match="Did you mean spec"):
        turned(INTERNAL, ["sepc=1"])
    with pytest.raises(Refusal, match="SYNTHETIC_UNKNOWN"):
        turned(INTERNAL, ["name=1"])


def test_every_number_of_a_site_but_its_ids_is_a_knob_with_a_range_or_the_kernel_mix():
    assert {f.name for f in fields(Site)} - {"name", "offset", "kernel_mix"} == set(_RANGES)


def test_where_groups_matter_risk_differs_by_sex_and_the_oracle_knows():
    world, law = World.named("groups", 0), find_site("groups", "internal")
    people = world.sample(law, 0, 8000)
    women = people.z[:, world.group] > 0
    assert people.y[women].mean() > people.y[~women].mean() + 0.1
    plain = World.named("li2025", 0).sample(INTERNAL, 0, 8000)
    assert abs(plain.y[women].mean() - plain.y[~women].mean()) < 0.05
    assert oracle.auc(people.y, oracle.env_bayes(world, law, people, "both")) > 0.93
    outside = world.sample(find_site("groups", "external"), 0, 8000)
    assert (outside.z[:, world.group] > 0).mean() > 0.8


def test_knobs_reach_every_site_or_the_one_named():
    inside, east = find_sites("li2025", ["internal", "east"], ["spec=1.2", "east.rho=0"])
    assert inside == replace(INTERNAL, spec=1.2)
    assert east == replace(INTERNAL, name="east", offset=east.offset, spec=1.2, rho=0.0)
    assert len({inside.offset, east.offset, find_site("li2025", "external").offset}) == 3


def test_a_misspelt_site_is_refused():
    with pytest.raises(Refusal, match="internal, external"):
        find_sites("li2025", ["externel"], ["spec=1.2"])
    with pytest.raises(Refusal, match="no site asked for"):
        find_sites("li2025", ["internal"], ["east.rho=0"])
    with pytest.raises(Refusal, match="Did you mean base"):
        find_preset("bsae")
