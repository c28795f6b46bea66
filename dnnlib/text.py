"""Text from files, servers and exceptions, for a terminal."""


def printable(text: object) -> str:
    """The text with nothing in it that a terminal would obey: what is not printable is escaped, as Python does it."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def one_line(message: object, width: int = 500) -> str:
    """The beginning of the message, at most `width` signs on one line, `printable`; the type of an empty error.

    It takes no time for megabytes, as nothing beyond the first 8·width signs is looked at.
    """
    text = str(message)
    if isinstance(message, BaseException) and not text:
        text = type(message).__name__
    line = printable(' '.join(text[: 8 * width].split()))
    if len(line) <= width and len(text) <= 8 * width:
        return line
    head = line[: width - len(_CUT)]
    space = head.rfind(' ') if line[len(head) : len(head) + 1].strip() else -1
    return (head[:space] if space >= width // 2 else head) + _CUT  # a word is cut if it is long


_CUT = ' [...]'
