"""Export the notebooks to vegc/:  python .ci/export.py   (what `make export` does)

nbdev-export, but for one thing: nbdev breaks the line of `__all__` at 120 characters and then puts
`__all__ = ` before it. Here it is broken sooner, so that no line of the package is longer than 120.
"""
from textwrap import TextWrapper

import nbdev.maker
from nbdev.doclinks import nbdev_export


class ShorterLines(TextWrapper):
    "Leaves room for what is put before the first line."
    def __init__(self, width=120, **kw): super().__init__(width=width - len('__all__ = '), **kw)


if __name__ == '__main__':
    nbdev.maker.TextWrapper = ShorterLines
    nbdev_export()
