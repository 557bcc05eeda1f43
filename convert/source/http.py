"""Requests by HTTP that are repeated until they are answered, for a while."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # Documented, not re-exported.
from tenacity import retry, retry_if_exception, retry_if_not_exception_type, stop_after_attempt, wait_exponential

from slicecast.convert.errors import SlicecastError, first_line

# Seconds without a byte after which a request is repeated; a range of 16 MB takes a second where the network is busy.
TIMEOUT_SECONDS = 60

# With waits of 1, 2, 4, 8, 8, ... seconds, these outlast an interruption of a minute.
ATTEMPTS = 10

# Too slow, too many requests, and what servers say when something behind them fails.
_PASSING = (408, 429, 500, 502, 503, 504)

# It warns of each request that it repeats, and gives the address with the signature that grants access.
logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _passes(error: BaseException) -> bool:
    """Whether an error may be over when the same is asked again: no answer, or one that says so."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, HFValidationError | SlicecastError)


# For functions that ask the Hub through its library.
until_answered = retry(
    retry=retry_if_exception(_passes), stop=stop_after_attempt(ATTEMPTS), wait=wait_exponential(max=8), reraise=True
)


def without_query(error: BaseException | str) -> str:
    """The first line of an error, without the signatures that addresses carry."""
    return " ".join(word.partition("?")[0] if "://" in word else word for word in first_line(error).split())


# For connections that are not made or break off. Not for what a server has answered.
@retry(
    retry=retry_if_not_exception_type(HfHubHTTPError),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(max=8),
    reraise=True,
)
def request(method: str, url: str, headers: Mapping[str, str]) -> Any:
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
