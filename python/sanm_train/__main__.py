"""`python -m sanm_train` is the command line, for `torchrun -m`."""

import sys

from .cli import main

sys.exit(main())
