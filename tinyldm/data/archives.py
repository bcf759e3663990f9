"""Archives that are read in place: the files in a .zip, and where those in a .tar lie.

Archives may come from strangers. Nothing is unpacked to the disk, and files whose names
lead out of an archive are left alone.
"""
import contextlib
import functools
import os
import posixpath
import tarfile
import zipfile
from pathlib import Path

from tinyldm.errors import require, trying

MAX_ZIPPED = 2 ** 28        # bytes of one file in a .zip; more could fill the memory
UTF8_FLAG = 0x800           # a .zip says so that a name is UTF-8
TAR_BLOCK = 512             # bytes; the last blocks of a tar are zeros


# ---- .zip

def zip_names(path: Path) -> list[str]:
    """Return the names of all files in a .zip, sorted, with "/" between the parts."""
    with zipfile.ZipFile(path) as archive:
        return sorted(names_in_zip(archive))


def names_in_zip(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return {name: name in the archive} of all files.

    Some programs of Windows write "\\" between the parts of a name.
    """
    names = {}
    for info in archive.infolist():
        name = info.filename
        if not info.flag_bits & UTF8_FLAG:
            # zipfile has read it as cp437, but many programs write UTF-8 without the flag.
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf8")
        name = name.replace("\\", "/")
        if not name.endswith("/"):
            names[name] = info.filename
    return names


def read_zipped(path: Path, changed: int, name: str) -> bytes:
    """Return the contents of one file in a .zip. Raises BadInput if it is too large.

    changed: the time at which the .zip was changed; a newer one is opened anew.
    """
    archive, names = open_zip(path, changed, os.getpid())

    # If the .zip claims too small a size, no more than that is read.
    size = archive.getinfo(names[name]).file_size
    require(size < MAX_ZIPPED, f"{path}: {name!r:.99} has {size:,} bytes; unpack it")
    return archive.read(names[name])


@functools.cache
def open_zip(
    path: Path, changed: int, process: int
) -> tuple[zipfile.ZipFile, dict[str, str]]:
    """Open a .zip, once per process, and return it with names_in_zip.

    Why: workers inherit open files, and would move one another's position in them.
    """
    archive = zipfile.ZipFile(path)
    return archive, names_in_zip(archive)


# ---- .tar

def index_tar(path: Path, message: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Return the place of each plain file in a .tar, {name: (offset, size)} in bytes.

    Links, devices and files whose names lead out of the .tar are left out; the second
    value is how many they are.

    Raises BadInput(message) for a .tar that is cut off or damaged, or that is
    compressed, as then its files have no places.
    """
    places = {}
    n_left_out = 0
    with trying(message), tarfile.open(path, "r:") as tar:
        while member := tar.next():
            # Otherwise tarfile keeps all members in memory.
            tar.members.clear()

            # A negative size would lead back to an earlier member, again and again.
            require(member.size >= 0, message)

            name = posixpath.normpath(member.name)
            is_plain = member.isreg() and not member.issparse()
            leads_out = name.startswith(("/", "../"))
            if is_plain and not leads_out:
                places[name] = (member.offset_data, member.size)
            elif not member.isdir():
                n_left_out += 1

        # A .tar that is cut off between two members is seen only by its missing end.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(TAR_BLOCK)
        require(end == bytes(TAR_BLOCK), message)
    return places, n_left_out


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file, from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
