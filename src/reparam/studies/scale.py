"""What a training costs on GPUs that are not here: operations and bytes counted, not done; then a few formulas.

Counting runs the network's own forward and backward pass on tensors that have a shape and no content, so that a network
of any size is counted on any machine. With P parameters, k averages, B samples a step on n GPUs and b = B/n:

    memory    (16 + 4k) P + kept_fixed + kept·b/accumulate, and the data where they fit
    device    (forward + backward)·b/(fraction·peak) + (moved_fixed·accumulate + moved·b)/bandwidth
    compute   max(device, operations·accumulate·launch): small networks wait for the host
    reduce    2 (n − 1)/n · 4P/link + 2 (n − 1)·latency: a ring (0 for n = 1)
    update    (40 + 12k) P/bandwidth: clipping, AdamW, averages
    step      compute − backward part + max(backward part, reduce) + update, and no less than reading takes

What these leave out: the workspaces of libraries, fragments of memory, imbalance, validation, samples and scores.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..data import PICTURE_MEAN, PICTURE_STD, Data
from ..errors import ReparamError
from ..networks import network
from .recipe import RunConfig
from .run import _fitted

#: Of float32: weights, gradients and AdamW's two moments; and each average.
_STATE_BYTES, _AVERAGE_BYTES = 16, 4
#: Read and written in a step's end by norm and clipping (12), AdamW (28), and by each average.
_UPDATE_BYTES, _AVERAGING_BYTES = 40, 12
_GRADIENT_BYTES = 4
#: Pictures and classes of the data sets that recipes are meant for: at 32 pixels CIFAR-10, else ImageNet.
_CIFAR10, _IMAGENET = ("CIFAR-10", 50_000, 10), ("ImageNet", 1_281_167, 1000)
#: Two batches, small ones, from which what grows with the batch is told from what does not.
_BATCHES = (2, 4)


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Operations of attention: two products, [B, heads, N, d] with [B, heads, M, d]."""
    return int(4 * math.prod(query) * key[-2])


def _attention_backward(grad: Any, query: Any, key: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Twice as many; those that a kernel does anew to save memory are not counted."""
    return 2 * _attention(query, key, None)


#: What torch's counter does not know: attention as CPUs do it.
_MORE: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


#: Operations that do nothing.
_STILL = ("detach", "empty", "new_empty")


class _Moved(TorchDispatchMode):
    """Counts operations, and the bytes that each reads and writes; views and new empty tensors move none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and not func.__name__.startswith(_STILL):
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, out)) if isinstance(t, Tensor))
        return out


@dataclass
class Count:
    """What has been done inside :func:`counting`.

    Attributes:
        kept: bytes of what the forward pass leaves for the backward pass, weights themselves aside.
    """

    _flops: FlopCounterMode
    _moved: _Moved
    _storages: dict[int, Any] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products and convolutions; a multiplication and an addition are two."""
        return float(self._flops.get_total_flops())

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return float(self._moved.bytes)

    @property
    def operations(self) -> int:
        """How many operations the host has asked for."""
        return self._moved.operations

    @property
    def kept(self) -> float:
        return float(sum(storage.nbytes() for storage in self._storages.values()))


@contextlib.contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """Inside, all that is done with the module is counted, on real tensors or on ones without content."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    count = Count(FlopCounterMode(display=False, custom_mapping=_MORE), _Moved())

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            count._storages[storage._cdata] = storage
        return tensor

    # The last one sees operations first, before the other takes them to pieces.
    with count._flops, count._moved, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield count


@dataclass(frozen=True)
class Work:
    """What training asks of a network.

    Attributes:
        parameters: how many it has.
        forward, backward: floating-point operations a sample.
        kept, kept_fixed: bytes held from the forward to the backward pass, a sample and besides (weights in bf16).
        moved, moved_fixed: bytes read and written by all operations, a sample and besides.
        operations: that the host launches for one forward and backward pass.
    """

    parameters: int
    forward: float
    backward: float
    kept: float
    kept_fixed: float
    moved: float
    moved_fixed: float
    operations: int

    @property
    def flops(self) -> float:
        """Both passes, a sample."""
        return self.forward + self.backward


def stand_in(shape: tuple[int, ...], classes: int = 0, *, flip: bool = False) -> Data:
    """Data of a shape [C, H, W] with no content, for networks that are to fit pictures that are not at hand."""
    x, y = torch.zeros((1, *shape), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    labels = {"labels": y, "heldout_labels": y, "classes": tuple(map(str, range(classes)))} if classes else {}
    return Data(name="pictures", train=x, heldout=x, mean=PICTURE_MEAN, std=PICTURE_STD, flip=flip, **labels)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stated:
    """Pictures that are not at hand, as far as a recipe states them.

    Attributes:
        data: a stand-in of their shape. stored: bytes of one, and how many training ones there are.
        like: the data set from which their number, and that of their classes, is taken.
    """

    data: Data
    stored: tuple[float, int]
    like: str


def stated(config: RunConfig) -> Stated | None:
    """The pictures of a run whose recipe has no data.path; None where it has one, or does not state their size."""
    asked = config.data
    size = asked.get("size")
    if asked["name"] != "images" or asked.get("path") is not None or size is None:
        return None
    high, wide = (size, size) if isinstance(size, int) else size
    like, count, classes = _CIFAR10 if max(high, wide) == 32 else _IMAGENET
    shape = (1 if asked.get("colour") == "grey" else 3, high, wide)
    kept = round(min(count, asked.get("limit") or count) * (1 - asked.get("holdout", 0.1)))
    data = stand_in(shape, asked.get("classes") or classes, flip=asked.get("flip", False))
    return Stated(data, (math.prod(shape), kept), like)


def work_of(config: RunConfig, data: Data) -> Work:
    """What a run's network costs, counted on tensors without content; takes seconds, and a minute for billions.

    Mixed precision follows a CPU's rules of autocast, where normalisations stay in bf16.

    Raises:
        NetworkError: if the network cannot be made.
    """
    if config.network["name"] == "unet":
        with contextlib.suppress(ImportError):  # what it makes on import is to be real
            from diffusers import UNet2DModel  # noqa: F401
    arguments = {**config.network, **_fitted(config, data)}
    with FakeTensorMode():
        net = network(arguments)
        if config.train.checkpoint_activations:
            net.checkpoint_activations()  # type: ignore[operator]
        few, more = (_counted(net, config, data, batch) for batch in _BATCHES)
    each = _BATCHES[1] - _BATCHES[0]
    slope = {key: (more[key] - few[key]) / each for key in few}
    rest = {key: max(0.0, few[key] - _BATCHES[0] * slope[key]) for key in few}
    return Work(
        parameters=sum(p.numel() for p in net.parameters()),
        forward=slope["forward"],
        backward=slope["both"] - slope["forward"],
        kept=slope["kept"],
        kept_fixed=rest["kept"],
        moved=slope["moved"],
        moved_fixed=rest["moved"],
        operations=int(few["operations"]),
    )


def _counted(net: nn.Module, config: RunConfig, data: Data, batch: int) -> dict[str, float]:
    """One forward and backward pass of so many samples."""
    x, time = torch.randn(batch, *data.shape), torch.rand(batch)
    cond = {"y": torch.zeros(batch, dtype=torch.int64)} if config.conditional else {}
    bf16 = config.train.precision != "float32"
    with counting(net) as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x, time, **cond)
        forward = count.flops
        out.float().square().mean().backward()
    for p in net.parameters():
        p.grad = None
    found = {"forward": forward, "both": count.flops, "kept": count.kept, "moved": count.moved}
    return {**found, "operations": float(count.operations)}


@dataclass(frozen=True)
class Machine:
    """GPUs, nodes and what connects them. Assumptions, not measurements.

    Attributes:
        peak: bf16 operations a second of a GPU. fraction: of it that matrix products reach.
        bandwidth: of a GPU's memory, bytes a second. memory: bytes.
        launch: seconds of the host for an operation.
        node: GPUs in a node. link, across: bytes a second of an all-reduce, within a node and between nodes.
        latency: seconds of one of the 2 (n − 1) steps of a ring.
        reading: bytes of data a second that a node reads and decodes.
    """

    name: str = "NVIDIA H200"
    peak: float = 989e12
    fraction: float = 0.6
    bandwidth: float = 4.8e12
    memory: float = 141e9
    launch: float = 8e-6
    node: int = 8
    link: float = 300e9
    across: float = 150e9
    latency: float = 5e-6
    reading: float = 2e9

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to add up ``size`` bytes of gradients over GPUs, by a ring."""
        link = self.link if gpus <= self.node else self.across
        return 2 * (gpus - 1) / gpus * size / link + 2 * (gpus - 1) * self.latency


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU's memory during a step of training."""

    weights: float
    gradients: float
    optimiser: float
    averages: float
    activations: float
    data: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.averages + self.activations + self.data


def memory(parameter_bytes: float, averages: int, activations: float, data: float = 0.0) -> Memory:
    """Weights, gradients, two moments and averages of float32, and what else a step holds."""
    part = parameter_bytes
    return Memory(part, part, 2 * part, averages * part, activations, data)


def averages_of(config: RunConfig) -> int:
    """How many averages a run keeps."""
    return 1 + len(config.train.also_ema) + len(config.train.ema_widths)


@dataclass(frozen=True)
class Projection:
    """A run's training on a number of GPUs, computed.

    Attributes:
        gpus: how many. steps: of training.
        compute_s, reduce_s, update_s, read_s: what the parts of a step take. step_s: a step, with what overlaps.
        bound: what decides its length: "compute", "host", "network" or "reading".
        memory: of each GPU.
        read, reduced: bytes a step of data, by all GPUs, and of gradients, by each.
    """

    gpus: int
    steps: int
    compute_s: float
    reduce_s: float
    update_s: float
    read_s: float
    step_s: float
    bound: str
    memory: Memory
    read: float
    reduced: float

    @property
    def seconds(self) -> float:
        """All of training."""
        return self.steps * self.step_s


def project(work: Work, config: RunConfig, gpus: int, data: tuple[float, int], on: Machine | None = None) -> Projection:
    """The model at the head of this module.

    Args:
        work: what the network costs. gpus: how many share the batch.
        data: bytes of a sample as stored, and the number of samples.
        on: what it runs on.

    Raises:
        ReparamError: if the batch cannot be shared out evenly.
    """
    on, batch, k = on or Machine(), config.train.batch, averages_of(config)
    parts = gpus * config.train.accumulate
    if batch % parts:
        raise ReparamError(f"a batch of {batch} cannot be shared out evenly among {parts} parts.")
    share, p = batch / gpus, work.parameters
    resident = data[0] * data[1] if data[0] * data[1] <= on.memory / 4 else 0.0
    host = work.operations * config.train.accumulate * on.launch
    moved = work.moved_fixed * config.train.accumulate + work.moved * share
    device = work.flops * share / (on.fraction * on.peak) + moved / on.bandwidth
    compute = max(device, host)
    backward = compute * work.backward / work.flops / config.train.accumulate  # of the last part, while reducing
    reduced = _GRADIENT_BYTES * p
    reduce = on.all_reduce(reduced, gpus)
    update = (_UPDATE_BYTES + _AVERAGING_BYTES * k) * p / on.bandwidth
    read = 0.0 if resident else data[0] * batch
    reading = read / (on.reading * math.ceil(gpus / on.node))
    busy = compute - backward + max(backward, reduce) + update
    bounds = {"reading": reading > busy, "network": reduce > backward, "host": host > device}
    return Projection(
        gpus=gpus,
        steps=config.train.steps,
        compute_s=compute,
        reduce_s=reduce,
        update_s=update,
        read_s=reading,
        step_s=max(busy, reading),
        bound=next((name for name, holds in bounds.items() if holds), "compute"),
        memory=memory(4 * p, k, work.kept_fixed + work.kept * share / config.train.accumulate, resident),
        read=read,
        reduced=2 * (gpus - 1) / gpus * reduced,
    )
