"""The body of a request -> the images in it, in memory and within limits. Nothing of it touches the file system."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request

from reslab.errors import shown
from reslab.serve.problems import Problem

RAW = ("image/", "application/octet-stream")
MULTIPART = "multipart/form-data"
ACCEPTS = f"image/*, application/octet-stream, {MULTIPART}"
BODY_SECONDS = 30.0  # for a body to arrive
HEAD = 8192  # bytes of a part's head
PARTS = 256  # of a body, fields without a file included
BOUNDARY = re.compile(r'\bboundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
FILENAME = re.compile(rb'\r\ncontent-disposition:[^\r\n]*?\bfilename=(?:"([^"\r\n]*)"|([^\s;"]*))', re.IGNORECASE)
IMAGE_PART = re.compile(rb"\r\ncontent-type: *image/", re.IGNORECASE)


class Upload(NamedTuple):
    """One image file and the name it came with."""

    name: str | None
    body: bytes


class Memory:
    """Bytes of bodies held, over all requests, and the most there may be."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        """What one request holds, given back at its end."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.held -= lease.bytes


class Lease:
    """What one request holds."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.bytes = 0

    def grow(self, size: int) -> None:
        """Raises Problem 503 when all requests together hold too much."""
        if self.memory.held + size > self.memory.most:
            raise Problem(503, "the server holds as many bytes of images as it may; try again later", {"retry-after": "1"})
        self.memory.held += size
        self.bytes += size


async def read_uploads(request: Request, lease: Lease, most: int, images: int) -> list[Upload]:
    """The images of a request: at most `images` of them, `most` bytes in all.

    Raises Problem: 400 for a broken body, 408 a slow one, 413 a large one, 415 another type, 422 no image or too many, 503 no memory.
    """
    kind = request.headers.get("content-type", "application/octet-stream")
    essence = kind.split(";")[0].strip().lower()
    if not essence.startswith(RAW) and essence != MULTIPART:
        raise Problem(
            415, f"an image is sent as image/*, application/octet-stream or {MULTIPART}; received {shown(essence)[:80] or 'none'}", {"accept-post": ACCEPTS}
        )
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read(request, lease, most)
    except TimeoutError:
        raise Problem(408, f"a body must arrive within {BODY_SECONDS:.0f} s; received {lease.bytes} bytes by then", {"connection": "close"}) from None
    except ClientDisconnect:
        raise Problem(400, "the connection ended before the body did") from None
    uploads = _files(body, kind, images) if essence == MULTIPART else [Upload(None, body)]
    if not uploads:
        raise Problem(422, f"{MULTIPART} must have a part with a filename for each image; received none")
    return uploads


async def _read(request: Request, lease: Lease, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most, int(declared))
    chunks: list[bytes] = []
    async for chunk in request.stream():
        if lease.bytes + len(chunk) > most:
            raise _too_large(most, lease.bytes + len(chunk))
        lease.grow(len(chunk))
        chunks.append(chunk)
    chunks = [chunk for chunk in chunks if chunk]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(most: int, received: int) -> Problem:
    return Problem(413, f"a body must have at most {most / 2**20:.3g} MiB; received {received / 2**20:.3g} MiB or more", {"connection": "close"})


def _files(body: bytes, kind: str, most: int) -> list[Upload]:
    """The parts of a multipart body that have a filename or an image's type (RFC 7578; its framing is RFC 2046, section 5.1.1)."""
    boundary = BOUNDARY.search(kind)
    if not boundary:
        raise Problem(400, f"{MULTIPART} needs a boundary of 1 to 70 characters in its Content-Type; received none")
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")
    _, *pieces = (b"\r\n" + body).split(delimiter, PARTS + 1)  # one pass in C, whatever an attacker puts there
    uploads: list[Upload] = []
    for i, piece in enumerate(pieces):
        if piece.startswith(b"--"):
            return uploads
        if i == PARTS:
            raise Problem(422, f"a request must have at most {PARTS} parts; received more")
        head, blank, content = piece.lstrip(b" \t").partition(b"\r\n\r\n")
        if not blank or not head.startswith(b"\r\n") or len(head) > HEAD:
            raise Problem(400, f"each part must have a head of at most {HEAD} bytes and a blank line; one has not")
        name = FILENAME.search(head)
        if name or IMAGE_PART.search(head):
            uploads.append(Upload((name[1] or name[2] or b"").decode("utf-8", "replace") if name else None, content))
        if len(uploads) > most:
            raise Problem(422, f"a request must have at most {most} images; received more")
    raise Problem(400, f"the body must be {MULTIPART} to its last boundary; it stops before")
