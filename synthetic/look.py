"""A contact sheet of the world, so that a person sees whether a volume looks like a lung patch and a stay like a stay."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from mmjepa.files import atomic_path, fresh_folder
from synthetic import concepts, ct, events, icu, scanner, signs, source
from synthetic.plan import Plan, people, pictures, scan_second
from synthetic.presets import pick

FORMATS = ("png", "pdf", "svg")
PATCHES, TIMELINES, STAYS = 24, 8, 8
_CLEAR = 7  # a patch of the first seed that is neither small nor crowded
_FAMILIES = ("DIAGNOSIS", "MEDICATION", "PROCEDURE", "LAB", "REFERRAL", "PROTOCOL")
_COLOURS = {True: "#b2182b", False: "#2166ac"}  # malignant, benign
_LUNG_HU, _WIDE_HU = (-1150, 100), (-1100, 500)  # narrower than usual, so that emphysema shows; so that calcium does
_SIGNS = (*signs.NAMES[:5], *signs.NAMES[12:15])
_STATE_COLOURS = ("#1b9e77", "#d95f02", "#7570b3")


def contact_sheet(out: Path, plan: Plan) -> dict[str, Any]:
    """Draw patches, repeated scans, event timelines and ICU stays of the plan's first subjects to an image file.

    out: ``.png``, ``.pdf`` or ``.svg``. Raises Refusal: ``OUTPUT_EXISTS``, ``SYNTHETIC_UNKNOWN`` (another ending).
    """
    fresh_folder(out, "file")
    pick(dict.fromkeys(FORMATS), out.suffix[1:].lower(), "picture format")
    figure = Figure(figsize=(20, 36), dpi=72, layout="constrained")
    figure.suptitle(f"The synthetic world {plan.preset}, {plan.name} site, seed {plan.seed}", fontsize=16)
    parts = np.asarray(figure.subfigures(5, 1, height_ratios=[9, 6, 6, 8, 9]))
    patches, scans, knobs, records, stays = parts.tolist()
    subjects = plan.sample(0, PATCHES)
    persons = people(plan, 0, PATCHES, subjects)
    shown = pictures(plan, 0, persons, subjects)
    _draw_patches(patches, plan, shown[0].to_dict("records"), subjects.label)
    _draw_scans(scans, plan, shown, persons.to_dict("records"), subjects.label)
    _draw_knobs(knobs, plan, shown[0].iloc[_CLEAR].to_dict(), subjects.label[_CLEAR])
    _draw_timelines(records, plan, persons.to_dict("records"))
    _draw_stays(stays, plan.seed)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower())
    return {"out": str(out), "patches": PATCHES, "timelines": TIMELINES, "stays": STAYS}


def _show(axes: Axes, plane: np.ndarray, title: str, malignant: bool, window: tuple[float, float] = _LUNG_HU) -> None:
    """A slice with the patient's right on the right and the front or head up."""
    axes.imshow(plane.T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, color=_COLOURS[bool(malignant)])
    for side in axes.spines.values():
        side.set(color=_COLOURS[bool(malignant)], linewidth=2)


def _said(row: Mapping[Any, Any]) -> str:
    """What a patch should show."""
    parts = [f"{row['diameter_mm']:.0f} mm", f"spic {row['spiculation']:.1f}", f"GG {row['ground_glass']:.1f}"]
    scan = [f"emph {row['emphysema']:.1f}", f"{row['kernel']} {row['thickness_mm']:g} mm"]
    return ", ".join(parts) + "\n" + ", ".join([*scan, "contrast"] if row["contrast"] else scan)


def _draw_patches(part: SubFigure, plan: Plan, rows: list[dict[Any, Any]], label: np.ndarray) -> None:
    part.suptitle("CT patches: axial slice through the nodule, lung window; red = malignant, blue = benign")
    for i, axes in enumerate(part.subplots(3, PATCHES // 3).flat):
        volume = ct.render(rows[i], plan.seed, rows[i]["body"], size=plan.size)
        _show(axes, volume[:, :, plan.size // 2], _said(rows[i]), label[i])


def _draw_scans(part: SubFigure, plan: Plan, shown: list, persons: list[dict[Any, Any]], label: np.ndarray) -> None:
    part.suptitle("One patch in three planes; below it, the same nodules in repeated scans")
    grid = part.subplots(2, 8)
    row = shown[0].iloc[0].to_dict()
    for column, size in enumerate((32, 48)):
        volume = ct.render(row, plan.seed, row["body"], size=size)
        middle = size // 2
        planes = (volume[:, :, middle], volume[:, middle], volume[middle])
        for axes, plane, name in zip(grid[0, 4 * column :], planes, ("axial", "coronal", "sagittal"), strict=False):
            _show(axes, plane, f"{name}, {size} voxels", label[0])
        air = grid[0, 4 * column + 3]
        air.hist(volume.ravel(), bins=80, color="#555555", log=True)
        air.set_title("HU", fontsize=7)
        air.tick_params(labelsize=6)
    wanted = [int((label != kind).argmin()) for kind in (True, False)]  # the first of each kind, if there is one
    for start, i in zip((0, 4), wanted, strict=True):
        volumes = []
        for k, frame in enumerate(shown):
            row = frame.iloc[i].to_dict()
            volumes.append(ct.render(row, plan.seed, row["body"], k, size=plan.size)[:, :, plan.size // 2])
            said = f"day {persons[i][f'day_{k}']:.0f}: {row['diameter_mm']:.1f} mm"
            _show(grid[1, start + k], volumes[-1], said, label[i])
        for axes in grid[1, start + len(shown) : start + 4]:
            axes.imshow((volumes[-1] - volumes[0]).T, cmap="RdBu_r", vmin=-800, vmax=800, origin="lower")
            axes.set_title("last less first", fontsize=7)
            axes.axis("off")


def _draw_knobs(part: SubFigure, plan: Plan, row: dict[Any, Any], malignant: bool) -> None:
    part.suptitle(
        "One patch under other acquisitions; below, with signs of sparse concepts, in the slice that shows most of each"
    )
    grid = part.subplots(2, 8)

    def render(**changed: Any) -> np.ndarray:
        return ct.render(row | {"signs": (), "contrast": True} | changed, plan.seed, row["body"], size=plan.size)

    changes: list[dict[str, Any]] = [{"kernel": kernel} for kernel in scanner.KERNELS]
    changes += [{"thickness_mm": 5.0}, {"noise_factor": 3.0}, {"voxel_mm": 1.5}, {"gain": 1.1}, {"cup_hu": 100.0}]
    for axes, change in zip(grid[0], changes, strict=True):
        said = ", ".join(f"{name} {value}" for name, value in change.items())
        _show(axes, render(**change)[:, :, plan.size // 2], said, malignant)
    without = render()
    for axes, name in zip(grid[1], _SIGNS, strict=True):
        volume = render(signs=(name,))
        most = np.abs(volume.astype(float) - without).sum((0, 1)).argmax()
        _show(axes, volume[:, :, most], name.replace("_", " "), malignant, _WIDE_HU)


def _draw_timelines(part: SubFigure, plan: Plan, persons: list[dict[Any, Any]]) -> None:
    part.suptitle(
        "Records: the five years before the CT (dashed) and what follows; one tick an event, grey = in a visit"
    )
    subjects = plan.sample(0, PATCHES)
    facts = concepts.draw(subjects.t, plan.seed, 0)
    for i, axes in enumerate(part.subplots(TIMELINES // 2, 2, sharex=True).flat):
        rows = source.record(plan, persons[i], i, subjects, i, facts[i])
        codes = plan.vocabularies[persons[i]["site"]].codes
        names = np.array([codes[j] for j in rows.code])
        family = np.array([name.split("//")[0] for name in names])
        days = (rows.time / events.SECOND_US - scan_second(persons[i], 0)) / events.DAY
        years = np.where(rows.time == events.NO_TIME, np.nan, days / 365.25)
        for start, stop in zip(
            years[family == "HOSPITAL_ADMISSION"], years[family == "HOSPITAL_DISCHARGE"], strict=True
        ):
            axes.axvspan(start - 0.01, stop + 0.01, color="#dddddd", zorder=0)
        for level, kind in enumerate(_FAMILIES):
            hit = (family == kind) & (names != "DIAGNOSIS//LUNG_CANCER")
            axes.plot(years[hit], np.full(hit.sum(), level), "|", markersize=9, color="#333333")
        axes.plot(years[family == "CT"], np.full((family == "CT").sum(), 6), "s", markersize=5, color="k")
        cancer = names == "DIAGNOSIS//LUNG_CANCER"
        axes.plot(years[cancer], np.zeros(cancer.sum()), "X", markersize=9, color=_COLOURS[True])
        axes.axvline(0, linestyle="--", color="k", linewidth=0.8)
        axes.set_yticks(range(7), [*(f.lower() for f in _FAMILIES), "CT"], fontsize=7)
        axes.set_xlim(-5.1, 2.3)
        sex = "woman" if "GENDER//F" in names else "man" if "GENDER//M" in names else "no record"
        axes.set_title(f"{sex}, {len(names)} rows", fontsize=8, color=_COLOURS[bool(subjects.label[i])], loc="left")
    axes.set_xlabel("years from the CT")


def _draw_stays(part: SubFigure, seed: int) -> None:
    part.suptitle(
        "ICU stays: the three states (lines; thin = the same patient and noise, never treated), hours treated (grey), lab 1 (dots), "
        "onset of deterioration (dotted line), death (cross) or discharge (arrow)"
    )
    law = icu.Icu()
    many, never = (icu.simulate(law, seed, 0, 200, policy) for policy in ("observed", "never"))
    died, left = many.death_h != icu.NONE, many.discharge_h != icu.NONE
    kinds = (died & many.deteriorating, left, ~died & ~left & many.deteriorating, ~died & ~left & ~many.deteriorating)
    chosen = np.concatenate([np.flatnonzero(kind)[: STAYS // len(kinds)] for kind in kinds])
    for axes, i in zip(part.subplots(STAYS // 4, 4, sharex=True, sharey=True).flat, chosen, strict=True):
        end = int(many.end_h[i])
        hours = np.arange(min(end + 1, law.hours))
        for k, colour in enumerate(_STATE_COLOURS):
            axes.plot(hours, many.states[i, : len(hours), k], color=colour, linewidth=1.6)
            axes.plot(never.states[i, :, k], color=colour, linewidth=0.6)
        axes.plot(hours, many.labs[i, : len(hours), 0], "o", color="k", markersize=3)
        for hour in np.flatnonzero(many.treated[i, : len(hours)]):
            axes.axvspan(hour, hour + 1, color="#cccccc", alpha=0.6, linewidth=0)
        if np.isfinite(many.onset_h[i]) and many.onset_h[i] < law.hours:
            axes.axvline(many.onset_h[i], linestyle=":", color="k")
        for hour, marker, colour in ((many.death_h[i], "X", "k"), (many.discharge_h[i], ">", "#2166ac")):
            if hour != icu.NONE:
                axes.plot([hour], [0], marker, color=colour, markersize=12)
        axes.set_title("deteriorating" if many.deteriorating[i] else "stable", fontsize=8, loc="left")
    axes.set_xlabel("hours")
