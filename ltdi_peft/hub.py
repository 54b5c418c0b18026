"""Whole folders to the Hub and back.

In: a folder and a repository id.  Out: one commit there (`Pushed`); or the folder of a repository, cached.
Idea: private unless told otherwise, and what a repository holds is replaced only when told so. Every failure
is one sentence that says what to do; the Hub's client gives a page.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, as the client's version has it
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ltdi_peft.base import hub_reachable

OWN_FILE = ".gitattributes"  # what the Hub puts into every new repository
UNAUTHORISED, FORBIDDEN, CHANGED = 401, 403, 412  # HTTP


@dataclass(frozen=True)
class Pushed:
    """One upload: where it is, and the commit that pins it."""

    repo_id: str
    repo_type: str  # "model" or "dataset"
    revision: str  # commit, 40 hex digits
    url: str  # of the commit
    private: bool
    files: int


def is_folder(base_model: str) -> bool:
    """Whether this name of a base model means something on this machine only."""
    return not base_model or Path(base_model).is_absolute() or Path(base_model).is_dir()


def require_hub_base(base_model: str) -> None:
    """ValueError for a base model that nobody else could load an adapter onto."""
    if is_folder(base_model):
        raise ValueError(
            f"the base model is {base_model!r}, a folder of this machine: what is pushed must name a model "
            f"that others can load. Use `ltdi_peft.push(…, base_model='owner/name')` with its Hub id."
        )


def full_id(repo_id: str, token: str | None = None) -> str:
    """`owner/name`; a bare name belongs to whom the token belongs to."""
    if "/" in repo_id:
        return repo_id
    require_reachable(repo_id)
    with plain_errors(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def upload(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    message: str,
) -> Pushed:
    """Make a branch of `owner/name` hold exactly what `folder` holds; repository and branch are created.

    revision: a branch, None for main. Raises FileExistsError where the branch holds files, unless `overwrite`
    (its history keeps them); ValueError for a repository that is public already and was meant to be private;
    PermissionError for a token that is missing, wrong or may not write; ConnectionError, OSError.
    """
    require_reachable(repo_id)
    api = HfApi(token=token)
    with plain_errors(repo_id, revision):
        found = open_repository(api, repo_id, repo_type, private=private)
        head = open_branch(api, repo_id, repo_type, revision, overwrite=overwrite)
        done = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns="*",
            parent_commit=head,  # the Hub refuses if somebody else was quicker
        )
    files = sum(path.is_file() for path in folder.rglob("*"))
    return Pushed(repo_id, repo_type, done.oid, str(done.commit_url), bool(found.private), files)


def open_repository(api: HfApi, repo_id: str, repo_type: str, *, private: bool) -> ModelInfo | DatasetInfo:
    """The repository, created where there is none."""
    try:
        found = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type=repo_type, private=private)
        found = api.repo_info(repo_id, repo_type=repo_type)
    if not isinstance(found, ModelInfo | DatasetInfo):
        raise ValueError(f"{repo_id} is a {type(found).__name__}; expected a model or a dataset.")
    if private and not found.private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private in its settings, choose another name, or pass "
            f"private=False (--public)."
        )
    return found


def open_branch(api: HfApi, repo_id: str, repo_type: str, revision: str | None, *, overwrite: bool) -> str:
    """The commit that a branch is at; a branch that did not exist starts from main, which keeps its files."""
    try:
        found = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision), repo_type=repo_type)
        return str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
    held = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)) - {OWN_FILE}
    if held and not overwrite:
        raise FileExistsError(
            f"{repo_id} holds {len(held)} files at {revision or 'main'} already, first {min(held)}; nothing "
            f"was uploaded. Choose another name or revision, or pass overwrite=True (--overwrite) to replace "
            f"them."
        )
    return str(found.sha)


def download(
    repo_id: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a repository in the Hub's cache, named by its commit.

    Raises FileNotFoundError, PermissionError or OSError with one sentence.
    """
    with plain_errors(repo_id, revision):
        folder = snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            # Without a network the client would retry for 20 s before it looks no further than its cache.
            local_files_only=local_files_only or not hub_reachable(),
        )
    return Path(folder)


def require_reachable(repo_id: str) -> None:
    """ConnectionError when the Hub may not be asked or does not answer."""
    if not hub_reachable():
        hub_reachable.cache_clear()  # whoever repeats is asked for again
        raise ConnectionError(
            f"{repo_id}: {constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set; repeat"
        )


@contextmanager
def plain_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Within the block the client's errors become one sentence each."""
    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        raise plain(error, repo_id, revision) from error
    except RuntimeError as error:  # an upload that failed in one of the client's threads
        raise OSError(
            f"{repo_id}: {str(error).strip()} The Hub said: {said(error.__cause__ or error)}. Not all "
            f"of it is there: push again, with overwrite=True if the branch holds files by now."
        ) from error


def plain(error: Exception, repo_id: str, revision: str | None) -> OSError | ValueError:
    """The client's error as a built-in one, in one sentence."""
    if isinstance(error, HFValidationError):
        return FileNotFoundError(f"{repo_id!r} is no repository id; expected 'owner/name'")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo_id} has no revision {revision!r}: pass a branch, tag or commit of it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo_id} does not exist on {constants.ENDPOINT}, or is private and this token may not read "
            f"it: check the name, `hf auth login`, or pass token="
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{repo_id} is not in the Hub's cache, and {constants.ENDPOINT} cannot be asked"
        )
    if isinstance(error, HfHubHTTPError):
        return by_status(error, repo_id)
    return ConnectionError(
        f"{repo_id}: the connection to {constants.ENDPOINT} failed ({said(error)}); repeat."
    )


def by_status(error: HfHubHTTPError, repo_id: str) -> OSError:
    """What a status of HTTP means for a push or a download."""
    status = error.response.status_code
    if status == UNAUTHORISED:
        return PermissionError(
            f"{repo_id}: {constants.ENDPOINT} does not accept the token, or there is none: `hf auth login`, "
            f"set HF_TOKEN, or pass token="
        )
    if status == FORBIDDEN:
        return PermissionError(f"{repo_id}: this token may not write there; use one with write access")
    if status == CHANGED:
        return OSError(
            f"{repo_id} was changed by somebody else meanwhile; nothing was committed. Push again."
        )
    return OSError(f"{repo_id}: {constants.ENDPOINT} answered {status}: {said(error)}")


def said(error: BaseException) -> str:
    """The server's own words, else the error's first line."""
    words = error.server_message if isinstance(error, HfHubHTTPError) else None
    return (words or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
