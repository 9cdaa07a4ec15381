"""Object stores as pyarrow sees them: which one a URI names, how long to try, and what an error asks of the user."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from sims_ray.errors import SimsError

BUCKET = re.compile(r"[A-Za-z0-9._-]+")
SCHEME = re.compile(r"^(?!file://)[A-Za-z][A-Za-z0-9+.-]+://")
URI_SAFE = "/:?&=%+~!$'()*,;@"  # what is not quoted; a # in a URI would start a fragment, which no object store has
S3_ATTEMPTS = 4  # half a minute for an endpoint that does not answer; a URI alone gets pyarrow to try for minutes
GCS_RETRY_S = 10  # Google's client goes on for 15 minutes by default
REASON_CHARS = 240
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
DEFAULT_ADVICE = "check the bucket {bucket}, and the credentials and the endpoint in the environment"
ADVICE = {
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|NOT_SIGNED_UP": (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment to credentials that may use the bucket "
        "{bucket}"
    ),
    r"NO_SUCH_BUCKET|[Bb]ucket .*not found": "make the bucket {bucket}, or correct its name or AWS_ENDPOINT_URL",
    r"NETWORK_CONNECTION": "check AWS_ENDPOINT_URL in the environment and the network; the bucket is {bucket}",
    r"google::cloud": (
        "set GOOGLE_APPLICATION_CREDENTIALS in the environment to a key file that may use the bucket {bucket}"
    ),
}


def is_uri(location: str | Path) -> bool:
    """Whether a location names an object store and not a path."""
    return isinstance(location, str) and SCHEME.match(location) is not None


def check_bucket(uri: str) -> None:
    """Refuse a URI without a bucket, and one with credentials before anything repeats them.

    Raises:
        SimsError: it is one of the two.
    """
    bucket = uri.partition("://")[2].partition("/")[0].partition("?")[0]
    if "@" in bucket or ":" in bucket:  # a secret may hold a slash, and then its @ comes later
        raise SimsError(
            "a URI must not carry credentials; leave out what is before the @ and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    if not BUCKET.fullmatch(bucket):
        raise SimsError(f"{uri.partition('?')[0]} names no bucket; write it like s3://bucket/folder")


@lru_cache(maxsize=64)
def open_store(location: str) -> tuple[Any, str]:
    """pyarrow's file system of a path or URI, and the path in it.

    Raises:
        SimsError: pyarrow knows no such place, or cannot find out where the bucket is.
    """
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(location):
        return LocalFileSystem(), location
    uri = quote(location, safe=URI_SAFE)
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"
    try:
        store, path = FileSystem.from_uri(uri)
        return (_s3(store, uri) if store.type_name == "s3" else store), path
    except (ValueError, OSError, NotImplementedError) as error:
        shown = location.partition("?")[0]
        found, hint = reason(error).replace(uri, shown), advice(error, location, "give a path, s3:// or gs://")
        raise SimsError(f"{shown} is no place to keep files ({found}); {hint}") from None


def _s3(store: Any, uri: str) -> Any:
    """The same S3, with what a URI cannot say: how often to try, and small files in one request."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    options: dict[str, Any] = {"region": store.region, "allow_delayed_open": True}
    if endpoint := next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), None):
        options["endpoint_override"] = endpoint
    for key, value in parse_qsl(urlsplit(uri).query):
        options[key] = value == "true" if value in ("true", "false") else value
    return S3FileSystem(retry_strategy=AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS), **options)


def advice(error: Exception, uri: str, otherwise: str = DEFAULT_ADVICE) -> str:
    """What to do about an error of the store that a URI names."""
    found = (advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error)))
    return next(found, otherwise).format(bucket=urlsplit(uri).netloc)


def reason(error: Exception) -> str:
    """The message of an error in one line, without numbers of requests, cut where it goes on and on."""
    line = re.sub(r" \(Request ID: [^)]*\)", "", " ".join(str(error).split()))
    return line if len(line) <= REASON_CHARS else f"{line[:REASON_CHARS]}..."
