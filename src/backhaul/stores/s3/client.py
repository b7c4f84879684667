"""Sessions and clients of S3, made in little time.

A client is botocore's own, the one that boto3 hands out; boto3 itself, with the file transfers that are not used here,
takes 80 ms to load. And botocore looks through the folders of some 400 services for S3's, and reads 3 MB of JSON
slowly: done here in half the time, since every command waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from botocore import __version__ as botocore_version
from botocore.config import Config
from botocore.loaders import JSONFileLoader, Loader
from botocore.session import Session

from backhaul.errors import StoreRefusedError
from backhaul.model.location import Location
from backhaul.version import VERSION

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT = 10


class _Files(JSONFileLoader):
    """Reads a model's JSON."""

    def load_file(self, file_path: str) -> Any:
        """See botocore."""
        for ending, opened in ((".json", open), (".json.gz", gzip.open)):
            with contextlib.suppress(FileNotFoundError), opened(file_path + ending, "rb") as file:
                return msgspec.json.decode(file.read())
        return None


class _Models(Loader):
    """Finds the models of services; whether there is one shows when it is loaded."""

    def list_available_services(self, type_name: str) -> list[str]:
        """See botocore."""
        found: set[str] = set()
        for place in self.search_paths:
            with contextlib.suppress(OSError):
                found.update(os.listdir(place))
        return sorted(found)


@functools.cache
def _models(search_path: str | None) -> _Models:
    """Return the models that are found in some directories, and botocore's own; read once for all stores of a run."""
    paths = search_path.split(os.pathsep) if search_path else []
    return _Models(
        extra_search_paths=[str(Path(os.path.expandvars(path)).expanduser()) for path in paths], file_loader=_Files()
    )


def new_session(location: Location) -> Session:
    """Return a session with the credentials and the region that the location's settings ask for.

    Raises:
        StoreRefusedError: the file that is to hold the keys can't be read.
    """
    profile = location.profile
    if location.credentials_file is not None:
        try:
            open(location.credentials_file, "rb").close()
        except OSError as error:
            raise StoreRefusedError(
                f"The keys of s3://{location.bucket} can't be read",
                f"{location.credentials_file}: {error.strerror or error}",
                "Correct credentials-file, or let the account that runs Backhaul read it.",
            ) from error
        # A profile that is named takes precedence over keys in the environment: the file is what was asked for.
        profile = profile or "default"
    session = Session(profile=profile)
    if location.credentials_file is not None:
        session.set_config_variable("credentials_file", location.credentials_file)
    if location.region is not None:
        session.set_config_variable("region", location.region)
    session.register_component("data_loader", _models(session.get_config_variable("data_path")))
    return session


def new_client(session: Session, location: Location, read_timeout: float) -> S3Client:
    """Return a client of a location; ``read_timeout`` is the seconds of silence after which a request is lost."""
    client: Any = session.create_client(
        "s3",
        endpoint_url=location.endpoint,
        region_name=session.get_config_variable("region") or "us-east-1",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=read_timeout,
            max_pool_connections=32,
            # A store's log tells who it was. (botocore's own text is put together twice for each request, which was an
            # eighth of the CPU time of a small one.)
            user_agent=f"backhaul/{VERSION} botocore/{botocore_version}",
            # What is asked for is made here; each request would be compared with the service's model once more.
            parameter_validation=False,
            retries={"total_max_attempts": 1},
            # Third-party stores answer errors to the trailers that newer botocore adds by itself.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
        ),
    )
    found: S3Client = client
    return found
