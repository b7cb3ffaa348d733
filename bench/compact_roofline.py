# SPDX-License-Identifier: Apache-2.0
"""A model of the fused head on an H100: products at the rate of the best library, everything else at bandwidth.

    python bench/compact_roofline.py

Nothing here is measured. What overlaps with products is not credited: bytes and FLOPs add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import roofline

from fused_ppl import plan

N, V, D = 8192, 128256, 4096
SHARE, GROUP = 1 / 8, 1024
RATE = 768e12  # FLOP/s in bf16: QuACK's own measurement of its head at N = 4096 and this V and D; fp8 is twice that
BANDWIDTH = roofline.ATTAINED * roofline.CARDS["H100 SXM"].bandwidth
LIGER_CHUNKS = 32  # its rule: V / D, rounded up to a power of 2


@dataclass(frozen=True)
class Row:
    who: str
    flops: float  # in bf16
    fp8_flops: float
    moved: float  # bytes beside the products' own operands, once each

    @property
    def milliseconds(self) -> float:
        return 1e3 * (self.flops / RATE + self.fp8_flops / (2 * RATE) + self.moved / BANDWIDTH)


def rows() -> list[Row]:
    product, logits, weight, kept = 2 * N * V * D, N * V, V * D, int(SHARE * V)
    groups = N // GROUP
    # kept rows of W gathered, their gradients made (fp32) and added; W once for the thin product, dW once for it, and
    # read and rounded at the end
    thin = groups * kept * D * (4 + 4 + 8) + weight * (2 + 8 + 6)
    # stats and column sums read the logits; the kept ones are gathered (32 bytes of a sector each), written, read twice
    passes = logits * (2 + 2) + N * kept * (32 + 6)
    converted = weight * 3  # W, read and written as fp8 at every call
    case = plan.LinearCase(N, V, D, 2, "cuda", (True, True, False))
    chunks = -(-N // plan.linear_plan(case, "rows").rows)
    # each chunk but the first reads and writes dW, and the end reads and rounds it
    added = logits * 6 + weight * (8 * (chunks - 1) + 6)
    # without addmm(out_dtype=): each product is written to a buffer first
    beside = logits * 6 + weight * (8 * chunks + 6)
    return [
        Row("QuACK: three products, logits in bf16 chunks", 3 * product, 0, logits * 4 + weight * 2),
        Row("Liger: three products, chunks of 256 rows", 3 * product, 0, logits * 6 + LIGER_CHUNKS * weight * 4),
        Row("cut-cross-entropy: recomputes, no tile is skipped", 4 * product, 0, weight * 2),
        Row(f"fused_ppl, rows, {chunks} chunks", 3 * product, 0, added),
        Row("fused_ppl, rows, torch without addmm(out_dtype=)", 3 * product, 0, beside),
        Row("fused_ppl, compact", product * (1 + 2 * SHARE), 0, passes + thin),
        Row(
            "fused_ppl, compact with an fp8 screen",
            3 * SHARE * product,
            product,
            passes + N * kept * 6 + thin + converted,
        ),
    ]


def main() -> None:
    print(f"Model: H100 SXM, N={N}, V={V}, D={D}, K = V/{1 / SHARE:.0f}, {RATE / 1e12:.0f} TFLOP/s, "
          f"{BANDWIDTH / 1e12:.1f} TB/s. Not measured.\n")  # fmt: skip
    print("| | TFLOP | of them fp8 | GB beside the products | modelled ms | over QuACK |\n|---|---|---|---|---|---|")
    base = rows()[0].milliseconds
    for row in rows():
        total = (row.flops + row.fp8_flops) / 1e12
        print(f"| {row.who} | {total:.1f} | {row.fp8_flops / 1e12:.1f} | {row.moved / 1e9:.1f} | "
              f"{row.milliseconds:.1f} | {row.milliseconds / base:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
