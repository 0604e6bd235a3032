"""One repository of the hub at one commit: its files, their bytes, and what its refusals mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the hub's client is built on
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from torchtitan_flux.downloads.choose import DownloadError, RemoteFile

KNOWN = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
    "black-forest-labs/FLUX.1-Krea-dev",
    "black-forest-labs/FLUX.1-Kontext-dev",
    "black-forest-labs/FLUX.1-Fill-dev",
    "google/t5-v1_1-xxl",
    "openai/clip-vit-large-patch14",
)
"""Repositories that people mean here, offered where another is not found."""

HOW_TO_GIVE_A_TOKEN = "as --hf_token, in the environment as HF_TOKEN, or once with `hf auth login`"


class Hub:
    """A repository at the commit that its revision meant when `files` was first called.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None is the default branch.
        token: None takes HF_TOKEN, else the stored login, else none.
        endpoint: address of the hub; None takes HF_ENDPOINT, else huggingface.co.

    Raises:
        DownloadError: an endpoint or a token that cannot be one.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ):
        self.repo_id = repo_id
        self.revision = revision
        self.endpoint = endpoint or constants.ENDPOINT
        if not _is_address(self.endpoint):
            raise DownloadError(f"HF_ENDPOINT = {self.endpoint!r}: write https://huggingface.co")
        self.token_source = "--hf_token" if token else "HF_TOKEN or the stored login"
        self.token = token or get_token()
        if self.token and not (self.token.isascii() and self.token.isprintable()):
            raise DownloadError(f"the token of {self.token_source} has characters no token has")
        self._api = HfApi(endpoint=self.endpoint, token=self.token or False)
        self.commit = ""

    def files(self) -> list[RemoteFile]:
        """All files of the revision, with sizes and checksums.

        Raises:
            DownloadError: no such repository or revision, no access, no connection.
        """
        try:
            with self.explained():
                info = self._api.model_info(
                    self.repo_id,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
        except (ValueError, TypeError, KeyError) as error:  # no JSON, or not of this kind
            raise DownloadError(
                f"{self.endpoint} does not answer like a hub: check HF_ENDPOINT, and whether a "
                "login page of the network stands in between"
            ) from error
        self.commit = info.sha or self.revision or constants.DEFAULT_REVISION
        found = []
        for entry in info.siblings or []:
            path = PurePosixPath(entry.rfilename)
            if path.is_absolute() or ".." in path.parts:
                raise DownloadError(f"{self.repo_id} holds a file named {entry.rfilename}: refused")
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            if entry.size is None or digest is None:
                raise DownloadError(
                    f"{self.endpoint} names no size and checksum of {entry.rfilename}; it cannot "
                    "be verified (HF_ENDPOINT is not a complete hub?)"
                )
            found.append(RemoteFile(entry.rfilename, entry.size, digest, entry.lfs is not None))
        return found

    def check_access(self, file: RemoteFile) -> None:
        """Ask for a file without its bytes: anyone may list a gated repository, not read it.

        Raises:
            DownloadError: no access.
        """
        with self.explained():
            get_hf_file_metadata(
                self._url(file),
                token=self.token or False,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )

    @contextmanager
    def stream(self, file: RemoteFile, start: int) -> Iterator[Any]:
        """The response with the bytes of a file from `start` on; status 200: from its beginning.

        The hub's errors come out as they are, so that the caller can try again.
        """
        headers = build_hf_headers(token=self.token or False)
        headers["Accept-Encoding"] = "identity"  # ranges count the bytes of the file itself
        if start:
            headers["Range"] = f"bytes={start}-"
        with http_stream_backoff(
            "GET",
            self._url(file),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),  # a cut body must not be asked for again from the same start
        ) as response:
            hf_raise_for_status(response)
            yield response

    def _url(self, file: RemoteFile) -> str:
        return hf_hub_url(
            self.repo_id, file.name, revision=self.commit or self.revision, endpoint=self.endpoint
        )

    @contextmanager
    def explained(self, status: int = 2) -> Iterator[None]:
        """Turn whatever the hub's client raises into one DownloadError."""
        try:
            yield
        except HFValidationError:
            raise DownloadError(
                f"--repo_id {self.repo_id}: a repository is named owner/name, such as {KNOWN[0]}",
                status,
            ) from None
        except OfflineModeIsEnabled:
            raise DownloadError(
                "HF_HUB_OFFLINE is set, so nothing is downloaded; otherwise: unset HF_HUB_OFFLINE",
                status,
            ) from None
        except HfHubHTTPError as error:
            raise DownloadError(self._refusal(error), status) from error
        except HTTPError as error:
            raise DownloadError(
                f"no connection to {self.endpoint} ({str(error) or type(error).__name__}): check "
                "the network, HTTPS_PROXY and HF_ENDPOINT; the same command continues",
                status,
            ) from error

    def _refusal(self, error: HfHubHTTPError) -> str:
        """What an answer of the hub means and what to do about it."""
        code = error.response.status_code
        page = f"{self.endpoint}/{self.repo_id}"
        if code == 401 and self.token and not isinstance(error, GatedRepoError):
            return (
                f"the hub refuses the token of {self.token_source}: mistyped, expired or revoked? "
                f"Tokens: {self.endpoint}/settings/tokens"
            )
        if isinstance(error, GatedRepoError) or (code == 401 and not self.token):
            if not self.token:
                private = "" if isinstance(error, GatedRepoError) else " (if it exists)"
                return (
                    f"{self.repo_id}{private} needs a token, and none was given: make one at "
                    f"{self.endpoint}/settings/tokens and give it {HOW_TO_GIVE_A_TOKEN}; where "
                    f"{page} shows a licence, accept it there first{self._near_repository()}"
                )
            return (
                f"{self.repo_id} is gated, and the account of this token may not read it yet: "
                f"accept its licence at {page}, then run the same command again. A fine-grained "
                "token also needs the permission to read public gated repositories"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"--revision {self.revision}: {self.repo_id} has none such{self._revisions()}"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{error.response.url}: no such file any more"
        if isinstance(error, RepositoryNotFoundError) or code == 404:
            return (
                f"--repo_id {self.repo_id}: no such repository at {self.endpoint}, or a private "
                f"one that the token may not see{self._near_repository()}"
            )
        said = f" ({error.server_message})" if error.server_message else ""
        if code == 403:
            return f"the hub does not let this token read {self.repo_id}{said}"
        return f"the hub answered with status {code}{said}; run the same command again later"

    def _near_repository(self) -> str:
        near = get_close_matches(self.repo_id, KNOWN, n=2, cutoff=0.75)
        return f" (near: {', '.join(near)})" if near and self.repo_id not in KNOWN else ""

    def _revisions(self) -> str:
        """Its branches and tags, the nearest first, where they can be had."""
        try:
            refs = self._api.list_repo_refs(self.repo_id)
        except (HTTPError, ValueError):
            return ""
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        near = get_close_matches(self.revision or "", names, n=8, cutoff=0.0)
        return f"; it has {', '.join(near)}" if near else ""


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
