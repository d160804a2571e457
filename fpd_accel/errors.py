"""What a user can get wrong, as exceptions: the command line prints their message alone and exits with code 2."""

from typing import TypeVar

EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not finished, but saved; the same command goes on


class Preempted(Exception):  # noqa: N818 - nothing is wrong
    """A run was asked to stop and has saved where it is; started again, it goes on. No :class:`UserError`."""

    agreed = False  # as of a UserError


class UserError(ValueError):
    """Something outside the program is wrong. The message names the path, what is wrong with it and what to do."""

    local = False  # True: only this process met it, so that it has to say so itself, whatever its rank
    agreed = False  # True: every process raises it, so that the first alone has to say it


class ConfigError(UserError):
    """A recipe or skeleton cannot be used; the message lists every mistake with its dotted path."""


class DataError(UserError):
    """A dataset, annotation file, image folder or set of shards cannot be used."""


class ModelError(UserError):
    """No such architecture, or an input that the architecture cannot take."""


class WeightsError(UserError):
    """A weights file does not exist, cannot be read safely, or does not fit the model."""


class CheckpointError(UserError):
    """A run directory or checkpoint cannot be resumed."""


class TrainingError(UserError):
    """Training cannot go on: the loss is no longer finite, or the processes are not what the launcher promised."""


class BenchError(UserError):
    """A measurement would be worthless: what is compared does not compute the same."""


Failure = TypeVar("Failure", UserError, Preempted)


def said(error: UserError | Preempted) -> str:
    """Its message; without the traceback that one from a loader process comes with."""
    return str(error).rstrip().rsplit(f"{type(error).__name__}: ", 1)[-1]


def local(error: UserError) -> UserError:
    """The error, as one that only this process has met."""
    error.local = True
    return error


def agreed(error: Failure) -> Failure:
    """The error, as one that every process raises at the same place."""
    error.agreed = True
    return error
