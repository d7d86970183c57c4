"""A folder of this machine or of an object store, behind one set of calls.

TensorStore's key-value stores do the reading and writing of buckets. They know files too, but at half the
speed of plain ones in writing and a tenth in reading, and do not sync the names of new folders.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stack.config.errors import ConfigError
from stack.config.paths import expand
from stack.storage import durable

_CHUNK = 1 << 20  # Read at a time where bytes only pass by: what fits into a processor's cache.
_WRITTEN = 8 << 20  # Bytes after which the disk begins to take them.
_SCHEMES = {"gs": "gcs", "s3": "s3"}


class Store:
    """Files by name, with `/` between folder and file; every call may come from any thread.

    What fails raises OSError, with the system's or the service's words as its `strerror`.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Names a place; nothing is read or made.

        Args:
            place: a folder, or `gs://bucket/folder` or `s3://bucket/folder`. The environment says how to get
                in, as for each service's own tools; AWS_ENDPOINT_URL and TENSORSTORE_GCS_HTTP_URL name
                services that stand in for them.

        Raises:
            ConfigError: a URL of another kind.
        """
        text = os.fspath(place)
        scheme, found, rest = text.partition("://")
        if not found:
            self.folder: Path | None = expand(text).absolute()
            self.name = str(self.folder)
            return
        if scheme not in _SCHEMES or not rest.strip("/"):
            raise ConfigError(f"{text}: a place is a folder, or gs://bucket/... or s3://bucket/...")
        import tensorstore

        self.folder = None
        self.name = text.rstrip("/")
        bucket, _, path = rest.strip("/").partition("/")
        spec = {"driver": _SCHEMES[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}
        if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
        self._keys = tensorstore.KvStore.open(spec)

    def prepare(self) -> None:
        """Makes the folder, if it is one of this machine."""
        if self.folder is not None:
            durable.make_folder(self.folder)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13), self.name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file in one piece; it is durable when this returns."""
        if self.folder is None:
            self._wait(self._keys.result().write(name, data))
        else:
            durable.make_folder((self.folder / name).parent)
            durable.write_bytes(self.folder / name, data)

    def write_parts(self, name: str, parts: Sequence[memoryview]) -> None:
        """Writes a file that nobody looks for yet, of parts one after another; see `sync_names`."""
        if self.folder is None:
            self.write(name, b"".join(parts))
            return
        path = self.folder / name
        durable.make_folder(path.parent)
        with path.open("wb", buffering=0) as file:
            for part in parts:
                for start in range(0, len(part), _WRITTEN):
                    rest = part[start : start + _WRITTEN]
                    while rest:
                        rest = rest[file.write(rest) :]
                    if hasattr(os, "posix_fadvise"):  # Linux then begins to write, and waits for nothing.
                        os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
            os.fsync(file.fileno())

    def sync_names(self, folder: str) -> None:
        """Makes the names of what `write_parts` wrote into a folder durable."""
        if self.folder is not None and (self.folder / folder).is_dir():
            durable.sync(self.folder / folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A file's bytes, or some; FileNotFoundError where there is none, EOFError where it is shorter."""
        if self.folder is not None:
            with _named(self.folder / name), (self.folder / name).open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read() if stop is None else file.read(stop - start)
            if stop is not None and len(data) < stop - start:
                raise EOFError(f"{self.name}/{name}")
            return data
        some = None if start == 0 and stop is None else slice(start, stop)
        try:
            found = self._wait(self._keys.result().read(name, byte_range=some))
        except OSError as error:
            if "OUT_OF_RANGE" in str(error):
                raise EOFError(f"{self.name}/{name}") from None
            raise
        if found.state != "value":
            raise FileNotFoundError(2, os.strerror(2), f"{self.name}/{name}")
        return found.value

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fills memory with a file's bytes from a place on; raises what `read` does."""
        if self.folder is None:
            target[:] = self.read(name, start, start + len(target))
            return
        with _named(self.folder / name), (self.folder / name).open("rb", buffering=0) as file:
            file.seek(start)
            rest = target
            while rest:
                if not (count := file.readinto(rest)):
                    raise EOFError(f"{self.name}/{name}")
                rest = rest[count:]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A file's bytes, some at a time where that saves memory; each lasts until the next is asked for."""
        if self.folder is None:
            yield memoryview(self.read(name))
            return
        some = memoryview(bytearray(_CHUNK))  # The same for all: new memory costs more than what is read.
        with _named(self.folder / name), (self.folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(some):
                yield some[:count]

    def names(self, prefix: str = "") -> list[str]:
        """The files below a folder, `step/`, or all of them, in order; not what is still being written."""
        if self.folder is not None:
            start = len(os.path.join(self.folder, ""))
            return sorted(path[start:] for path in _files(os.fspath(self.folder / prefix)))
        import tensorstore

        keys = tensorstore.KvStore.KeyRange(prefix, _after(prefix)) if prefix else None
        return sorted(key.decode(errors="replace") for key in self._wait(self._keys.result().list(keys)))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where only reading it would tell."""
        return None if self.folder is None else (self.folder / name).stat().st_size

    def remove(self, prefix: str) -> None:
        """Removes a folder and all that is in it."""
        if self.folder is None:
            import tensorstore

            keys = tensorstore.KvStore.KeyRange(f"{prefix}/", _after(f"{prefix}/"))
            self._wait(self._keys.result().delete_range(keys))
        elif (self.folder / prefix).is_symlink():  # What it leads to is somebody's.
            (self.folder / prefix).unlink()
        elif (self.folder / prefix).is_dir():
            shutil.rmtree(self.folder / prefix)

    def remove_file(self, name: str) -> None:
        """Removes a file, durably, if it is there."""
        if self.folder is None:
            import tensorstore

            self._wait(self._keys.result().delete_range(tensorstore.KvStore.KeyRange(name, f"{name}\0")))
        else:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
                durable.sync((self.folder / name).parent)

    def _wait(self, future: Any) -> Any:
        try:
            return future.result()
        except OSError:
            raise
        except Exception as error:
            raise OSError(*_told(str(error)), self.name) from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of what is read or written says of which file, which the system leaves out once it is open."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _files(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The files below a folder, behind links too, but for links that lead back to a folder above them."""
    try:
        status = os.stat(folder)
        paths = [entry.path for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):  # Removed meanwhile, or never made.
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for path in paths:
        if os.path.isdir(path):
            yield from _files(path, above | {here})
        elif not durable.is_temporary(os.path.basename(path)):
            yield path


def _after(prefix: str) -> str:
    """The first key after those that begin with a prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _told(text: str) -> tuple[int, str]:
    """Number and words of an error of TensorStore's, which quotes the system's in brackets."""
    if code := re.search(r"os_error_code='(\d+)'", text):
        return int(code[1]), os.strerror(int(code[1]))
    return 5, text.splitlines()[0].split(" [")[0] if text else "it failed"
