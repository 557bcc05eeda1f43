"""Requests by HTTP that are repeated until they are answered, for a while."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # Documented, not re-exported.
from tenacity import retry, retry_if_not_exception_type, stop_after_attempt, wait_exponential

# Seconds without a byte after which a request is repeated; a range of 16 MB takes a second where the network is busy.
TIMEOUT_SECONDS = 60

# With waits of 1, 2, 4, 8, 8, ... seconds, these outlast an interruption of a minute.
ATTEMPTS = 10

# Too slow, too many requests, and what servers say when something behind them fails.
_PASSING = (408, 429, 500, 502, 503, 504)


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
