"""One run on several processes: who is there, who decides, and how all of them act in the same step."""

import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from fpd_accel.errors import DataError, Preempted, TrainingError, UserError, agreed, local, said
from fpd_accel.log import warn

if TYPE_CHECKING:
    from torch.distributed import Work

Result = TypeVar("Result")
Parallel = Literal["auto", "ddp", "fsdp2"]
PATIENCE = 5  # times the timeout, that collective operations wait: the watchdog speaks first, and more clearly
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # srun, Open MPI, MPICH
X86 = ("x86_64", "AMD64")  # as Linux and macOS, and as Windows call it
SIGNS_OF_SILENCE = ("onnection ", "Timed out waiting", "Application timeout")  # gloo's words for a process it lost


def create_accelerator(precision: str, *, parallel: Parallel = "auto", timeout_minutes: float = 30.0) -> Accelerator:
    """The one place that builds the Accelerator. The launcher says where to run, the recipe in which precision.

    Args:
        parallel: ``ddp`` copies the student to every rank, ``fsdp2`` shards it; ``auto``: as the launcher says.
        timeout_minutes: after which a collective operation counts as hanging (times ``PATIENCE``).

    Raises:
        TrainingError: the processes are not what the launcher promised, or an environment variable would overrule the
            recipe.
    """
    _check_launcher()
    sharded = parallel == "fsdp2" or (parallel == "auto" and _environment_says("ACCELERATE_USE_FSDP"))
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()  # Accelerate heeds the variable more than its argument
    # Batch statistics are float32 and must stay so: the student's precision is autocast's business, not the sharding's.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",  # by the classes that the student names as its units
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
    )
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        fsdp_plugin=plugin if sharded else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=PATIENCE * timeout_minutes)),
        ],
    )
    if accelerator.device.type == "cuda":  # batches of training have one size; as the published configurations have it
        torch.backends.cudnn.benchmark = True
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves one thread to each process, however many cores
        torch.set_num_threads(_cores_per_process(accelerator.num_processes))
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != promised:
        raise TrainingError(
            f"{promised} processes were started, but each trains alone; without a GPU tell Accelerate so: "
            "launch/local.sh N RECIPE.yaml, or "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N recipes/distill.py --config RECIPE.yaml"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise TrainingError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set; accumulation follows from train.global_batch and "
            "train.device_batch, so unset it"
        )
    if precision == "bf16" and not multiplies_bf16(accelerator.device):
        warn("precision bf16: this hardware has no bfloat16 arithmetic and emulates it; fp32 is many times faster")
    if sharded and accelerator.distributed_type != DistributedType.FSDP:
        if accelerator.num_processes == 1:
            return accelerator  # nothing to shard
        _shard_all_the_same(accelerator, plugin)
    return accelerator


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bfloat16 arithmetic. PyTorch emulates it where there is none, without a word."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN says so too of processors with AVX-512 and without bfloat16, on which it emulates it.
    has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine() not in X86 or has_it


def _check_launcher() -> None:
    for variable in OTHER_LAUNCHERS:
        tasks = int(os.environ.get(variable, "1"))
        if tasks > 1 and "WORLD_SIZE" not in os.environ:
            raise TrainingError(
                f"{tasks} processes were started ({variable}), but none knows of the others: RANK and WORLD_SIZE are "
                "not set; start them with `sbatch launch/slurm.sbatch RECIPE.yaml`, accelerate launch or torchrun"
            )


def _cores_per_process(processes: int) -> int:
    """What a scheduler gave to this process, else its part of the cores that it may run on."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given is not None and "SLURM_PROCID" in os.environ:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def _environment_says(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _shard_all_the_same(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate shards on accelerators alone, and gives DDP without a word elsewhere; PyTorch shards on gloo too."""
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def on_first_rank(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What a function gives on the first rank, on all of them; so does the :class:`UserError` that it raises.

    For whatever has to be the same everywhere although each rank might see it otherwise: the state of a disk.
    """
    if accelerator.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = (type(error), str(error))
        except Exception as error:  # nobody may be left waiting, whatever it is
            broadcast_object_list([None, (TrainingError, f"rank 0 failed: {type(error).__name__}: {error}")])
            raise
    broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        kind, message = problem
        raise agreed(kind(message))
    return result


@contextmanager
def explaining_silence(accelerator: Accelerator, where: str, *, intact: Callable[[], str] = str) -> Iterator[None]:
    """Whatever waits for a process that is gone, or says nothing for too long, gets an error: it becomes a message.

    Args:
        where: what the message begins with.
        intact: says what there is to go on from.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        lost = isinstance(error, dist.DistError) or any(sign in message for sign in SIGNS_OF_SILENCE)
        if accelerator.num_processes == 1 or not lost:
            raise
        raise local(
            TrainingError(
                f"{where}: another process is gone, or hangs ({message}); its own message says why; "
                f"{', and '.join(filter(None, (intact(), 'the same command goes on')))}"
            )
        ) from None


def leave() -> None:
    """Take leave of the other processes at the end, as NCCL asks for."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_every_rank(accelerator: Accelerator, function: Callable[[], Result], *, same: Callable[[Result], Any]) -> Result:
    """What a function gives on each rank, if it goes well on all of them and is the same by ``same``.

    For what each process opens itself. The :class:`UserError` of the first that has one is raised on all, as it is
    where one was asked to stop; what else goes wrong is raised where it did.

    Raises:
        DataError: the ranks have opened different things.
        TrainingError: something unforeseen went wrong on another rank.
    """
    if accelerator.num_processes == 1:
        return function()
    here = f"rank {accelerator.process_index} on {socket.gethostname()}"
    result: Result | None = None
    found, problem, unforeseen = "", None, None
    try:
        result = function()
        found = repr(same(result))
    except (UserError, Preempted) as error:
        problem = type(error), said(error) if accelerator.is_main_process else f"{here}: {said(error)}"
    except Exception as error:  # nobody may be left waiting, whatever it is
        problem, unforeseen = (TrainingError, f"{here} failed: {type(error).__name__}: {error}"), error
    answers: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(answers, (here, found, problem))
    if unforeseen is not None:
        raise unforeseen
    for _, _, problem in answers:
        if problem is not None:
            kind, message = problem
            raise agreed(kind(message))
    first, expected, _ = answers[0]
    for where, opened, _ in answers:
        if opened != expected:
            raise agreed(
                DataError(
                    f"{where} has opened other data or weights than {first}: {opened}, not {expected}; all machines "
                    "need the same files"
                )
            )
    assert result is not None
    return result


class Consensus:
    """Flags of which each rank knows a part, and upon which all have to act in the same step.

    :meth:`exchange` sends this step's flags and returns what the step before came to. The reduction runs on the CPU
    beside the step: the device is not asked, and no rank waits for one that is less than a step behind.
    """

    def __init__(self, flags: Sequence[str], *, ranks: int, minutes: float = 30.0) -> None:
        self.flags = tuple(flags)
        timeout = timedelta(minutes=PATIENCE * minutes)
        self._group: Any = None
        if ranks > 1:
            try:
                self._group = dist.new_group(backend="gloo", timeout=timeout)
            except RuntimeError as error:
                raise TrainingError(
                    f"the processes do not reach each other over gloo ({' '.join(str(error).split())}); "
                    "GLOO_SOCKET_IFNAME names the network interface to use, such as eth0"
                ) from None
        self._pending: tuple[Work, torch.Tensor] | None = None

    def exchange(self, raised: set[str]) -> set[str]:
        """The flags that any rank raised one step ago; on a single process those of now."""
        if self._group is None:
            return raised
        before = self.settle()
        values = torch.tensor([flag in raised for flag in self.flags], dtype=torch.int32)
        self._pending = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True), values
        return before

    def settle(self) -> set[str]:
        """The flags still under way, to be asked for once at the end."""
        if self._pending is None:
            return set()
        work, values = self._pending
        work.wait()
        self._pending = None
        return {flag for flag, value in zip(self.flags, values.tolist(), strict=True) if value}
