"""Sources of data as files on this machine: a path, file://, s3://, https:// or hf:// (the Hub).

What comes from elsewhere lies in .gram/sources, under a name made of the address; a file that is
there is not fetched again. A part of a file is never taken for it.
"""

import hashlib
import re
from pathlib import Path

from gram_core.errors import GramError
from pipelines.storage import secret, shown

CACHE = Path(".gram") / "sources"
NAME = 100  # characters of a cached file's name, after those that tell it from others
SILENCE = 60  # seconds without a byte after which a download has failed; it may last as it will
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


class SourceError(GramError):
    """A source that is not there or cannot be reached; one line that names it."""


def fetch(source: str) -> Path:
    """The file that `source` names. Raises `SourceError`."""
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme in ("", "file"):
        try:
            path = Path(source.removeprefix("file://")).expanduser()
            there = path.is_file()
        except (OSError, RuntimeError):  # a name too long, a home that nobody has
            there = False
        if not there:
            raise SourceError(f"{source}: no such file")
        return path
    if secret(source):
        raise SourceError(
            f"{shown(source)}: an address must not hold credentials; put them into the environment"
        )
    if scheme == "hf":
        return _from_hub(source)
    if scheme not in ("s3", "https", "http"):
        raise SourceError(
            f"{source}: cannot read {scheme}://; use a path, s3://, https:// or hf://"
        )
    return _from_remote(source)


def _from_hub(source: str) -> Path:
    """A file of a dataset repository, through huggingface_hub and its own cache."""
    from huggingface_hub import hf_hub_download

    match = HUB.fullmatch(source)
    if match is None:
        raise SourceError(f"{source}: expected hf://datasets/OWNER/NAME@REVISION/FILE")
    try:
        path = hf_hub_download(
            match["repo"], match["file"], repo_type="dataset", revision=match["revision"]
        )
    except Exception as error:  # of the client's HTTP library, which changes, among others
        reason = " ".join(str(error).split())[:160]
        raise SourceError(f"{source}: the Hub did not give it ({reason})") from None
    return Path(path)


def _from_remote(source: str) -> Path:
    """A file through fsspec, put into the cache whole."""
    import aiohttp
    import fsspec
    from botocore.exceptions import BotoCoreError

    last = source.partition("?")[0].rpartition("/")[2][-NAME:]
    name = hashlib.sha256(source.encode()).hexdigest()[:16] + "_" + last
    s3 = source.startswith("s3://")
    path = CACHE / name
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{name}.partial")
    try:
        web = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_read=SILENCE)}}
        filesystem, remote = fsspec.core.url_to_fs(source, **({} if s3 else web))
        filesystem.get_file(remote, str(partial))
        partial.replace(path)
    except FileNotFoundError:
        raise SourceError(f"{source}: no such file there") from None
    # An address or an endpoint that cannot be one is a ValueError.
    except (OSError, ValueError, BotoCoreError, aiohttp.ClientError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SourceError(f"{source}: cannot be fetched ({reason})") from None
    finally:
        partial.unlink(missing_ok=True)
    return path
