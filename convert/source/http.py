"""Requests by HTTP that are repeated until they are answered, for a while."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # Documented, not re-exported.
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential

from slicecast.convert.errors import SlicecastError, first_line

# Seconds without a byte after which a request is repeated; a range of 16 MB takes a second where the network is busy.
TIMEOUT_SECONDS = 60

# With waits of 1, 2, 4, 8, 8, ... seconds, these outlast an interruption of a minute.
ATTEMPTS = 10

# Too slow, too many requests, and what servers say when something behind them fails.
_PASSING = (408, 429, 500, 502, 503, 504)

# Failures that follow each other within this time are of one outage: a request that is repeated may fail only after
# TIMEOUT_SECONDS, and the next attempt comes up to 8 seconds later.
_OUTAGE_SECONDS = 2 * TIMEOUT_SECONDS

# It warns of each request that it repeats, and gives the address with the signature that grants access.
logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _passes(error: BaseException) -> bool:
    """Whether an error may be over when the same is asked again: no answer, or one that says so."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return _is_no_answer(error) and not isinstance(error, HFValidationError | SlicecastError)


def _is_no_answer(error: BaseException) -> bool:
    """Whether a connection was not made, or broke off: not what a server has answered, and not Ctrl-C."""
    return isinstance(error, Exception) and not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled)


def without_query(error: BaseException | str) -> str:
    """The first line of an error, without the signatures that addresses carry."""
    return " ".join(word.partition("?")[0] if "://" in word else word for word in first_line(error).split())


class OutageNotice:
    """Says once in an outage that requests are repeated, and why. Used from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last: float | None = None
        self._lock = threading.Lock()

    def note(self, host: str | None, error: BaseException) -> None:
        """Takes note of a failed request to a host that is about to be repeated."""
        with self._lock:
            last, self._last = self._last, self._clock()
            if last is not None and self._last - last < _OUTAGE_SECONDS:
                return
        print(
            f"slicecast: {host} does not answer as it should ({without_query(error)}); trying again for about a minute",
            file=sys.stderr,
            flush=True,
        )


_notice = OutageNotice()


def _note_of_hub(state: RetryCallState) -> None:
    _note(constants.ENDPOINT, state)


def _note_of_request(state: RetryCallState) -> None:
    _note(state.args[1], state)


def _note(url: str, state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        _notice.note(urlsplit(url).hostname, error)


# For functions that ask the Hub through its library.
until_answered = retry(
    retry=retry_if_exception(_passes),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(max=8),
    before_sleep=_note_of_hub,
    reraise=True,
)


# For connections that are not made or break off. Not for what a server has answered.
@retry(
    retry=retry_if_exception(_is_no_answer),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(max=8),
    before_sleep=_note_of_request,
    reraise=True,
)
def request(method: str, url: str, headers: Mapping[str, str], /) -> Any:
    """The response to a request, whose content is not compressed; waits as long as a server asks for.

    Raises:
      HfHubHTTPError: if a server answers for too long that it cannot answer now.
    """
    return http_backoff(
        method,  # type: ignore[arg-type]
        url,
        headers={"Accept-Encoding": "identity", **headers},
        timeout=TIMEOUT_SECONDS,
        max_retries=ATTEMPTS - 1,
        retry_on_status_codes=_PASSING,
        # Repeated here already, with the others.
        retry_on_exceptions=(),
        follow_redirects=True,
    )
