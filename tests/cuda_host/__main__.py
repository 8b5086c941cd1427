"""``python -m cuda_host [address|thread|tally …]``: build the emulated library, or what counts its
accesses, and print the path."""

import sys

from cuda_host import library, tally

for name in sys.argv[1:] or [None]:
    print(tally() if name == "tally" else library(name))
