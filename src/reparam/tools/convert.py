"""The same model, stated as another target: exact, and nothing is trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..confidence import Gaussian, prediction
from ..denoiser import Conventions, Denoiser
from ..errors import Conflict, OutputError, ReparamError, SingularTime, Unsupported, unknown
from ..networks.reexpressed import Reexpressed, linear_target
from ..schedules import DDPM
from ..spec import Spec, check_plain, save, weights_file
from ..targets import Target, aligned, coefficients
from .check import named_target

#: In what form a model is written.
FORMATS = ("reparam", "diffusers")
#: Where the network, its conventions and the record of training come from, in the record of a converted model.
ORIGIN = "converted_from"
#: Endings of files: not what somebody calls a folder.
_NO_FOLDER = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz", ".npy", ".json", ".yaml", ".onnx", ".gguf")


def reexpress(
    denoiser: Denoiser,
    to: Target | Gaussian | str | dict[str, Any],
    *,
    t_range: tuple[float, float] | None = None,
) -> Denoiser:
    r"""The same posterior of x0, from a network that predicts another target.

    .. math:: y' = a(t)\, x_t + b(t)\, y

    around the network (:class:`reparam.networks.Reexpressed`), which is shared, not copied. A converted model is
    converted from what its network predicts, so that nothing piles up, and back to that it is the network itself. A
    likelihood keeps its variances, which are of x0. The spec of the first model stays in the record.

    Args:
        denoiser: a model; not one under guidance.
        to: the target, an object, a name or a mapping; or for a model with a likelihood, that over another target.
        t_range: the times it is for; the model's by default.

    Returns:
        A model whose mean is that of ``denoiser``, up to rounding: an error of 16·κ·eps of its dtype, with κ the
        targets' condition numbers (:meth:`reparam.Target.condition`).

    Raises:
        SingularTime: if ``to`` does not follow from what is predicted somewhere in t_range; it says where.
        Unsupported: for what is no plain model, for a target that is code, or two different bases.
        Conflict: if ``to`` is another likelihood than the model's.
    """
    check_plain(denoiser)
    source, net = _origin(denoiser)
    source = replace(source, t_range=denoiser.t_range if t_range is None else t_range)
    wanted = _likelihood(denoiser, to)
    kind = linear_target(wanted.target if isinstance(wanted, Gaussian) else wanted)
    _refuse_singular(source, kind)
    input, made = source.input, net
    if kind != source.target:
        # EDM's scaling is stated by its target: where the new one does not say the same, the network scales itself.
        scales = input == "edm" and getattr(kind, "sigma_data", None) != getattr(source.target, "sigma_data", None)
        made = Reexpressed(net, source.schedule, source.target, kind, source.time, input, scales)
        input = "none" if scales else input
    found = Denoiser(
        made,
        source.schedule,
        replace(wanted, target=kind) if isinstance(wanted, Gaussian) else kind,
        time=source.time,
        input=input,
        t_range=source.t_range,
        data=denoiser.data,
    )
    _keep_record(denoiser, found)
    return found.train(denoiser.training)


def _origin(denoiser: Denoiser) -> tuple[Conventions, nn.Module]:
    """What the innermost network predicts and how it is called; and that network."""
    c, net = denoiser.conventions, denoiser.net
    if not (isinstance(net, Reexpressed) and net.stands_under(c)):
        linear_target(c.target)
        return c, net
    return Conventions(net.schedule, net.source, net.time, net.input, c.t_range), net.of


def _likelihood(denoiser: Denoiser, to: Any) -> Target | Gaussian:
    """What the result predicts: a target, or the model's likelihood over it."""
    wanted, has = prediction(to), denoiser.conventions.likelihood
    if not isinstance(wanted, Gaussian):
        return wanted if has is None else replace(has, target=wanted)
    if has is None or replace(wanted, target=has.target) != has:
        found = "has none" if has is None else f"has {_but_target(has)}"
        raise Conflict(
            f"a conversion changes what the mean is predicted as, not the likelihood: this model {found}, asked for is "
            f"{_but_target(wanted)}. Give the target alone."
        )
    return wanted


def _but_target(likelihood: Gaussian) -> dict[str, Any]:
    return {key: value for key, value in likelihood.config().items() if key != "target"}


def _keep_record(denoiser: Denoiser, found: Denoiser) -> None:
    """Hand on the record of training, with the spec of the first model where the result is not that one again."""
    # What was said of the first network's target stays with the record of that one.
    kept = {k: v for k, v in (denoiser.overrides or {}).items() if k not in ("target", "network")}
    found.training_record, found.overrides = denoiser.training_record, kept or None
    record = denoiser.training_record or {}
    try:
        first = record.get(ORIGIN) or Spec.of(denoiser).to_dict()
        now = found.conventions.predicted().config()
    except Unsupported:  # a target made of functions, which cannot be saved either
        return
    again = first["target"] == now
    found.training_record = first["training"] if again else {**record, ORIGIN: first}
    if again:
        found.overrides = {**(first.get("overrides") or {}), **kept} or None


def _times(c: Conventions) -> Tensor:
    """Times of t_range at which the network can be asked, with both ends; float64."""
    low, high = c.t_range
    if c.time == "step" and isinstance(c.schedule, DDPM):
        t = c.schedule.time(torch.arange(c.schedule.T))
        return t[(t >= low - 1e-9) & (t <= high + 1e-9)]
    t = torch.linspace(low, high, 2049, dtype=torch.float64)
    t[-1] = high
    return t


def _refuse_singular(source: Conventions, kind: Target) -> None:
    t = _times(source)
    try:
        coefficients(source.target, kind, t, source.schedule)
    except SingularTime as e:
        raise _singular(str(e).partition(" Keep t away")[0], source, kind) from e
    if lost := kind.singular_times(source.schedule, source.t_range):
        at = ", ".join(f"{v:g}" for v in lost[:4])
        raise _singular(f"{kind.name} does not determine x0 at t = {at} under {source.schedule}.", source, kind)


def _singular(what: str, source: Conventions, kind: Target) -> SingularTime:
    low, high = source.t_range
    where = f"{what} The model is for t in [{low:g}, {high:g}]; "
    left = _longest_fine(source, kind)
    if left is None:
        return SingularTime(f"{where}there is no part of it where that works. Choose another target.")
    return SingularTime(
        f"{where}leave that time out, for example t_range (--t-range) [{left[0]:.4g}, {left[1]:.4g}], or choose "
        "another target."
    )


def _longest_fine(source: Conventions, kind: Target) -> tuple[float, float] | None:
    """The longest part of t_range that stays clear of what is singular."""
    low, high = source.t_range
    gap = (high - low) / 100
    lost = [t for t in kind.singular_times(source.schedule, source.t_range) if low < t < high]

    def clear(t: float) -> bool:
        return _fine(t, source, kind) and all(abs(t - at) > gap / 2 for at in lost)

    # Beside an end that is lost: a little from the data, more from the noise, where errors are largest.
    times = [low, low + gap / 10, *(low + gap * k for k in range(1, 99)), high]
    runs = [list(run) for fine, run in itertools.groupby(times, clear) if fine]
    longest = max(runs, key=len, default=[])
    return (longest[0], longest[-1]) if len(longest) > 1 else None


def _fine(t: float, source: Conventions, kind: Target) -> bool:
    try:
        coefficients(source.target, kind, t, source.schedule)
    except SingularTime:
        return False
    return bool(kind.amplification(t, source.schedule).x0.isfinite().all())


def worst_condition(denoiser: Denoiser) -> tuple[float, float]:
    r"""(κ, t): where the conversion inside a model costs its x0 most; (1, the end) where there is none.

    κ is that of the map times the amplification of the new target, :math:`\kappa\,(|p'| + |q'|)\,\sigma/|\Delta'|`:
    an error of one rounding of the network's output becomes at most one of κ roundings in x0, of size one.
    """
    c, net = denoiser.conventions, denoiser.net
    if not isinstance(net, Reexpressed):
        return 1.0, c.t_range[1]
    t = _times(c)
    p, q, grown, kappa = aligned(
        t,
        *net.wanted.rows(t, net.schedule),
        net.wanted.amplification(t, net.schedule).x0,
        net.source.condition(t, net.schedule, net.wanted),
    )
    # At σ = 0 nothing is left to amplify, where a row may be infinite.
    kappa = (kappa * (p.abs() + q.abs()) * grown).nan_to_num(0.0).reshape(len(t), -1).amax(1)
    worst = int(kappa.argmax())
    return float(kappa[worst]), float(t[worst])


@dataclass(frozen=True)
class Conversion:
    """A model that was converted and written.

    Attributes:
        out: where it is. format: in which form.
        source, to: what it predicted, and what it predicts now, as plain data.
        t_range: the times it is for.
        condition, at: by how much rounding grows at worst on the way to x0, and at which t.
    """

    out: str
    format: str
    source: dict[str, Any]
    to: dict[str, Any]
    t_range: list[float]
    condition: float
    at: float
    #: What a user of it should know.
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return dict(vars(self))

    def _rounding(self) -> str:
        return (
            f"an error of one rounding in its output is at most {self.condition:.3g} of them in x0 (at t = {self.at:g})"
        )

    def text(self) -> str:
        """For a reader."""
        was, now = (prediction(config).words for config in (self.source, self.to))
        if self.source == self.to:
            what = f"it predicts {now}, as before"
        else:
            what = f"it predicted {was}; now {now}\n{self._rounding()}"
        what = "\n".join([what, *self.notes])
        return f"{what}\n{self.format} model for t in [{self.t_range[0]:g}, {self.t_range[1]:g}]: {self.out}"


def convert_model(
    where: str | Path,
    to: str | dict[str, Any] | None,
    out: str | Path,
    *,
    form: str = "reparam",
    t_range: tuple[float, float] | None = None,
    spec: Spec | Mapping[str, Any] | str | Path | None = None,
) -> Conversion:
    """Convert a model and write it.

    Args:
        where: the folder of a run, or a .safetensors file with its spec.
        to: the target; for diffusers' form the model's own by default.
        out: a .safetensors file, or a folder for ``model.safetensors``; for diffusers' form a folder.
        form: "reparam" or "diffusers".
        t_range: see :func:`reexpress`.
        spec: what the weights do not say of themselves, or say wrongly, as in :func:`reparam.load`.

    Raises:
        ReparamError: if it cannot be read, converted or written.
    """
    from ..studies.sampling import opened, recipe_beside

    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if to is None and form == "reparam":
        raise ReparamError("a conversion needs a target: --to v, or --to '{name: k, k: 0.3}'.")
    weights = weights_file(where)
    model = opened(weights, recipe_beside(weights), spec)
    own = model.conventions.predicted()
    made = reexpress(model, own if to is None else _asked(to), t_range=t_range)
    path, notes = (_to_diffusers if form == "diffusers" else _written)(made, Path(out), weights)
    kappa, at = worst_condition(made)
    now = made.conventions.predicted().config()
    return Conversion(str(path), form, own.config(), now, list(made.t_range), kappa, at, notes)


def _asked(to: str | dict[str, Any]) -> Any:
    """What was asked for: a name, a mapping, or a row p=…,q=…"""
    if isinstance(to, dict) and "name" not in to:
        raise ReparamError(f"--to: a mapping has the name of a target, {{name: v}}; found {to}.")
    return named_target(to) if isinstance(to, str) and not to.endswith(".py") else to


def _to_diffusers(model: Denoiser, out: Path, source: Path) -> tuple[Path, list[str]]:
    from ..interop import to_diffusers

    if out.suffix in (".safetensors", *_NO_FOLDER):
        raise OutputError(f"--out {out}: a pipeline of diffusers is a folder; expected the name of one.")
    if isinstance(model.net, Reexpressed):
        raise Unsupported(
            f"diffusers loads a network, and no map around one: the network in {source} predicts "
            f"{model.net.source.name}, and diffusers is to be told {model.net.wanted.name}. Write it as what it "
            f"predicts (--to {model.net.source.name})."
        )
    return out, to_diffusers(model, out)


def _written(model: Denoiser, out: Path, source: Path) -> tuple[Path, list[str]]:
    if out.suffix in _NO_FOLDER and not out.is_dir():
        raise OutputError(f"--out {out}: expected a name that ends in .safetensors, or a folder.")
    path = out if out.suffix == ".safetensors" else out / "model.safetensors"
    if path.exists() and path.samefile(source):
        raise OutputError(f"{path} is the model itself; choose another place (--out).")
    # A recipe alone beside another name is one of the reader's own.
    marks = ["recipe.yaml"] if path.name == "model.safetensors" else ["recipe.yaml", "metrics.jsonl"]
    of_a_run = all((path.parent / mark).exists() for mark in marks)
    if path.exists() or of_a_run:
        what = f"{path} exists" if path.exists() else f"{path.parent} is the folder of a run"
        raise OutputError(f"{what}; nothing was touched. Choose another place (--out), or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}. Choose another place (--out).") from e
    save(model, path)
    return path, []
