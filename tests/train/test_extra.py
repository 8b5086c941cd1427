"""What works with torch and numpy alone, and what is said where a package is missing."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_docs import ROOT, code
from test_structure import SOURCES, TRAIN_FILES, relative

from sanm_train import TrainConfig
from sanm_train.extra import PACKAGES, MissingPackage, extra
from sanm_train.train import build, quality_auc

FORBID = """
import sys

class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *where):
        if name.partition(".")[0] not in {hidden}:
            return self.finder.find_spec(name, *where)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def needs(package: str) -> set[str]:
    """What pip installs with `package`, itself included, as far as it is installed."""
    try:
        entries = requires(package) or ()
    except PackageNotFoundError:
        return set()
    names = (re.match(r"[\w.-]+", entry).group() for entry in entries if "extra ==" not in entry)
    return {package}.union(*map(needs, set(names)))


def hidden() -> set[str]:
    """Every module installed here but torch, numpy, what these need, and our own."""
    keep = {name.lower().replace("_", "-") for name in needs("torch") | needs("numpy")}
    keep.add("sanm-kernels")
    return {
        module
        for module, packages in packages_distributions().items()
        if not keep & {name.lower().replace("_", "-") for name in packages}
    }


def run_bare(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FORBID.format(hidden=hidden()) + program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_wrapper_needs_torch_and_numpy_alone() -> None:
    assert set(PACKAGES) - {"jinja2"} <= hidden(), "hides nothing: torch itself needs jinja2"
    page = code(ROOT / "README.md")
    examples = [block for block in page if "SANM(" in block]
    assert examples
    done = run_bare("\n".join(["from sanm_train import SANM, Batch, Decoder", *examples]))
    assert done.returncode == 0, done.stderr


def test_the_command_without_the_extra(tmp_path) -> None:
    """Help and version are there; what trains or shows says what is missing, and writes nothing."""
    out, program = tmp_path / "run", "from sanm_train.cli import main\n"
    for words in (["--help"], ["--version"], ["train", "--help"]):
        program += f"try: main({words})\nexcept SystemExit as end: assert not end.code\n"
    refused = (["train", "--out"], ["demo", "--out"], ["inspect"], ["eval"], ["compare", "--out"])
    for words in refused:
        program += f"assert main({[*words, str(out)]}) == 1\n"
    done = run_bare(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: sanm") == 2
    assert re.search(r"^sanm \d\S* \(torch \d\S*, Python \d\S*\)$", done.stdout, re.M)
    errors = done.stderr.splitlines()
    assert len(errors) == len(refused) and not out.exists()
    for error in errors:
        assert error.startswith("sanm: error: this needs ")
        assert "pip install scikit-learn matplotlib rich pyyaml" in error


USES = {
    "TrainConfig.read(preset='cifar10-sym50')": "pyyaml",
    "train(TrainConfig())": "lightning-fabric",
    "from sanm_train.train import build; build(TrainConfig())": "scikit-learn",
    "images.ImageFiles(['a.png'], 8)": "pillow",
    "augment.Augment('cifar', torch.ones(3), torch.ones(3), (8, 8))": "kornia",
    "readers.read_manifest('a.csv')": "pyarrow",
    "import sanm_train.reports.report": "matplotlib",
    "import sanm_train.progress": "rich",
}


def test_what_needs_more_says_so_before_it_starts() -> None:
    program = "import torch\nfrom sanm_train import TrainConfig, augment, images, readers, train\n"
    for use in USES:
        program += f"try: {use}\nexcept ImportError as error: print(type(error).__name__, error)\n"
    done = run_bare(program)
    assert done.returncode == 0, done.stderr
    for line, package in zip(done.stdout.splitlines(), USES.values(), strict=True):
        assert line.startswith(f"MissingPackage this needs {package}, which is not installed: ")
        assert f" {package} " in line.partition("pip install")[2]


def test_quality_auc_is_scikit_learn_s_without_it() -> None:
    data = build(TrainConfig()).data
    truth = torch.where(torch.rand(len(data)) < 0.3, -1, data.true_labels)
    data = dataclasses.replace(data, true_labels=truth)
    clean = (data.labels == truth)[truth >= 0]
    for values in (3, 50, 10**6):  # few: with ties
        quality = torch.randint(values, (len(data),)) / values + 0.1 * (data.labels == truth)
        expected = roc_auc_score(clean, quality[truth >= 0])
        assert quality_auc(quality, data) == pytest.approx(expected, abs=1e-12)


def test_a_part_that_is_missing_is_not_the_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'kornia.nothing'"), extra():
        import kornia.nothing  # noqa: F401


def test_other_missing_modules_are_not_ours_to_explain() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'of_a_user'") as error, extra():
        import of_a_user  # noqa: F401
    assert not isinstance(error.value, MissingPackage)


def test_packages_are_those_of_the_extra() -> None:
    listed = re.search(r"^train = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert listed
    names = re.findall(r'"([\w-]+)[^"]*"', listed.group(1))
    assert set(names) == set(PACKAGES.values())


@pytest.mark.parametrize("path", TRAIN_FILES, ids=relative)
def test_what_the_extra_has_is_imported_in_one_way(path) -> None:
    tree = ast.parse(path.read_text())
    inside = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and ast.unparse(block.items[0]) == "extra()"
        for node in block.body
    }
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        if {name.partition(".")[0] for name in modules} & {*PACKAGES, "cycler"}:
            assert node in inside, f"line {node.lineno}: not in a `with extra():`"


def test_nobody_is_sent_to_a_package_index_for_this_package() -> None:
    for path in SOURCES:
        assert not re.search(r"pip install\s+['\"]?sanm[-_]", path.read_text()), path
