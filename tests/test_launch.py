"""Launch files do what their first lines say: Accelerate's parser reads them, or they run without a GPU."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import PATIENCE

from fpd_accel.errors import EXIT_PREEMPTED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CONFIGS = sorted(LAUNCH.glob("*.yaml"))
SCRIPTS = (LAUNCH / "local.sh", LAUNCH / "slurm.sbatch")
LAUNCHERS = ("ACCELERATE_", "FSDP_", "SLURM_", "OMPI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_launcher_left_running() -> Iterator[None]:
    """Terminate the processes that a failed test has left, and kill them if they do not end."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def start(*command: str, environment: dict[str, str]) -> subprocess.Popen:
    STARTED.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    )
    return STARTED[-1]


@pytest.fixture
def environment() -> dict[str, str]:
    """Return an environment without GPU and launcher, with this Python first in the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    bin_folder = Path(sys.executable).parent
    return {**kept, "PATH": f"{bin_folder}:{kept['PATH']}", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def commands(path: Path) -> list[str]:
    """Return the commands in the comments of a launch file."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return [line for line in lines if line.startswith("accelerate launch ")]


def parsed(command: str, monkeypatch: pytest.MonkeyPatch):
    """Return the arguments that Accelerate reads from a command, and the environment of its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)[2:]))
    if arguments.use_fsdp or arguments.multi_gpu:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launch_file_sets_the_topology_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # raises on unknown keys, except nested ones
    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert set(config.fsdp_config) <= known.keys()
    assert (config.mixed_precision, config.dynamo_config) == ("no", {})
    assert commands(path), f"{path} does not begin with a command to type"
    for rank, command in enumerate(commands(path)):
        arguments, variables = parsed(command, monkeypatch)
        assert arguments.config_file == f"launch/{path.name}"
        assert (ROOT / arguments.training_script).is_file()
        several = path.stem not in ("cpu", "one_gpu", "one_process")
        assert arguments.multi_gpu or arguments.use_fsdp == several
        assert arguments.use_fsdp == ("fsdp2" in path.stem)
        assert (variables.get("ACCELERATE_USE_CPU") == "True") == (path.stem == "cpu")
        if path.stem.startswith("multi_node"):
            assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", rank)
            assert arguments.rdzv_endpoint == "10.0.0.1:29500"
            assert arguments.rdzv_backend == "static"
        elif several:
            assert arguments.nproc_per_node == "8"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*_fsdp2.yaml")), ids=lambda path: path.stem)
def test_fsdp_files_ask_for_what_the_trainer_can_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    _, variables = parsed(commands(path)[0], monkeypatch)
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    for name, value in variables.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing


def test_the_number_of_processes_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    command = commands(LAUNCH / "one_node_ddp.yaml")[0].replace("--num_processes 8 ", "")
    with pytest.raises(ValueError, match="--num_processes"):
        parsed(command, monkeypatch)


@pytest.fixture
def losses(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[str], list[float]]:
    """Return a function that reads the losses of a run by name."""

    def read(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["train_loss"] for record in map(json.loads, lines) if record["kind"] == "train"]

    return read


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path]) -> str:
    return str(tiny_recipe(data={"valid": None}, train={"freeze_norm": True}))


def launch(config: str, *options: str, recipe: str, name: str, environment: dict[str, str]) -> subprocess.Popen:
    command = ["accelerate", "launch", "--config_file", f"launch/{config}", *options, "recipes/distill.py"]
    command += ["--config", recipe, f"run.name={name}"]
    return start(*command, environment=environment)


def ends_well(*processes: subprocess.Popen) -> str:
    output = ""
    for process in processes:
        output += process.communicate(timeout=PATIENCE)[1]
    assert [process.returncode for process in processes] == [0] * len(processes), output[-3000:]
    return output


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.faults
@pytest.mark.parametrize("config", ["one_node_ddp.yaml", "one_node_fsdp2.yaml"])
def test_one_node_trains_as_one_process_does(
    config: str, recipe: str, environment: dict[str, str], losses: Callable
) -> None:
    output = ends_well(launch("cpu.yaml", recipe=recipe, name="one", environment=environment))
    assert "(1 x 4, " in output
    without_gpus = {**environment, "ACCELERATE_USE_CPU": "true"}
    output = ends_well(launch(config, "--num_processes", "2", recipe=recipe, name="two", environment=without_gpus))
    assert "(2 x 2, " in output
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("config", ["multi_node_ddp.yaml", "multi_node_fsdp2.yaml"])
def test_machines_join_under_the_address_of_the_first(config: str, recipe: str, environment: dict[str, str]) -> None:
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    options += ["--main_process_port", free_port()]
    without_gpus = {**environment, "ACCELERATE_USE_CPU": "true"}
    machines = [
        launch(config, *options, "--machine_rank", rank, recipe=recipe, name="two", environment=without_gpus)
        for rank in ("0", "1")
    ]
    assert "(2 x 2, " in ends_well(*machines)


def local(*arguments: str, environment: dict[str, str]) -> subprocess.Popen:
    return start(str(LAUNCH / "local.sh"), *arguments, environment=environment)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{folder} does not reach step {step}"
        time.sleep(0.02)


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "recipe.yaml"), ("recipe.yaml", "2")])
def test_local_names_its_missing_arguments(arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    process = local(*arguments, environment=environment)
    assert "launch/local.sh 2 RECIPE.yaml" in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2


def test_local_reports_a_mistake_once_with_its_exit_code(recipe: str, environment: dict[str, str]) -> None:
    process = local("2", recipe, "train.stepss=3", environment=environment)
    assert process.communicate(timeout=PATIENCE)[1].count("did you mean 'steps'?") == 1
    assert process.returncode == 2


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_local_saves_on_a_stop_signal_and_resumes(
    number: signal.Signals, recipe: str, environment: dict[str, str], tmp_path: Path, losses: Callable
) -> None:
    arguments = (recipe, "run.name=stopped", "optim.schedule=constant")
    process = local("2", *arguments, "train.steps=100000", environment=environment)
    wait_for_step(tmp_path / "stopped", 5, process)
    process.send_signal(number)
    output = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == EXIT_PREEMPTED, output
    assert "saved at step" in output
    steps = len(losses("stopped")) + 3
    ends_well(local("2", *arguments, f"train.steps={steps}", environment=environment))
    assert len(losses("stopped")) == steps


@pytest.mark.faults
def test_local_ends_when_a_process_is_killed(recipe: str, environment: dict[str, str], tmp_path: Path) -> None:
    process = local("2", recipe, "run.name=killed", "train.steps=100000", environment=environment)
    wait_for_step(tmp_path / "killed", 3, process)
    ranks = subprocess.run(
        ["pgrep", "--parent", str(process.pid), "python"], capture_output=True, text=True, check=True
    )
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: only the syntax was checked")
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_script_asks_for_a_recipe(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [LAUNCH / "slurm.sbatch"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sbatch launch/slurm.sbatch RECIPE.yaml" in done.stderr


def test_slurm_script_asks_for_an_environment(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [LAUNCH / "slurm.sbatch", "recipe.yaml"],
        cwd=ROOT, env={**environment, "FPD_ACTIVATE": "no/such/file"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "FPD_ACTIVATE" in done.stderr
