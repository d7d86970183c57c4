"""A folder of safetensors files, read and written one tensor at a time.

The format: eight bytes with the length of a header, the header in JSON (dtype, shape and place of every
tensor), then the tensors, little-endian, one after another (https://github.com/huggingface/safetensors).
The library that reads it checks it here; arrays of bfloat16, and files that are never whole in memory, it
does not have for NumPy.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from stack.config.errors import StackError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool),
}
_NAMES = {dtype.name: name for name, dtype in _DTYPES.items()}


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder by name, as arrays that read from their files what is asked of them.

    Raises:
        StackError: there are none, a file is missing or damaged, or a tensor is in two files.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in _files(folder):
        for name, array in _open(path):
            if name in tensors:
                raise StackError(f"{path} holds {name}, as another file of the folder does; remove one")
            tensors[name] = array
    return tensors


def open_file(path: Path) -> dict[str, np.ndarray]:
    """The same of one file."""
    return dict(_open(path))


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    make: Callable[[str], np.ndarray],
    *,
    most_bytes: int,
    write: bool = True,
) -> Iterator[str]:
    """Writes tensors into files of a folder that is there, and an index where they are several.

    Args:
        folder: that they go into.
        tensors: names and shapes, in the order of the files.
        dtype: they are stored in.
        make: gives a tensor by its name when its turn comes; the next is asked for when it is written.
        most_bytes: of a file, unless one tensor has more.
        write: false asks for every tensor and writes nothing, as a process of several must.

    Yields:
        The name of each file when it is there.

    Raises:
        OSError: it cannot be written.
        StackError: a tensor does not fit the dtype.
    """
    files = _spread(tensors, dtype.itemsize, most_bytes)
    names = [SINGLE] if len(files) == 1 else _numbered(len(files))
    for name, some in zip(names, files, strict=True):
        if write:
            with (folder / name).open("wb") as file:
                _write(file, some, dtype, make)
        else:
            for tensor in some:
                make(tensor)
        yield name
    if write and len(files) > 1:
        total = sum(size for some in files for size in _sizes(some, dtype.itemsize).values())
        places = {tensor: name for name, some in zip(names, files, strict=True) for tensor in some}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _files(folder: Path) -> list[Path]:
    """Those that hold tensors, by the index if there is one."""
    if not folder.is_dir():
        raise StackError(f"{folder} is no folder; give one with a config.json and safetensors files")
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            names = sorted(set(places.values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a file outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StackError(f"{folder / INDEX} is no index of safetensors files: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise StackError(f"{folder} lacks {missing[0]}, which its {INDEX} names; fetch it again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if found:
        told = f"holds {found[0]}, but neither {SINGLE} nor {INDEX}; fetch that too"
    elif pickles:
        where = shlex.quote(str(folder))
        told = (
            f"holds {pickles[0]}, a pickle, which could run any code; where it is trusted, convert it: "
            f"python -c 'from transformers import AutoModelForCausalLM as M; import sys; "
            f"M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])' {where} NEW_FOLDER"
        )
    else:
        told = f"holds no {SINGLE}; give a folder that `save_pretrained` has written"
    raise StackError(f"{folder} {told}")


def _open(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import safetensors
    except ImportError as error:
        raise StackError(f"reading {path} needs the extra hf: pip install 'stack[hf]'") from error
    try:
        with safetensors.safe_open(path, framework="numpy"):  # It checks the header and the size of the file.
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise StackError(f"{path} is damaged or no safetensors file: {told}; fetch it again") from error
    data = (
        np.memmap(path, np.uint8, "r", 8 + size) if path.stat().st_size > 8 + size else np.empty(0, np.uint8)
    )
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _DTYPES:
            raise StackError(f"{path}: {name} is of {about['dtype']}, which Stack has no numbers for")
        start, stop = about["data_offsets"]
        yield name, data[start:stop].view(_DTYPES[about["dtype"]]).reshape(about["shape"])


def _write(
    file: IO[bytes],
    tensors: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    make: Callable[[str], np.ndarray],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, size in _sizes(tensors, dtype.itemsize).items():
        offsets = [place, place + size]
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(tensors[name]), "data_offsets": offsets}
        place += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in tensors:
        stored = cast(name, make(name), dtype)
        file.write(np.ascontiguousarray(stored).view(np.uint8).reshape(-1).data)


def cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A finite tensor in another dtype.

    Raises:
        StackError: it has numbers that are too large for it.
    """
    with np.errstate(over="ignore"):
        stored = tensor.astype(dtype, copy=False)
    if not np.isfinite(stored.astype(np.float32, copy=False)).all():
        largest = float(np.abs(tensor).max())
        raise StackError(f"{name} has {largest:.6g}, too large for {dtype.name}; export it as bfloat16")
    return stored


def _spread(
    tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int, most_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors:
        size = int(np.prod(shape)) * itemsize
        if files[-1] and held + size > most_bytes:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    return files


def _numbered(number: int) -> list[str]:
    return [f"model-{place:05}-of-{number:05}.safetensors" for place in range(1, number + 1)]


def _sizes(tensors: Mapping[str, tuple[int, ...]], itemsize: int) -> dict[str, int]:
    return {name: int(np.prod(shape)) * itemsize for name, shape in tensors.items()}
