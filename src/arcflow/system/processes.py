"""Several processes as one.

`torchrun` starts the processes, FSDP2 shares the network out among them: each holds a part of every tensor, the frozen
base (which is teacher and student at once) like the trained weights, and sees its own rows of every batch. Gradients
are averaged, so that a run on any number of processes follows the same losses. With `shard` processes to a copy there
are several copies side by side (HSDP); with one, each process has a whole network, and only gradients travel. A process
alone goes the same way: every function here then gives back what it was given. Engine: torch.distributed
(`fully_shard`, DTensor, gloo and nccl).
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count as counted
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from arcflow.system.errors import first_line, sentence

T = TypeVar("T")

STORE = "ARCFLOW_STORE"
"""Environment variable with the file by which the processes of one machine find each other."""

STARTS = counted()
"""Numbers the runs that are started in these processes, one after the other."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; by default this one alone."""

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    """(copies, processes to a copy); None where each has a copy of its own."""
    side: dist.ProcessGroup | None = None
    """A process group (gloo) for the thread that reads prompts."""
    files: dist.ProcessGroup | None = None
    """One for the thread that writes checkpoints."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's rows of a batch."""
        if count % self.count:
            raise ValueError(
                f"a batch of {count} does not divide among {self.count} processes: expected a multiple of "
                f"{self.count}; change optim.batch"
            )
        each = count // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def share(self, count: int) -> list[int]:
        """This process's row numbers of what need not divide: the last ones begin again at 0."""
        each = -(-count // self.count)
        return [i % count for i in range(self.rank * each, (self.rank + 1) * each)]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Average over the processes."""
        if self.count == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.count).tolist(), strict=True))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is up on any of the processes, so that all of them act on it, or none."""
        if self.count == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(raised.bool().tolist())

    def gather(self, x: Float[Tensor, "rows *rest"]) -> Float[Tensor, "all_rows *rest"]:
        """The rows of all processes, in their order; all give equally many."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average their gradients over the processes; FSDP has done it for a network that is shared out."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or self.mesh or not gradients:
            return
        total = parameters_to_vector(gradients)
        dist.all_reduce(total)
        vector_to_parameters(total / self.count, gradients)

    def agree(self, make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `make` gives on the first process, for all; it must be something that can be pickled.

        Raises:
            OnAll: `make` has failed there; all processes are told, so that none waits for another.
        """
        if self.count == 1:
            return make()
        answer: list[Any] = [None, None]
        cause = None
        if self.first:
            try:
                answer[0] = make()
            except Exception as error:
                cause = error
                answer[1] = sentence(error) or first_line(error)
        dist.broadcast_object_list(answer, src=0, group=group or self.files)
        if answer[1] is not None:
            raise OnAll(answer[1]) from cause
        return answer[0]


class OnAll(ValueError):
    """What one process has met and all have been told, at the same place: each of them ends, or goes on."""


def processes() -> int:
    """How many `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def start(device: torch.device, shard: int | None = None) -> Iterator[Ranks]:
    """The processes of this run, on `device` each, with `shard` of them (default: all) to a copy of the network."""
    count = processes()
    each = shard or count
    if count % each:
        raise ValueError(
            f"{count} processes do not make whole copies of {each}: expected shard to divide the number of processes"
        )
    if count == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        # A store of its own: one that has served another run in these processes still tells where that one's were.
        store, rank = _meeting(count)
        store = dist.PrefixStore(f"arcflow/{next(STARTS)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    # FLUX's single blocks give views; nothing changes them in place, which is what FSDP fears.
    warnings.filterwarnings("ignore", ".*returned a view tensor.*", UserWarning)
    try:
        shape = (count // each, each)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shard")) if each > 1 else None
        alone = Ranks(rank=dist.get_rank(), count=count, mesh=mesh)
        yield replace(alone, side=dist.new_group(backend="gloo"), files=dist.new_group(backend="gloo"))
    finally:
        if ours:
            dist.destroy_process_group()


def _meeting(count: int) -> tuple[dist.Store, int]:
    """Where the processes find each other, and this one's number. `torchrun` names a host and a port; a file, which
    nobody else on the machine can read or write, does for those of one machine."""
    if path := os.environ.get(STORE):
        return dist.FileStore(path, count), int(os.environ["RANK"])
    store, rank, _ = next(dist.rendezvous("env://"))
    return store, rank


def shard(network: nn.Module, ranks: Ranks) -> nn.Module:
    """The same network, each process with its part of it. Quantized weights stay whole on every process."""
    if ranks.mesh is None:
        return network
    whole = {p for p in network.parameters() if type(p) is not nn.Parameter}
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=ranks.mesh, ignored_params=whole)
    # Of its own accord the root would keep what it gathered for the backward pass. After a measurement, which has none,
    # the next iteration would go on with the averaged weights.
    fully_shard(network, mesh=ranks.mesh, ignored_params=whole, reshard_after_forward=True)
    return network


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def in_parts(tensors: Iterable[Tensor]) -> bool:
    """Whether this process holds only its part of some of them."""
    return any(isinstance(x, DTensor) for x in tensors)


def writes(network: nn.Module) -> bool:
    """Whether this process is to write a network that all have gathered; each writes one that it holds alone."""
    return not in_parts(network.parameters()) or dist.get_rank() == 0


def local(x: Tensor) -> Tensor:
    """The part that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def shared_like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, shared out as `other` is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)
