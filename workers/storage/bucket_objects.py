"""Objects that maskfleet writes under an S3 prefix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3.exceptions
from botocore.exceptions import ClientError

from workers.storage.asset import PAGE_SIZE
from workers.storage.bucket import ATTEMPTS, Bucket
from workers.storage.client import s3_client
from workers.storage.place import StoredObject
from workers.storage.refusals import VENDOR_ERRORS, asset_error


class BucketObjects(Bucket):
    """Objects under an S3 prefix. S3 itself replaces an object as a whole."""

    def write(self, key: str, content: bytes) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content, **self._payer)
        except VENDOR_ERRORS as error:
            raise asset_error(key, self._bucket, error) from error

    def write_file(self, key: str, path: Path) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.upload_file(str(path), self._bucket, self._prefix + key, ExtraArgs=self._payer)
        except (*VENDOR_ERRORS, boto3.exceptions.S3UploadFailedError) as error:
            cause = error.__context__ if isinstance(error, boto3.exceptions.S3UploadFailedError) else error
            raise asset_error(key, self._bucket, cause if isinstance(cause, Exception) else error) from error

    def delete(self, key: str) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.delete_object(Bucket=self._bucket, Key=self._prefix + key, **self._payer)
        except VENDOR_ERRORS as error:
            if isinstance(error, ClientError) and error.response["Error"].get("Code") == "NoSuchKey":
                return  # AWS says nothing then, some other stores do
            raise asset_error(key, self._bucket, error) from error

    def stored(self) -> Iterator[StoredObject]:
        where: dict[str, str] = {}
        while True:
            answer = self._request(ATTEMPTS, "list_objects_v2", Prefix=self._prefix, MaxKeys=PAGE_SIZE, **where)
            for entry in answer.get("Contents", []):
                name = entry["Key"].removeprefix(self._prefix)
                changed_at = entry["LastModified"].timestamp()
                yield StoredObject(name=name, size_bytes=entry["Size"], changed_at=changed_at)
            if not answer.get("IsTruncated"):
                return
            where = {"ContinuationToken": answer["NextContinuationToken"]}
