"""In how many ways the hub can fail, what each means, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import shown

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Result = TypeVar("Result")

OTHER_ENDPOINT = "set HF_ENDPOINT to a hub that serves byte ranges, or download the checkpoint and give its path"


class RepositoryMissing(CheckpointUnavailable):
    """There is no such repository, or it is private."""


class RepositoryGated(CheckpointUnavailable):
    """The repository's terms were not accepted by this token's account."""


class RevisionMissing(CheckpointUnavailable):
    """The repository has no such branch, tag or commit."""


class FileMissing(CheckpointUnavailable):
    """The revision has no such file."""


class RateLimited(CheckpointUnavailable):
    """The hub asks to wait, for longer or more often than we are ready to."""


class BodyCut(CheckpointUnavailable):
    """The hub sent fewer bytes than the file has, again and again."""


class RangeIgnored(CheckpointUnavailable):
    """The server does not send the asked range alone."""


class HubOffline(CheckpointUnavailable):
    """HF_HUB_OFFLINE is set and the local hub cache does not have it."""


class HubTimedOut(CheckpointUnavailable):
    """The hub did not answer in time."""


class HubTooSlow(HubTimedOut):
    """The hub keeps sending, but so little that it would never get done."""


class HubUnreachable(CheckpointUnavailable):
    """The hub could not be reached, or fails."""


class HubRefused(CheckpointUnavailable):
    """The hub refuses for another reason, or its answer makes no sense."""


class AddressExpired(CheckpointUnavailable):
    """The signed address of a file is no longer valid; the hub gives a new one."""


# What asking again may cure, beside what the hub itself calls temporary.
PASSING = (BodyCut, AddressExpired, HubTooSlow)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the hub, in seconds, and how often to ask."""

    timeout: float | None = None  # until the next bytes arrive; None: as HF_HUB_DOWNLOAD_TIMEOUT says
    attempts: int = 5
    pause: float = 0.5  # before the second attempt; doubled before each further one
    longest_wait: float = 300.0  # the window of the hub's rate limit; a hub that asks for more is not waited for
    answer: float = 120.0  # until an answer has begun, or a listing is there, however it trickles
    progress_time: float = 60.0  # in which a body must bring `least_progress` bytes, unless it ends
    least_progress: int = 1 << 18


def patiently(action: Callable[[], Result], where: str, endpoint: str, patience: Patience) -> Result:
    """What `action` returns, asked again after failures that may pass.

    `where` names the repository or file in errors. Raises the CheckpointUnavailable that the last failure means.
    """
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    attempt, pause = 1, patience.pause
    while True:
        try:
            return action()
        except (CheckpointUnavailable, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            failure, wait = _meaning(error, where, endpoint)
            if wait is None or wait > patience.longest_wait or attempt >= patience.attempts:
                raise failure from error
        time.sleep(max(wait, pause))
        attempt += 1
        pause *= 2


@contextmanager
def sense(where: str) -> Iterator[None]:
    """Turns what huggingface_hub raises over a senseless name, token or answer into HubRefused."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except httpx.HTTPError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubRefused(
            f"{where}: the hub's client cannot make sense of the name, the token or the answer ({shown(str(error))}); "
            "correct the name in the claim, HF_TOKEN or HF_ENDPOINT"
        ) from error


def _meaning(error: Exception, where: str, endpoint: str) -> tuple[CheckpointUnavailable, float | None]:
    """What a failure means, and the seconds after which asking again makes sense (None: it does not)."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, CheckpointUnavailable):
        return error, 0.0 if isinstance(error, PASSING) else None
    if isinstance(error, OfflineModeIsEnabled):
        return HubOffline(
            f"{where}: HF_HUB_OFFLINE is set; unset it, or fetch the files before with `hf download`"
        ), None
    if isinstance(error, HfHubHTTPError):
        return _meaning_of_status(error, where, endpoint)
    if isinstance(error, httpx.TimeoutException):
        text = f"{where}: {endpoint} did not answer in time; try again later, or give it more HF_HUB_DOWNLOAD_TIMEOUT"
        return HubTimedOut(text), 0.0
    unreachable = HubUnreachable(
        f"{where}: {endpoint} cannot be reached ({shown(str(error))}); check the network, the proxy and HF_ENDPOINT"
    )
    lasting = isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.TooManyRedirects)
    return unreachable, None if lasting else 0.0


def _meaning_of_status(error: HfHubHTTPError, where: str, endpoint: str) -> tuple[CheckpointUnavailable, float | None]:
    from huggingface_hub import errors

    status = error.response.status_code
    answer = f"{status}: {shown(error.server_message)}" if error.server_message else str(status)
    has_token = "authorization" in error.response.request.headers
    if isinstance(error, errors.GatedRepoError) or status == 403:
        page = f"{endpoint}/{where.partition('@')[0]}"
        whose = "the account of your HF_TOKEN" if has_token else "your account and set HF_TOKEN to a token of it"
        return RepositoryGated(f"{where}: access is restricted; accept the terms at {page} with {whose}"), None
    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionMissing(f"{where}: there is no such revision; correct it in the claim"), None
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        token = "your HF_TOKEN does not open it" if has_token else "HF_TOKEN is not set"
        return RepositoryMissing(
            f"{where}: there is no such repository, or it is private and {token}; correct the name in the claim, or "
            "set HF_TOKEN to a token that may read it"
        ), None
    if status == 404:
        return FileMissing(f"{where}: is not there; correct the name and the revision in the claim"), None
    if status == 416:
        return BodyCut(f"{where}: is shorter than its header or the hub's listing says; name another revision"), None
    if status == 429:
        wait = asked_wait(error.response.headers)
        until = f"in {wait:.0f} s" if wait else "later"
        token = "" if has_token else ", or set HF_TOKEN: the hub allows more with a token"
        return RateLimited(f"{where}: the hub allows no more requests now; run again {until}{token}"), wait
    if status == 408 or status >= 500:
        wait = asked_wait(error.response.headers)
        return HubUnreachable(f"{where}: {endpoint} fails ({answer}); try again later"), wait
    return HubRefused(f"{where}: the hub refuses ({answer}); open {endpoint}/{where.partition('@')[0]}"), None


def asked_wait(headers: Mapping[str, str]) -> float:
    """The seconds that the hub asks to wait, by Retry-After (seconds or date) or RateLimit; 0 when it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0
