"""Files of the Hugging Face hub: from its cache on this machine, else fetched; errors are one sentence."""

from collections.abc import Sequence
from pathlib import Path

import requests

from anomalymatch.errors import ConfigError, DownloadError
from anomalymatch.text import reason

HUB_TIMEOUT_S = 5.0


def hub_file(repository: str, names: Sequence[str], *, otherwise: str) -> Path:
    """Return the first of the files `names` that a repository has, from the cache or fetched now.

    Args:
        repository: `OWNER/NAME`, with `@REVISION` if it is not the newest one.
        names: names of files in it, the preferred one first.
        otherwise: what to do without the hub, such as "set model.weights=none"; a part of the error.

    Raises:
        ConfigError: if the name of the repository is not valid, or it has none of the files.
        DownloadError: if the repository is missing or gated, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    id_, _, version = repository.partition("@")
    revision = version or None
    try:
        cached = (try_to_load_from_cache(id_, name, revision=revision) for name in names)
        if found := next((path for path in cached if isinstance(path, str)), None):
            return Path(found)
        require_hub()
        for name in names:
            try:
                return Path(hf_hub_download(id_, name, revision=revision))
            except LocalEntryNotFoundError:  # the hub cannot be reached
                raise
            except EntryNotFoundError:
                continue
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no repository of the hub: its name must be OWNER/NAME") from error
    except Exception as error:  # the hub's client raises dozens of types; being offline is the common cause
        why = _explained(error, repository, otherwise)
        raise DownloadError(f"cannot fetch {repository} from the hub {why}") from error
    raise ConfigError(f"{repository} on the hub has no {' and no '.join(names)}: it holds no model of timm")


def check_repository(repository: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: if it is not OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("there is no owner")
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no repository of the hub: its name must be OWNER/NAME") from error


def push_folder(folder: Path, repository: str) -> None:
    """Upload a folder to a repository, which is made if there is none; then it is private.

    Raises:
        DownloadError: if the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, constants

    try:
        require_hub()
        api = HfApi(endpoint=constants.ENDPOINT)
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Network exported by anomalymatch")
    except Exception as error:  # see `hub_file`
        why = _explained(error, repository, f"upload {folder} later")
        raise DownloadError(f"cannot upload to {repository} on the hub {why}") from error


def _explained(error: Exception, repository: str, otherwise: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    refused = error.__cause__ or error  # some answers are raised as a missing file of the cache
    status = getattr(getattr(refused, "response", None), "status_code", None)
    id_, _, revision = repository.partition("@")
    if isinstance(error, GatedRepoError):
        return f"(it is gated): accept its conditions at {constants.ENDPOINT}/{id_}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return "(no such repository, or a private one): check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"(it has no revision {revision}): leave out @{revision}, or name another"
    shown = reason(error) if isinstance(error, _OfflineError) else type(error).__name__
    return f"({shown}): check the network, or {otherwise}"


class _OfflineError(ConnectionError):
    """The hub may not be asked."""


def require_hub() -> None:
    """Check that the hub can be reached, within seconds; the hub's own client retries for half a minute.

    Raises:
        Exception: of any kind, if it cannot.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _OfflineError("HF_HUB_OFFLINE is set, and it is not in the cache")
    requests.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S, allow_redirects=False)
