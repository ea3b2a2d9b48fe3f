"""Errors of the Hub and of the network: retried where that can help, otherwise explained."""

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
FIRST_WAIT_SECONDS = 2.0  # doubled from try to try
LONGEST_WAIT_SECONDS = 300.0  # a Hub that asks for more is not waited for
EXPECTED: tuple[type[BaseException], ...] = (*TRANSPORT_ERRORS, RuntimeError, ValueError)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass
class Attempts:
    """Runs requests for `repo`, a few times each. token: what no message may show.

    huggingface_hub itself tries most requests again, but not the ones that make a repository, a branch or a commit.
    """

    repo: str
    token: str
    tell: Listener
    sleep: Callable[[float], None]

    def __call__(self, doing: str, work: Callable[[], T]) -> T:
        """What `work()` returns. doing: "making the repository".

        Raises PublishError when it is refused, or when it has failed TRIES times.
        """
        for attempt in range(1, TRIES + 1):
            try:
                return work()
            except EXPECTED as error:
                wait = _wait(error, attempt)
                if wait is None or attempt == TRIES:
                    raise self._fault(doing, error, attempt) from self._cause(error)
                self.tell(Progress("push", attempt, TRIES, f"{doing}: {_kind(error)}; again in {wait:.0f} s"))
                self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _fault(self, doing: str, error: BaseException, attempt: int) -> PublishError:
        return PublishError(self._safe(f"{doing} failed: {self._words(error, attempt)}"))

    def _words(self, error: BaseException, attempt: int) -> str:
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
                f"you or an organisation in which you may write{self._said(error)}"
            )
        if status == 404:
            return (
                f"{self.repo} is not there for this token (404): check the name and the branch, and that the token "
                "may see it"
            )
        if status in (409, 412):
            return (
                f"the Hub reports a conflict ({status}): something else is changing {self.repo} at this moment; "
                f"look at what is there, then push again{self._said(error)}"
            )
        again = "push again later, what has arrived is not sent twice"
        if status is not None:
            tried = f" after {attempt} tries" if status in TRANSIENT else ""
            return f"the Hub answers {status}{tried}{self._said(error)}; " + again
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to push"
        if _transient(error):
            return f"no connection to {constants.ENDPOINT} after {attempt} tries ({_last(error)}); {again}"
        return _last(error)

    def _said(self, error: BaseException) -> str:
        """Return the reason that the Hub gave, if it did."""
        found = next((link for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)
        said = getattr(found, "server_message", None)
        return f": {' '.join(said.split())[:200]}" if said else ""

    def _cause(self, error: BaseException) -> BaseException | None:
        """Return `error` for a traceback; None where the traceback would show the token."""
        return None if any(self.token in str(link) for link in _chain(error)) else error

    def _safe(self, text: str) -> str:
        return " ".join(text.split()).replace(self.token, "[token]")


def _wait(error: BaseException, attempt: int) -> float | None:
    """Return the seconds before the next attempt; None where another attempt cannot help."""
    if not _transient(error):
        return None
    found = next((link for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)
    asked = found.response.headers.get("Retry-After", "") if found is not None else ""
    wait = max(float(asked) if asked.isdigit() else 0.0, FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    return wait if wait <= LONGEST_WAIT_SECONDS else None


def _transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    lost = (TRANSPORT_ERRORS[0], ConnectionError, TimeoutError, json.JSONDecodeError)
    # The Xet client reports what it could not send as a RuntimeError without more.
    return isinstance(error, RuntimeError) or any(isinstance(link, lost) for link in _chain(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status behind `error`: huggingface_hub wraps a failed blob in an error of its own."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError):
            return int(link.response.status_code)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kind(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answers {status}" if status is not None else f"no connection ({type(error).__name__})"


def _last(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
