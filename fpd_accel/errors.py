"""Exceptions for problems that a user can correct: the command line prints the message alone and exits with code 2."""

from typing import TypeVar

EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped and saved; running the same command again continues


class Preempted(Exception):  # noqa: N818 - not an error
    """A run that was asked to stop and has saved a checkpoint, from which the same command continues.

    It is no `UserError`: nothing is wrong.
    """

    raised_everywhere = False  # as in `UserError`


class UserError(ValueError):
    """A problem outside the program. The message names the file or setting, what is wrong with it and what to do."""

    this_rank_only = False  # True: only this process met the problem, so it prints the message, whatever its rank
    raised_everywhere = False  # True: all processes raise the error at the same place, so rank 0 alone prints it


class ConfigError(UserError):
    """A recipe or skeleton that cannot be used; the message lists every mistake with its dotted path."""


class DataError(UserError):
    """A dataset, annotation file, image folder or set of shards that cannot be used."""


class ModelError(UserError):
    """An unknown architecture, an input that it cannot take, or a network with outputs of another form."""


class WeightsError(UserError):
    """A weights file that does not exist, cannot be read safely, or does not fit the model."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be written or resumed."""


class TrainingError(UserError):
    """Training that cannot continue: the loss is not finite, or processes differ from what the launcher promised."""


class BenchError(UserError):
    """A benchmark that would be meaningless, because the variants do not compute the same result."""


Failure = TypeVar("Failure", UserError, Preempted)


def message_of(error: UserError | Preempted) -> str:
    """Return the message of an error, without the traceback that PyTorch adds to one from a loader process."""
    return str(error).rstrip().rsplit(f"{type(error).__name__}: ", 1)[-1]


def this_rank_only(error: UserError) -> UserError:
    """Mark an error that only this process has met, and return it."""
    error.this_rank_only = True
    return error


def raised_everywhere(error: Failure) -> Failure:
    """Mark an error that all processes raise at the same place, and return it."""
    error.raised_everywhere = True
    return error
