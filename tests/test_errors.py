# SPDX-License-Identifier: Apache-2.0
"""Bad input is an error that states the rule, what it got, and the way out: one row for each `raise` of checks.py."""

from __future__ import annotations

import ast
import inspect
from collections import Counter

import compact_cases
import pytest
import torch

import fused_ppl
from fused_ppl import (
    CrossEntropyLoss,
    Options,
    Perplexity,
    PerplexityAccumulator,
    PerplexityLoss,
    checks,
    cross_entropy,
    perplexity,
)
from fused_ppl import cross_entropy_with_stats as with_stats
from fused_ppl import linear_cross_entropy as head
from fused_ppl import next_token_targets as targets
from fused_ppl import (
    rank_checks as ranks,
)

X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)
H = torch.zeros(5, 3)
LEAF = torch.zeros(4, 7, requires_grad=True)
OUTSIDE = torch.distributed.GroupMember.NON_GROUP_MEMBER
INPLACE = Options(inplace_backward=True)

# (the check, the call, the type, the rule, the value, the way out)
ROWS = [
    ("check_choice", lambda: cross_entropy(X, Y, reduction="avg"), ValueError, "one of 'mean', 'sum'", "'avg'", ""),
    ("check_choice", lambda: with_stats(X, Y, reduction=None), ValueError, "one of 'mean'", "None", ""),
    ("check_choice", lambda: Options(backend="cuda"), ValueError, "one of 'triton'", "'cuda'", "None picks"),
    ("check_constant", lambda: perplexity(X, Y, softcap=X[0]), ValueError, "shape (), one number", "(7,)", ""),
    ("check_no_grad", lambda: perplexity(X, Y, logit_scale=LEAF[0, 0]), ValueError, "logit_scale", "grad", "outside"),
    ("check_number", lambda: cross_entropy(X, Y, softcap=True), TypeError, "number > 0", "bool", "None for no cap"),
    ("check_number", lambda: cross_entropy(X, Y, z_loss="1"), TypeError, ">= 0", "str", ""),
    ("check_number", lambda: cross_entropy(X, Y, label_smoothing=1.5), ValueError, "in [0, 1]", "1.5", ""),
    ("check_number", lambda: cross_entropy(X, Y, label_smoothing=float("nan")), ValueError, "in [0, 1]", "nan", ""),
    ("check_number", lambda: perplexity(X, Y, softcap=0), ValueError, "> 0 and finite", "0", "None for no cap"),
    ("check_number", lambda: perplexity(X, Y, logit_scale=-1.0), ValueError, "> 0 and finite", "-1.0", ""),
    ("check_number", lambda: perplexity(X, Y, logit_scale=float("inf")), ValueError, "finite", "inf", ""),
    ("check_number", lambda: cross_entropy(X, Y, z_loss=-0.1), ValueError, ">= 0", "-0.1", ""),
    ("check_number", lambda: perplexity(X, Y, max_nll=0.0), ValueError, "> 0", "0.0", "None for no limit"),
    (
        "check_ignore_index",
        lambda: perplexity(X, Y, ignore_index=1.0),
        TypeError,
        "an int, or None",
        "float",
        "one value",
    ),
    ("check_ignore_index", lambda: perplexity(X, Y, ignore_index=[1]), TypeError, "an int", "list", "one value first"),
    ("check_memory_budget", lambda: Options(memory_budget=0), ValueError, "bytes > 0", "0", "512 MiB"),
    ("check_memory_budget", lambda: Options(memory_budget=1.5), ValueError, "bytes > 0", "1.5", "512 MiB"),
    ("check_options", lambda: perplexity(X, Y, options={}), TypeError, "fused_ppl.Options", "dict", "Pass Options("),
    ("check_tensor", lambda: perplexity([[0.0]], Y), TypeError, "input must be a torch.Tensor", "list", "as_tensor"),
    ("check_tensor", lambda: perplexity(X, [0] * 4), TypeError, "target must be", "list", "as_tensor"),
    ("check_tensor", lambda: cross_entropy(X, Y, [1.0] * 7), TypeError, "weight must be", "list", "as_tensor"),
    ("check_tensor", lambda: targets([1, 2]), TypeError, "tokens must be", "list", "as_tensor"),
    ("check_float_input", lambda: perplexity(X.long(), Y), TypeError, "float16, bfloat16", "torch.int64", ".float()"),
    ("check_float_input", lambda: perplexity(X.cfloat(), Y), TypeError, "float16", "torch.complex64", ""),
    (
        "check_target",
        lambda: perplexity(X, X),
        TypeError,
        "class indices",
        "torch.float32",
        "F|functional.cross_entropy",
    ),
    ("check_target", lambda: perplexity(X, Y.bfloat16()), TypeError, "class indices", "torch.bfloat16", ".long()"),
    ("check_indices", lambda: perplexity(X, Y.bool()), TypeError, "int64 or int32", "torch.bool", ".long()"),
    ("check_indices", lambda: perplexity(X, Y.to(torch.uint8)), TypeError, "int64 or int32", "torch.uint8", ".long()"),
    ("check_target", lambda: perplexity(X, Y[:3]), ValueError, "shape (4,) to match", "(3,)", "class_dim=-1"),
    ("check_target", lambda: perplexity(X[None], Y[None]), ValueError, "shape (1, 7)", "(1, 4)", "class_dim=-1"),
    ("check_target", lambda: perplexity(X[0], Y[:1]), ValueError, "shape ()", "(1,)", ""),
    ("check_device", lambda: perplexity(X, Y.to("meta")), ValueError, "target must be on", "meta", "input.device"),
    ("check_device", lambda: cross_entropy(X, Y, X[0].to("meta")), ValueError, "weight must be on", "meta", ".to("),
    ("check_constant", lambda: perplexity(X, Y, Y[:1].expand(7)), TypeError, "weight must be a floating", "int64", ""),
    ("check_constant", lambda: perplexity(X, Y, X[0, :6]), ValueError, "shape (7,), one number for each", "(6,)", ""),
    (
        "check_constant",
        lambda: perplexity(X, Y, token_weight=X[0]),
        ValueError,
        "token_weight must have shape (4,), the shape of target",
        "(7,)",
        "",
    ),
    (
        "check_no_grad",
        lambda: perplexity(X, Y, LEAF[0]),
        ValueError,
        "weight is a constant",
        "requires grad",
        "Detach it",
    ),
    (
        "check_no_grad",
        lambda: perplexity(X, Y, token_weight=LEAF[:, 0]),
        ValueError,
        "token_weight",
        "requires",
        "Detach",
    ),
    ("check_no_grad", lambda: cross_entropy(X, Y, num_items=LEAF.sum()), ValueError, "num_items", "requires", "Detach"),
    (
        "check_num_items",
        lambda: cross_entropy(X, Y, num_items=4, reduction="sum"),
        ValueError,
        "mean",
        "'sum'",
        "Leave",
    ),
    ("check_num_items", lambda: cross_entropy(X, Y, num_items=Y), ValueError, "one element", "(4,)", "num_items.sum()"),
    ("check_num_items", lambda: cross_entropy(X, Y, num_items="4"), TypeError, "a number or a tensor", "str", ""),
    (
        "check_reduction_for_perplexity",
        lambda: perplexity(X, Y, reduction="sum"),
        ValueError,
        "perplexities of tokens do not add up",
        "reduction='sum'",
        "combine sums and counts before exp",
    ),
    ("check_sequence", lambda: perplexity(X[0], Y[0], reduction="sequence"), ValueError, "last dim", "0-d", "'mean'"),
    ("check_logits", lambda: perplexity(X[0, 0], Y[0]), ValueError, "a class dimension", "0-d", "(N, C)"),
    ("check_logits", lambda: perplexity(X, Y, class_dim=1.0), TypeError, "class_dim must be an int", "float", ""),
    ("check_logits", lambda: perplexity(X, Y, class_dim=2), IndexError, "in [-2, 1]", "got 2", ""),
    ("check_logits", lambda: perplexity(X, Y, class_dim=-3), IndexError, "in [-2, 1]", "got -3", ""),
    ("check_head", lambda: head(X, H[0], Y), ValueError, "linear_weight must have shape (V, D)", "(3,)", ""),
    ("check_head", lambda: head(X[:, :0], H[:, :0], Y), ValueError, "at least one column", ", 0)", "pass logits"),
    ("check_head", lambda: head(X, H, Y), ValueError, "(..., D) with D = 3", "(4, 7)", ""),
    ("check_head", lambda: head(H, H, Y, linear_bias=X[0]), ValueError, "linear_bias must have shape (5,)", "(7,)", ""),
    (
        "check_head",
        lambda: head(H, H.bfloat16(), Y[:1].expand(5)),
        TypeError,
        "one dtype",
        "torch.bfloat16",
        "autocast",
    ),
    (
        "check_no_out_features",
        lambda: fused_ppl.LinearCrossEntropyLoss(3, 5, out_features=(2,)),
        ValueError,
        "out_features must be ()",
        "(2,)",
        "torch.nn.LinearCrossEntropyLoss",
    ),
    (
        "check_no_inplace",
        lambda: head(H, H, Y[:1].expand(5), options=INPLACE),
        ValueError,
        "is for logits",
        "inplace_backward=True",
        "memory_budget",
    ),
    ("check_classes", lambda: perplexity(X[:, :0], Y), ValueError, "at least one class", "size 0", ""),
    ("check_inplace_backward", lambda: perplexity(LEAF, Y, options=INPLACE), ValueError, "is a leaf", "", "=False"),
    (
        "check_inplace_backward",
        lambda: perplexity(LEAF.view(2, 2, 7), Y.view(2, 2), class_dim=-1, options=INPLACE),
        ValueError,
        "a view of a leaf",
        "",
        "inplace_backward=False",
    ),
    (
        "check_inplace_backward",
        lambda: perplexity((LEAF[:1] * 1).expand(4, 7), Y, options=INPLACE),
        ValueError,
        "share memory",
        "(0, 1)",
        "contiguous()",
    ),
    (
        "check_target_range",
        lambda: perplexity(X, Y + 7),
        IndexError,
        "in [0, 7)",
        "got 7 at flat position 0",
        "tokenizer",
    ),
    ("check_indices", lambda: targets(X), TypeError, "int64 or int32", "torch.float32", ".long()"),
    ("check_tokens", lambda: targets(Y[0]), ValueError, "shape (..., T)", "0-d", ""),
    ("check_steps", lambda: targets(Y, steps=0), ValueError, ">= 1", "got 0", "ahead"),
    ("check_steps", lambda: targets(Y, steps=1.0), ValueError, "an int", "got 1.0", ""),
    ("check_indices", lambda: targets(Y, cu_seqlens=X[0]), TypeError, "int64 or int32", "torch.float32", ".int()"),
    ("check_cu_seqlens", lambda: targets(Y, cu_seqlens=Y[:1]), ValueError, "(documents + 1,)", "(1,)", ""),
    (
        "check_cu_seqlens",
        lambda: targets(Y.view(2, 2), cu_seqlens=torch.tensor([0, 4])),
        ValueError,
        "one packed row",
        "(2, 2)",
        "for each row",
    ),
    (
        "check_cu_seqlens",
        lambda: targets(Y, cu_seqlens=torch.tensor([0, 3])),
        ValueError,
        "0 to the number",
        "3",
        "sum",
    ),
    ("check_cu_seqlens", lambda: targets(Y, cu_seqlens=torch.tensor([1, 4])), ValueError, "rise from 0", "1", "sum"),
    ("check_cu_seqlens", lambda: targets(Y, cu_seqlens=torch.tensor([0, 3, 2, 4])), ValueError, "rise", "3", "sum"),
    (
        "check_group_reduction",
        lambda: perplexity(X, Y, reduction="none", group=1),
        ValueError,
        "'mean'",
        "'none'",
        "out",
    ),
    (
        "check_mesh",
        lambda: ranks.check_mesh("group", 2, None),
        ValueError,
        "one dimension",
        "2 dim",
        "get_group(dim)",
    ),
    ("fail_group", lambda: perplexity(X, Y, group="dp"), TypeError, "a ProcessGroup, or", "str", "group.WORLD"),
    ("fail_group", lambda: Perplexity().sync(), ValueError, "all ranks", "none", "init_process_group"),
    ("fail_group", lambda: perplexity(X, Y, group=OUTSIDE), ValueError, "member of", "is not", "Call only on"),
    (
        "check_no_group",
        lambda: ranks.check_no_group(("0", 2)),
        NotImplementedError,
        "one process",
        "group=",
        "out",
    ),
    (
        "check_placement",
        lambda: ranks.check_placement("w", "R", mesh_dims=1, dim=0, sharded=False),
        ValueError,
        "Shard(0)",
        "R",
        "unshard",
    ),
    (
        "check_no_vocab_group",
        lambda: ranks.check_no_vocab_group("w", 1),
        ValueError,
        "already names",
        "too",
        "out",
    ),
    (
        "check_same_mesh",
        lambda: ranks.check_same_mesh(False),
        ValueError,
        "the same mesh",
        "is not",
        "full_tensor()",
    ),
    (
        "check_shard_sizes",
        lambda: ranks.check_shard_sizes([3, 0], 0, 2, 3),
        ValueError,
        "least one",
        "[3, 0]",
        "smaller",
    ),
    (
        "check_shard_sizes",
        lambda: ranks.check_shard_sizes([3, 4], 1, 2, 3),
        ValueError,
        "hold 4",
        "has 3",
        "(group, sizes)",
    ),
    (
        "check_same_shards",
        lambda: ranks.check_same_shards(False, True),
        ValueError,
        "same shards",
        "not",
        "sizes)",
    ),
    (
        "check_same_shards",
        lambda: ranks.check_same_shards(True, False),
        ValueError,
        "same targets",
        "not",
        "unshard()",
    ),
    ("check_ranks", lambda: ranks.check_ranks([{}, None]), RuntimeError, "must call", "rank 1 of 2", "0 tokens"),
    (
        "check_ranks",
        lambda: ranks.check_ranks([{"dtype": "a"}, {"dtype": "b"}, {"dtype": "a"}]),
        ValueError,
        "same dtype, a",
        "rank 1 has b",
        "same options",
    ),
    ("check_parameters", lambda: PerplexityAccumulator([]), ValueError, "at least one", "none", "model.parameters()"),
    *(
        (
            "check_sum_output",
            lambda output=output: PerplexityAccumulator([LEAF]).add(output()),
            kind,
            rule,
            value,
            "Use|Leave",
        )
        for output, kind, rule, value in (
            (lambda: perplexity(X, Y), TypeError, "a LossOutput", "Tensor"),
            (lambda: with_stats(X, Y, reduction="none"), ValueError, "one sum", "(4,)"),
            (lambda: with_stats(LEAF, Y), ValueError, "the sum of a micro-batch", "'mean'"),
            (lambda: with_stats(LEAF, Y, reduction="sum", z_loss=0.1), ValueError, "S alone", "0.1"),
        )
    ),
    *compact_cases.ERRORS,
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row[0]}" for i, row in enumerate(ROWS)])
def test_bad_input_raises_the_rule_the_value_and_the_way_out(row):
    _, call, kind, rule, value, way_out = row
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for part in (rule, value, way_out):
        assert any(option in message for option in part.split("|")), f"{part!r} is not in {message!r}"
    assert message[-1] in ".)", message


def test_every_raise_of_checks_is_in_the_table():
    raises = Counter()
    for function in [f for room in (checks, ranks) for f in ast.parse(inspect.getsource(room)).body]:
        if isinstance(function, ast.FunctionDef):
            raises[function.name] = sum(isinstance(node, ast.Raise) for node in ast.walk(function))
    rows = Counter(name for name, *_ in ROWS)
    assert {name: count for name, count in raises.items() if count > rows[name]} == {}


def test_errors_are_the_same_for_every_function_and_backend(backend):
    for call in (cross_entropy, perplexity, with_stats):
        for name in (backend, "reference"):
            options = Options(backend=name)
            with pytest.raises(IndexError, match=r"\[0, 7\).*tokenizer"):
                call(X, Y + 7, options=options)
            with pytest.raises(TypeError, match="class indices"):
                call(X, X, options=options)
            with pytest.raises(ValueError, match="gets no gradient"):
                call(X, Y, LEAF[0], options=options)


@pytest.mark.parametrize("module", [CrossEntropyLoss, PerplexityLoss])
def test_modules_raise_the_same_errors(module):
    with pytest.raises(ValueError, match="one of 'mean'"):
        module(reduction="avg")(X, Y)
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        module()(X, Y + 7)


def test_what_asks_for_a_gradient_is_no_error_where_none_is_recorded():
    with torch.no_grad():
        perplexity(X, Y, LEAF[0], options=INPLACE)
        perplexity(LEAF, Y, options=INPLACE)


def test_no_function_takes_a_keyword_it_does_not_know():
    for call, keyword in ((perplexity, "z_loss"), (perplexity, "num_items"), (cross_entropy, "max_nll")):
        with pytest.raises(TypeError, match=keyword):
            call(X, Y, **{keyword: 1.0})


def test_the_signature_begins_as_that_of_torch():
    theirs = list(inspect.signature(torch.nn.functional.cross_entropy).parameters)
    for function in (cross_entropy, perplexity, with_stats):
        ours = inspect.signature(function).parameters
        assert list(ours)[:3] == theirs[:3] == ["input", "target", "weight"]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[3:])
        for name in ("ignore_index", "reduction", "label_smoothing"):
            assert ours[name].default == inspect.signature(torch.nn.functional.cross_entropy).parameters[name].default


def test_debug_is_on_only_when_asked(monkeypatch):
    for value, expected in (("0", False), ("", False), ("1", True)):
        monkeypatch.setenv("FUSED_PPL_DEBUG", value)
        assert checks.debug() is expected


def test_public_names_are_what_the_package_says():
    assert sorted(fused_ppl.__all__) == fused_ppl.__all__
    for name in fused_ppl.__all__:
        assert getattr(fused_ppl, name).__doc__
