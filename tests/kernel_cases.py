# SPDX-License-Identifier: Apache-2.0
"""The inputs of tests/test_kernels*.py, and the float64 PyTorch code that they compare the kernels with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import emulator
import on_device
import options as option_table
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import reduction
from fused_ppl.records import RowStats, TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager, error_and_bound, make_logits, make_target

if "triton" not in on_device.backends():
    pytest.skip("the kernels run on a CPU only under TRITON_INTERPRET=1 or --emulate", allow_module_level=True)
tl = pytest.importorskip("triton.language")


from fused_ppl.backends import triton_rows  # noqa: E402
from fused_ppl.kernels import launch  # noqa: E402
from fused_ppl.kernels.launch import LaunchConfig, Rows, Totals, Upstream, Workspace  # noqa: E402
from fused_ppl.kernels.nll_backward import launch_nll_backward  # noqa: E402
from fused_ppl.kernels.nll_forward import launch_nll_forward  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")
IGNORED = -100


class Case(NamedTuple):
    """The inputs of a launch. `logits` is a (1, N, V) view into a buffer that is NaN everywhere else."""

    logits: Tensor
    target: Tensor
    spec: LossSpec = LossSpec()
    weight: Tensor | None = None
    token_weight: Tensor | None = None
    num_items: Tensor | None = None


class EmulatedTraffic(dict[str, int]):
    """Bytes loaded from and stored to the memory of some tensors, as the emulator counts them from now on."""

    def __init__(self, device: emulator.Device, tensors: tuple[Tensor, ...]) -> None:
        device.traffic = self.launches = []
        self.starts = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __getitem__(self, name: str) -> int:
        return sum(launch[1 if name == "load" else 2] for launch in self.launches if launch[0] in self.starts)

    def __eq__(self, other: object) -> bool:
        return {"load": self["load"], "store": self["store"]} == other


class Result(NamedTuple):
    rows: Rows
    totals: Totals
    gradient: Tensor


def embed(values: Tensor, offset: int, pad: int) -> tuple[Tensor, Tensor]:
    """(N, V) values as rows of V + pad, `offset` elements into a 16-byte aligned buffer of NaN; and the buffer."""
    n, v = values.shape
    buffer = torch.full((offset + n * (v + pad) + 16,), NAN, dtype=values.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer.as_strided((1, n, v), (n * (v + pad), v + pad, 1), offset)
    view[0] = values
    return view, buffer


def make(n, v, dtype, *, offset=0, pad=0, kind="random", ignored=0.2, **options) -> Case:
    logits, _ = embed(make_logits((n, v), dtype, kind=kind), offset, pad)
    return Case(logits, make_target((n,), v, ignored=ignored), **options)


def options_of(names: list[str], n: int, v: int) -> dict[str, Any]:
    """What `make` takes for these values of tests/options.py."""
    keywords = option_table.keywords(names, v, make_target((n,), v))
    tensors = {k: keywords.pop(k) for k in ("weight", "token_weight", "num_items") if k in keywords}
    if "num_items" in tensors:
        tensors["num_items"] = torch.as_tensor(tensors["num_items"])
    return {"spec": LossSpec(**{k: float(number) for k, number in keywords.items()}), **tensors}


def uneven(n: int, low: float, high: float, seed: int = 5) -> Tensor:
    """Random numbers. Neighbours differ, so that a read of the wrong one shows, as it would not in a linspace."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage, so that NaN compares equal to itself."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def config_of(case: Case, slices: int = 1) -> LaunchConfig:
    """A configuration of one warp, so that small rows have several tiles as well."""
    _, _, v = case.logits.shape
    tiles = v // (32 * 16 // case.logits.itemsize) + 1
    per_slice = math.ceil(tiles / slices)
    return LaunchConfig(
        vectors=1, num_warps=1, threads=32, tiles_per_slice=per_slice, slices=math.ceil(tiles / per_slice)
    )


def unwritten_rows(n: int, stats: bool) -> Rows:
    return Rows(
        *(torch.full((n,), NAN) for _ in range(3)),
        lse=torch.full((n,), NAN, dtype=torch.float64),
        entropy=torch.full((n,), NAN) if stats else None,
        predicted=torch.full((n,), -7) if stats else None,
    )


def forward(case: Case, config: LaunchConfig, stats: bool = False) -> tuple[Rows, Totals]:
    n, spec = case.target.shape[0], case.spec
    rows = unwritten_rows(n, stats)
    dtypes = (torch.float32,) * 2 + (torch.float64,) * 3
    totals = Totals(*(torch.full((), NAN, dtype=dtype) for dtype in dtypes), case.num_items)
    split = config.slices > 1
    launch_nll_forward(
        case.logits,
        case.target,
        triton_rows.weights(TokenInputs(case.target, case.weight, case.token_weight), spec),
        triton_rows.numbers(spec),
        rows=rows,
        totals=totals,
        workspace=Workspace(
            torch.zeros(1 + n * split, dtype=torch.int32),
            torch.full((launch.SLICE_FIELDS, n, config.slices), NAN) if split else None,
        ),
        config=config,
        ignore_index=spec.ignore_index,
        mean=spec.reduction == "mean",
    )
    return rows, totals


def backward(
    case: Case, rows: Rows, dloss: Tensor, dz_loss: Tensor, config: LaunchConfig, out: Tensor, **columns
) -> Tensor:
    launch_nll_backward(
        case.logits,
        case.target,
        triton_rows.weights(TokenInputs(case.target, case.weight, case.token_weight), case.spec),
        triton_rows.numbers(case.spec),
        lse=rows.lse,
        nll=rows.nll,
        upstream=Upstream(dloss, dz_loss),
        out=out,
        config=config,
        ignore_index=case.spec.ignore_index,
        **columns,
    )
    return out


def plain(case: Case, dtype: torch.dtype, dloss: Tensor, dz_loss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every result, computed from full logits by eager PyTorch in one dtype, and the gradient by autograd."""
    spec, x = case.spec, case.logits.detach().flatten(0, 1).to(dtype).requires_grad_()
    z = x * spec.logit_scale
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    n, v = z.shape
    counted = torch.ones(n, dtype=torch.bool) if spec.ignore_index is None else case.target != spec.ignore_index
    y = torch.where(counted, case.target, 0).long()
    w = torch.ones(v, dtype=dtype) if case.weight is None else case.weight.to(dtype)
    u = torch.ones(n, dtype=dtype) if case.token_weight is None else case.token_weight.to(dtype)
    logp = z.log_softmax(1)
    lse, nll = z.logsumexp(1), -logp[torch.arange(n), y]
    loss = u * (1 - spec.label_smoothing) * w[y] * nll
    if spec.label_smoothing:
        loss = loss - u * spec.label_smoothing / v * (w * logp).sum(1)
    p = logp.exp()
    results = {
        "loss": loss,
        "weight": u * w[y],
        "nll": nll,
        "lse": lse,
        "entropy": -torch.where(p > 0, p * logp, 0).sum(1),
    }
    results = {name: torch.where(counted, r, 0) for name, r in results.items()}
    total = dloss.to(dtype) * results["loss"]
    total = total + dz_loss.to(dtype) * spec.z_loss * results["weight"] * results["lse"].square()
    (gradient,) = torch.autograd.grad(total[counted].sum(), x)
    results["predicted"] = torch.where(counted, z.argmax(1), -1)
    gradient[~counted] = 0
    return {name: r.detach() for name, r in results.items()}, gradient


def check(case: Case, config: LaunchConfig | None = None, stats: bool = False) -> Result:
    """Runs forward and backward and judges them. It also checks that nothing outside of the gradient has changed."""
    config = config or config_of(case)
    n, v = case.target.shape[0], case.logits.shape[2]
    dloss, dz_loss = uneven(n, -2, 3), uneven(n, 1, 2, seed=6)
    before = bytes_of(case.logits)
    rows, totals = forward(case, config, stats)
    stride = case.logits.stride(1)
    out, buffer = embed(torch.full((n, v), NAN, dtype=case.logits.dtype), case.logits.storage_offset(), stride - v)
    out = out.as_strided(case.logits.shape, case.logits.stride(), out.storage_offset())
    buffer.fill_(7.0)
    out.fill_(NAN)
    backward(case, rows, dloss, dz_loss, config, out)
    assert torch.equal(bytes_of(case.logits), before), "the inputs have changed"
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert bool((buffer[outside] == 7.0).all()), "written outside of the rows"

    judge(case, rows, out, dloss, dz_loss)
    stats = RowStats(rows.loss, rows.weight, rows.nll, rows.lse, rows.loss, rows.loss)
    stated = reduction.sum_rows(stats, case.spec, case.target.shape)
    want = reduction.finish(stated, case.spec, num_items=case.num_items, dtype=torch.float32)
    for name, value in want._asdict().items():
        assert_close(
            getattr(totals, name), value, rtol=1e-12 if value.dtype == torch.float64 else 3e-7, atol=0, equal_nan=True
        )
    return Result(rows, totals, out)


def judge(case: Case, rows: Rows, gradient: Tensor, dloss: Tensor, dz_loss: Tensor) -> None:
    """Checks the results for these logits by the tolerances of fused_ppl.testing."""
    eager, eager_gradient = plain(case, torch.float32, dloss, dz_loss)
    truth, true_gradient = plain(case, torch.float64, dloss, dz_loss)
    stats = rows.predicted is not None
    for name in ("loss", "weight", "nll", "lse") + (("entropy",) if stats else ()):
        actual = getattr(rows, name).float()
        # an absolute error of the logits is one of every result: the floor is an ulp of the largest logit too
        size = case.logits.abs().nan_to_num(posinf=0, neginf=0).amax().item() if name != "weight" else 0
        assert_as_good_as_eager(actual, eager[name], truth[name], name, condition=1 + size)
    if case.logits.abs().nan_to_num(posinf=1e9).amax() < 100:
        # nll keeps its own digits, also where it is far smaller than a logit; a softcap rounds each logit first
        assert_close(rows.nll.double(), truth["nll"], rtol=2e-5, atol=0 if case.spec.softcap is None else 3e-6)
    if stats:
        assert torch.equal(rows.predicted, truth["predicted"])
    gradient = gradient.reshape(true_gradient.shape)
    assert_as_good_as_eager(gradient, eager_gradient.to(gradient.dtype), true_gradient, "gradient")
    assert_every_element(gradient, eager_gradient, true_gradient)
    assert not gradient[case.target == case.spec.ignore_index].any()


def assert_every_element(gradient: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The gradient before it is rounded keeps the tolerance of fp32; one rounding may add an ulp of the element itself.

    The tolerance of half precision alone is 4 ulp of the largest entry of a row, which hides a wrong small one.
    """
    error, allowed = error_and_bound(gradient.float(), eager, truth)
    kind = torch.finfo(gradient.dtype)
    one_rounding = kind.eps * (truth.abs().nan_to_num(posinf=0) + kind.smallest_normal)
    assert bool((error <= allowed + one_rounding).all()), f"worst element: {(error - allowed - one_rounding).max()}"


def count_bytes(monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> dict[str, int]:
    """Counts the bytes that kernels load from and store to the memory of these tensors from now on."""
    on_device.only_on_the_cpu("Triton's interpreter counts the bytes")
    if on_device.emulated is not None:
        return EmulatedTraffic(on_device.emulated, tensors)
    counts = {"load": 0, "store": 0}
    low_level = pytest.importorskip("triton.runtime.interpreter")._interpreter

    def count(name, original):  # type: ignore[no-untyped-def]
        def counted(ptrs, *rest):  # type: ignore[no-untyped-def]
            mask = rest[0] if name == "load" else rest[1]
            dtype_bytes = rest[-1].itemsize if name == "load" else rest[0].dtype.itemsize
            for tensor in tensors:
                start = tensor.untyped_storage().data_ptr()
                inside = (ptrs >= start) & (ptrs < start + tensor.untyped_storage().nbytes()) & mask
                counts[name] += int(inside.sum()) * dtype_bytes
            return original(ptrs, *rest)

        return counted

    for name in counts:
        monkeypatch.setattr(low_level, name, count(name, getattr(low_level, name)))
    return counts
