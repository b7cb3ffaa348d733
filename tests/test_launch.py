# SPDX-License-Identifier: Apache-2.0
"""Launch configurations, which are pure functions, and the signatures of the launch functions; without Triton."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fused_ppl.kernels import launch
from fused_ppl.kernels.launch import Device, choose_config, choose_two_pass_config


@pytest.mark.parametrize("num_sms", [1, 108, 132, 148])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("pressure", [0, 1])
def test_configurations_cover_every_row_and_fill_the_device(num_sms, itemsize, pressure):
    for warp in (32, 64):
        for v in (1, 31, 512, 2047, 4096, 50257, 65536, 151643, 10**6):
            for n in (1, 7, 100, 5000, 10**5):
                config = choose_config(n, v, itemsize, Device(num_sms, warp), register_pressure=pressure)
                tile = config.vectors * config.threads * 16 // itemsize
                assert config.threads == warp * config.num_warps
                assert (
                    config.tiles_per_slice * config.slices
                    >= v // tile + 1
                    > config.tiles_per_slice * (config.slices - 1)
                )
                assert config.slices == 1 or v // config.slices >= 4096
                assert config.slices <= launch.MAX_SLICES
    assert choose_config(10**5, 151643, 2, Device(132)).slices == 1
    assert choose_config(100, 151643, 2, Device(132)).slices > 8


@pytest.mark.parametrize("num_sms", [1, 108, 132, 148, 304])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("pressure", [0, 2])
def test_rows_at_work_stay_in_l2_until_their_second_pass(num_sms, itemsize, pressure):
    for warp in (32, 64):
        for v in (1, 31, 512, 2047, 4096, 32000, 50257, 65536, 128256, 151643, 10**6):
            config = choose_two_pass_config(v, itemsize, Device(num_sms, warp), register_pressure=pressure)
            tile = config.vectors * config.threads * 16 // itemsize
            assert config.slices == 1
            assert config.tiles_per_slice == v // tile + 1
            assert config.threads == warp * config.num_warps <= 1024
            at_work = num_sms * (1024 // config.threads)
            max_threads = 512 if pressure else 1024  # many options at 1024 threads spill
            assert at_work * v * itemsize <= launch.L2_BYTES or config.threads == max_threads
    assert [choose_two_pass_config(v, 2, Device(132)).num_warps for v in (1000, 8192, 50257, 128256)] == [2, 4, 16, 32]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "kernels").glob("*.py")), ids=lambda file: file.name
)
def test_functions_of_the_host_take_at_most_four_positional_arguments(file):
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    on_the_host = [f for f in functions if not any("jit" in ast.unparse(d) for d in f.decorator_list)]
    assert {f.name: len(f.args.args) for f in on_the_host if len(f.args.args) > 4} == {}
