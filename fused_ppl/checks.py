# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a loss. Each error states the rule, the value that was got, and the way out.

All messages about inputs are here, so every function reports the same mistake in the same words. `rank_checks` holds
the messages about groups of ranks, and `transform_checks` those about transforms of torch. Checks read shapes and
dtypes, so they do not wait for a GPU. Only `check_target_range` and `check_cu_seqlens` read values.
"""

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
    """True with FUSED_PPL_DEBUG=1. Then values on a GPU are checked too, and each such check waits for the GPU."""
    return os.environ.get("FUSED_PPL_DEBUG", "0") not in ("", "0")


def autocast(device_type: str) -> bool:
    """True if autocast is on for this type of device. The type "meta" has no autocast, and torch raises for it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_choice(name: str, value: object, choices: Sequence[str], hint: str = "") -> None:
    if value not in choices:
        allowed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}. {hint}".rstrip())


def check_number(name: str, value: object, rule: str, ok: Callable[[float], bool], *, hint: str = "") -> float:
    """Return `value`, a number for which `ok` is true. `rule` says in words what `ok` tests."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {rule}; got {type(value).__name__}. {hint}".rstrip())
    if not ok(value):
        raise ValueError(f"{name} must be {rule}; got {value!r}. {hint}".rstrip())
    return value


def check_ignore_index(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"ignore_index must be an int, or None to ignore nothing; got {type(value).__name__}. "
            "To ignore several targets, set all of them to one value first."
        )


def check_memory_budget(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
        raise ValueError(f"memory_budget must be a number of bytes > 0, or None; got {value!r}. 2**29 is 512 MiB.")


def check_compact(tolerance: object, columns: object, screen: object) -> None:
    if tolerance is not None:
        hint = "1e-3 is smaller than the rounding error of bf16."
        check_number("gradient_tolerance", tolerance, "in (0, 1), or None", lambda a: 0 < a < 1, hint=hint)
    if columns is not None:
        hint = "1/8 keeps an eighth of the vocabulary."
        allowed = "a finite count >= 1 or a share below 1, or None"
        count = check_number("gradient_columns", columns, allowed, lambda a: 0 < a < float("inf"), hint=hint)
        if count >= 1 and count != int(count):
            raise ValueError(f"gradient_columns must be a whole number of columns from 1 on; got {columns!r}. {hint}")
    if tolerance is not None and columns is not None:
        raise ValueError(
            "gradient_tolerance chooses the number of columns, and gradient_columns sets it; got both. Leave out one."
        )
    if screen is not None:
        check_choice("screen", screen, SCREENS, "None computes the logits in full precision.")
        if tolerance is None and columns is None:
            raise ValueError(
                f"screen={screen!r} only has an effect in the compact plan, and nothing asks for that plan. "
                "Set gradient_tolerance or gradient_columns as well."
            )


def check_screen(
    screen: str | None, dtype: torch.dtype, device_type: str, *, shape: Sequence[int], shards: int
) -> None:
    """Check that a head with a weight of shape (V, D) and products in `dtype` can use this screen.

    `shards` is the number of classes on all ranks if each rank holds a part of them, else 0.
    """
    if screen is None:
        return
    if shards:
        raise NotImplementedError(
            f"screen must be None for a shard of the {shards} classes, because all ranks need its logits in full "
            f"precision; got screen={screen!r}. Leave it out. You may keep gradient_tolerance and gradient_columns."
        )
    if dtype == torch.float64:
        raise NotImplementedError(
            f"screen must be None for float64, because a screen has at most the precision of float32; "
            f"got screen={screen!r}. Leave it out."
        )
    if screen == "fp8" and device_type != "cuda":
        raise NotImplementedError(
            f"matrix products in fp8 need a GPU; got screen='fp8' on {device_type}. Use screen='bf16', or 'int8' on a "
            "CPU that has no fast bf16 products."
        )
    multiple = {"int8": 8, "fp8": 16}.get(screen, 1)
    if device_type == "cuda" and any(size % multiple for size in shape):
        raise NotImplementedError(
            f"V and D must be multiples of {multiple} for {screen} products on a GPU; got {tuple(shape)}. "
            "Pad the head, or use screen='bf16'."
        )


def check_options(options: object, kind: type) -> None:
    if not isinstance(options, kind):
        raise TypeError(f"options must be a fused_ppl.Options; got {type(options).__name__}. Pass Options(...).")


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value`, which type checkers then know to be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}. Wrap it with torch.as_tensor.")
    return value


def check_float_input(name: str, value: object) -> Tensor:
    """Return `value`, a tensor of a dtype that the losses can compute with."""
    tensor = check_tensor(name, value)
    if name.endswith("linear_weight") and not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{name} must hold floating-point numbers; got {tensor.dtype}, which is how quantised weights are stored. "
            "Pass the dequantised weight, or compute the logits with the quantised module and use cross_entropy."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}. Convert it with .float()."
        )
    return tensor


def check_indices(name: str, value: object, convert: str) -> Tensor:
    """Return `value`, an int64 or int32 tensor. The message tells the caller to convert with `convert`."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int64 or int32; got {tensor.dtype}. Convert it with {convert}.")
    return tensor


def check_target(target: object, shape: Sequence[int], input: Tensor) -> None:
    """Check that `target` holds class indices, has the given shape and is on the device of the input."""
    dtype = check_tensor("target", target).dtype
    if dtype.is_floating_point:
        raise TypeError(
            f"target must hold class indices, int64 or int32; got {dtype}. For class probabilities use "
            "torch.nn.functional.cross_entropy. For indices that are stored as floats use target.long()."
        )
    indices = check_indices("target", target, ".long()")
    if tuple(indices.shape) != tuple(shape):
        raise ValueError(
            f"target must have shape {tuple(shape)} to match input of shape {tuple(input.shape)}; "
            f"got {tuple(indices.shape)}. For logits of shape (B, T, V) pass class_dim=-1."
        )
    check_device("target", indices, input)


def check_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}; got {value.device}. Use .to(input.device)."
        )


def check_constant(name: str, value: object, shape: Sequence[int], what: str, *, input: Tensor | None) -> None:
    """Check a float tensor of the given shape that the loss treats as a constant. `input` None allows any device.

    It must not require a gradient: the loss would leave that gradient at zero without saying so.
    """
    constant = check_tensor(name, value)
    if not constant.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {constant.dtype}. Convert it with .float().")
    if tuple(constant.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {what}; got {tuple(constant.shape)}.")
    if input is not None:
        check_device(name, constant, input)
    check_no_grad(name, constant)


def check_no_grad(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        rule = f"{name} is a constant of the loss and gets no gradient, but it requires grad."
        raise ValueError(f"{rule} Detach it, or multiply by it outside of the loss.")


def check_num_items(value: object, reduction: str) -> None:
    """Check that `num_items` is a number or a tensor of one element."""
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
            "reduction='sum' has no meaning for perplexity, because perplexities of tokens do not add up. Use 'mean' "
            "for exp(mean nll), or cross_entropy(..., reduction='sum') and combine sums and counts before exp."
        )


def check_parameters(parameters: Sequence[object]) -> None:
    for parameter in parameters:
        check_tensor("parameters", parameter)
    if not parameters:
        raise ValueError(
            "parameters must hold at least one tensor; got none. Pass model.parameters() itself: "
            "an iterator that was used before is empty."
        )


def check_sum_output(output: Any) -> None:
    """Check that `PerplexityAccumulator.add` gets S, a plain sum of nll, and M."""
    hint = 'Use cross_entropy_with_stats(..., reduction="sum"), or its linear form.'
    if not hasattr(output, "total_weight"):
        raise TypeError(f"add takes a LossOutput, which holds S and M; got {type(output).__name__}. {hint}")
    if output.loss.ndim:
        raise ValueError(f"add takes one sum; got a loss of shape {tuple(output.loss.shape)}. {hint}")
    request = getattr(output.loss.grad_fn, "request", None)  # only our own losses have one
    if request is None:
        return
    spec = request.spec
    if spec.reduction != "sum":
        raise ValueError(f"add takes the sum of a micro-batch, not its mean; got reduction={spec.reduction!r}. {hint}")
    if spec.z_loss:
        raise ValueError(
            f"add takes S alone, because finish() multiplies every gradient by PPL / M; got z_loss={spec.z_loss!r}. "
            "Leave z_loss out, or train on cross_entropy."
        )


def check_sequence(target: Tensor) -> None:
    if target.ndim == 0:
        raise ValueError(
            "target must have at least one dimension for reduction='sequence', which takes the mean over the last "
            "dimension; got a 0-d target. Use reduction='mean'."
        )


def check_logits(input: object, class_dim: int) -> None:
    input = check_float_input("input", input)
    if input.ndim == 0:
        raise ValueError("input must have a class dimension, (C,), (N, C) or (N, C, d1, ...); got a 0-d tensor.")
    if isinstance(class_dim, bool) or not isinstance(class_dim, int):
        raise TypeError(f"class_dim must be an int; got {type(class_dim).__name__}.")
    if input.ndim > 1 and not -input.ndim <= class_dim < input.ndim:
        raise IndexError(
            f"class_dim must be in [{-input.ndim}, {input.ndim - 1}] for input of shape {tuple(input.shape)}; "
            f"got {class_dim}."
        )


def check_head(input: object, linear_weight: object, linear_bias: object, *, whose: str = "") -> None:
    """Check hidden states (..., D), the weight (V, D) and the optional bias (V,); their names begin with `whose`."""
    input_name, weight_name, bias_name = (whose + name for name in ("input", "linear_weight", "linear_bias"))
    hidden, weight = check_float_input(input_name, input), check_float_input(weight_name, linear_weight)
    if weight.ndim != 2:
        raise ValueError(f"{weight_name} must have shape (V, D); got {tuple(weight.shape)}.")
    num_classes, size = weight.shape
    if hidden.ndim == 0 or hidden.shape[-1] != size:
        raise ValueError(
            f"{input_name} must have shape (..., D) with D = {size} to match {weight_name} of shape "
            f"{tuple(weight.shape)}; got {tuple(hidden.shape)}."
        )
    check_classes(num_classes)
    if size == 0:
        hint = "If the logits come from elsewhere, pass logits to cross_entropy or kl_divergence."
        raise ValueError(f"{weight_name} must have at least one column; got shape {tuple(weight.shape)}. {hint}")
    check_device(weight_name, weight, hidden)
    dtypes = {hidden.dtype, weight.dtype}
    if linear_bias is not None:
        bias = check_float_input(bias_name, linear_bias)
        if tuple(bias.shape) != (num_classes,):
            raise ValueError(f"{bias_name} must have shape ({num_classes},); got {tuple(bias.shape)}.")
        check_device(bias_name, bias, hidden)
        dtypes.add(bias.dtype)
    if len(dtypes) > 1 and not autocast(hidden.device.type):
        raise TypeError(
            f"{input_name}, {weight_name} and {bias_name} must have one dtype outside autocast; "
            f"got {', '.join(sorted(str(d) for d in dtypes))}. Convert one of them, or use torch.autocast."
        )


def check_no_out_features(out_features: object) -> None:
    if out_features != ():
        raise ValueError(
            f"out_features must be (), because each hidden state has one target; got {out_features!r}. "
            "For several targets of one hidden state use torch.nn.LinearCrossEntropyLoss."
        )


def check_no_inplace(inplace_backward: bool) -> None:
    if inplace_backward:
        raise ValueError(
            "inplace_backward=True is for logits, and the fused head has no logits to overwrite. "
            "Use Options(memory_budget=...) to limit its memory."
        )


def check_classes(num_classes: int) -> None:
    if num_classes == 0:
        raise ValueError("input must have at least one class; got a class dimension of size 0.")


def check_inplace_backward(input: Tensor) -> None:
    if torch.is_grad_enabled():
        rule = "inplace_backward=True writes the gradient over input"
        hint = "Use Options(inplace_backward=False), or pass the result of an operation, such as the logits of a model."
        if input.requires_grad and input.is_leaf:
            raise ValueError(f"{rule}, but input is a leaf, and its values must be kept. {hint}")
        base = None if torch.compiler.is_compiling() else input._base
        if base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(f"{rule}, but input is a view of a leaf, and its values must be kept. {hint}")
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        raise ValueError(
            f"inplace_backward=True writes the gradient over input, but elements of input share memory: strides "
            f"{input.stride()} for shape {tuple(input.shape)}. Use Options(inplace_backward=False), or .contiguous()."
        )


def readable(tensor: Tensor) -> bool:
    """True if Python can read the values. It cannot under torch.vmap, under torch.compile, or of meta tensors."""
    from torch._subclasses.fake_tensor import is_fake  # imported late, because `import torch` does not load it

    return (
        tensor.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_batchedtensor(tensor)
        and not is_fake(tensor)
    )


def check_target_range(target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[int, int]:
    """Check that each target is in [0, num_classes) or ignored. Returns the lowest and the highest target.

    Callers do this on a CPU. On a GPU they do it with FUSED_PPL_DEBUG=1 only, because it waits for the GPU.
    """
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
                "Check that the tokenizer's vocabulary is not larger than the head's. If ranks hold shards of "
                "different sizes, pass vocab_group=(group, sizes)."
            )
    return low, high


def check_tokens(tokens: object) -> None:
    if check_indices("tokens", tokens, ".long()").ndim == 0:
        raise ValueError("tokens must have shape (..., T); got a 0-d tensor.")


def check_steps(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, the number of tokens to predict ahead; got {steps!r}.")


def check_cu_seqlens(cu_seqlens: object, tokens: Tensor) -> None:
    """Check the boundaries of packed documents: (documents + 1,), rising from 0 to the number of tokens."""
    cu_seqlens = check_indices("cu_seqlens", cu_seqlens, ".int()")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape (documents + 1,); got {tuple(cu_seqlens.shape)}.")
    if tokens.numel() != tokens.shape[-1]:
        raise ValueError(
            f"cu_seqlens describes one packed row, so tokens must have shape (T,) or (1, T); "
            f"got {tuple(tokens.shape)}. Call next_token_targets for each row."
        )
    if (cu_seqlens.device.type == "cpu" or debug()) and readable(cu_seqlens):
        bounds, length = cu_seqlens.tolist(), tokens.shape[-1]
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {length}; got {bounds[:4]} ... {bounds[-1]}. "
                "It is the cumulative sum of the documents' lengths with a 0 in front."
            )
