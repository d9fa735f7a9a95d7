"""Files that appear whole or not at all, and JSON reports."""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path

from lib import settings
from lib.settings import UserError

from filelock import FileLock, Timeout

# The errors of a file system without locks. Some that are mounted from another machine are such.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def sync(file):
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Make a rename in this folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def lock(path, timeout=-1):
    """Acquire a lock file, which the system releases however the process ends. Returns the lock, to be released.

    timeout: seconds to wait for another process; -1 is without end. Where the file system has no locks a line says so,
    and the program goes on. Raises filelock's Timeout, OSError.
    """
    lock_file = FileLock(path)
    try:
        lock_file.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        settings.say(f"{path} can't be locked on this file system; see to it that no other process writes there")
    return lock_file


def write_text(path, text):
    """Replace a text file whole. What is no file, such as a pipe or a device, is written to. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_line(path, line):
    """Add a line to a file, or nothing where the disk does not take all of it. Raises OSError."""
    with open(path, "ab", buffering=0) as f:
        end, content = f.seek(0, os.SEEK_END), (line + "\n").encode()
        try:
            if f.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


def check_json(path, setting="json"):
    """Raise UserError where a report can't be written, before hours are spent on it.

    `setting` is the name of the setting that `path` comes from. A file that holds no JSON object stays as it is.
    """
    if path == "-":
        return
    path, another = Path(os.path.realpath(path)), f"--{setting}=PATH names another"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):  # A pipe that was opened and closed here would end for its reader.
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_file() and path.stat().st_size and path.read_bytes()[:1] != b"{":
            raise UserError(f"{path} holds something else than a report, so it is not overwritten; {another}")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); {another}") from None


def write_json(path, report):
    """Write a report where --json says: over the file as a whole, or for `-` to standard output. Raises UserError."""
    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        print(text, end="", flush=True)
        return
    try:
        write_text(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); --json=PATH names another") from None
