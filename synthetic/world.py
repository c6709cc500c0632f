"""The world: latents, label, measurement layer and sufficient readout of one preset, seed and site."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import expit

from synthetic.draws import Array, by_row, generator, normals, uniforms
from synthetic.presets import FOLLOW_UP_DAYS, Preset, Site, find_preset, find_site

MODALITIES = ("image", "ehr")
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True)
class Law:
    """A site's law. z ~ N(mean, diag(variance)), [p] each; log-odds of the outcome bias + w . z; tau {modality: sd of the noise}."""

    mean: Array
    variance: Array
    w: Array
    bias: float
    tau: dict[str, float]


@dataclass(frozen=True)
class Subjects:
    """n sampled subjects, row i being subject ``index[i]``.

    z [n, p], c [n, k_c], eta [n] log-odds of the outcome given z, y [n] bool the outcome, diagnosis_days [n] from the index CT
    to the diagnosis (of those with the outcome), label [n] bool the outcome as the site records it, theta {modality: [n, d]}
    measurements, t {modality: [n, q]} readouts. Everything rendered depends on t alone. seen_ehr [n] bool: whether there is a
    record; where there is none, theta and t of the EHR are 0.
    """

    index: Array
    z: Array
    c: Array
    eta: Array
    y: Array
    diagnosis_days: Array
    label: Array
    theta: dict[str, Array]
    t: dict[str, Array]
    seen_ehr: Array

    def theta_of(self, modalities: tuple[str, ...]) -> Array:
        """The chosen measurements side by side, [n, sum d]."""
        return np.concatenate([self.theta[m] for m in modalities], axis=1)


class World:
    """Constants of one (preset, seed), drawn once, and the law of its subjects."""

    def __init__(self, preset: Preset, internal: Site, seed: int) -> None:
        self.preset, self.internal, self.seed = preset, internal, seed
        self.block: dict[str, slice] = {}
        start = 0
        for name, width in preset.blocks.items():
            self.block[name] = slice(start, start + width)
            start += width
        self.p = start
        self.w = np.zeros(start)
        for name, weight in (("s", preset.w_s), ("u_image", preset.w_u_image), ("u_ehr", preset.w_u_ehr)):
            self.w[self.block[name]] = weight
        self.w[self.block["b"]] = preset.w_b
        self.A = {m: self._loadings(m) for m in MODALITIES}
        self.B = {m: self._columns(m, "c", preset.k_c, getattr(preset, f"a_c_{m}")) for m in MODALITIES}

    @classmethod
    def named(cls, preset: str, seed: int) -> "World":
        """The world of a preset's name."""
        return cls(find_preset(preset), find_site(preset, "internal"), seed)

    def _columns(self, modality: str, block: str, width: int, amplitude: float) -> Array:
        d = getattr(self.preset, f"d_{modality}")
        draw = generator(self.seed, f"world/{modality}/{block}").standard_normal((d, width))
        return 4 * amplitude * draw / np.sqrt(d)

    def _loadings(self, modality: str) -> Array:
        """A of one modality, [d, p]; zero where a block does not load."""
        amplitudes = {
            "s": getattr(self.preset, f"a_s_{modality}"),
            f"u_{modality}": getattr(self.preset, f"a_u_{modality}"),
            "b": self.preset.a_b,
            f"n_{modality}": self.preset.a_n,
        }
        A = np.zeros((getattr(self.preset, f"d_{modality}"), self.p))
        for name, amplitude in amplitudes.items():
            part = self.block[name]
            A[:, part] = self._columns(modality, name, part.stop - part.start, amplitude)
        return A

    def law(self, site: Site) -> Law:
        """What the site's knobs make of the prior, the label and the noise."""
        mean, variance, w = np.zeros(self.p), np.ones(self.p), self.w.copy()
        variance[self.block["u_image"]] = site.spec**2
        mean[self.group] = site.group_shift
        w[self.block["u_ehr"]] *= site.w_u_ehr_factor
        tau = self.preset.tau
        noise = {"image": tau * site.noise_image, "ehr": tau}
        return Law(mean, variance, w, self.preset.bias + site.bias_shift, noise)

    @property
    def group(self) -> int:
        """The latent behind sex, the second of b."""
        return self.block["b"].start + min(1, self.preset.k_b - 1)

    def channels(self, site: Site) -> Array:
        """Which channel each EHR channel takes its value from, [d_ehr]: the identity without code shift.

        The first floor(share * d) channels of a fixed permutation take their predecessor's value, in a ring.
        """
        d = self.preset.d_ehr
        source = np.arange(d)
        count = int(site.code_shift * d + 1e-9)  # .29 * 100 is 28.999...
        hit = generator(self.seed, "world/code_shift").permutation(d)[:count]
        source[hit] = np.roll(hit, 1)
        return source

    def loaded(self, modality: str) -> list[str]:
        """Names of the readout's coordinates in order, such as ``s1 s2 u_image1 ... c1``."""
        blocks = ["s", f"u_{modality}", "b", f"n_{modality}"]
        widths = self.preset.blocks | {"c": self.preset.k_c}
        return [f"{name}{i + 1}" for name in [*blocks, "c"] for i in range(widths[name])]

    def _latent_covariance(self) -> Array:
        """Exact covariance of (z, c) at the internal site, [p + k_c, p + k_c]."""
        law, rho = self.law(self.internal), self.internal.rho
        P, w = law.variance, law.w
        risk = expit(law.bias + w @ law.mean + np.sqrt(w @ (P * w)) * NODES)
        share, slope = WEIGHTS @ risk, WEIGHTS @ (risk * (1 - risk))
        k = self.preset.k_c
        cross = 2 * rho * slope * (P * w)[:, None] * np.ones((1, k))  # Stein's identity: E[z sigm(eta)]
        c = np.eye(k) + 4 * rho**2 * share * (1 - share) * np.ones((k, k))
        return np.block([[np.diag(P), cross], [cross.T, c]])

    @cached_property
    def readout(self) -> dict[str, Array]:
        """t = readout @ theta, [q, d] a modality: sufficient for (z, c), unit variance at the internal site, near-axis."""
        tau, matrices = self.law(self.internal).tau, {}
        for m in MODALITIES:
            full = np.concatenate([self.A[m], self.B[m]], axis=1)
            G = full[:, np.abs(full).sum(0) > 0]
            covariance = full @ self._latent_covariance() @ full.T + tau[m] ** 2 * np.eye(len(full))
            values, vectors = np.linalg.eigh(G.T @ covariance @ G)
            matrices[m] = (vectors / np.sqrt(values)) @ vectors.T @ G.T
        return matrices

    def sample(self, site: Site, first: int, count: int) -> Subjects:
        """Subjects first .. first + count - 1 of a site; the same bytes however a range is cut.

        A knob at its neutral value takes part in no arithmetic.
        """
        preset, law, seed = self.preset, self.law(site), self.seed
        z = np.empty((count, self.p))
        for name, part in self.block.items():
            z[:, part] = normals(seed, f"latent/{name}", first, count, part.stop - part.start)
        if site.spec != 1:
            z[:, self.block["u_image"]] *= site.spec
        if site.group_shift:
            z[:, self.group] += site.group_shift
        eta = law.bias + (z * law.w).sum(1)
        y = uniforms(seed, "label", first, count, 1)[:, 0] < expit(eta)
        c = normals(seed, "latent/c", first, count, preset.k_c) + site.rho * (2.0 * y - 1)[:, None]
        if site.c_mean:
            c += site.c_mean
        theta = {}
        for m in MODALITIES:
            noise = normals(seed, f"noise/{m}", first, count, len(self.A[m]))
            theta[m] = by_row(self.A[m], z) + by_row(self.B[m], c) + law.tau[m] * noise
        if site.code_shift:
            theta["ehr"] = theta["ehr"][:, self.channels(site)]
        seen = np.ones(count, bool)
        if site.ehr_missing:
            seen = uniforms(seed, "ehr_missing", first, count, 1)[:, 0] >= site.ehr_missing
            theta["ehr"][~seen] = 0
        t = {m: by_row(self.readout[m], theta[m]) for m in MODALITIES}
        soonest, latest = FOLLOW_UP_DAYS
        diagnosis = soonest + (latest - soonest) * uniforms(seed, "diagnosis", first, count, 1)[:, 0]
        label = y & (diagnosis < site.follow_up_days)
        if site.label_flip:
            label ^= uniforms(seed, "label_flip", first, count, 1)[:, 0] < site.label_flip
        return Subjects(np.arange(first, first + count), z, c, eta, y, diagnosis, label, theta, t, seen)


def blended(parts: list[Subjects], which: Array) -> Subjects:
    """The same range of subjects at several sites to one: row i comes from ``parts[which[i]]``."""
    rows = np.arange(len(which))

    def chosen(values: list) -> Any:
        if isinstance(values[0], dict):
            return {m: chosen([value[m] for value in values]) for m in values[0]}
        return np.stack(values)[which, rows]

    return Subjects(**{f.name: chosen([getattr(part, f.name) for part in parts]) for f in fields(Subjects)})
