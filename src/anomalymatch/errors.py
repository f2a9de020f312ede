"""Errors shown to the user as one sentence, without a stack trace."""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires

from anomalymatch.types import Reject


class AnomalyMatchError(Exception):
    """Base class of all errors with a message for the user.

    Example:
        >>> try:
        ...     am.open_task("folder", "data.root=nowhere")
        ... except am.AnomalyMatchError as error:
        ...     print(type(error).__name__)
        DataError
    """


class ConfigError(AnomalyMatchError):
    """A key or value of the configuration is wrong."""


class MissingValueError(ConfigError):
    """A key without a default is not set."""


class DataError(AnomalyMatchError):
    """A dataset, archive or image folder is missing, empty or of another kind than expected."""


class DownloadError(DataError):
    """A download failed, or its checksum is wrong."""


class UnreadableImageError(DataError):
    """One image cannot be decoded; sources convert this error to a `Reject`.

    Args:
        reason: reason in words.
        temporary: True if the same image may be readable later. An error of the operating system as context (a file
            that may not be opened, a connection that broke) means that, too.
    """

    def __init__(self, reason: str, *, temporary: bool = False) -> None:
        super().__init__(reason)
        self._temporary = temporary

    @property
    def temporary(self) -> bool:
        """True if the same image may be readable later."""
        cause: BaseException | None = self
        while cause is not None:
            # Decoders raise OSError, too, for damaged files, but without a number.
            if isinstance(cause, OSError) and (cause.errno is not None or isinstance(cause, TimeoutError)):
                return True
            cause = cause.__cause__ or cause.__context__
        return self._temporary


class NoReadableImageError(DataError):
    """None of the images can be read.

    Args:
        message: the sentence for the user.
        rejects: the images and their reasons; they are not known if the error comes from another process.
    """

    def __init__(self, message: str, rejects: Sequence[Reject] = ()) -> None:
        super().__init__(message)
        self.rejects = rejects


class LabelError(AnomalyMatchError):
    """Labels have unknown images or classes, contradict each other, or are too few for training."""


class TrainingError(AnomalyMatchError):
    """The training diverged or the features collapsed, and there is no other model to take instead."""


class StorageError(AnomalyMatchError):
    """The disk is full, the folder is read-only, or a stored file is corrupt."""


def describe_missing_package(error: ModuleNotFoundError) -> str:
    """Describe a missing package and its installation, as the extra of this package that includes it."""
    module = str(error.name).partition(".")[0]
    try:
        requirements = requires("anomalymatch") or []
    except PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    for requirement in requirements:
        package, extra = re.match(r"([\w-]+)(?:.*extra == ['\"](\w+)['\"])?", requirement).groups()  # type: ignore[union-attr]
        if extra not in (None, "dev") and package.replace("-", "_").startswith(module):
            return f'the package {package} is missing: pip install "anomalymatch[{extra}]"'
    return f"the package {module} is missing: pip install {module}"
