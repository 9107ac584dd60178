"""Archives of others: unpacked whole or refused, and nothing ever lands outside the folder it was meant for."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from prototypes_lib.files import storage

MOST = 2**40  # bytes an archive may unpack to
RATIO = 200  # and how many times its own size, beyond a first MiB: images hardly shrink, deflate's worst is 1,032


def extract(archive: str | Path, folder: str | Path, most: int = MOST, ratio: float = RATIO) -> Path:
    """Unpack a .tar(.gz, .bz2, .xz) or .zip into a new folder, all of it or nothing.

    Every name is checked before the first file is written; files land in a hidden folder that is renamed at the end.

    Raises ValueError, one line, where the folder exists already, or the archive is none, is damaged, has a member that
    is no file or folder (links, devices), leaves the folder, comes twice or lies inside another file, or unpacks to
    more than `most` bytes or `ratio` times its own size; OSError where the disk refuses.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is not there, or no file")
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists; choose a new folder for what is in {archive.name}")
    limit = _limit(archive.stat().st_size, most, ratio)
    with storage.all_or_nothing(folder) as aside:
        try:
            aside.mkdir()
            with _opened(archive, limit) as file:
                if isinstance(file, zipfile.ZipFile):
                    check_zip(file, limit)
                    file.extractall(aside)
                else:
                    file.extractall(aside, members=_check_tar(file, limit), filter="data")
            aside.rename(folder)
        except (tarfile.FilterError, ValueError, NotImplementedError) as error:  # the last: a method zipfile lacks
            raise ValueError(f"{archive} is refused: {_first(error)}") from error
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's; gzip's and bz2's have no number
                raise
            raise ValueError(f"{archive} is damaged ({_first(error)}); fetch it again") from error
    return folder


def _limit(size: int, most: int = MOST, ratio: float = RATIO) -> int:
    return min(most, max(2**20, int(size * ratio)))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, `extractall` of tarfile and zipfile, torchvision's too, refuses members that leave their folder.

    Tar archives may hold links inside the folder (data sets do); zip archives none, and nothing that swells up.
    """
    _need_filter()
    before, plain = tarfile.TarFile.extraction_filter, zipfile.ZipFile.extractall

    def checked(self: zipfile.ZipFile, path=None, members=None, pwd=None):
        check_zip(self, _limit(Path(self.filename).stat().st_size) if self.filename else MOST)
        return plain(self, path, members, pwd)

    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    zipfile.ZipFile.extractall = checked
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before if before is None else staticmethod(before)
        zipfile.ZipFile.extractall = plain


def check_zip(file: zipfile.ZipFile, limit: int) -> None:
    """Raise ValueError for the first member of a zip archive that must not be unpacked."""
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{info.filename!r} is a link or a device")
        if "\0" in info.orig_filename:
            raise ValueError(f"{info.orig_filename!r} has a zero in its name")
        if info.flag_bits & 1:
            raise ValueError(f"{info.filename!r} is encrypted")
    _check_names([(info.orig_filename, info.is_dir()) for info in file.infolist()])
    total = sum(info.file_size for info in file.infolist())
    if total > limit:
        raise ValueError(f"it unpacks to {total:,} bytes, more than the {limit:,} allowed for its size")


def _check_tar(file: tarfile.TarFile, limit: int) -> list[tarfile.TarInfo]:
    members, total = [], 0
    for member in file:
        if member.issparse() or not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
            raise ValueError(f"{member.name!r} is a link, a device or a file with holes")
        total += member.size
        if total > limit or len(members) > limit // 512:
            raise ValueError(f"it unpacks to more than the {limit:,} bytes allowed for its size")
        members.append(member)
    if not members:
        raise ValueError("it is no tar archive, or an empty one")
    _check_names([(member.name, member.isdir()) for member in members])
    return members


def _check_names(names: Sequence[tuple[str, bool]]) -> None:
    """Raise ValueError for a name that leaves the folder, comes twice or lies inside a file."""
    seen: dict[str, bool] = {}
    for name, is_folder in names:
        parts = PurePosixPath(name).parts
        if not name or name.startswith(("/", "\\")) or PureWindowsPath(name).drive or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is no relative path")
        if ".." in parts:
            raise ValueError(f"{name!r} leaves the folder")
        if any(len(os.fsencode(part)) > 255 for part in parts):
            raise ValueError(f"{name[:60]!r}... is too long a name")
        key = "/".join(parts)
        if (key in seen or not parts) and not (is_folder and seen.get(key, True)):
            raise ValueError(f"{name!r} comes twice, or is no name")
        seen[key] = is_folder
    for key in seen:
        above = key
        while "/" in above:
            above = above.rpartition("/")[0]
            if not seen.get(above, True):
                raise ValueError(f"{key!r} lies inside a file")


class _Capped:
    """A file that may be read up to a limit, and never in large pieces: headers are small, contents come in blocks."""

    def __init__(self, file: io.BufferedIOBase, limit: int):
        self.file, self.limit = file, limit

    def read(self, n: int = -1) -> bytes:
        if not 0 <= n <= 2**24 or self.file.tell() > self.limit:
            raise ValueError("it unpacks to more than its size allows")
        return self.file.read(n)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset <= self.limit:
            raise ValueError("it unpacks to more than its size allows")
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()


@contextlib.contextmanager
def _opened(archive: Path, limit: int) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    _need_filter()
    with archive.open("rb") as raw:
        head = raw.read(6)
    opener = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(head[:2])
    if opener is None and zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield file
        return
    most = 2 * limit + 2**20  # headers and padding come on top of the contents that are counted
    with (opener or open)(archive, "rb") as raw:
        capped = _Capped(raw, most)
        with tarfile.open(fileobj=capped, mode="r:") as file:
            yield file
        while capped.read(2**16):  # to the end, where the checksum is
            pass


def _need_filter() -> None:
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python extracts archives unsafely; use 3.11.4 or later")


def _first(error: Exception) -> str:
    """A message's first line."""
    return ((str(error).strip().splitlines() or [""])[0] or type(error).__name__)[:200]
