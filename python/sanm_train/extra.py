"""The packages of the extra `train`, and what is said where one of them is missing.

`import sanm_train`, its `SANM`, `Batch` and `Decoder` and `sanm --help` need torch and numpy alone:
all else is imported where it is used, in a ``with extra():``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: What pip calls them, by what Python does.
PACKAGES = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "yaml": "pyyaml",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "kornia": "kornia",
    "tensorboard": "tensorboard",
    "lightning_fabric": "lightning-fabric",
}


class MissingPackage(ModuleNotFoundError):
    """A package of the extra is not installed; the message names it and how to get it."""


@contextmanager
def extra() -> Iterator[None]:
    """Around imports of `PACKAGES`: raises MissingPackage where one of them is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in PACKAGES or find_spec(name):  # not ours, or too old
            raise
        missing = " ".join(package for module, package in PACKAGES.items() if not find_spec(module))
        message = (
            f"this needs {PACKAGES[name]}, which is not installed: pip install {missing} (all that "
            "sanm_train lacks here; in a checkout of sanm_kernels also: pip install -e '.[train]')"
        )
        raise MissingPackage(message, name=error.name) from None
