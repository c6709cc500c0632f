from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.config import build, load_yaml, merge, override, resolved_yaml, to_plain
from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Loss:
    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Train:
    seed: int
    out: Path = Path("runs/x")
    steps: int | None = None
    debug: bool = False
    size_mm: tuple[float, float] = (1.0, 2.0)
    losses: tuple[Loss, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)


def test_a_config_is_built_with_nested_parts_and_written_back_the_same():
    values = {
        "seed": 1,
        "steps": None,
        "losses": [{"name": "l1"}, {"name": "reg", "weight": 2}],
        "optim": {"lr": "1e-4"},
    }
    built = build(Train, values)
    assert built.losses == (Loss(name="l1"), Loss(name="reg", weight=2.0))
    assert built.optim.lr == 1e-4
    assert isinstance(build(Train, {"seed": 1, "out": "a/b"}).out, Path)
    assert build(Train, yaml.safe_load(resolved_yaml(built))) == built


@pytest.mark.parametrize(
    ("values", "code", "says"),
    [
        ({"seed": 1, "stepz": 3}, "CONFIG_UNKNOWN_KEY", "nearest known key is 'steps'"),
        ({"seed": 1, "optim": {"ir": 1}}, "CONFIG_UNKNOWN_KEY", "nearest known key is 'optim.lr'"),
        ({}, "CONFIG_REQUIRED", "'seed' is not set"),
        ({"seed": "one"}, "CONFIG_TYPE", "want int"),
        ({"seed": True}, "CONFIG_TYPE", "want int"),
        ({"seed": 1, "debug": 1}, "CONFIG_TYPE", "want bool"),
        ({"seed": 1, "size_mm": [1.0]}, "CONFIG_TYPE", "has 1 entries, want 2"),
        ({"seed": 1, "size_mm": 1.0}, "CONFIG_TYPE", "want a list"),
        ({"seed": 1, "weights": {"a": "much"}}, "CONFIG_TYPE", "'weights.a'"),
        ({"seed": 1, "losses": [{"weight": 1.0}]}, "CONFIG_REQUIRED", "losses[0].name"),
        ({"seed": 1, "optim": {"kind": "lion"}}, "CONFIG_VALUE", "'adamw', 'sgd'"),
        ({"seed": 1, "optim": {"lr": -1.0}}, "CONFIG_VALUE", "must be above 0"),
        ({"seed": 1, "optim": 3}, "CONFIG_TYPE", "want key: value pairs"),
    ],
)
def test_a_bad_config_is_refused_with_what_to_do(values, code, says):
    with pytest.raises(Refusal) as refused:
        build(Train, values)
    assert refused.value.code == code
    assert says in str(refused.value)


plain = st.recursive(
    st.integers() | st.booleans(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from("abc"), plain), st.dictionaries(st.sampled_from("abc"), plain))
def test_merging_keeps_what_is_not_stated_and_changes_neither_side(base, over):
    copies = (repr(base), repr(over))
    merged = merge(base, over)
    assert (repr(base), repr(over)) == copies
    assert merge(merged, over) == merged
    assert merged.keys() == base.keys() | over.keys()
    assert all(merged[key] == base[key] for key in base.keys() - over.keys())


def test_a_mapping_of_another_kind_replaces_the_old_one_whole():
    base = {"ct": {"kind": "vit3d", "patch": 8, "latent": 96}}
    assert merge(base, {"ct": {"kind": "vit3d", "patch": 4}}) == {"ct": {"kind": "vit3d", "patch": 4, "latent": 96}}
    assert override(base, ["ct.kind=slices25d", "ct.stack=4"]) == {"ct": {"kind": "slices25d", "stack": 4}}
    assert merge({"ct": {"patch": 8}}, {"ct": {"kind": "vit3d"}}) == {"ct": {"patch": 8, "kind": "vit3d"}}


def test_arguments_override_nested_keys_and_are_read_as_yaml():
    values = override(
        {"optim": {"lr": 1.0, "kind": "sgd"}}, ["optim.lr=1e-4", "steps=null", "size_mm=[3, 4.0]", "out=a=b"]
    )
    assert values == {"optim": {"lr": "1e-4", "kind": "sgd"}, "steps": None, "size_mm": [3, 4.0], "out": "a=b"}


@pytest.mark.parametrize("argument", ["seed", "=1", "seed=[1"])
def test_an_argument_that_is_not_key_value_is_refused(argument):
    with pytest.raises(Refusal, match="CONFIG_ARGUMENT"):
        override({}, [argument])


def test_a_config_may_start_from_another_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\noptim: {lr: 0.1, kind: sgd}\n")
    (tmp_path / "small.yaml").write_text("base: base.yaml\noptim: {lr: 0.2}\n")
    assert load_yaml(tmp_path / "small.yaml") == {"seed": 1, "optim": {"lr": 0.2, "kind": "sgd"}}


@pytest.mark.parametrize(
    ("text", "code"), [(None, "CONFIG_MISSING"), ("a: [", "CONFIG_BROKEN"), ("- 1", "CONFIG_BROKEN")]
)
def test_a_config_file_that_cannot_be_read_is_refused(tmp_path, text, code):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(Refusal, match=code):
        load_yaml(tmp_path / "run.yaml")


def test_plain_values_hold_no_objects():
    assert to_plain(build(Train, {"seed": 1})) == {
        "seed": 1,
        "out": "runs/x",
        "steps": None,
        "debug": False,
        "size_mm": [1.0, 2.0],
        "losses": [],
        "weights": {},
        "optim": {"lr": 1e-3, "kind": "adamw"},
    }


def test_a_dotted_override_reaches_a_dotted_key():
    from mmjepa.engine.optim import OptimConfig

    values = override({"optim": {"lr": {"ehr.adapter": 1.0, "default": 2.0}}}, ["optim.lr.ehr.adapter=3e-4"])
    assert build(OptimConfig, values["optim"]).lr == {"default": 2.0, "ehr.adapter": 3e-4}
