"""Batches of the CT+EHR system: subjects as sets of cells (a modality at a date), some of them hidden.

Our reconstruction of arXiv 2509.15470. An absent cell is removed, never filled with zeros. A CT cell is a crop; an EHR
cell holds the events between the previous date and its own. Times are days from the latest date in the context, so that
they never tell that follow-up took place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mmjepa.batch import Batch, Layout, SequenceView, View, VolumeView
from mmjepa.cohort import Cohort
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import ranges_hu
from mmjepa.ehr.tokens import JointTokens, TokensConfig
from mmjepa.keyed import generator
from mmjepa.masking import (
    CellMask,
    CellMaskConfig,
    Grid,
    PatchMaskConfig,
    check_patches,
    draw_cells,
    draw_events,
    draw_patches,
)
from mmjepa.pairing import pair
from mmjepa.refusal import Refusal
from mmjepa.sample.images import Crops, order_images, report_choice

KINDS = ("ct", "ehr", "ct_patch")
DAY_US = 86_400_000_000
Patch = int | tuple[int | None, int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class CtEhrViews:
    """crop: voxels of a CT crop; spacing_mm: their edges, to which volumes are resampled, None for the volume's own. A crop
    lies anywhere in the volume while training, another in every epoch; embedding takes the middle one. window: its name,
    or its lowest and highest HU (``mmjepa.ct.window``). prefer_kernel: reconstruction kernels, the best first, to choose by
    where a date has several images (``mmjepa.sample.images.order_images``); embedding takes the first, training any.
    dates: most dates a subject (the latest). history_days: how far the first EHR cell reaches back. max_events: newest
    events kept in a cell."""

    kind: Literal["ct_ehr"] = "ct_ehr"
    crop: tuple[int, int, int] = (32, 32, 32)
    spacing_mm: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    window: str | tuple[int, int] = "wide"
    prefer_kernel: tuple[str, ...] = ()
    dates: int = 4
    history_days: float = 5 * 365.25
    max_events: int = 128
    tokens: TokensConfig = field(default_factory=TokensConfig)
    mask: CellMaskConfig = field(default_factory=CellMaskConfig)
    patches: PatchMaskConfig = field(default_factory=PatchMaskConfig)

    def __post_init__(self) -> None:
        if self.dates < 1 or self.max_events < 1 or min(self.crop) < 1:
            raise ValueError(f"crop={self.crop}, dates={self.dates} and max_events={self.max_events} must be positive")
        if self.spacing_mm is not None and not all(0 < size < float("inf") for size in self.spacing_mm):
            raise ValueError(f"spacing_mm={self.spacing_mm} must be three positive numbers")
        try:
            ranges_hu(self.window)
        except Refusal as refusal:
            raise ValueError(f"window: {refusal.message}; {refusal.hint}") from None


def token_grid(crop: Grid, patch: Patch) -> Grid:
    """Tokens along each axis of a crop. patch: voxels of a token along x, y, z (None: the whole crop), one number for a
    cube. Raises Refusal CONFIG_VALUE if tokens do not fill the crop."""
    sizes = (patch,) * 3 if isinstance(patch, int) else patch
    x, y, z = (edge if size is None else size for edge, size in zip(crop, sizes, strict=True))
    if crop[0] % x or crop[1] % y or crop[2] % z:
        raise Refusal(
            "CONFIG_VALUE",
            f"views.crop={crop} is not a multiple of the volume encoder's token, {x} x {y} x {z} voxels",
            "Change views.crop, or model.ct.patch (of a vit3d) or model.ct.stack (of slices25d)",
        )
    return crop[0] // x, crop[1] // y, crop[2] // z


@dataclass(frozen=True)
class Subject:
    """One item. times_us: int64 [T] ascending; scans: at each date the image_ids of that moment (several where a scan was
    reconstructed several times), in the order of ``order_images``; present: bool [T, 2], which of the date's CT and EHR cells exist."""

    subject_id: int
    times_us: np.ndarray
    scans: tuple[tuple[str, ...], ...]
    present: np.ndarray

    @property
    def images(self) -> tuple[str, ...]:
        """The first image of each date: the one that is embedded."""
        return tuple(images[0] for images in self.scans)

    def draw_image(self, date: int, rng: np.random.Generator) -> str:
        """One of a date's images."""
        images = self.scans[date]
        return images[int(rng.integers(len(images)))] if len(images) > 1 else images[0]


class CtEhrSampler:
    """Items are the subjects of some splits who have at least one paired CT."""

    def __init__(
        self,
        cohort: Cohort,
        config: CtEhrViews,
        tokens: JointTokens,
        *,
        patch: Patch,
        seed: int,
        splits: Sequence[str] | None = ("train",),
    ) -> None:
        """patch: voxels of the volume encoder's token (``token_grid``). splits: None takes every subject."""
        self.config, self.tokens, self.seed = config, tokens, seed
        self.grid = token_grid(config.crop, patch)
        try:
            check_patches(self.grid, config.patches)
        except ValueError as error:
            raise Refusal("CONFIG_VALUE", f"views.patches: {error}") from None
        if not cohort.has_images:
            raise Refusal(
                "COHORT_NO_IMAGES",
                f"{cohort.path} holds records but no CT",
                "Ingest images into it, or name a run that needs none",
            )
        if not cohort.images_paired:
            raise Refusal(
                "COHORT_UNPAIRED",
                f"the images of {cohort.path} were ingested without a crosswalk, so nobody knows whose they are",
                "Ingest again with --crosswalk",
            )
        self.events, self.volumes = cohort.events(), VolumeStore(cohort.path)
        paired, self.pairing = pair(self.volumes.index, self.events)
        known = self.events.splits
        wanted = None if splits is None or not known else np.concatenate([known.get(s, []) for s in splits])
        self.encoded: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.subjects = list(self._subjects(paired, wanted))
        self.fingerprint = cohort.fingerprint
        self.vocabulary = tokens.size
        self.report: dict[str, Any] = {**self.pairing, "subjects": len(self.subjects)}
        if not self.subjects:
            why = ", ".join(f"{n} images {name}" for name, n in self.pairing["unmatched"].items() if n)
            raise Refusal(
                "COHORT_UNPAIRED",
                f"no subject of {cohort.path} has a CT paired with a record ({why})",
                "no_time: CT_NO_TIME in ct/manifest.csv; give the scan a time, in images.csv or by a MEDS row with its image_id. "
                "no_event_in_window: records need rows besides the scans. A crosswalk joins people",
            )
        scans = [images for subject in self.subjects for images in subject.scans]
        self.crops = Crops(
            self.volumes,
            [image for images in scans for image in images],
            size=config.crop,
            spacing_mm=config.spacing_mm,
            window=config.window,
            seed=seed,
        )
        self.report |= self.crops.report | report_choice(scans, self.volumes.index)

    @classmethod
    def fit_tokens(cls, cohort: Cohort, config: CtEhrViews) -> JointTokens:
        """Token vocabulary and value statistics, from the training subjects alone."""
        events = cohort.events()
        return JointTokens.fit(events, events.splits.get("train", events.subjects), config.tokens)

    def __len__(self) -> int:
        return len(self.subjects)

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        """No sequence is reused, so there is nothing to keep."""
        return None

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The batch of (epoch, subject index) pairs."""
        builder = _Builder(self)
        skipped = 0
        for row, (epoch, index) in enumerate(items):
            subject, builder.epoch = self.subjects[index], epoch
            rng = generator(self.seed, "mask", epoch, subject.subject_id)
            mask = draw_cells(subject.present, rng, self.config.mask)
            if mask is None:
                skipped += 1
            elif mask.mode == "patches":
                builder.add_patches(row, subject, rng)
            elif mask.mode == "events":
                skipped += not builder.add_events(row, subject, rng)
            else:
                builder.add_cells(row, subject, mask, rng)
        ids = torch.tensor([self.subjects[index].subject_id for _, index in items])
        return builder.finish(len(items), ids, skipped)

    @property
    def embedding_chunks(self) -> int:
        """How many chunks ``embedding_batches`` yields."""
        return -(-sum(int(s.present[:, 0].sum()) for s in self.subjects) // 64)

    def embedding_batches(self, size: int = 64) -> Iterator[tuple[pd.DataFrame, list[View], np.ndarray]]:
        """Every date with a CT, in chunks: keys (subject_id, prediction_time, image_id), views with one row a date and
        modality (CT, then EHR), and which EHR cells exist, bool [rows]."""
        rows = [(s, int(t)) for s in self.subjects for t in np.flatnonzero(s.present[:, 0])]
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            keys = pd.DataFrame(
                {
                    "subject_id": [s.subject_id for s, _ in chunk],
                    "prediction_time": pd.to_datetime([s.times_us[t] for s, t in chunk], unit="us").as_unit("us"),
                    "image_id": [s.images[t] for s, t in chunk],
                }
            )
            ehr = np.array([s.present[t, 1] for s, t in chunk])
            views: list[View] = [VolumeView("ct", self.crops.voxels([s.images[t] for s, t in chunk]))]
            if ehr.any():
                cells = [(s, t) for (s, t), there in zip(chunk, ehr, strict=True) if there]
                views.append(self.sequences([self.encoded[s.subject_id, t] for s, t in cells]))
            yield keys, views, ehr

    def sequences(self, parts: Sequence[dict[str, np.ndarray]]) -> SequenceView:
        """A view of some EHR cells, given as their event tokens."""
        lengths = [len(part["codes"]) for part in parts]
        joined = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return SequenceView(
            "ehr",
            tokens=joined["codes"],
            offsets=torch.tensor([0, *np.cumsum(lengths)]),
            values=joined["values"],
            has_value=joined["has_value"],
            days=joined["days"],
        )

    def _encode(self, subject_id: int, since_us: int, t_us: int) -> dict[str, np.ndarray]:
        """The tokens of the events that became available in (since, t]."""
        _, stops = self.events.as_of(np.array([subject_id] * 2), np.array([since_us, t_us]))
        return self.tokens.encode(self.events, subject_id, int(stops[0]), int(stops[1]), t_us, self.config.max_events)

    def _subjects(self, paired: pd.DataFrame, wanted: np.ndarray | None) -> Iterator[Subject]:
        known = set(np.asarray(self.events.subjects).tolist())
        chosen = known if wanted is None else known & {int(subject) for subject in wanted}
        ordered = order_images(paired, self.volumes.index, self.config.prefer_kernel)
        of_subject = dict(iter(ordered.groupby("subject_id")))
        for subject_id in sorted(chosen & of_subject.keys()):
            rows = of_subject[subject_id]
            scans = rows.groupby("prediction_time")["image_id"].agg(tuple).tail(self.config.dates)
            times = scans.index.to_numpy().astype("datetime64[us]").astype(np.int64)
            since = np.array([times[0] - round(self.config.history_days * DAY_US), *times[:-1]])
            present = np.ones((len(times), 2), dtype=bool)
            for date, (start, end) in enumerate(zip(since.tolist(), times.tolist(), strict=True)):
                cell, static = self._encode(subject_id, start, end), self._encode(subject_id, end, end)
                self.encoded[subject_id, date] = cell
                present[date, 1] = len(cell["codes"]) > len(static["codes"])
            yield Subject(subject_id, times, tuple(scans), present)


class _Builder:
    """Collects the cells of a batch, then lays them out."""

    def __init__(self, sampler: CtEhrSampler) -> None:
        self.sampler, self.epoch = sampler, 0
        # (image, epoch) of each crop
        self.images: dict[str, list[tuple[str, int]]] = {"seen": [], "patched": [], "hidden": []}
        self.cells: dict[str, list[dict[str, np.ndarray]]] = {"seen": [], "hidden": []}
        self.keep: list[np.ndarray] = []
        # (batch row, kind, is target, table and row in it, days, place)
        self.slots: list[tuple[int, int, bool, str, int, float, np.ndarray]] = []

    def add_cells(self, row: int, subject: Subject, mask: CellMask, rng: np.random.Generator) -> None:
        """Context and target cells of one subject."""
        reference = subject.times_us[np.flatnonzero(mask.context.any(axis=1))[-1]]
        for target, chosen in ((False, mask.context), (True, mask.target)):
            group = "hidden" if target else "seen"
            for date, modality in np.argwhere(chosen):
                if modality == 0:
                    self.images[group].append((subject.draw_image(int(date), rng), self.epoch))
                else:
                    self.cells[group].append(self.sampler.encoded[subject.subject_id, int(date)])
                days = float(subject.times_us[date] - reference) / DAY_US
                self._add(row, int(modality), group, days)

    def add_events(self, row: int, subject: Subject, rng: np.random.Generator) -> bool:
        """Some events of one of the subject's EHR cells as context, the others as target; False if it has but one."""
        dates = np.flatnonzero(subject.present[:, 1])
        cell = self.sampler.encoded[subject.subject_id, int(dates[rng.integers(len(dates))])]
        if len(cell["codes"]) < 2:
            return False
        shown = draw_events(len(cell["codes"]), rng)
        for group, part in (("seen", shown), ("hidden", ~shown)):
            self.cells[group].append({name: column[part] for name, column in cell.items()})
            self._add(row, 1, group, 0.0)
        return True

    def _add(self, row: int, modality: int, group: str, days: float) -> None:
        """A slot for the cell that was last put into a group."""
        table = self.images[group] if modality == 0 else self.cells[group]
        name = f"{group}.{KINDS[modality]}"
        self.slots.append((row, modality, group == "hidden", name, len(table) - 1, days, np.zeros(3)))

    def add_patches(self, row: int, subject: Subject, rng: np.random.Generator) -> None:
        """Visible and hidden places of one of the subject's CTs."""
        grid, dates = self.sampler.grid, np.flatnonzero(subject.present[:, 0])
        date = int(dates[rng.integers(len(dates))])
        visible, hidden = draw_patches(grid, rng, self.sampler.config.patches)
        first = len(self.images["patched"])
        self.images["patched"].append((subject.draw_image(date, rng), self.epoch))
        self.keep.append(visible)
        places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1) / np.maximum(1, np.array(grid) - 1)
        for target, name, chosen, rows in (
            (False, "patched.context", visible, first * len(visible) + np.arange(len(visible))),
            (True, "patched.target", hidden, first * len(places) + hidden),
        ):
            for place, index in zip(chosen, rows, strict=True):
                self.slots.append((row, 2, target, name, int(index), 0.0, places[place]))

    def finish(self, size: int, subjects: Tensor, skipped: int) -> Batch:
        """The batch."""
        views, context = self._views(("seen.ct", "patched.context", "seen.ehr"))
        targets, wanted = self._views(("hidden.ct", "patched.target", "hidden.ehr"))
        per_row = np.bincount([slot[0] for slot in self.slots], minlength=size)
        layout = Layout.empty(size, int(per_row.max(initial=1)))
        filled = np.zeros(size, dtype=int)
        for row, kind, target, table, index, days, place in self.slots:
            at = row, filled[row]
            filled[row] += 1
            layout.kind[at], layout.time[at], layout.place[at] = kind, days, torch.from_numpy(place).float()
            if target:
                layout.target[at] = wanted[table] + index
            else:
                layout.source[at] = context[table] + index
        return Batch(views, targets, layout, subjects, notes={"skipped": skipped})

    def _views(self, names: Sequence[str]) -> tuple[list[View], dict[str, int]]:
        """The views of some tables in order, and the first row of each in the latent table."""
        views: list[View] = []
        first: dict[str, int] = {}
        rows = 0
        for name in names:
            view = self._view(*name.split("."))
            if view is not None:
                views.append(view)
                first[name] = rows
                rows += view.rows
        return views, first

    def _view(self, group: str, what: str) -> View | None:
        if what == "ehr":
            return self.sampler.sequences(self.cells[group]) if self.cells[group] else None
        if not self.images[group]:
            return None
        images, epochs = zip(*self.images[group], strict=True)
        voxels = self.sampler.crops.voxels(images, epochs)
        if what == "ct":
            return VolumeView("ct", voxels)
        everything = torch.arange(int(np.prod(self.sampler.grid))).expand(len(voxels), -1)
        keep = torch.from_numpy(np.stack(self.keep)) if what == "context" else everything
        return VolumeView("ct", voxels, keep, "tokens")
