"""One run on several processes: the Accelerator, calls that all ranks make together, and flags that they share."""

import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

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

from fpd_accel.console import warn
from fpd_accel.errors import (
    DataError,
    Preempted,
    TrainingError,
    UserError,
    message_of,
    raised_everywhere,
    this_rank_only,
)

Result = TypeVar("Result")
COLLECTIVE_TIMEOUT_FACTOR = 5
"""Multiple of `train.timeout_minutes` that collective operations wait, so that the watchdog reports a hang first."""
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # srun, Open MPI, MPICH
X86 = ("x86_64", "AMD64")  # names of the architecture on Linux and macOS, and on Windows
LOST_PEER = ("onnection ", "Timed out waiting", "Application timeout")  # parts of gloo's messages about a lost process


def create_accelerator(
    precision: str, *, parallel: Literal["auto", "ddp", "fsdp2"] = "auto", timeout_minutes: float = 30.0
) -> Accelerator:
    """Build the Accelerator. The launcher decides where to run, the recipe in which precision.

    Args:
        precision: `fp32` or `bf16`.
        parallel: `ddp` copies the student to every rank, `fsdp2` shards it; `auto` follows the launcher.
        timeout_minutes: After `COLLECTIVE_TIMEOUT_FACTOR` times this, a collective operation fails.

    Raises:
        TrainingError: There are other processes than the launcher announced, or an environment variable would overrule
            the recipe.
    """
    _check_launcher()
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    sharded = parallel == "fsdp2" or (parallel == "auto" and launched)
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()  # Accelerate prefers it to its argument
    # Batch statistics must stay float32, so the precision is left to autocast instead of FSDP2.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",  # by the classes that `Student` names
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
    )
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        fsdp_plugin=plugin if sharded else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=COLLECTIVE_TIMEOUT_FACTOR * timeout_minutes)),
        ],
    )
    if accelerator.device.type == "cuda":  # training batches have one size; the published configurations do so too
        torch.backends.cudnn.benchmark = True
    if accelerator.device.type == "cpu":  # `accelerate launch` gives each process one thread
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
    if sharded and not is_sharded(accelerator) and accelerator.num_processes > 1:
        _shard_on_processors(accelerator, plugin)
    return accelerator


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 arithmetic. PyTorch emulates it silently where there is none."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN also says so of processors with AVX-512 but without bfloat16, where it emulates it.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine() not in X86 or has_bf16


def _check_launcher() -> None:
    for variable in OTHER_LAUNCHERS:
        tasks = int(os.environ.get(variable, "1"))
        if tasks > 1 and "WORLD_SIZE" not in os.environ:
            raise TrainingError(
                f"{tasks} processes were started ({variable}), but each runs alone, because RANK and WORLD_SIZE are "
                "not set; start them with `sbatch launch/slurm.sbatch RECIPE.yaml`, accelerate launch or torchrun"
            )


def _cores_per_process(processes: int) -> int:
    """Return the cores that a scheduler gave to this process, else its share of those that it may run on."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given is not None and "SLURM_PROCID" in os.environ:
        return int(given)
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def _shard_on_processors(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let Accelerate shard on processors too, where it silently falls back to DDP although PyTorch shards over gloo.

    This is the one place that writes to Accelerate's private state: `AcceleratorState` chooses FSDP by the type of the
    device alone (accelerate 1.15), and no upstream issue asks for another way yet. It serves tests and small machines.
    """
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the student is sharded over ranks (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def run_on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Run `function` on rank 0 and broadcast its result, or its `UserError`, to all ranks.

    For decisions that all ranks have to share although each might see something else, such as the content of a disk.
    """
    if accelerator.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = (type(error), str(error))
        except Exception as error:  # whatever it is: the other ranks are waiting
            broadcast_object_list([None, (TrainingError, f"rank 0 failed: {type(error).__name__}: {error}")])
            raise
    broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        kind, message = problem
        raise raised_everywhere(kind(message))
    return result


@contextmanager
def translate_comm_errors(accelerator: Accelerator, where: str, *, intact: Callable[[], str] = str) -> Iterator[None]:
    """Re-raise gloo and NCCL connection and timeout errors as TrainingError.

    The message begins with `where`, and ends with what `intact` returns: from which checkpoint the run can continue.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        lost = isinstance(error, dist.DistError) or any(sign in message for sign in LOST_PEER)
        if accelerator.num_processes == 1 or not lost:
            raise
        raise this_rank_only(
            TrainingError(
                f"{where}: the connection to another rank was lost or timed out ({message}); see that rank's error; "
                f"{', and '.join(filter(None, (intact(), 'the same command goes on')))}"
            )
        ) from None


def shutdown() -> None:
    """Destroy the process group at the end, as NCCL requires."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_on_all(accelerator: Accelerator, function: Callable[[], Result], *, same: Callable[[Result], Any]) -> Result:
    """Run `function` on every rank, and return its result if it succeeds on all ranks and agrees between them.

    For files that each process opens itself. A `UserError` or `Preempted` of any rank is raised on all ranks; any other
    exception is raised where it occurred.

    Args:
        accelerator: Knows the ranks.
        function: Called on every rank.
        same: Returns the part of the result that has to be equal on all ranks.

    Raises:
        DataError: The results differ.
        TrainingError: Another rank failed for an unforeseen reason.
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
        problem = type(error), message_of(error) if accelerator.is_main_process else f"{here}: {message_of(error)}"
    except Exception as error:  # whatever it is: the other ranks are waiting
        problem, unforeseen = (TrainingError, f"{here} failed: {type(error).__name__}: {error}"), error
    answers: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(answers, (here, found, problem))
    if unforeseen is not None:
        raise unforeseen
    for _, _, problem in answers:
        if problem is not None:
            kind, message = problem
            raise raised_everywhere(kind(message))
    first, expected, _ = answers[0]
    for where, opened, _ in answers:
        if opened != expected:
            raise raised_everywhere(
                DataError(
                    f"{where} has opened other data or weights than {first}: {opened}, not {expected}; all machines "
                    "need the same files"
                )
            )
    assert result is not None
    return result


class FlagReducer:
    """Combines flags that single ranks raise, so that all ranks act on them in the same step.

    `step` sends the flags of this step and returns those that any rank raised one step before. The reduction runs on
    the CPU beside the step, so that the device is not synchronised and no rank waits for one less than a step behind.

    Raises:
        TrainingError: The processes do not reach each other over gloo.
    """

    def __init__(self, flags: Sequence[str], *, ranks: int, minutes: float) -> None:
        self.flags = flags
        timeout = timedelta(minutes=COLLECTIVE_TIMEOUT_FACTOR * minutes)
        self._group: Any = None
        if ranks > 1:
            try:
                self._group = dist.new_group(backend="gloo", timeout=timeout)
            except RuntimeError as error:
                raise TrainingError(
                    f"the processes do not reach each other over gloo ({' '.join(str(error).split())}); "
                    "GLOO_SOCKET_IFNAME names the network interface to use, such as eth0"
                ) from None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def step(self, raised: set[str]) -> set[str]:
        """Return the flags that any rank raised one step ago; on a single process those raised now."""
        if self._group is None:
            return raised
        before: set[str] = set()
        if self._pending is not None:
            work, values = self._pending
            work.wait()
            before = {flag for flag, value in zip(self.flags, values.tolist(), strict=True) if value}
        values = torch.tensor([flag in raised for flag in self.flags], dtype=torch.int32)
        self._pending = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True), values
        return before


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
