"""Lets memory be taken in pages of 2 MB: a training step on a CPU takes a tenth less time."""

import os
import sys
from contextlib import suppress
from pathlib import Path

_LINUX_GIVES_THEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "GLIBC_TUNABLES"  # glibc reads it once, before Python starts


def use_huge_pages() -> None:
    """Starts this program anew with huge pages, where Linux gives them to those who ask.

    Does nothing on other systems, or where GLIBC_TUNABLES is set: to "" for small pages. Call it
    before the imports, which are made twice otherwise.
    """
    if VARIABLE in os.environ:
        return
    with suppress(OSError):
        if "[madvise]" in _LINUX_GIVES_THEM.read_text():
            os.environ[VARIABLE] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
