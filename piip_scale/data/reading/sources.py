"""Where a packed set lies, and how the bytes of its files come from there.

A location is a folder, ``http(s)://``, ``s3://`` or ``gs://`` through fsspec, or ``pipe:`` and a shell command. In it
``{name}`` stands for the name of a file of the set; a location without it is a folder, and the name follows it. A
command gets the name by its environment, so that it is one word in any quotes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import selectors
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import IO, Any, Protocol

from piip_scale.data.reading.pipe_commands import NAME, VARIABLE, taking_name
from piip_scale.errors import DataError

PIPE = "pipe:"

Stop = threading.Event
"""Set when nobody waits for a transfer any more."""

NEVER = Stop()

MOST_UNSIZED_BYTES = 256 << 20
"""Of a file whose length nothing states: a manifest, an index. Those of millions of samples are smaller."""

# A failed try costs at most a block; each is a request of its own, so small ones cost time.
_BLOCK_BYTES = 8 << 20
_PIPE_BYTES = 1 << 20
_POLL_S = 0.1
# Statuses of a client's fault that may pass: a timeout, too early, too many requests.
_PASSING = {408, 425, 429}
# No path, and nothing that a command takes for an option, however it is quoted.
_FILE_NAME = re.compile(r"(?!-)(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")
_NO_SUCH_COMMAND = (126, 127)
_GCSFS_GRPC = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
# What fsspec needs for each kind of location, and the extra of this package that brings it.
_EXTRAS = {"http": "", "https": "", "s3": "s3", "gs": "gcs"}


class TransferError(Exception):
    """A try that failed.

    Attributes:
        is_final: Another one would fail too.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class SpoiltError(TransferError):
    """What came, came to its end, and is not the file."""


class StoppedError(Exception):
    """Nobody waits for the transfer any more."""


class Source(Protocol):
    """Where the files of a set come from.

    Attributes:
        location: As the user wrote it.
        resumes: Can begin in the middle of a file.
    """

    location: str
    resumes: bool

    def stream(self, name: str, begin: int, num_bytes: int | None, stop: Stop) -> Iterator[bytes]:
        """The bytes of a file from ``begin`` to its end.

        Args:
            name: Of the file.
            begin: 0 where the source cannot resume.
            num_bytes: Length of the file, ``None`` where that is not known.
            stop: Ends the transfer when set.

        Raises:
            TransferError: They did not come.
            StoppedError: ``stop`` was set.
        """
        ...


def is_remote(location: str) -> bool:
    """Whether a location is no folder of this machine."""
    return location.startswith(PIPE) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def open_source(location: str, stall_s: float, most_unsized_bytes: int) -> Source:
    """The source at a remote location.

    Args:
        location: Where.
        stall_s: A transfer that brings nothing for so long has failed.
        most_unsized_bytes: Of a file whose length nothing states.

    Raises:
        DataError: There is no such kind of location, or what it needs is not installed.
    """
    if location.startswith(PIPE):
        return PipeSource(location, stall_s)
    return ObjectSource(location, stall_s, most_unsized_bytes)


class ObjectSource:
    """Files behind a URL, read block by block through fsspec.

    Options of its clients are fsspec's own to read: ``FSSPEC_S3_ENDPOINT_URL`` and the like, or its config files.

    Raises:
        DataError: As ``open_source``.
    """

    resumes = True

    def __init__(self, location: str, stall_s: float, most_unsized_bytes: int = MOST_UNSIZED_BYTES) -> None:
        self.location, self._stall_s, self._most_unsized_bytes = location, stall_s, most_unsized_bytes
        self._protocol = location.partition("://")[0].lower()
        if self._protocol not in _EXTRAS:
            raise DataError(
                f"location of shards {location}",
                rule=f"a folder, {', '.join(f'{protocol}://' for protocol in _EXTRAS)} or {PIPE}COMMAND",
                fix=f"for other storage, name the command that reads it: {PIPE}COMMAND {NAME}",
            )
        self._open: Any = None
        _OPEN.add(self)
        self._filesystem()

    def stream(self, name: str, begin: int, num_bytes: int | None, stop: Stop) -> Iterator[bytes]:
        """As in ``Source``."""
        if num_bytes is None:
            # One more than there may be: whoever counts them knows then that there are too many.
            yield self._block(name, 0, self._most_unsized_bytes + 1, self._most_unsized_bytes + 1, stop)
            return
        while begin < num_bytes:
            end = min(begin + _BLOCK_BYTES, num_bytes)
            block = self._block(name, begin, end, num_bytes, stop)
            # A server that knows no ranges sends the whole file, whatever it is asked for.
            if len(block) == num_bytes:
                block, end = block[begin:], num_bytes
            if len(block) != end - begin:
                raise SpoiltError(f"{len(block)} bytes came for bytes {begin} to {end} of its {num_bytes}")
            yield block
            begin = end

    def _block(self, name: str, begin: int, end: int, most: int, stop: Stop) -> bytes:
        try:
            filesystem = self._filesystem()
            path = self._path(filesystem, name)
            if self._is_http:
                read = _read_http(filesystem, path, (begin, end), most, self._request())
            else:
                read = filesystem._cat_file(path, start=begin, end=end)
            future = asyncio.run_coroutine_threadsafe(read, filesystem.loop)
            return _awaited(future, None if self._is_http else self._stall_s, stop)
        except StoppedError:
            raise
        # The clients' errors have no base of their own in common.
        except Exception as error:
            raise TransferError(self._reason(error), is_final=_is_final(error)) from error

    @property
    def _is_http(self) -> bool:
        return self._protocol in ("http", "https")

    def _request(self) -> Mapping[str, Any]:
        """Settings of every request of http; the other clients wait for a block as long as for a stall."""
        import aiohttp

        wait = aiohttp.ClientTimeout(total=None, sock_connect=self._stall_s, sock_read=self._stall_s)
        return {"timeout": wait}

    def _path(self, filesystem: Any, name: str) -> str:
        path: str = filesystem._strip_protocol(located(self.location, name))
        return path

    def _filesystem(self) -> Any:
        if self._open is None:
            self._open = self._new_filesystem()
        return self._open

    def _new_filesystem(self) -> Any:
        try:
            return _filesystem_class(self._protocol)(**self._client_options())
        except ImportError as error:
            extra = _EXTRAS[self._protocol]
            raise DataError(
                f"shards at {self.location} need a package that is not installed",
                value=str(error).splitlines()[0],
                fix=f"pip install 'piip-scale[{extra}]'" if extra else "pip install aiohttp",
            ) from None
        # Options that the user set for fsspec reach its clients unchecked, which raise whatever comes of them.
        except Exception as error:  # noqa: BLE001
            raise DataError(
                f"no client for {self.location} can be made",
                value=_first_line(error),
                fix="correct the options in FSSPEC_* variables and in fsspec's config files",
            ) from None

    def _client_options(self) -> dict[str, Any]:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True}
        if self._is_http:
            own = fsspec.config.conf.get("http", {})
            options["client_kwargs"] = {"trust_env": True} | own.get("client_kwargs", {})
            options["headers"] = {"Accept-Encoding": "identity"} | own.get("headers", {})
        return options

    def _reason(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "it is not there"
        if isinstance(error, TimeoutError | asyncio.TimeoutError | FutureTimeout):
            return f"nothing came for {self._stall_s:g} s"
        if type(error).__name__ == "ClientPayloadError":
            return "the connection ended before the answer did"
        if (status := getattr(error, "status", None)) is not None:
            return f"{status} {getattr(error, 'message', '')}".strip()
        return _first_line(error)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        _OPEN.add(self)

    def leave_to_parent(self) -> None:
        """Has this process, just forked, make a client of its own; the other is its parent's for good."""
        if self._open is not None:
            _INHERITED.append(self._open)
            self._open = None


_OPEN: weakref.WeakSet[ObjectSource] = weakref.WeakSet()
# A client that a forked process let go of would close its connections there, which removes them from the event queue
# that the process shares with its parent: the parent's next download on each would hear nothing until it has stalled.
_INHERITED: list[Any] = []


def _leave_all_to_parent() -> None:
    for source in list(_OPEN):
        source.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


class PipeSource:
    """Files that a shell command writes to its standard output, as webdataset's ``pipe:`` does.

    Raises:
        DataError: The command has no place for the file's name, or one where it could not stay one word.
    """

    resumes = False

    def __init__(self, location: str, stall_s: float) -> None:
        self.location, self._stall_s = location, stall_s
        if NAME not in location:
            raise DataError(
                f"location of shards {location}",
                rule=f"the command reads one file of the set; {NAME} stands for its name",
                fix=f"write it as in {PIPE}curl -sf https://host/train/{NAME}",
            )
        self._command = taking_name(location.removeprefix(PIPE))

    def stream(self, name: str, begin: int, num_bytes: int | None, stop: Stop) -> Iterator[bytes]:
        """As in ``Source``; always from the start."""
        with tempfile.TemporaryFile() as errors, _running(self._command, name, errors) as process:
            assert process.stdout is not None
            yield from self._output(process.stdout, stop)
            code = process.wait(self._stall_s)
            if code:
                errors.seek(0)
                last_lines = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                reason = ": ".join([f"the command ended with exit code {code}", *last_lines])
                raise TransferError(reason, is_final=code in _NO_SUCH_COMMAND)

    def _output(self, stdout: IO[bytes], stop: Stop) -> Iterator[bytes]:
        last = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not stop.is_set():
                if selector.select(_POLL_S):
                    if not (block := os.read(stdout.fileno(), _PIPE_BYTES)):
                        return
                    yield block
                    last = time.monotonic()
                elif time.monotonic() - last > self._stall_s:
                    raise TransferError(f"nothing came for {self._stall_s:g} s")
        raise StoppedError


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def located(location: str, name: str) -> str:
    """The location of a file of the set at ``location``."""
    return location.replace(NAME, name) if NAME in location else f"{location.rstrip('/')}/{name}"


async def _read_http(filesystem: Any, url: str, part: tuple[int, int], most: int, request: Mapping[str, Any]) -> bytes:
    """A part of a file; the first bytes of the whole where the server knows no ranges.

    fsspec (2026.9) reads whatever comes into memory, and a server may send without end.
    """
    options = {**filesystem.kwargs, **request}
    headers = {**options.pop("headers", {}), "Range": f"bytes={part[0]}-{part[1] - 1}"}
    session, content = await filesystem.set_session(), bytearray()
    async with session.get(filesystem.encode_url(url), headers=headers, **options) as response:
        filesystem._raise_not_found_for_status(response, url)
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > most:
                break
    return bytes(content)


def _filesystem_class(protocol: str) -> Any:
    """fsspec's; of gcsfs its plain one, unless the user asked for the other.

    The other asks what kind each bucket is, over gRPC, which does not survive a fork, and for up to a minute.
    """
    import fsspec

    if protocol == "gs" and _GCSFS_GRPC not in os.environ:
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem
    return fsspec.get_filesystem_class(protocol)


def _awaited(future: Future[bytes], longest_s: float | None, stop: Stop) -> bytes:
    end = time.monotonic() + (longest_s if longest_s is not None else float("inf"))
    while True:
        try:
            return future.result(_POLL_S)
        except CancelledError:
            raise StoppedError from None
        except FutureTimeout:
            if future.done() or time.monotonic() > end:
                future.cancel()
                raise
        if stop.is_set():
            future.cancel()
            raise StoppedError


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING
    return isinstance(error, FileNotFoundError | PermissionError | ValueError) or "Credential" in type(error).__name__


@contextlib.contextmanager
def _running(command: str, name: str, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that does not outlive the block, nor what it started."""
    if not _FILE_NAME.fullmatch(name):
        raise TransferError(f"its name {name!a} is not that of a file in one folder", is_final=True)
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        env=os.environ | {VARIABLE: name},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )
    try:
        yield process
    except subprocess.TimeoutExpired:
        raise TransferError("the command closed its output and did not end") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
