# SPDX-License-Identifier: Apache-2.0
"""The only words for input errors, with `rank_checks`: the rule, what was got, and the way out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCREENS = ("int8", "fp8", "bf16")
INDEX_DTYPES = (torch.int64, torch.int32)


def debug() -> bool:
    """FUSED_PPL_DEBUG=1: check what costs a synchronisation on a GPU."""
    return os.environ.get("FUSED_PPL_DEBUG", "0") not in ("", "0")


def autocast(device_type: str) -> bool:
    """Whether autocast is on for these tensors; torch raises where it does not know the type, as that of meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_choice(name: str, value: object, choices: Sequence[str], hint: str = "") -> None:
    if value not in choices:
        allowed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}. {hint}".rstrip())


def check_number(name: str, value: object, rule: str, ok: Callable[[float], bool], hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {rule}; got {type(value).__name__}. {hint}".rstrip())
    if not ok(value):
        raise ValueError(f"{name} must be {rule}; got {value!r}. {hint}".rstrip())


def check_ignore_index(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"ignore_index must be an int, or None to ignore nothing; got {type(value).__name__}. "
            "To leave out several targets, set them all to one value first."
        )


def check_memory_budget(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
        raise ValueError(f"memory_budget must be a number of bytes > 0, or None; got {value!r}. 2**29 is 512 MiB.")


def check_compact(tolerance: object, columns: object, screen: object) -> None:
    if tolerance is not None:
        hint = "1e-3 is less than what bf16 rounds away."
        check_number("gradient_tolerance", tolerance, "in (0, 1), or None", lambda a: 0 < a < 1, hint)
    if columns is not None:
        hint = "1/8 keeps an eighth of the vocabulary."
        allowed = "a finite count >= 1 or a share below 1, or None"
        check_number("gradient_columns", columns, allowed, lambda a: 0 < a < float("inf"), hint)
        assert isinstance(columns, (int, float))
        if columns >= 1 and columns != int(columns):
            raise ValueError(f"gradient_columns must be a whole number of columns from 1 on; got {columns!r}. {hint}")
    if tolerance is not None and columns is not None:
        raise ValueError(
            "gradient_tolerance chooses the number of columns, and gradient_columns sets it; got both. Leave out one."
        )
    if screen is not None:
        check_choice("screen", screen, SCREENS, "None computes the logits in full.")
        if tolerance is None and columns is None:
            raise ValueError(
                f"screen={screen!r} says how the compact plan finds its columns, and nothing asks for that plan. Set "
                "gradient_tolerance or gradient_columns as well."
            )


def check_screen(screen: str | None, dtype: torch.dtype, device_type: str, shape: Sequence[int], shards: int) -> None:
    """For the weight (V, D) of a head; `shards`: the classes of all ranks, where each has a part of them."""
    if screen is None:
        return
    if shards:
        raise NotImplementedError(
            f"a shard of the {shards} classes computes its logits in full for the loss of all ranks, and a screen only "
            f"comes on top; got screen={screen!r}. Leave it out; gradient_tolerance and gradient_columns may stay."
        )
    if dtype == torch.float64:
        raise NotImplementedError(
            f"a screen computes in at most float32, and float64 asks for more; got screen={screen!r}. Leave it out."
        )
    if screen == "fp8" and device_type != "cuda":
        raise NotImplementedError(
            f"products in fp8 need a GPU; got screen='fp8' on {device_type}. Use screen='bf16', or 'int8' on a CPU "
            "that has no fast bf16 products."
        )
    multiple = {"int8": 8, "fp8": 16}.get(screen, 1)
    if device_type == "cuda" and any(size % multiple for size in shape):
        raise NotImplementedError(
            f"{screen} products of a GPU want V and D to be multiples of {multiple}; got {tuple(shape)}. Pad the head, "
            "or use screen='bf16'."
        )


def check_options(options: object, kind: type) -> None:
    if not isinstance(options, kind):
        raise TypeError(f"options must be a fused_ppl.Options; got {type(options).__name__}. Pass Options(...).")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}. Wrap it with torch.as_tensor.")


def check_float_input(name: str, value: object) -> None:
    check_tensor(name, value)
    if name == "linear_weight" and not value.dtype.is_floating_point:  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} must hold floating-point numbers; got {value.dtype}, as quantised weights are stored. "  # type: ignore[attr-defined]
            "Pass the dequantised weight, or compute the logits with the quantised module and use cross_entropy."
        )
    if value.dtype not in FLOAT_DTYPES:  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}. "  # type: ignore[attr-defined]
            f"Convert it with .float()."
        )


def check_target(target: object, shape: Sequence[int], input: Tensor) -> None:
    """Class indices of the given shape on the device of the input."""
    check_tensor("target", target)
    assert isinstance(target, Tensor)
    if target.dtype.is_floating_point:
        raise TypeError(
            f"target must hold class indices, int64 or int32; got {target.dtype}. For class probabilities use "
            "torch.nn.functional.cross_entropy; for indices stored as floats use target.long()."
        )
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(f"target must be int64 or int32; got {target.dtype}. Convert it with .long().")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(
            f"target must have shape {tuple(shape)} to match input of shape {tuple(input.shape)}; "
            f"got {tuple(target.shape)}. For logits of shape (B, T, V) pass class_dim=-1."
        )
    check_device("target", target, input)


def check_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}; got {value.device}. Use .to(input.device)."
        )


def check_constant(name: str, value: object, shape: Sequence[int], what: str, input: Tensor) -> None:
    """A float tensor that takes part as a constant; a gradient asked for would be zero, which is an error."""
    if value is None:
        return
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {value.dtype}. Convert it with .float().")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {what}; got {tuple(value.shape)}.")
    check_device(name, value, input)
    check_no_grad(name, value)


def check_no_grad(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is a constant of the loss and gets no gradient, but requires grad. Detach it first.")


def check_num_items(value: object, reduction: str) -> None:
    """A number, or a tensor of one element."""
    if value is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items replaces the denominator of reduction='mean'; got reduction={reduction!r}. "
            "Leave num_items out, or use reduction='mean'."
        )
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"num_items must have one element; got shape {tuple(value.shape)}. Pass num_items.sum().")
        check_no_grad("num_items", value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"num_items must be a number or a tensor of one element; got {type(value).__name__}.")


def check_reduction_for_perplexity(reduction: str) -> None:
    if reduction == "sum":
        raise ValueError(
            "reduction='sum' has no meaning for perplexity: perplexities of tokens do not add up. Use 'mean' for "
            "exp(mean nll), or cross_entropy(..., reduction='sum') and combine sums and counts before exp."
        )


def check_parameters(parameters: Sequence[object]) -> None:
    for parameter in parameters:
        check_tensor("parameters", parameter)
    if not parameters:
        raise ValueError("parameters must hold at least one tensor; got none. Pass model.parameters(), a fresh one.")


def check_sum_output(output: Any) -> None:
    """What is added up must be S: a plain sum, of which the mean is the logarithm of a perplexity."""
    way = 'Use cross_entropy_with_stats(..., reduction="sum"), or the linear form.'
    if not hasattr(output, "total_weight"):
        raise TypeError(f"add takes a LossOutput, which knows S and M; got {type(output).__name__}. {way}")
    if output.loss.ndim:
        raise ValueError(f"add takes one sum; got a loss of shape {tuple(output.loss.shape)}. {way}")
    request = getattr(output.loss.grad_fn, "request", None)  # that of our own op; another has none
    if request is None:
        return
    spec = request.spec
    if spec.reduction != "sum":
        raise ValueError(
            f"add takes the sum of a micro-batch, and a mean loses M; got reduction={spec.reduction!r}. {way}"
        )
    if spec.z_loss:
        raise ValueError(
            f"add takes S alone: finish() would scale the gradient of z_loss={spec.z_loss!r} by PPL / M as well. "
            "Leave z_loss out, or train on cross_entropy."
        )


def check_sequence(reduction: str, target: Tensor) -> None:
    if reduction == "sequence" and target.ndim == 0:
        raise ValueError(
            "reduction='sequence' takes the mean over the last dimension of target, which must have one; got a 0-d "
            "target. Use reduction='mean'."
        )


def check_logits(input: object, class_dim: int) -> None:
    check_float_input("input", input)
    assert isinstance(input, Tensor)
    if input.ndim == 0:
        raise ValueError("input must have a class dimension, (C,), (N, C) or (N, C, d1, ...); got a 0-d tensor.")
    if isinstance(class_dim, bool) or not isinstance(class_dim, int):
        raise TypeError(f"class_dim must be an int; got {type(class_dim).__name__}.")
    if input.ndim > 1 and not -input.ndim <= class_dim < input.ndim:
        raise IndexError(
            f"class_dim must be in [{-input.ndim}, {input.ndim - 1}] for input of shape {tuple(input.shape)}; "
            f"got {class_dim}."
        )


def check_head(input: object, linear_weight: object, linear_bias: object) -> None:
    check_float_input("input", input)
    check_float_input("linear_weight", linear_weight)
    assert isinstance(input, Tensor) and isinstance(linear_weight, Tensor)
    if linear_weight.ndim != 2:
        raise ValueError(f"linear_weight must have shape (V, D); got {tuple(linear_weight.shape)}.")
    if input.ndim == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input must have shape (..., D) with D = {linear_weight.shape[1]} to match linear_weight of shape "
            f"{tuple(linear_weight.shape)}; got {tuple(input.shape)}."
        )
    check_classes(linear_weight.shape[0])
    if linear_weight.shape[1] == 0:
        raise ValueError(
            f"linear_weight must have at least one column; got shape {tuple(linear_weight.shape)}. Hidden states of "
            "size 0 say nothing: pass logits, to cross_entropy, if they come from somewhere else."
        )
    check_device("linear_weight", linear_weight, input)
    if linear_bias is not None:
        check_float_input("linear_bias", linear_bias)
        assert isinstance(linear_bias, Tensor)
        if tuple(linear_bias.shape) != (linear_weight.shape[0],):
            raise ValueError(
                f"linear_bias must have shape ({linear_weight.shape[0]},); got {tuple(linear_bias.shape)}."
            )
        check_device("linear_bias", linear_bias, input)
    dtypes = {t.dtype for t in (input, linear_weight, linear_bias) if isinstance(t, Tensor)}
    if len(dtypes) > 1 and not autocast(input.device.type):
        raise TypeError(
            f"input, linear_weight and linear_bias must have one dtype outside autocast; "
            f"got {', '.join(sorted(str(d) for d in dtypes))}. Convert one of them, or use torch.autocast."
        )


def check_no_out_features(out_features: object) -> None:
    if out_features != ():
        raise ValueError(
            f"out_features must be (): one class index for each hidden state; got {out_features!r}. "
            "For several targets of one hidden state use torch.nn.LinearCrossEntropyLoss."
        )


def check_no_inplace(inplace_backward: bool) -> None:
    if inplace_backward:
        raise ValueError(
            "inplace_backward=True is for logits; the fused head has none to write over. "
            "Use Options(memory_budget=...) to bound its memory."
        )


def check_classes(count: int) -> None:
    if count == 0:
        raise ValueError("input must have at least one class; got a class dimension of size 0.")


def check_inplace_backward(input: Tensor) -> None:
    if input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "inplace_backward=True writes the gradient over input, but input is a leaf whose values belong to you. "
            "Use Options(inplace_backward=False), or pass the result of an operation, as the logits of a model are."
        )
    base = None if torch.compiler.is_compiling() else input._base
    if base is not None and base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inplace_backward=True writes the gradient over input, but input is a view of a leaf whose values belong "
            "to you. Use Options(inplace_backward=False), or pass the result of an operation that copies."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        raise ValueError(
            f"inplace_backward=True writes the gradient over input, but elements of input share memory: strides "
            f"{input.stride()} for shape {tuple(input.shape)}. Use Options(inplace_backward=False), or .contiguous()."
        )


def readable(tensor: Tensor) -> bool:
    """Whether it has values to look at: not under torch.vmap, nor where only shapes are known."""
    from torch._subclasses.fake_tensor import is_fake  # no sooner than it is asked for: torch imports it late

    return (
        tensor.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_batchedtensor(tensor)
        and not is_fake(tensor)
    )


def check_target_range(target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[int, int]:
    """The lowest and the highest target. Asked on a CPU, and anywhere under FUSED_PPL_DEBUG=1 (it synchronises)."""
    if target.numel() == 0 or target.is_meta:
        return 0, 0
    low, high = (int(a) for a in target.aminmax())
    if low < 0 or high >= num_classes:
        bad = (target < 0) | (target >= num_classes)
        if ignore_index is not None:
            bad &= target != ignore_index
        if bool(bad.any()):
            first = int(bad.reshape(-1).int().argmax())
            raise IndexError(
                f"target must be in [0, {num_classes}) or equal to ignore_index={ignore_index}; "
                f"got {int(target.reshape(-1)[first])} at flat position {first}. "
                "Check that the tokenizer's vocabulary is not larger than the head's, and where ranks hold shards of "
                "different sizes, that they are given as vocab_group=(group, sizes)."
            )
    return low, high


def check_tokens(tokens: object) -> None:
    check_tensor("tokens", tokens)
    assert isinstance(tokens, Tensor)
    if tokens.dtype not in INDEX_DTYPES:
        raise TypeError(f"tokens must be int64 or int32; got {tokens.dtype}. Convert them with .long().")
    if tokens.ndim == 0:
        raise ValueError("tokens must have shape (..., T); got a 0-d tensor.")


def check_steps(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, how many tokens ahead to predict; got {steps!r}.")


def check_cu_seqlens(cu_seqlens: object, tokens: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"cu_seqlens must be int64 or int32; got {cu_seqlens.dtype}. Convert it with .int().")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape (documents + 1,); got {tuple(cu_seqlens.shape)}.")
    if tokens.numel() != tokens.shape[-1]:
        raise ValueError(
            f"cu_seqlens describes one packed row, so tokens must have shape (T,) or (1, T); "
            f"got {tuple(tokens.shape)}. "
            "Call next_token_targets for each row."
        )
    if (cu_seqlens.device.type == "cpu" or debug()) and readable(cu_seqlens):
        ends, length = cu_seqlens.tolist(), tokens.shape[-1]
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {length}; got {ends[:4]} ... {ends[-1]}. "
                "It is the cumulative sum of the documents' lengths with a 0 in front."
            )
