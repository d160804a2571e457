"""A Slurm cluster of two nodes on this host: munged, slurmctld and two slurmd in one temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

TEMPLATE = Path(__file__).with_name("slurm.conf")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
INSTALLING = 300  # seconds for each of two apt-get commands
PACKAGES = ("slurm-wlm", "slurm-client", "munge")


def why_not() -> str | None:
    """Return the reason why no cluster can run here, or None; install Debian's packages if necessary and possible."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    if missing() and (problem := install()) is not None:
        return problem
    return f"still without {', '.join(missing())} after {', '.join(PACKAGES)} were installed" if missing() else None


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def install() -> str | None:
    """Install Debian's packages; return the reason if that fails, else None."""
    if shutil.which("apt-get") is None:
        return f"no Slurm, and no apt-get to install {', '.join(PACKAGES)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=INSTALLING, check=False
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]}: not done after {INSTALLING} s"
        if done.returncode:
            return f"apt-get {command[0]}: {done.stderr.strip()[-300:]}"
    return None


class Cluster:
    """A cluster that starts on entry and stops on exit; `run` calls Slurm's commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        ports = dict(zip(("ctld_port", "n1_port", "n2_port"), free_ports(3), strict=True))
        settings = TEMPLATE.read_text().format(host=socket.gethostname(), folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(settings)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *options)
            self._until((self.folder / "munge.socket").exists, "munged does not answer")
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", "n1")
            self._start("slurmd", "-D", "-N", "n2")
            self._until(
                lambda: self.run("sinfo", "--noheader", "--format=%D %t", "--partition=main", check=False) == "2 idle",
                "the nodes do not come up",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the jobs, so that no task outlives its daemon; then the daemons in reverse order."""
        if len(self._daemons) == 4:
            self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """Run a command with `variables` besides the environment, and return its stdout."""
        done = subprocess.run(
            command, env={**self.environment, **variables}, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints: JobState, Restarts, ExitCode and more."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of these states and return its fields; any other final state is a failure."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            output = Path(job["StdOut"])
            problem = f"job {number} is {job['JobState']}: {output.read_text() if output.is_file() else 'no output'}"
            assert job["JobState"] not in final, problem
            assert time.monotonic() < deadline, f"after {seconds} s {problem}"
            time.sleep(0.2)
        return job

    def cancel_all(self) -> None:
        """Cancel all jobs and wait for their end; KillWait ends those that do not end themselves."""
        deadline = time.monotonic() + 30
        while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            self.run("scancel", "--user=root", check=False)
            time.sleep(0.2)

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program)
        assert path is not None
        with (self.folder / f"{program}-{len(self._daemons)}.out").open("w") as output:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments], env=self.environment, stdout=output, stderr=output, start_new_session=True
                )
            )

    def _until(self, reached, problem: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            ended = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"{problem}; ended: {ended}; logs in {self.folder}:\n{logs}")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
