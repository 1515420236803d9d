"""Files that a kill leaves whole, and files that come from strangers.

safetensors is 8 bytes of length, a JSON header, and raw numbers. Nothing in this project is ever unpickled: a pickle is
a program, and opening one runs it. Reading is left to the safetensors library, which maps files and fills GPU memory
directly. The writer is written by hand (20 lines): the library's gathers whole files in host memory, leaves a temporary
file with a random name after a kill, and hides the disk's error number.

Whoever writes asks the disk to really have it (fsync) before anything is renamed; checkpoint.py and resume.py build on
that. What the operating system has against it is told in one sentence.
Sources: the safetensors format notes.
"""

import errno
import json
import os
import struct
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. The message is one sentence: what, which numbers, what to do."""


STORED_AS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATS = {name: dtype for dtype, name in STORED_AS.items() if dtype.is_floating_point}
HEADER_LIMIT = 100_000_000  # bytes; readers refuse more


def writing_order(tensors):
    """The names of `tensors` as they come in a file: wide types first, which keeps every tensor aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def whole(tensor):
    """A tensor that is divided over processes (a DTensor) put together; any other as it is. All of them must ask, for
    the same tensors in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_safetensors(path, tensors, metadata):
    """Write tensors {name: tensor on any device} and metadata {text: text}; return once the disk has them.

    One tensor at a time passes through host memory. Divided ones need the other processes (parallel.help_save).
    """
    order, header, end = writing_order(tensors), {"__metadata__": metadata}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        if tensors[name].dtype not in STORED_AS:
            raise CheckpointError(f"{name} is {tensors[name].dtype}, which is not written here: convert it first")
        header[name] = {"dtype": STORED_AS[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            f"the header of {path.name} would be {len(text):,} bytes and readers stop at {HEADER_LIMIT:,}: "
            "keep long lists out of the loop's dict"
        )
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(whole(tensors[name]).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def write_json(path, data):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder):
    """A rename is kept in the folder, and the folder, too, reaches the disk only when asked to."""
    if os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path):
    """Turn what the operating system says while `path` is written into a sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "what was there before is untouched: free some space on this disk and save again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "it may not be written to: choose another folder or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            why = "a file is where a folder should be, or the reverse: choose another name"
        else:
            why = "choose another place"
        raise CheckpointError(f"cannot write {path} ({error.strerror or error}); {why}") from None
    except ValueError as error:  # the tokenizer's own sentence
        raise CheckpointError(str(error)) from None


def open_safetensors(path, device="cpu"):
    """A safetensors file opened for reading; only its header is read and checked."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: check the path")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({error}): it is damaged or cut "
            "short; copy or make it again"
        ) from None


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is no model folder: check the path") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is damaged or cut short") from None
