"""Cells of the CT+EHR system: what a subject has at each date, and the layout of a batch of cells, some of them hidden."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmjepa.batch import Batch, Layout, SequenceView, View, VolumeView
from mmjepa.masking import CellMask, Grid, PatchMaskConfig, draw_events, draw_patches
from mmjepa.sample.images import Crops

KINDS = ("ct", "ehr", "ct_patch")
DAY_US = 86_400_000_000
Tokens = dict[str, np.ndarray]


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


def sequences(parts: Sequence[Tokens]) -> SequenceView:
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


class CellBuilder:
    """Collects the cells of a batch, then lays them out."""

    def __init__(
        self, crops: Crops, encoded: Mapping[tuple[int, int], Tokens], grid: Grid, patches: PatchMaskConfig
    ) -> None:
        """encoded: the tokens of each (subject id, date) of an EHR cell. grid: tokens along each axis of a crop. ``epoch`` is
        that of what is added next."""
        self.crops, self.encoded, self.grid, self.patches, self.epoch = crops, encoded, grid, patches, 0
        # (image, epoch) of each crop
        self.images: dict[str, list[tuple[str, int]]] = {"seen": [], "patched": [], "hidden": []}
        self.cells: dict[str, list[Tokens]] = {"seen": [], "hidden": []}
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
                    self.cells[group].append(self.encoded[subject.subject_id, int(date)])
                days = float(subject.times_us[date] - reference) / DAY_US
                self._add(row, int(modality), group, days)

    def add_events(self, row: int, subject: Subject, rng: np.random.Generator) -> bool:
        """Some events of one of the subject's EHR cells as context, the others as target; False if it has but one."""
        dates = np.flatnonzero(subject.present[:, 1])
        cell = self.encoded[subject.subject_id, int(dates[rng.integers(len(dates))])]
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
        grid, dates = self.grid, np.flatnonzero(subject.present[:, 0])
        date = int(dates[rng.integers(len(dates))])
        visible, hidden = draw_patches(grid, rng, self.patches)
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
            return sequences(self.cells[group]) if self.cells[group] else None
        if not self.images[group]:
            return None
        images, epochs = zip(*self.images[group], strict=True)
        voxels = self.crops.voxels(images, epochs)
        if what == "ct":
            return VolumeView("ct", voxels)
        everything = torch.arange(int(np.prod(self.grid))).expand(len(voxels), -1)
        keep = torch.from_numpy(np.stack(self.keep)) if what == "context" else everything
        return VolumeView("ct", voxels, keep, "tokens")
