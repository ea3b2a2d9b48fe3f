"""Errors of the Hub and of the network: transient ones are retried, the others explained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from mhconvert.errors import PublishError
from mhconvert.progress import Listener, Progress

from ..convert.donor.hub_download import TRANSPORT_ERRORS

T = TypeVar("T")
TRIES = 5
FIRST_WAIT_SECONDS = 2.0  # doubled after each attempt
LONGEST_WAIT_SECONDS = 300.0  # if the Hub asks for more, there is no further attempt
EXPECTED: tuple[type[BaseException], ...] = (*TRANSPORT_ERRORS, RuntimeError, ValueError)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass
class Attempts:
    """Runs requests for `repo` and retries them after transient errors.

    huggingface_hub retries most requests itself, but not the creation of a repository, a branch or a commit.

    Attributes:
        token: removed from every message.
        on_progress: told of every repeated attempt.
    """

    repo: str
    token: str
    on_progress: Listener
    sleep: Callable[[float], None]

    def __call__(self, doing: str, work: Callable[[], T]) -> T:
        """The result of `work()`.

        Args:
            doing: what it does, for messages: "making the repository".

        Raises:
            PublishError: the request was refused, or failed TRIES times.
        """
        for attempt in range(1, TRIES + 1):
            try:
                return work()
            except EXPECTED as error:
                wait = _wait(error, attempt)
                if wait is None or attempt == TRIES:
                    raise self._explain(doing, error, attempt) from self._cause(error)
                self.on_progress(
                    Progress("push", attempt, TRIES, f"{doing}: {_kind(error)}; again in {wait:.0f} s")
                )
                self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, doing: str, error: BaseException, attempt: int) -> PublishError:
        return PublishError(self._without_token(f"{doing} failed: {self._reason(error, attempt)}"))

    def _reason(self, error: BaseException, attempt: int) -> str:
        """What went wrong and what to do about it."""
        status, owner = _status(error), self.repo.partition("/")[0]
        if status == 401:
            return (
                "the Hub does not accept the token (401): expired, revoked or mistyped; "
                "run 'hf auth login', or set HF_TOKEN"
            )
        if status == 403:
            return (
                f"the token may not write to {self.repo} (403): it needs the role 'write', or, fine-grained, write "
                f"access to repositories of {owner}; see {constants.ENDPOINT}/settings/tokens, and that {owner} is "
                f"you or an organisation in which you may write{_server_message(error)}"
            )
        if status == 404:
            return (
                f"{self.repo} is not there for this token (404): check the name and the branch, and that the token "
                "may see it"
            )
        if status in (409, 412):
            return (
                f"the Hub reports a conflict ({status}): something else is changing {self.repo} at this moment; "
                f"look at what is there, then push again{_server_message(error)}"
            )
        again = "push again later, what has arrived is not sent twice"
        if status is not None:
            tried = f" after {attempt} tries" if status in TRANSIENT else ""
            return f"the Hub answers {status}{tried}{_server_message(error)}; " + again
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to push"
        if _transient(error):
            return f"no connection to {constants.ENDPOINT} after {attempt} tries ({_last(error)}); {again}"
        return _last(error)

    def _cause(self, error: BaseException) -> BaseException | None:
        """`error` as the cause in a traceback; None if the traceback would show the token."""
        return None if any(self.token in str(link) for link in _chain(error)) else error

    def _without_token(self, text: str) -> str:
        """`text` on one line, without the token."""
        return " ".join(text.split()).replace(self.token, "[token]")


def _http_error(error: BaseException) -> HfHubHTTPError | None:
    """The HTTP error in the chain of causes of `error`, if there is one."""
    return next((link for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)


def _server_message(error: BaseException) -> str:
    """The reason that the Hub gave, as ": reason"; empty if it gave none."""
    message = getattr(_http_error(error), "server_message", None)
    return f": {' '.join(message.split())[:200]}" if message else ""


def _wait(error: BaseException, attempt: int) -> float | None:
    """The seconds to wait before the next attempt; None if another attempt cannot help."""
    if not _transient(error):
        return None
    http_error = _http_error(error)
    retry_after = http_error.response.headers.get("Retry-After", "") if http_error is not None else ""
    wait = max(float(retry_after) if retry_after.isdigit() else 0.0, FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    return wait if wait <= LONGEST_WAIT_SECONDS else None


def _transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    lost = (TRANSPORT_ERRORS[0], ConnectionError, TimeoutError, json.JSONDecodeError)
    # The Xet client reports a failed upload as a plain RuntimeError.
    return isinstance(error, RuntimeError) or any(isinstance(link, lost) for link in _chain(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status in the chain of causes of `error`; huggingface_hub wraps the error of a failed upload."""
    http_error = _http_error(error)
    return None if http_error is None else int(http_error.response.status_code)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kind(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answers {status}" if status is not None else f"no connection ({type(error).__name__})"


def _last(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
