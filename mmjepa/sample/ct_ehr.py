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

from mmjepa.batch import Batch, SequenceView, View, VolumeView
from mmjepa.cohort import Cohort
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import ranges_hu
from mmjepa.ehr.store import to_us
from mmjepa.ehr.tokens import JointTokens, TokensConfig
from mmjepa.keyed import generator
from mmjepa.masking import CellMaskConfig, Grid, PatchMaskConfig, check_patches, draw_cells
from mmjepa.pairing import PairingConfig, pair
from mmjepa.refusal import Refusal
from mmjepa.sample.cells import DAY_US, CellBuilder, Subject, Tokens, sequences
from mmjepa.sample.cells import KINDS as KINDS
from mmjepa.sample.images import Crops, order_images, report_choice

_NOBODY = np.empty(0, np.int64)  # of another type, ids above 2^53 would be rounded
Patch = int | tuple[int | None, int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class CtEhrViews:
    """crop: voxels of a CT crop; spacing_mm: their edges, to which volumes are resampled, None for the volume's own. A crop
    lies anywhere in the volume while training, another in every epoch; embedding takes the middle one. window: its name,
    or its lowest and highest HU (``mmjepa.ct.window``). prefer_kernel: reconstruction kernels, the best first, to choose by
    where a date has several images (``mmjepa.sample.images.order_images``); embedding takes the first, training any.
    dates: most dates a subject (the latest). history_days: how far the first EHR cell reaches back. max_events: newest
    events kept in a cell. pairing: which CT goes with which record, as of when (``mmjepa.pairing``)."""

    kind: Literal["ct_ehr"] = "ct_ehr"
    crop: tuple[int, int, int] = (32, 32, 32)
    spacing_mm: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    window: str | tuple[int, int] = "wide"
    prefer_kernel: tuple[str, ...] = ()
    dates: int = 4
    history_days: float = 5 * 365.25
    max_events: int = 128
    pairing: PairingConfig = field(default_factory=PairingConfig)
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
        paired, self.pairing = pair(self.volumes.index, self.events, **vars(config.pairing))
        known = self.events.splits
        wanted = None if splits is None or not known else np.concatenate([known.get(s, _NOBODY) for s in splits])
        self.encoded: dict[tuple[int, int], Tokens] = {}
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

    def __len__(self) -> int:
        return len(self.subjects)

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        """No sequence is reused, so there is nothing to keep."""
        return None

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The batch of (epoch, subject index) pairs."""
        builder, skipped = CellBuilder(self.crops, self.encoded, self.grid, self.config.patches), 0
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
                views.append(sequences([self.encoded[s.subject_id, t] for s, t in cells]))
            yield keys, views, ehr

    def _encode(self, subject_id: int, since_us: int, t_us: int) -> Tokens:
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
            times = to_us(scans.index)
            since = np.array([times[0] - round(self.config.history_days * DAY_US), *times[:-1]])
            present = np.ones((len(times), 2), dtype=bool)
            for date, (start, end) in enumerate(zip(since.tolist(), times.tolist(), strict=True)):
                cell, static = self._encode(subject_id, start, end), self._encode(subject_id, end, end)
                self.encoded[subject_id, date] = cell
                present[date, 1] = len(cell["codes"]) > len(static["codes"])
            yield Subject(subject_id, times, tuple(scans), present)
