"""``python -m cuda_host [address|thread …]``: build the emulated library, print its path."""

import sys

from cuda_host import library

for sanitize in sys.argv[1:] or [None]:
    print(library(sanitize))
