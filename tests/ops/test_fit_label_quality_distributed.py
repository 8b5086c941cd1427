"""fit_label_quality over a process group: 1, 2 and 4 ranks on any shards fit what one process does.

Each number of ranks starts its processes once; they run all cases and leave what they got in files.
"""

from __future__ import annotations

import datetime
import functools
import re
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from inputs import extended
from test_fit_label_quality import KINDS, data, two_points

import sanm_kernels as sk

pytestmark = [
    extended,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]

WORLDS = (1, 2, 4)
WAIT = 30  # seconds for a collective, after which gloo gives up
DEADLINE = 100  # seconds for all cases together
TOLERANCE = 1e-12
SHARES = ("uneven", "first empty", "last empty", "one has all")
FIELDS = sk.LabelQuality._fields


class Case(NamedTuple):
    losses: torch.Tensor
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    history: torch.Tensor | None = None


def past(x: torch.Tensor, epochs: int) -> torch.Tensor:
    rows = torch.stack([2.0**e * x.roll(e).abs().sqrt() + 0.1 * e for e in range(epochs)])
    rows[-2:-1] = 3.0  # an epoch in which all losses are equal
    return rows


@functools.cache
def cases() -> dict[str, Case]:
    few, many = data("skewed", 1237), data("heavy", 150_001)
    zero = torch.zeros(0)
    result = {kind: Case(data(kind, 1237)) for kind in KINDS}
    result |= {f"seed {s}": Case(data("overlapping", 997, s), {"seed": s}) for s in (1, 7, 12345)}
    result |= {
        f"history {epochs}{'' if normalize else ' raw'}": Case(
            few, {"normalize": normalize}, past(few, epochs)
        )
        for epochs in (1, 4, 7)
        for normalize in (True, False)
    }
    result |= {
        "many": Case(many),
        "many, raw": Case(40 + 7 * many, {"normalize": False, "reg_covar": 0.3, "seed": 4}),
        "float32": Case(few.float(), {"max_iter": 3}, past(few, 2).float()),
        "bfloat16": Case(few.bfloat16(), {"seed": 9}),
        "strided": Case(few[::3]),
        "one step": Case(few, {"max_iter": 1}),
        "to the end": Case(few, {"max_iter": 20, "tol": 0.0}),
        "converging": Case(few, {"max_iter": 60, "tol": 1e-6}),
        "two": Case(torch.tensor([0.5, 3.0])),
        "three": Case(torch.tensor([0.5, 3.0, 2.5])),
        "an outlier": Case(torch.cat([data("bimodal", 999) * 0.01, torch.ones(1)])),
        "none": Case(zero),
        "none, history": Case(zero, {}, zero.expand(3, -1)),
        "one": Case(torch.ones(1)),
        "equal": Case(torch.full((7,), 2.5)),
        "equal, raw": Case(torch.full((7,), -2.5), {"normalize": False}),
        "equal, history": Case(torch.full((7,), 2.5), {}, torch.full((2, 7), 2.5)),
        "no variance": Case(two_points(9, torch.float64), {"reg_covar": 0.0}),
        "huge": Case(torch.tensor([1e200, 1e308, 3.0, 4.0], dtype=torch.float64).repeat(50)),
        "tiny": Case(torch.tensor([0.0, 5e-324, 0.0, 1e-320], dtype=torch.float64).repeat(50)),
    }
    return result


def shares(name: str) -> tuple[str, ...]:
    """Two of SHARES, other ones for the next case; one where there are many samples."""
    place = list(cases()).index(name) % len(SHARES)
    return (SHARES[0], SHARES[place])[: 1 if name.startswith("many") or place == 0 else 2]


@functools.cache
def alone(name: str) -> sk.LabelQuality:
    case = cases()[name]
    return sk.fit_label_quality(
        case.losses, history=case.history, backend="reference", **case.options
    )


def sizes(n: int, world: int, share: str) -> list[int]:
    """How many of the n samples each rank has."""
    if share == "one has all":
        return [n if rank == world // 2 else 0 for rank in range(world)]
    cuts = np.sort(np.random.RandomState(n + world).randint(n + 1, size=world - 1))
    result = np.diff(np.r_[0, cuts, n]).tolist()
    if share != "uneven" and world > 1:
        empty, other = (0, 1) if share == "first empty" else (-1, -2)
        result[other] += result[empty]
        result[empty] = 0
    return result


class Wrong(NamedTuple):
    error: type[Exception]
    match: str  # of the message, in which {} is the rank that is wrong
    change: dict[str, Any]  # of that rank's arguments


LOSSES = torch.rand(6, generator=torch.Generator().manual_seed(0))
NOT_FINITE = torch.tensor([0.0, 1.0, torch.nan, 3.0, 4.0, torch.inf])
ON = r" \(on rank {} of the process group\)$"
#: One rank has a wrong argument, or another one than the others.
WRONG = {
    "not a tensor": Wrong(TypeError, "^losses: expected a torch.Tensor.*" + ON, {"losses": [1.0]}),
    "shape": Wrong(ValueError, "^losses: expected shape.*" + ON, {"losses": torch.rand(2, 3)}),
    "nan": Wrong(ValueError, r"^losses: .*got nan at index \[2\]" + ON, {"losses": NOT_FINITE}),
    "infinite history": Wrong(
        ValueError,
        r"^history\[-4:\]: .*got inf at index \[0, 5\]" + ON,
        {"history": NOT_FINITE.nan_to_num(1.0, posinf=torch.inf)[None]},
    ),
    "another N": Wrong(
        ValueError, r"^history: expected shape \(E, 6\)" + ".*" + ON, {"history": torch.rand(1, 5)}
    ),
    "seed": Wrong(TypeError, "^seed: expected an int.*" + ON, {"seed": 1.0}),
    "tol": Wrong(ValueError, "^tol: expected a number.*" + ON, {"tol": float("nan")}),
    "normalize": Wrong(TypeError, "^normalize: expected a bool.*" + ON, {"normalize": None}),
    "no backend": Wrong(ValueError, "^backend: expected one of.*" + ON, {"backend": "numpy"}),
    "backend": Wrong(RuntimeError, "^backend 'cpu' cannot run.*" + ON, {"backend": "cpu"}),
    "other seed": Wrong(ValueError, "^seed: .*same value.*got 0 on rank 0 and 1", {"seed": 1}),
    "other max_iter": Wrong(ValueError, "^max_iter: expected the same value", {"max_iter": 3}),
    "other tol": Wrong(ValueError, "^tol: expected the same value", {"tol": 0.5}),
    "other reg_covar": Wrong(ValueError, "^reg_covar: expected the same", {"reg_covar": 0.1}),
    "other normalize": Wrong(ValueError, "^normalize: expected the same", {"normalize": False}),
    "other epochs": Wrong(
        ValueError,
        "^history: expected the same number of rows .*got 1 on rank 0 and 2 on rank {}",
        {"history": torch.rand(2, 6)},
    ),
}


def complaint(**arguments: Any) -> tuple[str, str]:
    try:
        sk.fit_label_quality(arguments.pop("losses"), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def run_rank(rank: int, world: int, folder: str) -> None:
    """What rank `rank` got, as {kind: {case: …}}, into the file `rank`.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=WAIT),
    )
    largest, all_gather = 0, dist.all_gather

    def counted(parts: list[torch.Tensor], numbers: torch.Tensor, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, numbers.numel())
        return all_gather(parts, numbers, **options)

    dist.all_gather = counted
    fits, wrong = {}, {}
    for name, case in cases().items():
        for share in shares(name):
            parts = sizes(len(case.losses), world, share)
            own = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
            history = None if case.history is None else case.history[:, own]
            fits[f"{name}/{share}"] = tuple(
                sk.fit_label_quality(
                    case.losses[own],
                    history=history,
                    process_group=dist.group.WORLD,
                    **case.options,
                )
            )
    for name, call in WRONG.items():
        arguments: dict[str, Any] = {"losses": LOSSES, "history": LOSSES.flip(0)[None]}
        if rank == world - 1:
            arguments |= call.change
        wrong[name] = complaint(**arguments, process_group=dist.group.WORLD)
    wrong["group"] = complaint(losses=LOSSES, process_group="world")
    part = {}
    if world > 2:  # a group of some ranks: the others are told that they are not in it
        some = dist.new_group([1, world - 1])
        if rank in (1, world - 1):
            own = LOSSES[:2] if rank == 1 else LOSSES[2:]
            part["some"] = tuple(sk.fit_label_quality(own, process_group=some))
        else:
            wrong["outside"] = complaint(losses=LOSSES, process_group=some)
    torch.save(
        {"fits": fits, "wrong": wrong, "part": part, "largest": largest}, f"{folder}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS, ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(
        run_rank, (request.param, str(folder)), request.param, join=False
    )
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, "a rank hangs"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_alike(parts: list[tuple[torch.Tensor, ...]], one: sk.LabelQuality) -> None:
    """The ranks' results have the same bits, and are those of the one process."""
    first = parts[0]
    for part in parts[1:]:
        for name, a, b in zip(FIELDS[1:], first[1:], part[1:], strict=True):
            assert torch.equal(a, b), name
    joined = sk.LabelQuality(torch.cat([part[0] for part in parts]), *first[1:])
    for name, actual, expected in zip(FIELDS, joined, one, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
        # float32: rounded from float64
        tolerance = TOLERANCE if actual.dtype != torch.float32 else 1e-7
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", cases())
def test_ranks_fit_what_one_process_does(ranks, name):
    for share in shares(name):
        parts = [rank["fits"][f"{name}/{share}"] for rank in ranks]
        assert [len(part[0]) for part in parts] == sizes(
            len(cases()[name].losses), len(ranks), share
        )
        assert_alike(parts, alone(name))


def test_the_cases_are_what_they_are_meant_to_be():
    degenerate = {name for name in cases() if bool(alone(name).degenerate)}
    assert degenerate == {name for name in cases() if re.match("none|one$|equal|no var", name)}
    assert {bool(alone(name).converged) for name in set(cases()) - degenerate} == {True, False}
    assert len({int(alone(name).n_iter) for name in cases()}) > 5


def test_no_rank_gets_the_losses_of_another(ranks):
    for rank in ranks:
        assert 0 < rank["largest"] <= 10  # extremes of five epochs


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_raises_on_all(ranks, name):
    call = WRONG[name]
    if "same" in call.match and len(ranks) == 1:
        pytest.skip("one rank agrees with itself")
    messages = [rank["wrong"][name] for rank in ranks]
    assert len(set(messages)) == 1
    error, message = messages[0]
    assert error == call.error.__name__
    assert re.search(call.match.format(len(ranks) - 1), message), message


def test_what_is_no_group_is_named(ranks):
    for rank in ranks:
        error, message = rank["wrong"]["group"]
        assert error == "TypeError"
        assert message.startswith("process_group: expected a torch.distributed.ProcessGroup")


def test_a_group_of_some_ranks(ranks):
    if len(ranks) < 4:
        pytest.skip("there is no such group")
    inside = [rank["part"]["some"] for rank in ranks if rank["part"]]
    assert len(inside) == 2
    assert_alike(inside, sk.fit_label_quality(LOSSES, backend="reference"))
    for rank in ranks:
        if not rank["part"]:
            error, message = rank["wrong"]["outside"]
            assert error == "TypeError" and "with this process in it" in message
