"""Botocore's errors, translated once, here, into the store errors of ``backhaul.errors``."""

from __future__ import annotations

from collections.abc import Iterator

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from backhaul.errors import (
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreThrottledError,
    StoreUnavailableError,
    StoreUnreachableError,
)

_NOT_FOUND = {"NoSuchKey", "404", "NotFound", "NoSuchUpload"}
_PRECONDITION = {"PreconditionFailed", "412"}
_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
}
_REFUSED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem", "InvalidBucketName"}
# What TLS says when it is set up wrongly; its other failures pass.
_TLS_SETTINGS = ("CERTIFICATE", "WRONG_VERSION", "WRONG VERSION", "RECORD LAYER", "UNSUPPORTED PROTOCOL")
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507", "StorageFull", "QuotaExceededException"}
_THROTTLED = {
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "TooManyRequests",
    "503",
    "429",
}
_TRANSIENT = {
    # Another write of the same key was under way at that moment; whether it won shows at the next try.
    "ConditionalRequestConflict",
    "OperationAborted",
    "409",
    "InternalError",
    "RequestTimeout",
    "BadDigest",
    "InvalidDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "IncompleteSignature",
    "500",
    "502",
    "504",
    "408",
}


def translated(error: Exception, what: str, *, bucket: str, endpoint: str) -> StoreError:
    """Return the store error that says what botocore said.

    Args:
        error: anything a client call raised.
        what: what was being done, with the object named.
        bucket: for the advice.
        endpoint: for the advice.
    """
    if isinstance(error, StoreError):
        return error
    if isinstance(error, boto.ClientError):
        return _from_reply(error, what, bucket, endpoint)
    why = _reason(error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StoreRefusedError(
            what, why, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile with AWS_PROFILE."
        )
    if isinstance(error, boto.ProfileNotFound):
        return StoreRefusedError(what, why, "Add the profile to ~/.aws/config, or name another with AWS_PROFILE.")
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError) or (
        isinstance(error, ValueError) and "endpoint" in str(error).lower()
    ):
        return StoreRefusedError(what, why, f"Check the bucket's name ({bucket}), the endpoint and the region.")
    if isinstance(error, boto.SSLError) and any(words in why.upper() for words in _TLS_SETTINGS):
        return StoreRefusedError(
            what, why, f"Check that {endpoint} speaks TLS and that its certificate is of an authority known here."
        )
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
        return StoreUnreachableError(
            what, why, f"Check that {endpoint} is the right address, that it runs, and that this host reaches it."
        )
    if isinstance(error, boto.ConnectionClosedError | boto.HTTPClientError | ResponseParserError | OSError):
        return StoreUnavailableError(what, why, f"Check {endpoint} and the network between; then try again.")
    return StoreError(what, why, "This was not expected; if it happens again, report it with this message.")


def _from_reply(error: boto.ClientError, what: str, bucket: str, endpoint: str) -> StoreError:
    details = error.response.get("Error", {})
    code = str(details.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = str(details.get("Message") or "").strip().rstrip(".")
    why = f"{endpoint} answered {status or ''} {code}".rstrip() + (f": {message}" if message else "")
    if code == "NoSuchBucket":
        return StoreRefusedError(what, why, f"Create the bucket {bucket} first, or correct the name or the endpoint.")
    if code in _CREDENTIALS:
        return StoreRefusedError(
            what,
            why,
            "Check the access key and secret (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE).",
        )
    if code == "RequestTimeTooSkewed":
        return StoreRefusedError(what, why, "Set this host's clock (timedatectl): S3 refuses requests of another time.")
    if code in _PRECONDITION:
        return PreconditionError(what, why, "Another run wrote there first.")
    if code == "NoSuchUpload":
        return ObjectNotFoundError(
            what, why, "The upload was aborted meanwhile, by clean or by a rule of the store: push again."
        )
    if code in _NOT_FOUND:
        return ObjectNotFoundError(what, why, "It was deleted, or never written.")
    if code in _FULL:
        return StoreFullError(what, why, "Make room in the store, raise its quota, or push to another place.")
    if code in _THROTTLED or status in (429, 503):
        return StoreThrottledError(what, why, "The store asks for fewer requests; try again later.")
    if code == "NotImplemented" or status == 501:
        return StoreError(
            what,
            why,
            "This provider lacks what was asked for: name it with ?provider=NAME, and see: backhaul doctor STORE",
        )
    if code == "InvalidObjectState":
        return StoreError(
            what,
            why,
            "The object is in an archive class: restore it to a readable one first (aws s3api restore-object).",
        )
    if code in _TRANSIENT or status >= 500:
        return StoreUnavailableError(what, why, "The store is overloaded or ill; try again later.")
    if code in _REFUSED or status in (401, 403):
        return StoreRefusedError(
            what,
            why,
            f"Allow this key to list, read, write and delete in bucket {bucket}, or use another key.",
        )
    return StoreError(
        what,
        why,
        f"Check the settings for {endpoint}: tags, storage-class, sse, retain-until. See: backhaul doctor STORE",
    )


def _reason(error: Exception) -> str:
    """Return the innermost words: botocore wraps urllib3, which wraps the operating system."""
    text = str(error)
    for inner in causes(error):
        if isinstance(inner, OSError) and inner.strerror:
            return f"{text} ({inner.strerror})" if inner.strerror not in text else text
    return text


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what led to it, from the outside in; botocore keeps some of it in ``kwargs``."""
    inner: object = error
    while isinstance(inner, BaseException):
        yield inner
        inner = getattr(inner, "kwargs", {}).get("error") or inner.__cause__ or inner.__context__
