r"""A likelihood over what a network predicts: a mean, and how sure of it the network is.

The network predicts any linear target y and, beside it, numbers that make a covariance. With μ the x0
that follows from y, :math:`R^2 = \alpha^2\sigma_d^2 + \sigma^2` and the standard deviation that Gaussian data
of standard deviation σ_d have given x_t, :math:`c = \sigma\sigma_d/R`,

.. math:: q(x_0 \mid x_t) = N(\mu,\; c^2 e^{G}),

so that G = 0 is the posterior of such data at every noise level, and the network's numbers stay of order one
from σ → 0 to σ → ∞. The error of the mean over c is the error of y times :math:`k = R/(\sigma_d|\Delta|)`, in which
no σ cancels (k = 1 for EDM's F, a constant factor of Δ's for any other target), and

.. math:: -2\log q(x_0 \mid x_t) = \log 2\pi c^2 + G + e^{-G}\,k^2(\hat y - y)^2 .

That is the posterior reading (``of="x0"``), whose optimum is :math:`c^2 e^{G} = \mathrm{Var}[x_0 \mid x_t]`. In the
predictive one (``of="noisy"``) the likelihood is that of a fresh noisy sample
:math:`x_t' = \alpha x_0 + \sigma\varepsilon'`, whose mean is αμ and whose variance at best is
:math:`\sigma^2 + \alpha^2\mathrm{Var}[x_0 \mid x_t]`. Averaged over ε′,

.. math:: 2L = \log 2\pi c'^2 + G + e^{-G}\,[1 - r + r\,k^2(\hat y - y)^2], \qquad
          c'^2 = \sigma^2 + \alpha^2 c^2, \quad r = \alpha^2 c^2/c'^2 = \alpha^2\sigma_d^2/(R^2 + \alpha^2\sigma_d^2).

The first is the second with r = 1, and both are written once. For a full covariance the precision has the triangular
factor S/c, its diagonal the exponential of the network's numbers: with :math:`e = k(\hat y - y)`,

.. math:: 2L = D\log 2\pi c^2 - 2\sum_i \log S_{ii} + (1 - r)\lVert S\rVert_F^2 + r\,\lVert S^\top e\rVert^2 .

References:
    The scaling by noise level: Karras et al., arXiv 2206.00364 and 2312.02696. A weight that follows from a learned
    variance: Kendall & Gal, arXiv 1703.04977. Its cure for starved points, β-NLL: Seitzer et al., arXiv 2203.09168.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .errors import NetworkError, Unsupported, unknown
from .schedules import Elementwise, Schedule, build, like
from .targets import ALIASES, EDM, TARGETS, Target, aligned, target
from .weightings import Space

#: The largest D for a full covariance, whose factor has D(D + 1)/2 numbers a sample.
LARGEST_FULL = 64
#: A variance further than e^±30 from that of Gaussian data is lost: its root is below float32's resolution, or useless.
LIMIT = 30.0
COVARIANCES = ("isotropic", "diagonal", "full")
READINGS = ("x0", "noisy")


class VarianceLost(RuntimeError):
    """A learned variance collapsed or exploded. Not a user's error: a result.

    Attributes:
        what: what happened. t: the time of the sample where it did. advice: what may help.
    """

    def __init__(self, what: str, t: float, advice: str) -> None:
        super().__init__(f"{what}, for a sample at t = {t:.3g}. {advice}")
        self.what, self.t, self.advice = what, t, advice

    def __reduce__(self) -> tuple[type[VarianceLost], tuple[str, float, str]]:
        return VarianceLost, (self.what, self.t, self.advice)


class _Level(NamedTuple):
    """The likelihood at float64 times t: log c², r, and k; each of t's shape, or by element or direction."""

    log_var: Tensor
    r: Tensor
    k: Tensor


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian likelihood of what a network predicts, to be given where a target is.

    Args:
        target: any linear target, which the mean is predicted as: an object, a name or a mapping.
        covariance: "isotropic", one variance a sample; "diagonal", one an element; or "full", for
            vectors of at most 64 numbers.
        of: "x0", the posterior of the clean data, which gives ``posterior.var``; or "noisy", the
            likelihood of another noisy sample of the same data (the published reading).
        sigma_data: σ_d, the standard deviation of data whose posterior variance is G = 0; that of the
            target where it has one (edm), else 0.5.
        beta: multiplies each loss by its own variance over c² to this power, e^{βG}, as a constant (of a full
            covariance, by D/‖S‖²). 0 is the likelihood; at 1 what was predicted of the variance no longer weighs the
            mean's error, which for "x0" counts as in EDM's loss (with a full covariance in the mean over
            directions), for "noisy" r times that. β-NLL multiplies by the variance itself, which would also take
            the weight from low noise.
        detach_mean: the mean learns from EDM's loss alone, and the variance from the likelihood around it.

    Raises:
        UnknownName: if a name is not known.
        Unsupported: if a number is out of range.
    """

    name: ClassVar[str] = "gaussian"
    target: Target
    covariance: str = "diagonal"
    of: str = "x0"
    sigma_data: float | None = None
    beta: float = 0.0
    detach_mean: bool = False

    def __post_init__(self) -> None:
        if "gaussian" in (self.target, self.target.get("name") if isinstance(self.target, dict) else None):
            raise Unsupported("gaussian: its target is what the mean is predicted as, a linear one, found gaussian.")
        object.__setattr__(self, "target", target(self.target))
        for name, known in (("covariance", COVARIANCES), ("of", READINGS)):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise Unsupported(
                    f"gaussian: {name} is one of {', '.join(known)}, found {value!r}. To compare several, list whole "
                    "targets: target: [{name: gaussian, …}, {name: gaussian, …}]."
                )
            if value not in known:
                raise unknown(f"{name} of gaussian", value, known)
        if self.sigma_data is None:
            object.__setattr__(self, "sigma_data", float(getattr(self.target, "sigma_data", 0.5)))
        if not (_number(self.sigma_data) and 0 < self.sigma_data < math.inf):  # type: ignore[operator]
            raise Unsupported(f"gaussian: sigma_data must be a positive number, found {self.sigma_data!r}.")
        if not (_number(self.beta) and 0 <= self.beta <= 1):
            raise Unsupported(f"gaussian: beta is a number in [0, 1], found {self.beta!r}.")
        if not isinstance(self.detach_mean, bool):
            raise Unsupported(f"gaussian: detach_mean is true or false, found {self.detach_mean!r}.")

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        what = "the posterior of x0" if self.of == "x0" else "another noisy sample"
        return f"a Gaussian of {what}: mean from {self.target.words}, {self.covariance} covariance"

    @functools.cached_property
    def space(self) -> Space:
        """The loss in which the mean's error counts where the variance is that of Gaussian data: EDM's."""
        return Space(EDM(float(self.sigma_data)))  # type: ignore[arg-type]

    def config(self) -> dict[str, Any]:
        """The likelihood as plain data, from which :func:`prediction` builds it again."""
        names = ("covariance", "of", "sigma_data", "beta", "detach_mean")
        return {"name": self.name, "target": self.target.config(), **{k: getattr(self, k) for k in names}}

    def singular_times(self, schedule: Schedule, t_range: tuple[float, float], kind: Target) -> list[float]:
        """The times, of the ends and a grid between, at which an error of ``kind`` counts without bound: k is infinite.

        For x0 that is where there is no noise: no network can state it as exactly as it would have to.
        """
        t = torch.linspace(*t_range, 257, dtype=torch.float64)
        t[-1] = t_range[1]
        k = self.space.on_prediction(t, schedule, kind)
        lost = ~k.isfinite()
        return t[lost.reshape(len(t), -1).any(1) if lost.ndim > 1 else lost].tolist()

    def check(self, schedule: Schedule) -> None:
        """Refuses a schedule under which there is no such likelihood.

        Raises:
            Unsupported: for a full covariance beside noise that differs by element.
        """
        if self.covariance == "full" and isinstance(schedule, Elementwise):
            raise Unsupported(
                "a full covariance needs the same noise in every element, found elementwise; use diagonal."
            )

    def outputs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a network's output for a sample of this shape: along the first axis first the target, then
        the covariance's numbers (for pictures an isotropic one takes one channel, averaged over the picture).

        Raises:
            Unsupported: for a full covariance of data that are no vectors, or too long ones.
        """
        first, *rest = shape
        if self.covariance == "full":
            if rest or first > LARGEST_FULL:
                raise Unsupported(
                    f"a full covariance is for vectors of at most {LARGEST_FULL} numbers, found samples of shape "
                    f"{list(shape)}; use covariance: diagonal, one variance an element."
                )
            return (first + first * (first + 1) // 2,)
        return (first + (1 if self.covariance == "isotropic" else first), *rest)

    def split(self, out: Any, x_t: Tensor, by: str) -> tuple[Tensor, Tensor]:
        """The prediction of the target, of x_t's shape [B, …], and the rest of the output of the network ``by``.

        Raises:
            NetworkError: if the output has another shape than :meth:`outputs` says.
        """
        wanted = (len(x_t), *self.outputs(tuple(x_t.shape[1:])))
        if not isinstance(out, Tensor) or out.shape != wanted:
            found = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            size = x_t.shape[1]
            raise NetworkError(
                f"{by} returned {found} for an input of shape {list(x_t.shape)}; a network under a {self.covariance} "
                f"Gaussian returns shape {list(wanted)}: {size} along the first axis for {self.target.name}, and "
                f"{wanted[1] - size} more for the covariance."
            )
        out = out.to(x_t.dtype)
        return out[:, : x_t.shape[1]], out[:, x_t.shape[1] :]

    def level(self, t: Tensor, schedule: Schedule, kind: Target) -> _Level:
        """Scales at float64 times for a prediction of the target ``kind``, in float64."""
        s = float(self.sigma_data)  # type: ignore[arg-type]
        alpha, sigma = aligned(t, schedule.alpha(t), schedule.sigma(t))
        radius = torch.hypot(alpha * s, sigma)
        k = self.space.on_prediction(t, schedule, kind).sqrt()
        signal = alpha * s / radius
        if self.of == "x0":
            return _Level(2 * (sigma * s / radius).log(), torch.ones_like(sigma), k)
        return _Level(2 * (sigma * torch.hypot(torch.ones_like(signal), signal)).log(), signal**2 / (1 + signal**2), k)

    def loss(
        self, rest: Tensor, error: Tensor, t: Tensor, schedule: Schedule, kind: Target, spread: Tensor | float = 0.0
    ) -> Tensor:
        """The negative log-likelihood in nats an element, shape [B].

        Args:
            rest: the covariance's part of the network's output, [B, …].
            error: of the prediction of the target ``kind``, ŷ − y, shape [B, …].
            t: float64 times, a scalar or [B].
            spread: what x0 still varies by where it is not given as a point (:meth:`spread`).

        Raises:
            VarianceLost: on the CPU, where a variance collapsed or exploded; elsewhere, where looking would wait for
                the device, such a sample's loss is infinite.
        """
        at = self.level(t, schedule, kind)
        self._refuse_infinite(at, t)
        e = kind.apply(at.k, error)
        fixed = e.detach() if self.detach_mean else e
        r, log_var = like(at.r, e), like(at.log_var, e)
        found = self._full(rest, fixed, r, spread) if self.covariance == "full" else self._apart(rest, fixed, r, spread)
        each, log_ratio, scale = found
        each = (each + log_var + math.log(2 * math.pi)) / 2
        if self.beta:
            each = each * (self.beta * scale.detach()).exp()
        if self.detach_mean:  # of value zero: only its gradient counts
            each = each + (e.square() - fixed.square()) / 2
        lost = _lost(log_ratio, t)
        loss = each.expand_as(e).flatten(1).mean(1)
        return loss if lost is None else loss.masked_fill(lost, math.inf)

    def spread(self, std: Tensor | float, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """Var[z | x_t, x0]/c² of data z ~ N(x0, std²), by element, at times t; ``x`` has the data's shape and dtype."""
        alpha, sigma = (like(c, x) for c in aligned(t, schedule.alpha(t), schedule.sigma(t)))
        s, known = torch.as_tensor(std, dtype=x.dtype, device=x.device), float(self.sigma_data)  # type: ignore[arg-type]
        found = (alpha.square() * known**2 + sigma.square()) / (alpha.square() * s.square() + sigma.square())
        return torch.where(s > 0, s.square() / known**2 * found, 0.0)

    def _apart(self, rest: Tensor, e: Tensor, r: Tensor, spread: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """G + e^{−G}(1 − r + r(e² + v)) by element; and G, twice."""
        log_ratio = rest if self.covariance == "diagonal" else _one_a_sample(rest)
        return log_ratio + (-log_ratio).exp() * (1 - r + r * (e.square() + spread)), log_ratio, log_ratio

    def _full(self, rest: Tensor, e: Tensor, r: Tensor, spread: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """What a full covariance adds, [B, 1], to be taken for each element; minus twice the logarithm of S's
        diagonal; and log D/‖S‖², where beta asks for it. S itself is not made."""
        size = e.shape[1]
        log_diagonal, below = rest[:, :size], rest[:, size:]
        diagonal = log_diagonal.exp()
        rows, columns = torch.tril_indices(size, size, -1, device=e.device)
        along = (diagonal * e).index_add(1, columns, below * e.index_select(1, rows))  # Sᵀe
        quadratic = r * along.square().mean(1, keepdim=True)
        log_ratio = -2 * log_diagonal
        scale = log_ratio
        if self.of == "noisy" or isinstance(spread, Tensor) or self.beta:
            squared = diagonal.square().index_add(1, rows, below.square())  # ‖S‖², row by row
            quadratic = quadratic + (squared * (1 - r + r * spread)).mean(1, keepdim=True)
            scale = -squared.mean(1, keepdim=True).log()
        return log_ratio.mean(1, keepdim=True) + quadratic, log_ratio, scale

    def _refuse_infinite(self, at: _Level, t: Tensor) -> None:
        good = at.k.isfinite() & at.log_var.isfinite() if at.k.shape == at.log_var.shape else at.k.isfinite()
        if not bool(good.all()):
            raise Unsupported(
                f"the likelihood of {self.target.name} is not finite at t = {float(t.flatten()[0]):g} or another time "
                "of the batch: there is no noise, or the target is singular; keep t away from there (t_range)."
            )

    def covariance_of(self, rest: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
        """(variance by element, root of the covariance where it is full) of x0, or of the noisy sample.

        Args:
            rest: the covariance's part of the network's output. x: of the data's shape and dtype, [B, …].
        """
        std = like((self.level(t, schedule, self.space.target).log_var / 2).exp(), x)
        if self.covariance != "full":
            log_ratio = rest if self.covariance == "diagonal" else _one_a_sample(rest)
            return (std.square() * log_ratio.exp()).expand_as(x), None
        s = _triangular(rest, x.shape[1])
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        root = torch.linalg.solve_triangular(s.mT, eye.expand_as(s), upper=True)
        root = root * (std if std.ndim == 0 else std[..., None])
        return root.square().sum(2), root


def _one_a_sample(rest: Tensor) -> Tensor:
    """One number a sample, which broadcasts against the data: of a picture's channel, the mean."""
    return rest.flatten(1).mean(1).reshape(-1, *[1] * (rest.ndim - 1))


def _triangular(rest: Tensor, size: int) -> Tensor:
    """S [B, D, D], lower triangular, of D(D + 1)/2 numbers a sample: first the logarithm of its diagonal, then what
    lies below it, row by row."""
    s = torch.diag_embed(rest[:, :size].exp())
    rows, columns = torch.tril_indices(size, size, -1, device=rest.device)
    s[:, rows, columns] = rest[:, size:]
    return s


def _lost(log_ratio: Tensor, t: Tensor) -> Tensor | None:
    """The samples whose variance is beyond all bounds, [B]; None where it is known that there are none.

    Raises:
        VarianceLost: on the CPU, if there are any.
    """
    flat = log_ratio.detach().flatten(1)
    if flat.device.type != "cpu":
        return (flat.abs() > LIMIT).any(1)
    low, high = torch.aminmax(flat)
    if (low >= -LIMIT and high <= LIMIT) or not bool((low + high).isfinite()):
        return None
    collapsed = bool(-low > high)
    sample = int((flat.argmin() if collapsed else flat.argmax()) // flat.shape[1])
    at = float(t.expand(len(flat))[sample])
    what = "collapsed" if collapsed else "exploded"
    raise VarianceLost(
        f"the learned variance {what} to e^{float(low if collapsed else high):.0f} times that of Gaussian data",
        at,
        "Train more slowly (train.lr), clip gradients (train.clip), use gaussian's beta or detach_mean; if it was in "
        "the first steps, look at what the network makes of its time (a plain one may answer steps of 0 to 999 with "
        "numbers as large: time: t).",
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def prediction(which: str | dict[str, Any] | Target | Gaussian) -> Target | Gaussian:
    """A target, or a likelihood over one, by name, by mapping, or itself.

    Raises:
        UnknownName: if there is none of that name.
    """
    if isinstance(which, Gaussian):
        return which
    name = which if isinstance(which, str) else which.get("name") if isinstance(which, dict) else None
    if name == Gaussian.name:
        made: Gaussian = build("target", {Gaussian.name: Gaussian}, which)  # type: ignore[arg-type]
        return made
    if isinstance(name, str) and name not in TARGETS and name not in ALIASES:
        raise unknown("target", name, [*TARGETS, *ALIASES, Gaussian.name])
    return target(which)
