"""Errors shown to the user as one sentence, without a stack trace."""


class AnomalyMatchError(Exception):
    """Base class of all errors with a message for the user."""


class ConfigError(AnomalyMatchError):
    """A key or value of the configuration is wrong."""


class MissingValueError(ConfigError):
    """A key without a default is not set."""


class DataError(AnomalyMatchError):
    """A dataset, archive or image folder is missing, empty or of another kind than expected."""


class DownloadError(DataError):
    """A download failed, or its checksum is wrong."""


class UnreadableImageError(DataError):
    """One image cannot be decoded; sources convert this error to a `Reject`."""


class LabelError(AnomalyMatchError):
    """Labels have unknown images or classes, contradict each other, or are too few for training."""


class TrainingError(AnomalyMatchError):
    """The training diverged, and there is no other model to rank with."""


class StorageError(AnomalyMatchError):
    """The disk is full, the folder is read-only, or a stored file is corrupt."""
