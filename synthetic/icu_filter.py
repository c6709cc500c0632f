"""What can be known of a stay from its record: a particle filter, and the Kalman filter that tests it.

Onset of deterioration is a Markov state of a particle, so that particles keep turning; a fixed onset hour per particle
would be impoverished by resampling. Evidence of an hour: the labs, how many were drawn, the treatment given, and having
stayed in the unit.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mmjepa.refusal import Refusal
from synthetic.draws import Array, by_row, generator
from synthetic.icu import LABS, STATES, Icu, IcuWorld, Stays

BLOCK = 8192  # particles moved at a time, for memory and cache; no byte depends on it
FLOAT = np.float32  # rounding moves a risk a tenth as far as another seed does
GOLDEN = (5**0.5 - 1) / 2


class ParticleFilter:
    """The optimal observer under ``law`` (right only where the law is the stays' own), up to Monte Carlo error.

    particles: per stay, even. Their randomness is fixed by (seed, stay), whatever the batch. Raises
    Refusal SYNTHETIC_RANGE.
    """

    def __init__(self, law: Icu, world: IcuWorld, particles: int, seed: int) -> None:
        if particles < 2 or particles % 2:
            raise Refusal("SYNTHETIC_RANGE", f"{particles} particles a stay", "Take an even number, 256 say")
        self.law, self.world, self.particles, self.seed = law, world, particles, seed

    def means(self, stays: Stays, last_h: int, know_onset: bool = False) -> Array:
        """[n, last_h + 1, 3] mean state of each hour given the record up to it, and the onset hour if ``know_onset``.

        Void from the hour in which a stay ends.
        """
        means = []
        for part in self._blocks(stays):
            cloud = _Cloud(self, part, last_h, part.on() if know_onset else None)
            means.append(np.stack([cloud.state.mean(-1) for _ in cloud.filtered(part, last_h)]))
        return np.concatenate(means, axis=2).transpose(2, 0, 1).astype(np.float64)

    def risk(self, stays: Stays, seen_h: int, last_h: int, know_state: bool = False) -> Array:
        """[n] probability of death in the unit in hours seen_h + 1 .. last_h, treatment following the law's policy.

        Given the record up to hour ``seen_h`` and having stayed through it (void for those who did not), or
        (``know_state``) given the state, whether the drift acts and the treatment of that hour.
        """
        found = [np.empty(0)]  # there may be no stay
        for part in self._blocks(stays):
            cloud = self._placed(part, seen_h, last_h, know_state)
            found.append(cloud.risk(seen_h, last_h, part.treated[:, seen_h]))
        return np.concatenate(found)

    def forecast(
        self, stays: Stays, seen_h: int, hours: Sequence[int], know_state: bool = False, read_treatment: bool = False
    ) -> Array:
        """[n, len(hours), 3] median state in later ``hours`` under the treatment that was given; onset may yet come.

        What is known as in ``risk``. The median has the least absolute error. Later treatment is taken as imposed;
        with ``read_treatment`` as chosen by the policy: it tells of the state in its hour, and of onset.
        """
        forecasts = []
        for part in self._blocks(stays):
            cloud, medians = self._placed(part, seen_h, max(hours), know_state), {}
            for hour in range(seen_h + 1, max(hours) + 1):
                cloud.advance(hour, part.treated[:, hour - 1, None])
                if hour in hours:
                    medians[hour] = np.median(cloud.state, axis=-1)
                if read_treatment:
                    cloud.resample(hour, _treatment_evidence(self.law, cloud.state, part.treated[:, hour, None]))
            forecasts.append(np.stack([medians[hour] for hour in hours]))
        return np.concatenate(forecasts, axis=2).transpose(2, 0, 1).astype(np.float64)

    def _blocks(self, stays: Stays) -> Iterator[Stays]:
        """The stays, some at a time."""
        size = max(1, BLOCK // self.particles)
        return (stays.take(slice(first, first + size)) for first in range(0, len(stays.index), size))

    def _placed(self, stays: Stays, seen_h: int, last_h: int, know_state: bool) -> "_Cloud":
        """Particles at the end of hour ``seen_h``, with randomness up to ``last_h``."""
        cloud = _Cloud(self, stays, last_h)
        if know_state:
            cloud.state = np.repeat(stays.states[:, seen_h].T[:, :, None], self.particles, axis=2).astype(FLOAT)
            cloud.on = np.repeat(stays.on()[:, seen_h, None], self.particles, axis=1)
        else:
            for _ in cloud.filtered(stays, seen_h):
                pass
        return cloud


class _Cloud:
    """Particles of m stays: state [3, m, P], on [m, P] whether the drift acts; and their random numbers.

    known_on: [m, T] if the onset is known.
    """

    def __init__(self, owner: ParticleFilter, stays: Stays, last_h: int, known_on: Array | None = None) -> None:
        self.law, self.world, self.known_on = owner.law, owner.world, known_on
        hours, shape = last_h + 1, (len(stays.index), owner.particles)
        draws = [generator(owner.seed, "icu/particles", int(stay)) for stay in stays.index]
        half = (hours + 1, STATES, owner.particles // 2)
        self.normal = np.stack([d.standard_normal(half, dtype=FLOAT) for d in draws], axis=2)
        self.onset_u, self.treat_u, self.resample_u = np.stack([d.random((3, hours)) for d in draws], axis=2)
        self.lattice = (np.arange(owner.particles) * GOLDEN % 1).astype(FLOAT)
        self.state = np.zeros((STATES, *shape), dtype=FLOAT)
        self._add_noise(-1, (self.law.start_sd,) * STATES)
        self.on = np.zeros(shape, dtype=bool)
        self.hazard = self.law.onset_hazard()

    def _add_noise(self, hour: int, sd: tuple[float, ...]) -> None:
        """Neighbours, of one parent more often than not, take opposite noise: their mean is the sharper for it."""
        noise = self.normal[hour + 1] * np.array(sd, FLOAT)[:, None, None]
        self.state[..., ::2] += noise
        self.state[..., 1::2] -= noise

    def _spread(self, uniform: Array) -> Array:
        """[m] -> [m, P] uniforms that fill (0, 1) evenly over any run of neighbours."""
        u = uniform[:, None].astype(FLOAT) + self.lattice
        return u - (u >= 1)

    def advance(self, hour: int, treated: Array) -> None:
        """Move to ``hour``; treated: [m, 1] or [m, P] in the hour before."""
        if self.known_on is None:
            self.on = self.on | (self._spread(self.onset_u[hour]) < self.hazard[hour])
        else:
            self.on = np.repeat(self.known_on[:, hour, None], self.on.shape[1], axis=1)
        self.state = self.law.step(self.state, self.on, treated)
        self._add_noise(hour, self.law.noise)

    def filtered(self, stays: Stays, last_h: int) -> Iterator[None]:
        """Take in the record of each hour 0 .. last_h, and stop after each."""
        quadratic, linear, drawn = sufficient(self.law, self.world, stays.labs[:, : last_h + 1])
        before = np.zeros((len(stays.index), 1), dtype=bool)
        for hour in range(last_h + 1):
            self.advance(hour, before)
            before = stays.treated[:, hour, None]
            evidence = _lab_evidence(self.state, quadratic[:, hour], linear[:, hour])
            evidence += _treatment_evidence(self.law, self.state, before)
            evidence += _stay_evidence(self.law, self.state, drawn[:, hour, None])
            self.resample(hour, evidence)
            yield

    def resample(self, hour: int, log_weight: Array) -> None:
        """Systematic resampling of every stay's particles."""
        m, particles = self.on.shape
        weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
        edges = np.cumsum(weight, axis=1, dtype=np.float64)
        edges = np.ceil(edges * (particles / edges[:, -1:]) - self.resample_u[hour][:, None])
        edges[:, -1] = particles
        copies = np.diff(edges, axis=1, prepend=0).astype(np.int64)
        chosen = np.repeat(np.arange(m * particles), copies.ravel())
        self.state = self.state.reshape(STATES, -1)[:, chosen].reshape(STATES, m, particles)
        self.on = self.on.ravel()[chosen].reshape(m, particles)

    def risk(self, seen_h: int, last_h: int, treated: Array) -> Array:
        """[m] chance of death in hours seen_h + 1 .. last_h: survival times hazard, treatment drawn from the policy."""
        law, acting = self.law, treated[:, None]
        alive = np.ones(self.on.shape, dtype=FLOAT)
        risk = np.zeros(self.on.shape, dtype=FLOAT)
        for hour in range(seen_h + 1, last_h + 1):
            self.advance(hour, acting)
            stay_alive = np.exp(-law.death_rate(self.state))
            risk += alive * (1 - stay_alive)
            alive *= stay_alive * np.exp(-law.discharge_rate(self.state))
            acting = self._spread(self.treat_u[hour]) * (1 + np.exp(-law.treat_logit(self.state))) < 1
        return risk.mean(1, dtype=np.float64)


def sufficient(law: Icu, world: IcuWorld, labs: Array) -> tuple[Array, Array, Array]:
    """What an hour's labs say: log p(labs | S) = -.5 S'Q S + b'S + constant.

    labs: [n, T, 12]. Returns Q [n, T, 6] (00, 11, 22, 01, 02, 12), b [n, T, 3] and how many labs were drawn [n, T].
    """
    flat = labs.reshape(-1, LABS).astype(np.float64)
    drawn = ~np.isnan(flat)
    centred = np.where(drawn, flat - world.lab_shift(law), 0) / law.lab_noise
    C = world.loading.T / law.lab_noise
    i, j = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    shape = labs.shape[:-1]
    quadratic = by_row(C[i] * C[j], drawn.astype(np.float64)).reshape(*shape, 6)
    return quadratic, by_row(C, centred).reshape(*shape, 3), drawn.sum(1).reshape(shape)


def _lab_evidence(state: Array, quadratic: Array, linear: Array) -> Array:
    """[m, P] log likelihood of an hour's labs; state [3, m, P], quadratic [m, 6], linear [m, 3]."""
    s0, s1, s2 = state
    q = quadratic.T[:, :, None].astype(FLOAT)
    b = linear.T[:, :, None].astype(FLOAT)
    return (
        s0 * (b[0] - 0.5 * q[0] * s0 - q[3] * s1 - q[4] * s2)
        + s1 * (b[1] - 0.5 * q[1] * s1 - q[5] * s2)
        + s2 * (b[2] - 0.5 * q[2] * s2)
    )


def _treatment_evidence(law: Icu, state: Array, treated: Array) -> Array:
    """[m, P] log likelihood of the treatment of an hour, [m, 1]."""
    return -np.log(1 + np.exp(np.where(treated, -1, 1).astype(FLOAT) * law.treat_logit(state)))


def _stay_evidence(law: Icu, state: Array, drawn: Array) -> Array:
    """[m, P] log likelihood of how many labs were drawn, [m, 1], and of staying in the unit."""
    measured = law.measured_logit(state)
    chance = drawn.astype(FLOAT) * measured - LABS * np.log(1 + np.exp(measured))
    return chance - law.death_rate(state) - law.discharge_rate(state)


def kalman(stays: Stays, last_h: int) -> tuple[Array, Array]:
    """Mean [n, last_h + 1, 3] and covariance [n, last_h + 1, 3, 3] of the state given labs up to each hour, the
    treatments and the onset: exact where treatment, measurement and ends do not depend on the state.
    """
    law, n = stays.law, len(stays.index)
    quadratic, linear, _ = sufficient(law, stays.world, stays.labs[:, : last_h + 1])
    precision = quadratic[..., [0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(n, last_h + 1, STATES, STATES)
    keep, Q = np.diag(law.keep), np.diag(law.noise) ** 2
    mean, covariance = np.zeros((n, STATES)), np.broadcast_to(law.start_sd**2 * np.eye(STATES), (n, STATES, STATES))
    on, none = stays.on(), np.zeros(n, dtype=bool)
    means, covariances = [], []
    for hour in range(last_h + 1):
        mean = law.step(mean.T, on[:, hour], stays.treated[:, hour - 1] if hour else none).T
        prior = np.linalg.inv(keep @ covariance @ keep + Q)
        covariance = np.linalg.inv(prior + precision[:, hour])
        mean = (covariance @ (prior @ mean[..., None] + linear[:, hour, :, None]))[..., 0]
        means.append(mean)
        covariances.append(covariance)
    return np.stack(means, axis=1), np.stack(covariances, axis=1)
