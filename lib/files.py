"""Files that appear whole or not at all, and JSON reports."""

import contextlib
import errno
import json
import os
import stat
import tempfile
from pathlib import Path

from lib import settings
from lib.settings import UserError

from filelock import FileLock, Timeout

# The errors of a file system without locks. Some that are mounted from another machine are such.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Acquire a lock file, which the system releases however the process ends. Returns it, to be released.

    Where the file system has no locks a line says so, and the program goes on. Raises filelock's Timeout, and OSError.
    """
    lock_file = FileLock(path, fallback_to_soft=False)
    try:
        lock_file.acquire(timeout=timeout)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from None  # The system does not name the file.
        settings.say(f"{path} can't be locked on this file system; see to it that no other process writes there")
    return lock_file


def remedy(error, place):
    """What to do about an OSError in writing somewhere. `place` is such as "there" or "in out/a"."""
    return f"make room {place}" if error.errno in NO_ROOM else f"mend what is wrong {place}"


@contextlib.contextmanager
def in_place_of(path):
    """A name for a new file, which takes the place of `path` whole at the end of the `with`. Raises OSError.

    A file or a link that has the name already goes, and nothing behind it. A new file that is not whole goes too.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path, text):
    """Replace a text file whole. What is no file, such as a pipe, is written to. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with in_place_of(path) as partial, open(partial, "xb") as f:
        f.write(text.encode())


def append_line(path, line):
    """Add a line to a file, or nothing where not all of the line can be written. Raises OSError."""
    # A pipe without a reader would wait for one for ever.
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o666)
    with open(number, "ab", buffering=0) as f:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        end, content = f.seek(0, os.SEEK_END), (line + "\n").encode()
        try:
            if f.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


def stamp(path):
    """(inode, size, time of the last change) of a file, by which a change or another file shows; None for none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


def is_file(path):
    """Whether a file of a dataset is there. Raises UserError where something else has its name.

    What the folder is depends on which files it has, so a link whose disk is not mounted must not pass for no file.
    """
    if not os.path.isfile(path) and os.path.lexists(path):
        raise UserError(f"{path} is a link that leads nowhere, a folder or a pipe, and no file; put the file back")
    return os.path.isfile(path)


def check_json(path, setting="json", holds="results"):
    """Raise UserError where a report can't be written, before hours are spent on it.

    `setting` names the path. A file that is there must be an older report, which has the key `holds`.
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
        if path.is_file() and path.stat().st_size and not is_report(path, holds):
            raise UserError(f"{path} holds something else than a report, and stays; {another}")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); {another}") from None


def is_report(path, holds):
    """Whether a file is JSON with this key."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(report, dict) and holds in report


def write_json(path, report):
    """Write a report where --json says: over the file as a whole, or for `-` to standard output. Raises UserError."""
    text = json.dumps(report, indent=2) + "\n"
    where = "standard output" if path == "-" else path
    try:
        if path == "-":
            print(text, end="", flush=True)
        else:
            write_text(Path(os.path.realpath(path)), text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{where} can't be written ({error.strerror}); --json=PATH names another") from None
