"""Archives that are read in place: the files in a .zip, and where those in a .tar lie.

Archives may come from strangers. Nothing is unpacked to the disk, and files whose names
lead out of an archive are left alone.
"""
import functools
import os
import posixpath
import tarfile
import zipfile
from pathlib import Path

from tinyldm.errors import require, trying

MAX_ZIPPED = 2 ** 28        # bytes of one file in a .zip; more could fill the memory
TAR_BLOCK = 512             # bytes; the last blocks of a tar are zeros


# ---- .zip

def zip_names(path: Path) -> list[str]:
    """Return the names of all files in a .zip, sorted."""
    names = zipfile.ZipFile(path).namelist()
    return sorted(name for name in names if not name.endswith("/"))


def read_zipped(path: Path, changed: int, name: str) -> bytes:
    """Return the contents of one file in a .zip. Raises BadInput if it is too large.

    changed: the time at which the .zip was changed; a newer one is opened anew.
    """
    archive = open_zip(path, changed, os.getpid())

    # If the .zip claims too small a size, no more than that is read.
    size = archive.getinfo(name).file_size
    require(size < MAX_ZIPPED, f"{path}: {name!r:.99} has {size:,} bytes; unpack it")
    return archive.read(name)


@functools.cache
def open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Open a .zip, once per process.

    Why: workers inherit open files, and would move one another's position in them.
    """
    return zipfile.ZipFile(path)


# ---- .tar

def index_tar(path: Path, message: str) -> dict[str, tuple[int, int]]:
    """Return the place of each plain file in a .tar, {name: (offset, size)} in bytes.

    Links, devices and files whose names lead out of the .tar are left out. Raises
    BadInput(message) for a .tar that is cut off or damaged, or that is compressed, as
    then its files have no places.
    """
    places = {}
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

        # A .tar that is cut off between two members is seen only by its missing end.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(TAR_BLOCK)
        require(end == bytes(TAR_BLOCK), message)
    return places


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file, from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
