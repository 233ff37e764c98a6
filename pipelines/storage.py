"""Files behind one set of functions, whether at a local path or an s3:// address, and the optional
section `storage` of params.yaml.

Credentials come from the environment or the usual AWS files (botocore finds them), never from an
address. Requests are tried again within bounds; what still fails is one line that names the
address. An object is there whole or not at all.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gram_core.config import Config
from gram_core.errors import GramError
from gram_core.files import write_atomic

# Bounds of trying again, with growing pauses: a server may be away for half a minute or so.
ATTEMPTS = 8
CONNECT_SECONDS, READ_SECONDS = 5, 60
SECRET = re.compile(
    r"(?i)(?:^|[&;_-])(?:sig|signature|token|credential|password|secret|key|apikey|auth)="
)
S3 = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]+)(?:/(?P<key>.*))?")


class StorageError(GramError):
    """Something that cannot be read or written where it lies; one line that names it."""


class StorageConfig(Config, frozen=True, kw_only=True):
    """Where workers read and write by themselves, as s3:// prefixes; what is left out travels
    between them and the driver through Ray. `datasets` are the tables that training reads,
    `trajectories` the blocks of a run as they finish, `checkpoints` those of runs in progress."""

    datasets: str | None = None
    trajectories: str | None = None
    checkpoints: str | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            address = getattr(self, name)
            if address is not None:
                if not address.startswith("s3://"):
                    raise ValueError(f"{name}: expected s3://BUCKET/PREFIX, got {shown(address)!r}")
                check(address)


def secret(address: str) -> bool:
    """Whether an address holds what may be a credential: a user before an @, a secret behind a
    colon (it may contain slashes; a bucket has no port), a signature or token among the parameters
    of a URL."""
    scheme, _, whole = address.partition("://")
    rest, _, query = whole.partition("?")
    authority = rest.partition("/")[0]
    _, colon, port = authority.partition(":")
    behind = bool(colon) and (scheme == "s3" or not port.isdecimal())
    return "@" in authority or behind or bool(SECRET.search(query))


def shown(address: str) -> str:
    """An address fit for a message: without what may be a credential."""
    if not secret(address):
        return address
    plain = address.partition("?")[0]
    if not secret(plain):
        return f"{plain}?..."
    scheme, _, rest = plain.partition("://")
    _, at, behind = rest.rpartition("@")
    return f"{scheme}://...{at}{behind if at else ''}"


def check(address: str) -> str:
    """The address itself. Raises `StorageError` where it is neither a local path nor a plain
    s3://BUCKET/KEY, holds credentials, or climbs out of its folder."""
    scheme = address.partition("://")[0] if "://" in address else "file"
    if scheme not in ("file", "s3"):
        raise StorageError(f"{shown(address)}: cannot use {scheme}://; use a path or s3://")
    if secret(address):
        raise StorageError(
            f"{shown(address)}: an address must not hold credentials; put them into the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the AWS files"
        )
    if ".." in address.split("/"):
        raise StorageError(f"{address}: must not contain '..'")
    if scheme == "s3" and not S3.fullmatch(address):
        raise StorageError(f"{address}: not of the form s3://BUCKET/KEY")
    if scheme == "s3" and set(address) & set("*?[]"):
        raise StorageError(
            f"{address}: must not contain any of * ? [ ], which would name others too"
        )
    return address


def join(address: str, *parts: str) -> str:
    """The address of something below another."""
    return check("/".join([address.rstrip("/"), *parts]))


def local(address: str) -> Path | None:
    """The path of a local address, None of a remote one."""
    check(address)
    if address.startswith("s3://"):
        return None
    return Path(address.removeprefix("file://"))


def filesystem() -> Any:
    """The S3 file system, with bounded retries."""
    from s3fs import S3FileSystem

    # s3fs tries again on top of botocore, which has done so by then; once is for answers cut short.
    S3FileSystem.retries = 2
    return S3FileSystem(
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        },
    )


def read(address: str) -> bytes:
    """The whole content. Raises `StorageError`."""
    path = local(address)
    with _explained(address):
        content: bytes = path.read_bytes() if path else filesystem().cat_file(address)
        return content


def write(address: str, content: bytes) -> None:
    """Put the content there whole or not at all. Raises `StorageError`."""
    path = local(address)
    with _explained(address):
        if path:
            write_atomic(path, content)
        else:
            filesystem().pipe_file(address, content)


def names(address: str) -> list[str]:
    """What lies directly below, by name, sorted; nothing where there is no such folder. Raises
    `StorageError`."""
    path = local(address)
    with _explained(address):
        try:
            found = list(path.iterdir()) if path else filesystem().ls(address, detail=False)
        except FileNotFoundError:
            if path is None:
                _bucket(address)
            return []
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found})


def remove(address: str) -> None:
    """Delete a file, or a folder with all in it; nothing there is as well. Raises
    `StorageError`, also where something is left."""
    import shutil

    path = local(address)
    with _explained(address):
        if path is None:
            store = filesystem()
            try:
                store.rm(address, recursive=True)
            except FileNotFoundError:
                return
            # s3fs does not look at what a server refused to delete.
            if store.find(address):
                raise PermissionError(address)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _bucket(address: str) -> None:
    """Raise where the bucket itself is missing. Asked by what every user of a prefix may do."""
    match = S3.fullmatch(address)
    assert match is not None
    bucket, key = match["bucket"], match["key"] or ""
    try:
        filesystem().call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    except FileNotFoundError:
        raise FileNotFoundError(f"no bucket {bucket!r}") from None


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what the libraries raise into one line about `address`."""
    from aiohttp import ClientError as CutShort
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from fsspec.exceptions import FSTimeoutError

    try:
        yield
    except FileNotFoundError as error:
        reason = str(error) if "bucket" in str(error) else "not there"
        raise StorageError(f"{address}: {reason}") from None
    except (NoCredentialsError, PermissionError) as error:
        if not address.startswith("s3://"):
            raise StorageError(f"{address}: {getattr(error, 'strerror', error)}") from None
        raise StorageError(
            f"{address}: access refused; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the "
            "AWS files, and what they may do"
        ) from None
    except GramError:
        raise
    # A malformed AWS_ENDPOINT_URL is a ValueError of botocore's.
    except (OSError, ValueError, BotoCoreError, ClientError, CutShort, FSTimeoutError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise StorageError(f"{address}: {reason}") from None
