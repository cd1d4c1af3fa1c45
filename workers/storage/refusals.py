"""What a store's refusal means: one asset fails, the source cannot be used, or it may pass.

S3's error code decides which remedy is in the message.
"""

from __future__ import annotations

import botocore.exceptions
import botocore.parsers

from workers.errors import AssetError, ErrorKind, SourceError, TransientError, redact

# ResponseParserError: a proxy or a web server answered with HTML.
NETWORK_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
)

VENDOR_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
    ValueError,
)

# The store was not asked: this worker's credentials come from a service that fails now, or they have run out.
SESSION_ERRORS = (
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOError,
    RuntimeError,  # botocore's own, when new credentials have run out too
)

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in this process's environment"
    " (MASKFLEET_S3_ANONYMOUS=true for a public bucket)"
)
_RIGHTS = (
    "the credentials need s3:ListBucket and s3:GetObject on it (a bucket whose readers pay also needs"
    " MASKFLEET_S3_REQUEST_PAYER=requester, a public one may need MASKFLEET_S3_ANONYMOUS=true)"
)
_NOT_PUBLIC = "the bucket is not public: unset MASKFLEET_S3_ANONYMOUS and give credentials"
_BUCKET_NAME = "check the bucket's name, and MASKFLEET_S3_ENDPOINT where it is not on AWS"
_HOST_NAME = "this store wants the bucket in the host's name: set MASKFLEET_S3_ADDRESSING_STYLE=virtual"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION to it"
_SESSION = "the session has run out: get new credentials (AWS_SESSION_TOKEN, or `aws sso login`)"
_BUSY = "the store is busy or broken: try again later"

_REMEDIES = {
    "NoSuchBucket": _BUCKET_NAME,
    "InvalidBucketName": _BUCKET_NAME,
    "InvalidAccessKeyId": "the store does not know this access key: " + _CREDENTIALS,
    "SignatureDoesNotMatch": "the secret key does not fit the access key: " + _CREDENTIALS,
    "AccessDenied": _RIGHTS,
    "SecondLevelDomainForbidden": _HOST_NAME,  # Alibaba Cloud OSS
    "PathStyleDomainForbidden": _HOST_NAME,  # Tencent COS
    "InvalidPathAccess": _HOST_NAME,  # Volcengine TOS
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "ExpiredToken": _SESSION,
    "ExpiredTokenException": _SESSION,
    "TokenRefreshRequired": _SESSION,
    "InvalidToken": _SESSION,
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "301": _REGION,
    "401": _CREDENTIALS,
    "403": _RIGHTS,
    "404": _BUCKET_NAME,
}

_PASSING_STATUSES = (408, 425, 429)  # whatever word a store, or a proxy before it, has for it
# Not about the asset: the store is busy, or this worker's session has ended or its clock is wrong. Others may be fine.
_PASSING_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"}
    | {"RequestTimeout", "InternalError", "RequestTimeTooSkewed"}
    | {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
)


def asset_error(key: str, bucket: str, error: Exception) -> Exception:
    """What a failed get_object means for the asset: it fails, or nothing is known."""
    reason = redact(str(error))
    if isinstance(error, botocore.exceptions.ClientError):
        status, code = _status_and_code(error)
        if status == 404:
            return AssetError(ErrorKind.NOT_FOUND, f"{key}: no longer in s3://{bucket} ({code})")
        if code == "InvalidObjectState":  # the listing cannot show this: a restored object keeps its storage class
            storage_class = error.response["Error"].get("StorageClass", "Glacier or the like")
            message = f"{key}: archived in s3://{bucket} ({storage_class}), cannot be read until it is restored there"
            return AssetError(ErrorKind.NOT_FOUND, message)
        if status >= 500 or status in _PASSING_STATUSES or code in _PASSING_CODES:
            return TransientError(f"{key}: {reason}")
        message = f"{key}: s3://{bucket} refuses it ({status}): {reason}; {_remedy(error)}"
        return AssetError(ErrorKind.FORBIDDEN, message)
    if isinstance(error, (*NETWORK_ERRORS, *SESSION_ERRORS)):
        return TransientError(f"{key}: {reason}")
    return AssetError(ErrorKind.FORBIDDEN, f"{key}: cannot ask s3://{bucket}: {reason}; {_remedy(error)}")


def source_error(uri: str, error: Exception, *, anonymous: bool) -> Exception:
    """What a failed request about the bucket means for the whole source: it may pass, or what to do."""
    reason = redact(str(error))
    if isinstance(error, (*NETWORK_ERRORS, *SESSION_ERRORS)):
        return TransientError(f"{uri}: {reason}")
    if isinstance(error, botocore.exceptions.ClientError):
        status, code = _status_and_code(error)
        if status >= 500 or status in _PASSING_STATUSES or code in _PASSING_CODES:
            return TransientError(f"{uri}: {reason}")
        if anonymous and status in (401, 403) and _remedy(error) == _RIGHTS:
            return SourceError(f"{uri}: {reason}; {_NOT_PUBLIC}")
    return SourceError(f"{uri}: {reason}; {_remedy(error)}")


def no_answer(uri: str, where: str, error: TransientError) -> SourceError:
    """What to tell a person who waits at a command. A worker would try again later; a command does not."""
    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):
        _, code = _status_and_code(cause)
        if not code.isdigit():  # stores give a word; if there is none, botocore gives a number
            return SourceError(f"{error}; {_REMEDIES.get(code, _BUSY)}")
    if isinstance(cause, SESSION_ERRORS):
        return SourceError(f"{error}; {_remedy(cause)}")
    if isinstance(cause, botocore.exceptions.SSLError):
        remedy = "set AWS_CA_BUNDLE to the certificates of the store's own authority"
        return SourceError(f"{uri}: {where} is not trusted ({error}); {remedy}")
    remedy = "is MASKFLEET_S3_ENDPOINT right?"
    return SourceError(f"{uri}: {where} does not answer as an S3 API ({error}); {remedy}")


def _remedy(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        status, code = _status_and_code(error)
        return _REMEDIES.get(code) or _REMEDIES.get(str(status), "see what the store says")
    if isinstance(error, botocore.exceptions.ParamValidationError):
        return "check the bucket's name"
    if isinstance(error, botocore.exceptions.SSOError | RuntimeError):
        return _SESSION
    if isinstance(error, ValueError):  # "Invalid endpoint: …"
        return "check MASKFLEET_S3_ENDPOINT, expected http(s)://host[:port]"
    return _CREDENTIALS


def _status_and_code(error: botocore.exceptions.ClientError) -> tuple[int, str]:
    """HTTP status and S3's error code."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"]), str(error.response["Error"].get("Code", ""))
