"""Text files that users write: lists of images and of classes."""

from pathlib import Path


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text without the blanks around them; empty lines are kept, a byte order mark is not.

    Raises OSError where it cannot be read, ValueError, one line with its name, where it is no UTF-8.
    """
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); save it in that encoding") from error
