"""What a user can get wrong, as exceptions: the command line prints their message alone and exits with code 2."""


class UserError(ValueError):
    """Something outside the program is wrong. The message names the path, what is wrong with it and what to do."""


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
