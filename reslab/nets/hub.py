"""Weights from elsewhere: an https URL, or a repository of the Hugging Face hub, as a file on this machine.

What was fetched once is kept and used without a network; a file that is put where it would be kept is used as well.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reslab.download import MAX_BYTES, MD5_LENGTH, Archive, cache, digest, fetch
from reslab.errors import CallError, WorkError, needs_extra, shown
from reslab.run import write_whole

FILES = ("model.safetensors", "pytorch_model.bin")
LONGEST = 200  # characters of a kept file's name, whose ending says what it is; with what is put behind it, disks take it
WRITTEN = "a repository is written hf:owner/name, hf:owner/name@revision or hf:owner/name/file"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HUB = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(@(?P<revision>{_PART}))?(/(?P<file>{_PART}(/{_PART})*))?")
_DIGITS_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.")  # the beginning of a SHA-256, as torchvision's files have it; not a date


def locate(source: str | Path) -> Path:
    """The file on this machine for a path, a folder with a model.safetensors, an https URL or `hf:owner/name`.

    Raises CallError for a source that is written wrongly, WorkError when it cannot be fetched, with what to put where.
    """
    text = str(source)
    if text.startswith("hf:"):
        return _from_hub(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        return _from_url(text)
    return _first_file(Path(source), FILES) or Path(source)


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    # a path that is too long, or may not be looked at, is said to be none
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)  # noqa: PTH113


def _from_url(text: str) -> Path:
    url, _, fragment = text.partition("#")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.partition("?")[0].rpartition("/")[2])[-LONGEST:].lstrip(".")
    if not url.startswith("https://") or not name:
        raise CallError(f"weights come over https from the URL of a file; received {shown(text)}: give https://.../FILE, or a path")
    if not url.isascii():
        raise CallError(f"an address is written in ASCII; received {shown(url)}: write other letters as %XX, and in the host's name as xn--")
    if not _names_a_host(url):
        raise CallError(f"a URL names a host, and a port where it has one; received {shown(url)}: give https://HOST/.../FILE")
    if fragment and not re.fullmatch("sha256=[0-9a-f]{64}", fragment):
        raise CallError(f"a checksum is written #sha256= and 64 hexadecimal digits, small letters; received #{shown(fragment)}")
    folder = cache() / "weights" / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    record = folder / f"{name}.sha256"
    in_name = _DIGITS_IN_NAME.search(name)
    published = in_name[1] if in_name and len(in_name[1]) != MD5_LENGTH else ""
    recorded = record.read_text("ascii", "replace").strip() if record.is_file() else ""
    file = fetch(Archive(name, fragment.removeprefix("sha256=") or recorded or published, url), folder, lambda *_: None, otherwise="")
    if not recorded:
        write_whole(record, digest(file).encode())
    return file


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:  # of brackets that are not closed, a port that is no number, a label that is empty or too long
        return False


def _from_hub(text: str) -> Path:
    asked = _HUB.fullmatch(text)
    if asked is None:
        raise CallError(f"{WRITTEN}; received {shown(text)}")
    repo, revision, files = asked["repo"], asked["revision"], (asked["file"],) if asked["file"] else FILES
    kept = cache() / "weights" / "hf" / repo / (revision or "")
    if put := _first_file(kept, files):
        return put
    try:
        import huggingface_hub
    except ImportError as error:
        raise needs_extra("huggingface_hub", "hub") from error
    try:
        for name in files:
            if path := _download(huggingface_hub, repo, revision, name):
                _download(huggingface_hub, repo, revision, "config.json")  # says what shapes cannot
                return path
    except WorkError:
        raise
    except huggingface_hub.errors.HFValidationError as error:
        raise CallError(f"{WRITTEN}; received {shown(text)}: {shown(str(error))[:120]}") from error
    except Exception as error:  # of the hub's client and of the network below it
        where = huggingface_hub.hf_hub_url(repo, files[0], revision=revision)
        reason = shown(" ".join(str(error).split()))[:160]
        raise WorkError(f"{files[0]} of {repo} is needed and could not be fetched ({reason}): put {shown(where)} into {shown(kept)}") from error
    raise WorkError(f"a repository of weights has {' or '.join(files)}; {repo} has not: name the file, hf:{repo}/FILE")


def _download(hub: Any, repo: str, revision: str | None, name: str) -> Path | None:
    """The file, from the hub's own cache if it is there; None if the repository has no such file."""
    held = hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(held, str):
        return Path(held)
    try:
        size = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=revision), timeout=30).size
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError):  # not here, and nobody to ask
            raise
        return None
    if (size or 0) > MAX_BYTES:
        raise WorkError(f"weights have at most {MAX_BYTES >> 30} GiB; {name} of {repo} has {size} bytes")
    return Path(hub.hf_hub_download(repo, name, revision=revision))
