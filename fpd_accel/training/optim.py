"""Parameter groups, the optimizer, and the schedules of learning rate and alpha as pure functions of the step."""

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from fpd_accel.config.schema import Distill, Optim


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices and kernels, which decay, and biases and normalisation scales, which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
    kept = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decayed, kept) if group["params"]]


def create_optimizer(model: nn.Module, optim: Optim, device: torch.device) -> torch.optim.Optimizer:
    """Return Adam, AdamW or SGD, fused where the device supports it. The learning rate is set in every step."""
    groups = parameter_groups(model, optim.weight_decay)
    fused = device.type in ("cpu", "cuda", "mps")
    match optim.name:
        case "adam":
            return torch.optim.Adam(groups, lr=optim.lr, betas=optim.betas, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)


def learning_rate(optim: Optim, step: int, *, total_steps: int, steps_per_epoch: float) -> float:
    """Return the learning rate of a step, counted from 0. A step belongs to the epoch in which it begins."""
    match optim.schedule:
        case "constant":
            rate = optim.lr
        case "step":
            passed = bisect_right(optim.milestones, step / steps_per_epoch)
            rate = optim.lr * optim.gamma**passed
        case "cosine":
            done = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
            rate = optim.final_lr + (optim.lr - optim.final_lr) * _half_cosine(min(max(done, 0.0), 1.0))
    return rate * min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else rate


def alpha_at(distill: Distill, step: int, *, total_steps: int) -> float:
    """Return alpha of a step, counted from 0: from `alpha` at the first step to `alpha_final` at the last."""
    if distill.alpha_final is None:
        return distill.alpha
    done = min(step / max(total_steps - 1, 1), 1.0)
    remaining = _half_cosine(done) if distill.alpha_schedule == "cosine" else 1 - done
    return distill.alpha_final + (distill.alpha - distill.alpha_final) * remaining


def _half_cosine(done: float) -> float:
    """Fall from 1 to 0 as `done` goes from 0 to 1, flat at both ends."""
    return 0.5 * (1 + math.cos(math.pi * done))
