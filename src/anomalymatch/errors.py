"""Every error that a user can cause or meet: one clear sentence each, never a stack trace."""


class AnomalyMatchError(Exception):
    """Base of all errors whose message is meant for the person at the keyboard."""


class ConfigError(AnomalyMatchError):
    """A key or value of the configuration is wrong."""


class MissingValueError(ConfigError):
    """A key that has no default was not set."""


class DataError(AnomalyMatchError):
    """A dataset, archive or image folder is missing, empty or not what it claims to be."""


class DownloadError(DataError):
    """A file could not be fetched, or its checksum is wrong."""


class UnreadableImageError(DataError):
    """One image cannot be decoded; sources turn it into a `Reject`."""


class LabelError(AnomalyMatchError):
    """Labels name unknown images or classes, contradict each other, or are too few to train on."""


class TrainingError(AnomalyMatchError):
    """A training diverged, and nothing is there to rank by in its place."""


class StorageError(AnomalyMatchError):
    """The disk is full, the folder is read-only, or a file written earlier is corrupt."""
