"""The world: latents, label, measurement layer and sufficient readout of one preset, seed and site."""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from scipy.special import expit

from mmjepa.refusal import Refusal
from synthetic.draws import Array, by_row, generator, normals, uniforms

MODALITIES = ("image", "ehr")
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes, amplitudes (``a_<block>_<modality>``) and label weights of a world; defaults are LI2025.

    Blocks of z: s shared biology (2), u_image and u_ehr unique to one modality (2 each), b shared but irrelevant,
    n_image and n_ehr nuisance; c is the care pathway, caused by the label.
    """

    k_c: int = 1
    k_b: int = 2
    k_n_image: int = 8
    k_n_ehr: int = 12
    d_image: int = 48
    d_ehr: int = 128
    a_s_image: float = 0.22
    a_s_ehr: float = 1.0
    a_u_image: float = 1.1
    a_u_ehr: float = 0.6
    a_c_image: float = 0.13
    a_c_ehr: float = 0.7
    a_b: float = 0.5
    a_n: float = 0.7
    w_s: float = 1.45
    w_u_image: float = 0.9
    w_u_ehr: float = 0.1
    w_b: float = 0.0
    bias: float = -0.6
    tau: float = 1.0

    @property
    def blocks(self) -> dict[str, int]:
        """Widths of the blocks of z, in order."""
        return {
            "s": 2,
            "u_image": 2,
            "u_ehr": 2,
            "b": self.k_b,
            "n_image": self.k_n_image,
            "n_ehr": self.k_n_ehr,
        }


@dataclass(frozen=True, kw_only=True)
class Site:
    """Knobs of one site; a field's default is its neutral value, rho excepted.

    rho: how strongly the label drives the care pathway c. spec: spread of the image-unique block (case spectrum).
    code_shift: share of EHR channels that carry their neighbour's value. offset: of subject ids; sites never collide.
    """

    name: str
    rho: float
    spec: float = 1.0
    code_shift: float = 0.0
    offset: int


PRESETS = {"li2025": Preset()}
SITES = {
    "li2025": {
        "internal": Site(name="internal", rho=0.8, offset=10_000_000),
        "external": Site(name="external", rho=-0.05, spec=1.4, code_shift=0.15, offset=20_000_000),
    }
}


def _pick(table: dict, name: str, what: str):  # noqa: ANN202
    if name not in table:
        raise Refusal("SYNTHETIC_UNKNOWN", f"no {what} is called {name!r}", f"Known: {', '.join(table)}")
    return table[name]


def find_preset(name: str) -> Preset:
    """The preset of that name; Refusal ``SYNTHETIC_UNKNOWN`` otherwise."""
    return _pick(PRESETS, name, "preset")


def find_site(preset: str, name: str) -> Site:
    """The site of that name under a preset; Refusal ``SYNTHETIC_UNKNOWN`` otherwise."""
    return _pick(_pick(SITES, preset, "preset"), name, "site")


@dataclass(frozen=True)
class Subjects:
    """n sampled subjects, row i being subject ``index[i]``.

    z [n, p], c [n, k_c], eta [n] log-odds of the label given z, y [n] bool, theta {modality: [n, d]} measurements,
    t {modality: [n, q]} readouts. Everything rendered depends on t alone.
    """

    index: Array
    z: Array
    c: Array
    eta: Array
    y: Array
    theta: dict[str, Array]
    t: dict[str, Array]

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

    def prior(self, site: Site) -> Array:
        """Diagonal of the prior covariance of z, [p]."""
        variance = np.ones(self.p)
        variance[self.block["u_image"]] = site.spec**2
        return variance

    def channels(self, site: Site) -> Array:
        """Which channel each EHR channel takes its value from, [d_ehr]: the identity without code shift.

        The first floor(share * d) channels of a fixed permutation take their predecessor's value, in a ring.
        """
        d = self.preset.d_ehr
        source = np.arange(d)
        hit = generator(self.seed, "world/code_shift").permutation(d)[: int(site.code_shift * d)]
        source[hit] = np.roll(hit, 1)
        return source

    def loaded(self, modality: str) -> list[str]:
        """Names of the readout's coordinates in order, such as ``s1 s2 u_image1 ... c1``."""
        blocks = ["s", f"u_{modality}", "b", f"n_{modality}"]
        widths = self.preset.blocks | {"c": self.preset.k_c}
        return [f"{name}{i + 1}" for name in [*blocks, "c"] for i in range(widths[name])]

    def _latent_covariance(self) -> Array:
        """Exact covariance of (z, c) at the internal site, [p + k_c, p + k_c]."""
        P, rho = self.prior(self.internal), self.internal.rho
        risk = expit(self.preset.bias + np.sqrt(self.w @ (P * self.w)) * NODES)
        share, slope = WEIGHTS @ risk, WEIGHTS @ (risk * (1 - risk))
        k = self.preset.k_c
        cross = 2 * rho * slope * (P * self.w)[:, None] * np.ones((1, k))  # Stein's identity: E[z sigm(eta)]
        c = np.eye(k) + 4 * rho**2 * share * (1 - share) * np.ones((k, k))
        return np.block([[np.diag(P), cross], [cross.T, c]])

    @cached_property
    def readout(self) -> dict[str, Array]:
        """t = readout @ theta, [q, d] a modality: sufficient for (z, c), unit variance at the internal site, near-axis."""
        matrices = {}
        for m in MODALITIES:
            full = np.concatenate([self.A[m], self.B[m]], axis=1)
            G = full[:, np.abs(full).sum(0) > 0]
            covariance = full @ self._latent_covariance() @ full.T + self.preset.tau**2 * np.eye(len(full))
            values, vectors = np.linalg.eigh(G.T @ covariance @ G)
            matrices[m] = (vectors / np.sqrt(values)) @ vectors.T @ G.T
        return matrices

    def sample(self, site: Site, first: int, count: int) -> Subjects:
        """Subjects first .. first + count - 1 of a site; the same bytes however a range is cut."""
        preset, P = self.preset, self.prior(site)
        z = np.empty((count, self.p))
        for name, part in self.block.items():
            z[:, part] = normals(self.seed, f"latent/{name}", first, count, part.stop - part.start)
        if site.spec != 1:
            z *= np.sqrt(P)
        eta = preset.bias + (z * self.w).sum(1)
        y = uniforms(self.seed, "label", first, count, 1)[:, 0] < expit(eta)
        c = normals(self.seed, "latent/c", first, count, preset.k_c) + site.rho * (2.0 * y - 1)[:, None]
        theta = {}
        for m in MODALITIES:
            noise = normals(self.seed, f"noise/{m}", first, count, len(self.A[m]))
            theta[m] = by_row(self.A[m], z) + by_row(self.B[m], c) + preset.tau * noise
        if site.code_shift:
            theta["ehr"] = theta["ehr"][:, self.channels(site)]
        t = {m: by_row(self.readout[m], theta[m]) for m in MODALITIES}
        return Subjects(np.arange(first, first + count), z, c, eta, y, theta, t)


def describe(preset: Preset, site: Site) -> dict[str, float | int | str]:
    """Every number of a preset and a site, for a truth folder's manifest."""
    return {f.name: getattr(preset, f.name) for f in fields(preset)} | {
        f.name: getattr(site, f.name) for f in fields(site)
    }
