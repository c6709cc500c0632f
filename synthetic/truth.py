"""The truth of a range of subjects, for the files that nobody may train on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from synthetic import concepts, events, growth, oracle, risk_scores
from synthetic.draws import Array
from synthetic.plan import Plan, pictures
from synthetic.presets import Site
from synthetic.world import Subjects

_MARKED = 0.5  # share of spiculation, or of the most emphysema, that a reader notes
_MOST_EMPHYSEMA = 0.5
_PART_SOLID, _NON_SOLID = 0.3, 0.7  # shares of ground glass from which a nodule is called so


def scores(plan: Plan, persons: pd.DataFrame, subjects: Subjects, shown: list[pd.DataFrame]) -> dict[str, Array]:
    """Log-odds of the label as recorded, at its scan, [n] each: exact oracles, each under the subject's own site, and the
    reference scores ``mayo`` and ``brock`` from what a reader would note.

    shown: ``synthetic.plan.pictures``. A mispaired image's oracle is that of the right one.
    """
    world, which, rows = plan.world, persons["site"].to_numpy(), np.arange(len(persons))

    def at_site(score: Callable[[Site], Array]) -> Array:
        return np.stack([score(site) for site in plan.sites])[which, rows]

    parts = {site: oracle.scores(world, site, subjects) for site in plan.sites}
    found = {name: at_site(lambda site, name=name: parts[site][name]) for name in parts[plan.sites[0]]}
    by_then = range(plan.labelled_scan + 1)
    if len(by_then) > 1:
        own = pictures(plan, int(subjects.index[0]), persons.assign(mispaired=False), subjects)
        log_mm = np.log(np.stack([own[k]["diameter_mm"] for k in by_then], axis=1))
        grown = growth.growth_log_odds(log_mm, persons[[f"day_{k}" for k in by_then]].to_numpy())
        found = {name: score + grown if name.endswith(("image", "both")) else score for name, score in found.items()}
    found = {name: at_site(lambda site, score=score: oracle.recorded(site, score)) for name, score in found.items()}
    return found | _reference(plan, subjects, shown[plan.labelled_scan])


def _reference(plan: Plan, subjects: Subjects, image: pd.DataFrame) -> dict[str, Array]:
    """Clinical scores; where there is no record, of a man of 62 who has smoked and had no cancer."""
    chart = events.background(subjects.t["ehr"], plan.world.loaded("ehr"))
    glass, none = image["ground_glass"].to_numpy(), np.zeros(len(image), bool)
    both = {
        "age_years": chart["age_years"],
        "diameter_mm": image["diameter_mm"].to_numpy(),
        "spiculated": image["spiculation"].to_numpy() > _MARKED,
        "upper_lobe": image["upper_lobe"].to_numpy(bool),
    }
    return {
        "mayo": risk_scores.mayo(**both, smoker=chart["smoker"], cancer=chart["cancer"]),
        "brock": risk_scores.brock(
            **both,
            nodules=np.ones(len(image)),
            female=chart["female"],
            family_history=none,
            emphysema=image["emphysema"].to_numpy() > _MARKED * _MOST_EMPHYSEMA,
            part_solid=(glass > _PART_SOLID) & (glass <= _NON_SOLID),
            non_solid=glass > _NON_SOLID,
        ),
    }


def latents(
    plan: Plan, first: int, persons: pd.DataFrame, subjects: Subjects, shown: list[pd.DataFrame]
) -> dict[str, Any]:
    """Latents, readouts, concepts and image parameters, one column each; subjects first .. first + n - 1."""
    world = plan.world
    found: dict[str, Any] = {"subject_id": persons["subject_id"].to_numpy(), "y": subjects.y, "eta": subjects.eta}
    for block, part in world.block.items():
        found |= {f"{block}{j + 1}": column for j, column in enumerate(subjects.z[:, part].T)}
    found |= {f"c{j + 1}": column for j, column in enumerate(subjects.c.T)}
    for modality, t in subjects.t.items():
        found |= {f"t_{modality}_{name}": t[:, j] for j, name in enumerate(world.loaded(modality))}
    found |= {f"k{j + 1}": column for j, column in enumerate(concepts.draw(subjects.t, plan.seed, first).T)}
    found |= {name: persons[name].to_numpy() for name in ("mispaired", "unpaired")} | {"seen_ehr": subjects.seen_ehr}
    found |= {f"ct_{name}": _column(shown[0][name]) for name in shown[0] if name not in ("body", "signs")}
    return found | {f"ct_diameter_mm_{k}": shown[k]["diameter_mm"].to_numpy() for k in range(1, plan.scans)}


def _column(values: pd.Series) -> Any:
    return values.to_numpy() if values.dtype.kind in "biuf" else pa.array(values.tolist(), pa.string())
