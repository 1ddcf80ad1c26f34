"""lrpi: latent reasoning is policy improvement, in one file (after arXiv 2511.16886).

A small network that loops over its own latent state solves puzzles on which large one-pass networks fail. The
usual explanation is "looping adds depth". But many loop steps change nothing. Which steps do the work?
  1. The model sees the puzzle x and refines an answer y and a scratchpad z. A readout maps y to logits.
  2. The logits before a step define a reference policy pi_u = softmax(l_u), those after it the conditional
     policy pi_c. With delta = l_c - l_u, the policy pi_w of l_w = l_u + w delta does more (w > 1) or less
     (w < 1) of the step. This is classifier-free guidance.
  3. Read pi_c as pi_u conditioned on success, o = 1. By Bayes' rule p(o = 1 | a) ∝ pi_c(a) / pi_u(a), so
     A(a) = log pi_c(a) - log pi_u(a) scores token a as an advantage in RL does: a step is policy improvement.
  4. Advantage margin: A of the true token minus the mean of A under pi_w. It is -dL/dw for the loss
     L(w) = -log pi_w(y*). Positive: more of the step would help. Negative: less of it would. Zero: the step
     has the right size, or it is dead compute (then it also did not move the policy).
  5. Deep Improvement Supervision (DIS) gives each step its own target, closer to the solution than the last.
     The paper reports that 18 forward passes then do what takes TRM (arXiv 2510.04871) 336.

Letters: x [B, L] is a puzzle, y* its solution (where puzzles are made or scored: y), y†_s the target of step
  s, all tokens; y, z [B, L, D] is the state. A forward pass applies the shared `net` once. A cycle is n times
  z <- net(x + y + z), then y <- net(y + z), which with recall sees x and a trained vector, too.
  A step is T cycles, the last one with gradient; a rollout is N_sup steps: N_sup T (n + 1) forward passes.
  B L D V S: batch, cells, width, vocabulary, steps; N puzzles of a data set; H W rows and columns.
No section uses a later one. §1-6 are the method. §1, §2, §3, §5, §7 and §1-4 together can be copied alone.

  python lrpi.py --task maze                    train, evaluate, draw; results are written to runs/maze-dis/
  python lrpi.py --eval runs/maze-dis/model.pt  diagnose a checkpoint; also with --halt, --think 24, --size 21
  python lrpi.py --solve FILE                   solve your own puzzles (text) with a trained model
  python lrpi.py --compare trm,dis --seeds 3    train with each scheme and seed, and compare; more: --help
"""

import argparse
import csv
import gc
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# ------------------------------------------------------------------------------------------------------------
# §1  The looped model (paper section 2; TRM, arXiv 2510.04871)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model and of its loop. Brackets give the range that the command line accepts."""

    vocab: int = 5  # V, number of tokens
    shape: tuple = (11, 11)  # H, W: rows and columns of the puzzle; L = H W
    mixer: str = "conv"  # how cells exchange information; mlp works at one grid size only
    width: int = 64  # D, channels per cell [4, 8192]
    layers: int = 1  # blocks in the shared net [1, 100]
    ffn: int = 128  # inner width of SwiGLU; 0: as in TRM, 8 D / 3 rounded up to a multiple of 256 [0, 65536]
    kernel: int = 7  # K, odd, of the conv mixer's 1 x K and K x 1 kernels [1, 31]
    heads: int = 4  # heads of the attention mixer; width / heads must be even [1, 256]
    T: int = 1  # cycles per step; only the last one carries gradient [1, 100]
    n: int = 2  # updates of z per cycle, before the one of y [1, 100]
    n_sup: int = 6  # N_sup, supervised steps per rollout [1, 1000]
    recall: bool = True  # the update of y sees x, too
    step_index: bool = False  # the model is told which step it is in
    feedback: bool = False  # from step 2 on, the model sees its last answer in place of the puzzle
    stablemax: bool = False  # policies are TRM's stablemax instead of softmax
    untied: bool = False  # separate weights for every forward pass of a step: no loop within the step
    act: bool = False  # learn when to stop (ACT): rows that a head calls solved leave the training batch


def lecun_(weight: torch.Tensor) -> torch.Tensor:
    """Fill with a truncated normal of std 1 / sqrt(fan-in); 0.8796 makes up for the cut tails."""
    std = weight[0].numel() ** -0.5 / 0.87962566
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def rms_norm(h: torch.Tensor) -> torch.Tensor:
    """Scale h to mean square 1 along the last axis, as TRM's code does."""
    return h * torch.rsqrt(h.square().sum(-1, keepdim=True) / h.shape[-1] + 1e-5)  # faster than mean


def log_stable(v: torch.Tensor) -> torch.Tensor:
    """log s(v), s(v) = 1 + v or, below 0, 1 / (1 - v): softmax of it is TRM's stablemax s / sum s."""
    return torch.where(v < 0, -(-v).clamp(min=0).log1p(), v.clamp(min=0).log1p())


class SwiGLU(nn.Module):
    """down(silu(gate(h)) * up(h)) along the last axis, of width d."""

    def __init__(self, d: int, inner: int = 0):
        super().__init__()
        inner = inner or 256 * math.ceil(round(4 * d * 2 / 3) / 256)
        self.gate_up, self.down = nn.Linear(d, 2 * inner, bias=False), nn.Linear(inner, d, bias=False)

    def forward(self, h):
        gate, up = self.gate_up(h).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class SeparableConv(nn.Module):
    """Depthwise 1 x K, then K x 1 convolution: information moves (K - 1) / 2 cells. Weights fit any grid."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.shape, D, sizes = cfg.shape, cfg.width, ((1, cfg.kernel), (cfg.kernel, 1))
        self.convs = nn.Sequential(*(nn.Conv2d(D, D, k, padding="same", groups=D, bias=False) for k in sizes))

    def forward(self, h):  # [B, L, D]
        h = h.unflatten(1, self.shape).permute(0, 3, 1, 2)  # [B, D, H, W], in channels_last order: no copy
        return self.convs(h).permute(0, 2, 3, 1).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention over all cells, rotary positions along the flattened grid (TRM's default)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, D, d = cfg.heads, cfg.width, cfg.width // cfg.heads
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        frequency = 10_000.0 ** -(torch.arange(0, d, 2) / d)  # channels i and i + d / 2 rotate as a pair
        angle = torch.outer(torch.arange(math.prod(cfg.shape)), torch.cat([-frequency, frequency]))  # [L, d]
        self.cos, self.sin = (nn.Buffer(t, persistent=False) for t in (angle.cos(), angle.sin()))

    def forward(self, h):  # [B, L, D]
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, d]
        q, k = (t * self.cos + t.roll(t.shape[-1] // 2, -1) * self.sin for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


MIXERS = {"conv": SeparableConv, "attention": Attention, "mlp": lambda cfg: SwiGLU(math.prod(cfg.shape))}


class Block(nn.Module):
    """Mix the cells, then the channels of each cell; an RMS norm follows each residual sum (post-norm)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.mix, self.swiglu = MIXERS[cfg.mixer](cfg), SwiGLU(cfg.width, cfg.ffn)
        self.across = cfg.mixer == "mlp"  # mixes, and as in TRM's code also normalises, [B, D, L]

    def forward(self, h):  # [B, L, D]
        h = h.mT if self.across else h
        h = rms_norm(h + self.mix(h))
        h = h.mT if self.across else h
        return rms_norm(h + self.swiglu(h))


class LoopedModel(nn.Module):
    """TRM's recursion: net refines the scratchpad z and the answer y. From a config, its fields, or both."""

    def __init__(self, cfg: ModelConfig | None = None, **changes):
        super().__init__()
        self.cfg = cfg = replace(cfg or ModelConfig(), **changes)
        self.forward_passes, self.bf16, D = 0, False, cfg.width  # bf16: net's matrix products in bfloat16
        self.tokens = nn.Embedding(cfg.vocab, D)
        self.readout = nn.Linear(D, cfg.vocab, bias=False)  # f_O
        if cfg.stablemax:
            self.readout.register_forward_hook(lambda module, h, v: log_stable(v))
        copies = cfg.T * (cfg.n + 1) if cfg.untied else 1
        self.nets = nn.ModuleList(nn.Sequential(*map(Block, [cfg] * cfg.layers)) for _ in range(copies))
        self.y0, self.z0 = (nn.Buffer(lecun_(torch.empty(D))) for _ in range(2))  # never trained
        if cfg.recall:
            self.role = nn.Parameter(torch.zeros(D))  # tells net which update this is, now that both see x
        if cfg.step_index:
            self.step_table = nn.Embedding(cfg.n_sup, D)
        for matrix in (p for p in self.parameters() if p.ndim > 1):
            lecun_(matrix)
        if cfg.act:
            self.halting = nn.Linear(D, 1)
            nn.init.zeros_(self.halting.weight)
            nn.init.constant_(self.halting.bias, -5.0)  # at first it says: not solved

    def start(self, B: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before the first step: y0 and z0 in every cell, each [B, L, D]."""
        return tuple(h.expand(B, math.prod(self.cfg.shape), -1) for h in (self.y0, self.z0))

    def net(self, h):  # one forward pass: [B, L, D] -> [B, L, D]
        self.forward_passes += 1
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            return self.nets[(self.forward_passes - 1) % len(self.nets)](h).float()

    def forward(self, x, y, z, s) -> tuple[torch.Tensor, torch.Tensor]:
        """Step s [B], counted from 1, on the puzzles x [B, L] (tokens): the new y and z [B, L, D]."""
        if self.cfg.feedback:
            x = torch.where(s[:, None] == 1, x, self.readout(y).argmax(-1))
        x = self.tokens(x.int())  # [B, L, D]
        if self.cfg.step_index:
            x = x + self.step_table(s.clamp(max=self.cfg.n_sup) - 1)[:, None]
        x = math.sqrt(self.cfg.width) * x
        for cycle in range(1, self.cfg.T + 1):  # only the last cycle carries gradient
            with torch.set_grad_enabled(cycle == self.cfg.T and torch.is_grad_enabled()):
                for _ in range(self.cfg.n):
                    z = self.net(x + y + z)
                y = self.net(x + self.role + y + z if self.cfg.recall else y + z)
        return y, z


# ------------------------------------------------------------------------------------------------------------
# §2  Policy improvement (paper sections 3 and 4): what a step did, from logits [.., V] before and after it


def guide(logits_u, logits_c, w: float | torch.Tensor) -> torch.Tensor:
    """l_w = l_u + w (l_c - l_u) [.., V] (Eq. 5); its policy is pi_w ∝ pi_u^(1-w) pi_c^w (Eq. 7)."""
    return logits_u + w * (logits_c - logits_u)


def advantage(logits_u, logits_c) -> torch.Tensor:
    """A(a) = log pi_c(a) - log pi_u(a) [.., V]; by Bayes' rule log p(o = 1 | a) up to a constant."""
    return logits_c.log_softmax(-1) - logits_u.log_softmax(-1)


def margin(logits_u, logits_c, y, w: float | torch.Tensor = 1.0) -> torch.Tensor:
    """The advantage margin A(y) - E_{a ~ pi_w}[A(a)] [..] of the tokens y [..] (Prop. 4.1); 0 where y < 0.

    -dL/dw of the convex L(w) = -log pi_w(y). At w = 1: above 0, all of the step helped; below, w < 1 is best.
    """
    delta, pi_w = logits_c - logits_u, guide(logits_u, logits_c, w).softmax(-1)
    excess = delta.gather(-1, y.clamp(min=0)[..., None]) - delta  # 0 at y; shifts of the logits cancel
    return (pi_w * excess).sum(-1) * (y >= 0)


def derivatives(logits_u, logits_c, y, w: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dw = E[delta] - delta(y) and d²L/dw² = Var[delta] [..], both for a ~ pi_w (Prop. 4.1)."""
    delta, pi_w = logits_c - logits_u, guide(logits_u, logits_c, w).softmax(-1)
    variance = (pi_w * (delta - (pi_w * delta).sum(-1, keepdim=True)).square()).sum(-1)
    return -margin(logits_u, logits_c, y, w), variance * (y >= 0)


def divergence(logits_u, logits_c) -> torch.Tensor:
    """KL(pi_c || pi_u) [..] in nats: how far the step moved the policy, for good or ill. Needs no label."""
    return (logits_c.softmax(-1) * advantage(logits_u, logits_c)).sum(-1).clamp(min=0)  # rounding: below 0


def largest_change(logits_u, logits_c) -> torch.Tensor:
    """max_a |pi_c(a) - pi_u(a)| [..], from 0 to 1. Needs no label."""
    return (logits_c.softmax(-1) - logits_u.softmax(-1)).abs().amax(-1)


def best_guidance(logits_u, logits_c, y) -> float:
    """w* = argmin_w of L(w) summed over all positions: > 1 the step is too timid, < 1 too big, < 0 harmful.

    inf (-inf): more (less) is better everywhere. nan: the step is mere rounding. Labels below 0 are ignored.
    Raises `ValueError` unless the logits [.., V] are finite and the labels y [..] integers below V.
    """
    shapes, V = [tuple(t.shape) for t in (logits_u, logits_c, y)], logits_u.shape[-1]
    good = shapes == [(*shapes[2], V)] * 2 + shapes[2:] and not (y.is_floating_point() or (y >= V).any())
    if not (good and (logits_u.isfinite() & logits_c.isfinite()).all()):
        raise ValueError(f"logits and labels {shapes}: must be finite [.., V] and whole numbers [..] below V")
    eps = max(torch.finfo(logits.dtype).eps for logits in (logits_u, logits_c))
    l_u, l_c, y = logits_u[y >= 0].cpu().double(), logits_c[y >= 0].cpu().double(), y[y >= 0].cpu().long()
    delta = l_c - l_u - (l_c - l_u).gather(-1, y[:, None])  # 0 at y
    rounding = 2 * eps * torch.maximum(l_u.abs(), l_c.abs()).amax(-1, keepdim=True)
    rises, falls = (delta < -rounding).any(), (delta > rounding).any()  # as w grows, tokens lose, gain on y
    if not (rises and falls):
        return math.inf if rises else -math.inf if falls else math.nan
    low, high = -math.pi / 2, math.pi / 2  # bisection in atan(w): all real w; L is convex
    for _ in range(40):
        middle = (low + high) / 2
        too_far = margin(l_u, l_c, y, math.tan(middle)).sum() < 0
        low, high = (low, middle) if too_far else (middle, high)
    return math.tan(middle)


# ------------------------------------------------------------------------------------------------------------
# §3  Targets (paper section 5): Φ gives every step s its own target y†_s, and the last one is y*.
# Each is a function of puzzles (x, y*, draft, order: [B, L]), steps s [B], noise u [B, 2, L] in [0, 1), fixed
# for a rollout, and cfg. If y†_s is nearer to y* than y†_(s-1) and a model fits both exactly, step s leaves
# fewer wrong cells and its expected margin is positive (Prop. A.3). Equal targets ask for a dead step.


def share(s: torch.Tensor, cfg) -> torch.Tensor:
    """How much of y* the target of step s [B] shows: (s / N_sup)^power, 1 from N_sup on. [B, 1]"""
    return ((s / cfg.n_sup).clamp(max=1) ** cfg.power)[:, None]


def reveal(puzzles, s, u, cfg) -> torch.Tensor:
    """The puzzle with a share of its differences from y* revealed, rounded down, in one random order."""
    x, y, *_ = puzzles
    rank = torch.where(x != y, u[:, 0], 2.0).argsort(1).argsort(1)  # [B, L]: differing cells come first
    shown = (share(s, cfg) * (x != y).sum(1, keepdim=True) + 1e-4).floor()  # 1e-4: 0.3333 of 3 cells is 1
    return torch.where(rank < shown, y, x)


def mask(puzzles, s, u, cfg) -> torch.Tensor:
    """Masked diffusion: a share of y*, and the mask token, which is the last of the V, in all other cells."""
    x, y, *_ = puzzles
    return torch.where(u[:, 0] < share(s, cfg), y, cfg.vocab - 1)


def replace_at_random(puzzles, s, u, cfg) -> torch.Tensor:
    """Uniform diffusion: a share of y*, and a random token, fixed for a rollout, in all other cells."""
    x, y, *_ = puzzles
    return torch.where(u[:, 0] < share(s, cfg), y, (u[:, 1] * cfg.vocab).to(y.dtype))


def edits(puzzles, s, u, cfg) -> torch.Tensor:
    """A solver's answer after pace * s of its rounds (in mazes, each fills the dead ends); at N_sup, y*."""
    _, y, draft, order, *between = puzzles  # order: the round that sets a cell to y*
    rounds = torch.where(s < cfg.n_sup, cfg.pace * s, order.max())[:, None]
    if between:  # with marks: a cell first gets its mark, in round `since`, and in `order` its value in y*
        draft = torch.where(between[1] <= rounds, between[0], draft)
    return torch.where(order <= rounds, y, draft)  # each step does `pace` rounds: one map can serve all


TARGETS = {"reveal": reveal, "mask": mask, "replace": replace_at_random, "edits": edits}
TARGETS["final"] = lambda puzzles, s, u, cfg: [*puzzles][1]  # y* at every step, as in TRM

# ------------------------------------------------------------------------------------------------------------
# §4  Training (paper section 5): one loop for every scheme


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """What training needs beside the model's sizes. The defaults are the scheme `dis`."""

    target: str = "edits"  # the target of each step
    pace: int = 7  # target edits: rounds of the solver per step [1, 10000]
    power: float = 0.3  # targets reveal, mask, replace: step s shows the share (s / n-sup)^power [0.01, 10]
    linear: bool = False  # weight the loss of step s by s instead of equally
    hinge: float = 0.0  # weight of the loss on negative advantage margins [0, 1000]
    awr: float = 0.0  # weight cells by exp(A / awr), at most 20 (as in AWR); 0: off [0, 1e6]
    noise: float = 0.2  # std of the noise added to y and z before each step [0, 10]
    examples: int = 10000  # training puzzles seen, counting repetitions [1, 1e10]
    budget_seconds: float = 0.0  # train for this time instead of --examples; 0: off [0, 1e9]
    batch_size: int = 12  # puzzles in a batch [1, 1e6]
    linger: float = 0.5  # chance of one more step, with target y*, after N_sup and each later one [0, 0.99]
    lr: float = 0.01  # peak learning rate of AdamW [1e-9, 1000]
    weight_decay: float = 0.0  # decoupled weight decay [0, 10]
    warmup: int = 100  # updates of linear warm-up [0, 1e9]
    cosine: bool = True  # decay the learning rate to 0 along a cosine
    ema: float = 0.998  # decay of the averaged weights, the result; 0: the last weights [0, 0.999999]


TRM = {"target": "final", "recall": False, "noise": 0, "linger": 0, "act": True, "ema": 0.999, "n_sup": 16}
SCHEMES = {  # what each changes of the defaults; forward passes: N_sup T (n + 1)
    "dis": {},  # 6 * 1 * 3 = 18
    "dis-margin": {"hinge": 1.0},  # 18
    "final": {"target": "final"},  # 18
    "one-pass": {"target": "final", "n": 17, "n_sup": 1, "untied": True, "linger": 0},  # 1 * 1 * 18 = 18
    "trm": {**TRM, "T": 3, "n": 6},  # 16 * 3 * 7 = 336
    "trm-medium": {**TRM, "T": 1, "n": 2},  # 16 * 1 * 3 = 48
}


def step_loss(logits_u, logits_c, y_dagger, s, cfg: TrainConfig) -> torch.Tensor:
    """Cross-entropy of pi_c with y† [B, L]; optional: weights exp(A(y†) / awr), hinge on the margin of y†."""
    loss = F.cross_entropy(logits_c.flatten(0, 1), y_dagger.flatten(), reduction="none").view_as(y_dagger)
    if cfg.awr:
        A = advantage(logits_u, logits_c.detach()).gather(-1, y_dagger[..., None])[..., 0]
        loss = loss * (A / cfg.awr).exp().clamp(max=20)
    if cfg.hinge:  # the margin should not be negative (Prop. 4.1)
        loss = loss + cfg.hinge * F.relu(-margin(logits_u, logits_c, y_dagger))
    if cfg.linear:
        loss = loss * (2 * s / (cfg.n_sup + 1))[:, None]  # mean weight 1 over steps 1 .. N_sup
    return loss.mean()


def halting_loss(model: LoopedModel, y, logits_c, y_star, s) -> tuple[torch.Tensor, torch.Tensor]:
    """TRM's ACT: loss of a head that predicts from y's first cell if the answer is right; rows to end [B]."""
    q, right = model.halting(y[:, 0]).squeeze(-1), (logits_c.argmax(-1) == y_star).all(1)  # both [B]
    stay = torch.randint(2, max(3, model.cfg.n_sup + 1), s.shape, device=s.device)
    stay = stay * (torch.rand_like(q) < 0.1)  # a tenth go on, so that the head sees later steps
    return 0.5 * F.binary_cross_entropy_with_logits(q, right.float()), (q > 0) & (s >= stay)


def refill(run: SimpleNamespace, data) -> list:
    """run.rows (x, y*, .., s, u, y, z); rows that are done get the next puzzle, step 1, a new u, y0, z0."""
    turn = (run.seen + run.done.cumsum(0) - 1) % len(data)  # the k-th row done takes the k-th puzzle in line
    s, u, *_ = run.rows[-4:]
    fresh = (*data[run.queue[turn]], torch.ones_like(s), torch.rand_like(u), *run.model.start(len(s)))
    run.seen, pairs = run.seen + run.done.sum(), zip(fresh, run.rows, strict=True)
    return [torch.where(run.done.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in pairs]


def train(model, data, cfg: TrainConfig, callback=None, average=lambda grads: None, resume=None):
    """Train `model` in place on `data`; returns the model with averaged weights.

    data[rows [B]] gives (x, y*, ..) [B, L] on the model's device, as TensorDataset does (edits: `Puzzles`).
        for x, y* in batches:  y, z <- y0, z0;  for s = 1 .. N_sup:  y, z <- step s;  loss; update; detach
    `act` and `linger` end each row's rollout at a step of its own. If callback(run, loss) returns True,
    training stops; loss is a number 200 times, else None. average(grads) and resume(run) work in place.
    """
    s = torch.zeros(cfg.batch_size, dtype=torch.long, device=model.y0.device)  # [B]
    rows = [*data[s], s, model.y0.new_zeros(len(s), 2, math.prod(model.cfg.shape)), *model.start(len(s))]
    run = SimpleNamespace(model=model, updates=0, seconds=0.0, share=0.0, rows=rows, done=s == 0, seen=s[0])
    run.queue = torch.randperm(len(data)).to(s.device)
    run.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    run.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    length = cfg.n_sup + cfg.linger / (1 - cfg.linger)  # expected steps of a rollout
    if resume:
        resume(run)
    while run.share < 1:
        began, run.updates = time.perf_counter() - run.seconds, run.updates + 1
        *puzzles, s, u, y, z = refill(run, data)
        y_dagger = TARGETS[cfg.target](puzzles, s, u, cfg).long()  # [B, L]
        logits_u = model.readout(y).detach()  # the reference policy
        y, z = (h + cfg.noise * torch.randn_like(h) for h in (y, z))
        y, z = model(puzzles[0], y, z, s)  # the latent step
        logits_c = model.readout(y)  # the conditional policy
        halt_loss, ends = halting_loss(model, y, logits_c, puzzles[1], s) if cfg.act else (0.0, False)
        loss = step_loss(logits_u, logits_c, y_dagger, s, cfg) + halt_loss
        run.done = (s >= cfg.n_sup) & (torch.rand(s.shape, device=s.device) >= cfg.linger) | ends

        run.optimizer.zero_grad()
        loss.backward()
        average([p.grad for p in model.parameters() if p.grad is not None])
        warm, cosine = min(1, run.updates / (cfg.warmup + 1)), 0.5 + 0.5 * math.cos(math.pi * run.share)
        run.optimizer.param_groups[0]["lr"] = cfg.lr * warm * (cosine if cfg.cosine else 1)
        run.optimizer.step()
        run.averaged.update_parameters(model)
        run.rows = [*puzzles, s + 1, u, y.detach(), z.detach()]  # no gradient crosses steps

        to_do = ((1 - s / cfg.n_sup).clamp(min=0) * ~run.done).sum()  # unfinished rollouts, in puzzles
        finished = (run.seen - to_do).item() if cfg.act else cfg.batch_size * run.updates / length
        spent, before = time.perf_counter() - began, run.share
        run.share = spent / cfg.budget_seconds if cfg.budget_seconds else finished / cfg.examples
        look = int(200 * run.share + 1e-6) > int(200 * before + 1e-6)  # reading the loss makes a GPU wait
        value, run.seconds = loss.item() if look else None, time.perf_counter() - began
        if callback and callback(run, value):
            run.share = math.inf
    return run.averaged.module


# ------------------------------------------------------------------------------------------------------------
# §5  The maze task: generate, solve and check, whole batches at once

WALL, OPEN, START, GOAL, PATH = range(5)  # x is made of the first four tokens, y* of all five
SPLITS = {"test": (0,), "valid": (1,), "train": (2, 3)}  # fingerprint of a puzzle, modulo 4


@dataclass
class Puzzles:
    """N puzzles x with solutions y, and a solver's way there. Unpacks to its tensors, takes rows by index."""

    x: torch.Tensor  # [N, L] uint8, the question
    y: torch.Tensor  # [N, L] uint8, the solution y*
    draft: torch.Tensor  # [N, L] uint8, the solver's answer before its first round
    order: torch.Tensor  # [N, L] int16, the round that gave a cell its value in y; 0: draft and y agree
    mark: torch.Tensor | None = None  # [N, L] uint8, the value that a cell may have between draft and y
    since: torch.Tensor | None = None  # [N, L] int16, the round that gave it

    def __iter__(self):
        return (t for t in vars(self).values() if t is not None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows) -> "Puzzles":
        return Puzzles(*(t[rows] for t in self))

    def to(self, device) -> "Puzzles":
        return Puzzles(*(t.to(device) for t in self))


def spanning_trees(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform spanning trees of the side x side grid: each room's parent [count, side²], the root its own.

    Cycle popping (Propp & Wilson 1998): each room points at a random neighbour; those on a cycle draw again.
    """
    room, root = torch.arange(side * side), side * side // 2
    exists = torch.stack([room >= side, room < side * (side - 1), room % side > 0, (room + 1) % side > 0], 1)
    degree, existing_first = exists.sum(1), (~exists).int().argsort(stable=True)
    neighbour = room[:, None] + torch.tensor([-side, side, -1, 1])[existing_first]  # [rooms, 4]
    neighbour[root] = root
    parent, live = room.repeat(count, 1), torch.arange(count)  # live: the trees that may still have cycles
    again = torch.ones_like(parent, dtype=torch.bool)  # [live, rooms]
    while len(live):
        tree, room = again.nonzero(as_tuple=True)
        choice = (torch.rand(len(room), generator=generator) * degree[room]).long()
        parent[live[tree], room] = neighbour[room, choice]
        reached = parent[live]  # doubled below to >= side² moves: each walk is then on a cycle or at the root
        for _ in range(math.ceil(math.log2(side * side))):
            reached = reached.gather(1, reached)
        again = torch.zeros_like(reached, dtype=torch.bool).scatter_(1, reached, reached != root)
        live, again = live[again.any(1)], again[again.any(1)]
    return parent


def carve(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random perfect mazes [count, L] uint8: a uniform spanning tree joins rooms, two are start and goal."""
    cell = torch.arange(size * size).view(size, size)[::2, ::2].flatten()  # [rooms]: every second cell
    parent = spanning_trees(count, size // 2 + 1, generator)
    x = torch.full((count, size * size), WALL, dtype=torch.uint8).index_fill(1, cell, OPEN)
    x.scatter_(1, (cell + cell[parent]) // 2, OPEN)  # the cell midway between a room and its parent
    ends = torch.rand(count, len(cell), generator=generator).topk(2).indices  # [count, 2]
    return x.scatter_(1, cell[ends], torch.tensor([START, GOAL], dtype=torch.uint8).expand(count, 2))


def grid(cells: torch.Tensor) -> torch.Tensor:
    """Square puzzles [N, L] -> [N, H, W]; [N, H, W] stays as it is."""
    return cells if cells.ndim == 3 else cells.unflatten(1, [math.isqrt(cells.shape[1])] * 2)


def around(cells: torch.Tensor) -> torch.Tensor:
    """What the cells above, left of, right of and below each cell hold: [N, H, W] -> [4, N, H, W]."""
    m = F.pad(cells, (1, 1, 1, 1))
    return torch.stack([m[:, :-2, 1:-1], m[:, 1:-1, :-2], m[:, 1:-1, 2:], m[:, 2:, 1:-1]])


def neighbours(mask: torch.Tensor) -> torch.Tensor:
    """How many of each cell's four neighbours are set: [N, H, W] bool -> [N, H, W] uint8."""
    return around(mask.to(torch.uint8)).sum(0, dtype=torch.uint8)


def flood(reached: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """The cells `reached`, and all that a way over free cells joins to them: [N, H, W] bool."""
    while (more := free & ~reached & (neighbours(reached) > 0)).any():
        reached = reached | more
    return reached


def solve_mazes(x: torch.Tensor) -> Puzzles:
    """Solve perfect mazes x [N, L] by dead-end filling, all dead ends in a round; the path remains.

    The draft marks every open cell as path; the order of a cell is the round that filled it.
    """
    maze = grid(x)
    way, left, order = maze == OPEN, maze != WALL, torch.zeros_like(maze, dtype=torch.int16)
    while (dead := left & way & (neighbours(left) <= 1)).any():
        order[dead] = order.max() + 1
        left &= ~dead
    draft, y = (torch.where(marked, PATH, maze).to(torch.uint8) for marked in (way, way & left))
    return Puzzles(*(t.flatten(1) for t in (x, y, draft, order)))


def maze_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers to x ([B, L] or [B, H, W]) are x with one path from start to goal marked: [B] bool."""
    asked, said = grid(x), grid(answer).clamp(max=PATH)
    unchanged = (said == asked) | (said == PATH) & (asked == OPEN)
    on = (said == PATH) | (said == START) | (said == GOAL)
    line = ~on | (neighbours(on) == torch.where(said == PATH, 2, 1))  # marked neighbours: 2, at the ends 1
    good = (unchanged & line).all((1, 2), keepdim=True)  # and no closed loop beside the path:
    return (good & (flood(said == START, on & good) == on)).all((1, 2)) & ((asked == START).sum((1, 2)) == 1)


def draw_split(count: int, size: int, split: str, draw, key=lambda cells: cells) -> torch.Tensor:
    """`count` grids [count, L] of those that draw(n) makes; a fingerprint of key(grids) decides the split."""
    table = torch.randint(-(2**63), 2**63 - 1, (size, size), generator=torch.Generator().manual_seed(0))
    views = torch.stack([t.rot90(k).flatten() for t in (table, table.T) for k in range(4)], 1)  # [L, 8]
    found = []
    while sum(map(len, found)) < count:
        cells = draw(min(64 << len(found), 64 + 2 * count, 2**21 // size**2))
        fingerprint = (key(cells).long() @ views).amin(1)  # the same in all 8 symmetric views of a grid
        found.append(cells[torch.isin(fingerprint % 4, torch.tensor(SPLITS[split]))])
    return torch.cat(found)[:count]


def make_mazes(count: int, size: int = 11, split: str = "train", seed: int = 0) -> Puzzles:
    """`count` solved mazes of side `size` (odd), from one of the SPLITS: their walls alone decide it."""
    generator = torch.Generator().manual_seed(seed)
    x = draw_split(count, size, split, lambda n: carve(n, size, generator), lambda x: x == WALL)
    return solve_mazes(x)


# ------------------------------------------------------------------------------------------------------------
# §6  Evaluation: a rollout gives the logits around every step, and everything else is computed from them


class Step(NamedTuple):
    """What a latent step leaves behind, for the B puzzles that are still in the batch."""

    rows: torch.Tensor  # [B], their rows in the batch that the rollout started with
    x: torch.Tensor  # [B, L], the puzzles
    logits_u: torch.Tensor  # [B, L, V], the readout before the step
    logits_c: torch.Tensor  # [B, L, V], the readout after it
    y: torch.Tensor  # [B, L, D]


@torch.no_grad()
def rollout(model: LoopedModel, x: torch.Tensor, steps=None, stop=None):
    """Yield a `Step` of x [B, L] for each of `steps` (or 1 .. N_sup); rows with stop(model, step) leave."""
    rows, (y, z) = torch.arange(len(x), device=x.device), model.start(len(x))
    logits_c = model.readout(y)  # of y0, which no loss has trained: step 1's logits_u mean little
    for s in steps or range(1, model.cfg.n_sup + 1):
        y, z = model(x, y, z, torch.full_like(rows, s))
        logits_u, logits_c = logits_c, model.readout(y)
        yield (step := Step(rows, x, logits_u, logits_c, y))
        stays = ~stop(model, step) if stop else slice(None)  # the others cost nothing from now on
        rows, x, y, z, logits_c = (t[stays] for t in (rows, x, y, z, logits_c))
        if not len(rows):
            return


def batches(x: torch.Tensor):
    """Row numbers of x [N, L] in batches: of 12,000 cells on a CPU, where they stay in its cache."""
    return torch.arange(len(x), device=x.device).split(max(1, (10**6 if x.is_cuda else 12_000) // x.shape[1]))


def answer(model: LoopedModel, x: torch.Tensor, steps=None, stop=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The last answers [N, L] to the puzzles x [N, L], and the number of steps taken for each [N]."""
    answers, taken = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.long, device=x.device)
    for rows in batches(x):
        for step in rollout(model, x[rows], steps, stop):
            answers[rows[step.rows]] = step.logits_c.argmax(-1).to(x.dtype)
            taken[rows[step.rows]] += 1
    return answers, taken


HALTS = {  # scores [B] for early exit: low if the step hardly moved the policy, or TRM's halting head is sure
    "kl": lambda model, step: divergence(step.logits_u, step.logits_c).mean(1),
    "change": lambda model, step: largest_change(step.logits_u, step.logits_c).amax(1),
    "head": lambda model, step: -model.halting(step.y[:, 0]).squeeze(-1),
}
STILL = 1e-4  # nats per cell: a step with a smaller KL does not move the policy
WS = [w / 4 for w in range(-2, 13)]  # the guidance weights tried at every step: -0.5 to 3


def stopping(rule: str, threshold: float):
    """The `stop` function of `rollout` that ends thinking when a score of HALTS is at most `threshold`."""
    return lambda model, step: HALTS[rule](model, step) <= threshold


def measure(model: LoopedModel, step: Step, ws, solved, scores, asked, y_star) -> dict:
    """What is measured of a step for each puzzle [B, ..]; means over the cells, logarithms in nats."""
    u, c = step.logits_u, step.logits_c
    policies = torch.cat([u[None], c[None], guide(u, c, torch.tensor(ws, device=u.device).view(-1, 1, 1, 1))])
    label, answers, gap = y_star.expand(policies.shape[:-1]), policies[1:].argmax(-1), margin(u, c, y_star)
    logp = policies.log_softmax(-1).gather(-1, label[..., None])[..., 0].mean(-1)  # log pi(y*) [2 + W, B]
    exact = solved(asked, answers[0]).repeat(len(answers), 1)  # [1 + W, B]
    differs = (answers != answers[0]).any(2)  # only other answers than at w = 1 have to be checked again
    exact[differs] = solved(asked.expand_as(answers)[differs], answers[differs])
    found = {
        "exact": exact[0],  # is the puzzle solved?
        "label": (answers[0] == y_star).all(1),  # is the answer y*? (there may be other solutions)
        "cells": (answers[0] == y_star).float().mean(1),  # share of the cells that are right
        "logp": logp[1],  # log pi_c(y*)
        "gain": logp[1] - logp[0],  # what the step added to log pi(y*)
        "margin": gap.mean(1),  # at w = 1
        "margin_positive": (gap > 0).float().mean(1),  # share of the cells (at a dead step, up to rounding)
    }
    found |= {"guided_exact": exact[1:].T, "guided_logp": logp[2:].T} if ws else {}
    return found | {name: of(model, step) for name, of in scores.items() if name != "head" or model.cfg.act}


def intervals(values: torch.Tensor, resamples: int = 4000) -> list:
    """Bootstrap intervals [S][2] of the means of values [N, S]: 95% for all S together (Bonferroni)."""
    (N, S), generator = values.shape, torch.Generator().manual_seed(0)
    draws = (torch.randint(N, (10, N), generator=generator) for _ in range(0, resamples, 10))
    means = torch.cat([F.embedding_bag(rows, values, mode="mean") for rows in draws]).double()
    ends = means.quantile(torch.tensor([0.025 / S, 1 - 0.025 / S]).double(), 0).T.tolist()
    return ends if N > 5 else [[-math.inf, math.inf]] * S  # of so few puzzles nothing can be said


def evaluate(model: LoopedModel, puzzles, solved=None, steps=None, ws=None, scores=HALTS) -> dict:
    """Means {name: [S]} of `measure`, intervals of gain and margin, and the "passes" of a puzzle.

    "each": the measures of every puzzle {name: [N, S, ..]}. `puzzles` unpacks to (x, y*, ..); solved(x,
    answer) [B]: equality with y* by default; `ws` [S][..]: guidance weights; `scores`: measures, as HALTS.
    """
    (x, y_star, *_), before, chunks = puzzles, model.forward_passes, []
    asked, solved = (x, solved) if solved else (y_star, lambda y, said: (said == y).all(1))
    for rows in batches(x):
        given, steps_of = (asked[rows], y_star[rows].long()), enumerate(rollout(model, x[rows], steps))
        each = [measure(model, step, ws[k] if ws else [], solved, scores, *given) for k, step in steps_of]
        chunks.append({name: torch.stack([m[name] for m in each], 1).cpu().float() for name in each[0]})
    each = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    found = {name: v.double().mean(0).tolist() for name, v in each.items()}
    found |= {f"{name}_interval": intervals(each[name]) for name in ("gain", "margin")}
    return {"passes": (model.forward_passes - before) // len(chunks), **found, "each": each}


def halting_curve(scores: torch.Tensor, solved: torch.Tensor, loss: float = 0.003) -> dict:
    """Mean "steps" and share "exact" for 202 thresholds on the scores [N, S], with solved [N, S].

    "threshold": the one with the fewest steps among those that cost at most the share `loss`.
    """
    levels = scores.flatten().double().quantile(torch.linspace(0, 1, 201).double())
    levels = F.pad(levels, (1, 0), value=-math.inf)
    stop = scores[..., None] <= levels  # [N, S, levels]
    stop[:, -1] = True
    first = stop.int().argmax(1)  # [N, levels]
    steps, exact = 1 + first.double().mean(0), solved.double().gather(1, first).mean(0)
    best = torch.where(exact >= exact.max() - loss, steps, math.inf).argmin()
    return {"threshold": levels[best].item(), "steps": steps.tolist(), "exact": exact.tolist()}


def calibrate(model: LoopedModel, valid, solved=None, steps=None) -> dict:
    """What is chosen before the test, on validation puzzles: "w_star" [S], and a `halting_curve` per rule."""
    logits = {"u": lambda model, step: step.logits_u, "c": lambda model, step: step.logits_c}
    (_, y_star, *_), each = valid, evaluate(model, valid, solved, steps, scores=HALTS | logits)["each"]
    pairs = zip(each["u"].unbind(1), each["c"].unbind(1), strict=True)
    halt = {rule: halting_curve(each[rule], each["exact"]) for rule in HALTS if rule in each}
    return {"w_star": [best_guidance(u, c, y_star.cpu()) for u, c in pairs], "halt": halt}


def diagnose(model: LoopedModel, test, valid, solved, steps=None) -> dict:
    """Which steps work: `evaluate` on `test`, with what `calibrate` chose on `valid`, and

    "verdict" [S]: dead, if the step hardly moves the policy (KL at most STILL); else improves or harms, as
    the interval of the gain lies above or below 0; else moves (no gain is shown). "step_size" [S]: too timid
    or overshoots, where the interval of the margin and w* agree. "guided_exact", "guided_logp" [S][ws]: under
    the weights "ws" and, last, w* (within `ws`). "halting": {rule: "exact", mean "passes"}, puzzles leaving;
    rule "checker": as soon as `solved` accepts the answer.
    "cut": puzzles "won" and "lost" with as many steps as improve (with a step index: with just these).
    """
    steps = steps or range(1, model.cfg.n_sup + 1)
    chosen, verdict, size = calibrate(model, valid, solved, steps), [], []
    own = torch.tensor(chosen["w_star"]).double().nan_to_num(1.0).clamp(WS[0], WS[-1]).tolist()
    found = {"ws": WS, **chosen, **evaluate(model, test, solved, steps, [[*WS, w] for w in own])}
    of_steps = zip(found["kl"], found["gain_interval"], found["margin_interval"], own, strict=True)
    for kl, gain, gap, w in of_steps:
        gains = ("moves", "improves", "harms")[(gain[0] > 0) - (gain[1] < 0)]
        verdict.append(gains if kl > STILL else "dead")
        side = (gap[0] > 0 and w > 1) - (gap[1] < 0 and w < 1)
        size.append(("just right", "too timid", "overshoots")[side])
    runs = [(kind, [*run]) for kind, run in itertools.groupby(steps, lambda s: verdict[s - steps[0]])]
    words = [f"{kind}: step {run[0]}" + f"-{run[-1]}" * (len(run) > 1) for kind, run in runs]
    working = [s for s, kind in zip(steps, verdict, strict=True) if kind == "improves"]
    found["summary"] = f"{'; '.join(words)}. {len(working)} of {len(steps)} steps improve the answer"
    halting = {"none": {"exact": found["exact"][-1], "passes": found["passes"]}}
    stops = {rule: stopping(rule, of["threshold"]) for rule, of in chosen["halt"].items()}
    stops["checker"] = lambda model, step: solved(step.x, step.logits_c.argmax(-1))  # needs no label either
    for rule, stop in stops.items():
        answers, taken = answer(model, test.x, steps, stop)
        passes = taken.cpu().double().mean().item() * model.cfg.T * (model.cfg.n + 1)
        halting[rule] = {"exact": solved(test.x, answers).cpu().double().mean().item(), "passes": passes}
    if 0 < len(working) < len(steps):
        full, cut = found["each"]["exact"][:, -1] > 0, solved(test.x, answer(model, test.x, working)[0]).cpu()
        found["cut"] = {"won": (cut & ~full).sum().item(), "lost": (full & ~cut).sum().item()}
    return found | {"verdict": verdict, "step_size": size, "halting": halting}


# ------------------------------------------------------------------------------------------------------------
# §7  Sudoku and n queens: generate and check; symmetric views of all puzzles

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of a sudoku -> rows and columns of its boxes
EMPTY, QUEEN = range(2)


def units(size: int) -> torch.Tensor:
    """The cells of each row, column and box of a sudoku: [3 size, size]."""
    cell, (height, width) = torch.arange(size**2).view(size, size), BOXES[size]
    boxes = cell.view(size // height, height, size // width, width).transpose(1, 2).reshape(size, size)
    return torch.cat([cell, cell.T, boxes])


def sudoku_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] keep the givens of x [B, L] and have every digit in every unit: [B] bool."""
    x, answer = x.flatten(1), answer.flatten(1)
    size = math.isqrt(x.shape[1])
    digits = answer[:, units(size)].sort(-1).values == torch.arange(1, size + 1, device=x.device)
    return ((x == 0) | (answer == x)).all(1) & digits.all((1, 2))


def propagate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One round of constraint propagation on sudokus x [N, L].

    Returns x with single candidates filled in; the candidates of its blanks [N, size, L], only one where a
    digit has no other place in a unit; and which x contradict the rules [N].
    """
    size = math.isqrt(x.shape[1])
    digit = torch.arange(1, size + 1, dtype=x.dtype)[:, None]
    U = F.one_hot(units(size), size**2).sum(1).float()  # [units, L]: 1 where the cell belongs to the unit
    has = (x[:, None] == digit).float() @ U.T  # [N, size, units]: how often the unit has the digit
    free = (x[:, None] == 0) & (has @ U == 0)  # [N, size, L]
    places = free.float() @ U.T  # [N, size, units]: cells of the unit where the digit may go
    only = free & ((places == 1).float() @ U > 0)
    free = torch.where(only.any(1, keepdim=True), only, free)
    filled = torch.where(free.sum(1) == 1, (free * digit).amax(1), x)
    return filled, free, ((has > 1) | (has + places == 0)).any((1, 2))


def other_solutions(x: torch.Tensor, y: torch.Tensor, generator=None) -> torch.Tensor:
    """For sudokus x [N, L]: a solution other than y (y = 0: any solution), or y where there is none. [N, L]

    A complete search in random order: propagate, then try each digit in a blank with the fewest candidates.
    """
    other, boards, owner, width = y.clone(), x, torch.arange(len(x)), min(3000, len(x) + 60)
    while len(boards):
        now, owners = boards[-width:], owner[-width:]  # the newest first: memory stays bounded
        filled, free, broken = propagate(now)
        found = ~broken & (now > 0).all(1) & (now != y[owners]).any(1)
        for n, board in zip(owners[found].tolist(), now[found], strict=True):
            other[n] = board
        few = free.sum(1) + torch.rand(now.shape, generator=generator)
        cell = few.where(now == 0, math.inf).argmin(1)
        options = free[torch.arange(len(now)), :, cell] & ~broken[:, None]  # [n, size]
        chance, digit = (options * (1 + torch.rand(options.shape, generator=generator))).sort(1)
        turn, which = chance.T.nonzero(as_tuple=True)  # the last ones are one try for each board
        new = filled[which].scatter(1, cell[which, None], digit[which, turn, None].to(x.dtype) + 1)
        boards, owner = torch.cat([boards[:-width], new]), torch.cat([owner[:-width], owners[which]])
        unsolved = (other == y).all(1)[owner]
        boards, owner = boards[unsolved], owner[unsolved]
    return other


def look(cells: torch.Tensor, cell: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Puzzles or answers [N, L] in a view: `cell` [N, L] comes to each place, `new` [N, V] for each token.

    look(.., cell.argsort(1), new.argsort(1)) takes them back.
    """
    return new.gather(1, cells.gather(1, cell).long()).to(cells.dtype)


def grid_views(N: int, shape: tuple[int, int], generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """N random symmetries of grids, all that there are before one comes again: `look`'s `cell` and `new`."""
    index = torch.arange(math.prod(shape)).view(shape)
    turned = [t.rot90(k) for t in (index, index.flip(0)) for k in range(4)]
    views = torch.stack([t.flatten() for t in turned if t.shape == shape])
    chosen = torch.rand(-(-N // len(views)), len(views), generator=generator).argsort(1).flatten()[:N]
    return views[chosen], torch.arange(8).expand(N, -1)  # no task of these has more tokens


def sudoku_views(N: int, shape: tuple[int, int], generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """N random symmetries of sudokus: digits, bands, stacks, lines in these; square boxes: transposed."""
    size, lines = shape[0], []
    for step in BOXES[size]:  # groups of `step` lines are permuted, and the lines in each group
        groups = torch.rand(N, size // step, generator=generator).argsort(1).repeat_interleave(step, 1)
        lines.append((groups + torch.rand(N, size, generator=generator)).argsort(1))
    cell = lines[0][:, :, None] * size + lines[1][:, None]  # [N, size, size]
    if BOXES[size][0] == BOXES[size][1]:
        cell = torch.where(torch.rand(N, 1, 1, generator=generator) < 0.5, cell, cell.mT)
    digits = torch.rand(N, size, generator=generator).argsort(1) + 1
    blank, masked = torch.zeros(N, 1, dtype=torch.long), torch.full((N, 1), size + 1)
    return cell.flatten(1), torch.cat([blank, digits, masked], 1)


def sudoku_kind(y: torch.Tensor) -> torch.Tensor:
    """For each solved sudoku [N, L] a number that none of its symmetries changes, and zeros: [N, L]."""
    size, kind = math.isqrt(y.shape[1]), 0
    rows = F.one_hot(y.long() - 1, size).view(-1, size, size, size).float()  # [N, row, column, digit]
    for lines in (rows, rows.transpose(1, 2)):
        P = torch.einsum("nacd,nbce->nabde", lines, lines)  # the permutation of digits from line a to line b
        cubes = (P @ P @ P).diagonal(dim1=3, dim2=4).sum(3)  # traces: they tell the lengths of its cycles
        kind += ((cubes + 10 * (P @ P).diagonal(dim1=3, dim2=4).sum(3)) ** 2 % 1009).sum((1, 2)).long()
    return F.pad((kind * 2654435761 >> 16)[:, None], (0, size**2 - 1))  # mixed: all of `kind` are even


def minimal(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sudokus [N, L] with the only solutions y: empties cells in random order, but none that makes two."""
    x = y.clone()
    for cell in torch.rand(y.shape, generator=generator).argsort(1).T[..., None]:
        fewer = x.scatter(1, cell, 0)
        x = torch.where((other_solutions(fewer, y, generator) == y).all(1, keepdim=True), fewer, x)
    return x


def placements(size: int) -> torch.Tensor:
    """All ways to place `size` queens so that none attacks another: [K, L] uint8, in reading order."""
    columns = torch.zeros(1, 0, dtype=torch.long)  # of the queens in the rows so far
    for row in range(size):
        columns, new = columns.repeat_interleave(size, 0), torch.arange(size).repeat(len(columns))[:, None]
        apart = (columns - new).abs()  # attacked: 0 columns apart, or as many as rows
        columns = torch.cat([columns, new], 1)[(apart * (apart - torch.arange(row, 0, -1))).all(1)]
    return F.one_hot(columns, size).flatten(1).to(torch.uint8)


def queens_boards(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Boards [count, L] uint8 with 1 to size - 1 queens of a random valid placement."""
    every = placements(size)
    y = every[torch.randint(len(every), (count,), generator=generator)]
    rank = torch.where(y == QUEEN, torch.rand(y.shape, generator=generator), 2.0).argsort(1).argsort(1)
    return y * (rank < torch.randint(1, size, (count, 1), generator=generator))


def queens_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] keep the queens of x [B, L] and have `size` of them, none attacked: [B] bool."""
    x, answer = x.flatten(1), answer.flatten(1)
    size = math.isqrt(x.shape[1])
    row, col = torch.arange(size**2, device=x.device) // size, torch.arange(size**2, device=x.device) % size
    lines = torch.cat([F.one_hot(k) for k in (row, col, row + col, row - col + size - 1)], 1).float()
    apart = ((answer == QUEEN).float() @ lines <= 1).all(1)
    return apart & (answer <= QUEEN).all(1) & (answer >= x).all(1) & (answer.sum(1) == size)


# ------------------------------------------------------------------------------------------------------------
# §8  Tasks: one table, and puzzles from text and CSV files


class UserError(Exception):
    """Invalid user input. The message is one line: what, which value, and what is allowed."""


@contextmanager
def naming(path, what: str):
    """Turn any error, as files may be damaged in many ways, into a message that names the file."""
    try:
        yield
    except Exception as e:
        kind = "" if isinstance(e, UserError | OSError) else f"{type(e).__name__}: "
        raise UserError(f"{path}: {kind}{getattr(e, 'strerror', None) or e}; must be {what}") from e


def make_sudokus(count: int, size: int = 9, split: str = "train", seed: int = 0, blanks: int = 0) -> Puzzles:
    """`count` sudokus with 1 to `blanks` empty cells (0: no limit): views of at most 60 minimal ones."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: other_solutions(*torch.zeros(2, n, size**2).byte(), generator)  # noqa: E731
    key = sudoku_kind if size > 4 else torch.clone  # decides the split; of size 4, there are only two kinds
    y = draw_split(min(count, 60), size, split, draw, key)
    x, rows = minimal(y, generator), torch.arange(count) % len(y)
    view = sudoku_views(count, (size, size), generator)
    x, y = (look(cells[rows], *view) for cells in (x, y))
    rank = torch.where(x == 0, torch.rand(x.shape, generator=generator), 2.0).argsort(1).argsort(1)
    most = (x == 0).sum(1, keepdim=True).clamp(max=blanks or size**2)
    blank = rank < 1 + (torch.rand(count, 1, generator=generator) * most).floor()
    return solve_sudokus(torch.where(blank, x, y), y)  # with cells given back: still one solution


def solve_sudokus(x: torch.Tensor, y: torch.Tensor | None = None) -> Puzzles:
    """Sudokus x [N, L] with solutions y, filled by rounds of `propagate`, and a last one if it gets stuck."""
    x = x.flatten(1)
    y = other_solutions(x, 0 * x, torch.Generator().manual_seed(0)) if y is None else y
    order, now, moved = torch.zeros_like(x, dtype=torch.int16), x, torch.ones(len(x), 1, dtype=torch.bool)
    while moved.any():
        order += moved & (now == 0)
        now, last = propagate(now)[0], now
        moved = (now != last).any(1, keepdim=True)
    return Puzzles(x, y, x, order)


def make_queens(count: int, size: int = 8, split: str = "train", seed: int = 0) -> Puzzles:
    """`count` boards with 1 to size - 1 queens to be completed. The given queens decide the split."""
    generator = torch.Generator().manual_seed(seed)
    return solve_queens(draw_split(count, size, split, lambda n: queens_boards(n, size, generator)))


def solve_queens(x: torch.Tensor, y: torch.Tensor | None = None) -> Puzzles:
    """Boards x [N, L] completed by y, or first in reading order (or EMPTY), a queen a round."""
    x = x.flatten(1)
    every = placements(math.isqrt(x.shape[1]))
    fits, first = (x.float() @ every.T.float() == x.sum(1, keepdim=True)).max(1, keepdim=True)
    y = every[first[:, 0]] * fits if y is None else y
    return Puzzles(x, y, x, ((y != x).cumsum(1) * (y != x)).to(torch.int16))


def solve_any_mazes(x: torch.Tensor, y: torch.Tensor | None = None, marks=False) -> Puzzles:
    """As `solve_mazes`, also with loops: a shortest path remains. x and y [N, L] or [N, H, W].

    A flood from the start, one cell a round, cuts the loops: each cell keeps the way to the first of the
    neighbours that the flood came from, and the others are cut once it has reached both sides. If y is given,
    one last round sets the cells that differ from it. marks: cells that the flood has reached, and the path,
    are PATH + k, where k is the distance from the start modulo 3: it tells from which side the flood came.
    """
    maze = grid(x)
    way, left, order = maze == OPEN, maze != WALL, torch.zeros_like(maze, dtype=torch.int16)
    when = 2 * (maze == START).to(torch.int16)  # 2 + the distance from the start; 0: not reached
    while (more := left & (when == 0) & (around(when).amax(0) > 0)).any():
        when[more] = when.max() + 1
    last = when.amax((1, 2), keepdim=True) + 1
    when = torch.where(when > 0, when, last)
    near = around(when)
    came = near == when - 1
    came &= came.cumsum(0) == 1
    tree = came | torch.stack([around(came[3 - k])[k] for k in range(4)])  # from there, or to there
    until = torch.where(tree, 9999, torch.maximum(near, when))
    for done in itertools.count(1):
        dead = left & way & ((around(left) & (until > done + 1)).sum(0) <= 1)
        if not dead.any() and (done > last).all():
            break
        order[dead] = done
        left = left & ~dead
    distance = torch.where(when == last, 9999, when - 2).to(torch.int16)
    draft, mark = torch.where(way, PATH, maze), torch.where(way, PATH + marks * (distance % 3), maze)
    path, order = torch.where(left, mark, maze), torch.where(way & left & marks, distance, order)
    y = path if y is None else torch.where(grid(y) == PATH, mark, grid(y))
    order = torch.where(y == path, order, order.amax((1, 2), keepdim=True) + 1)
    x, y, draft, mark = (t.to(torch.uint8).flatten(1) for t in (x, y, draft, mark))
    return Puzzles(x, y, draft, order.flatten(1), *((mark, distance.flatten(1)) if marks else ()))


def add_loops(x: torch.Tensor, loops: float, generator: torch.Generator) -> torch.Tensor:
    """Mazes x [N, L]: of the share `loops`, half with walls opened, half random obstacles, with new ends.

    Start and goal are any two open cells that a way joins; the few without such a goal are left out.
    """
    (N, L), size = x.shape, math.isqrt(x.shape[1])
    cell, (chance, *rank) = torch.arange(L), torch.rand(3, N, L, generator=generator)
    kind, amount = torch.rand(2, N, 1, generator=generator)
    between = (cell // size + cell % size) % 2 == 1  # the cells between two rooms
    free = (x != WALL) | between & (chance < 0.3 * amount)
    free = torch.where(kind < loops / 2, chance > 0.1 + 0.3 * amount, free)
    new = torch.where(free, OPEN, WALL).to(torch.uint8)
    new.scatter_(1, torch.where(free, rank[0], -1).argmax(1, keepdim=True), START)
    reached = flood(grid(new == START), grid(free)).flatten(1) & (new == OPEN)
    new.scatter_(1, torch.where(reached, rank[1], -1).argmax(1, keepdim=True), GOAL)
    return torch.where(kind < loops, new, x)[(kind >= loops)[:, 0] | reached.any(1)]


def make_any_mazes(count: int, size=11, split="train", seed=0, loops=0.0, marks=False) -> Puzzles:
    """As `make_mazes`, with loops or obstacles in a share `loops` of the mazes. Walls decide the split."""
    if not (loops or marks):
        return make_mazes(count, size, split, seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: add_loops(carve(n, size, generator), loops, generator)  # noqa: E731
    return solve_any_mazes(draw_split(count, size, split, draw, lambda x: x == WALL), None, marks)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
MAZE = {"wall": "#30343f", "open": "#f4f1ea", "start": COLOURS[2], "goal": COLOURS[1], "path": COLOURS[5]}
BOARD = {"mixer": "mlp", "scheme": "dis-margin", "batch_size": 8, "pick": 1, "examples": 12000, "lr": 0.005}


class Task(NamedTuple):
    """A kind of puzzle, by default the maze: functions, and data for options, text files and figures."""

    make: Callable = make_any_mazes  # (count, size, split, seed, more options) -> Puzzles
    solve: Callable = solve_any_mazes  # (x [N, L], maybe y) -> Puzzles
    solved: Callable = maze_solved  # (x [B, L], answer [B, L]) -> [B] bool
    views: Callable = grid_views  # (N, shape) -> N random symmetries
    sizes: tuple = tuple(range(5, 62, 2))
    letters: str = "# SGo"  # one character for each token
    alias: dict = str.maketrans("%X+-|10.sAPgEBF", "######  SSSGGGG")  # other characters for them
    colours: dict = MAZE  # {token's name: colour}; the last is that of all further tokens
    glyphs: str = ""  # what figures write into the cells
    options: tuple = ("loops", "marks")  # the fields of `Config` that `make` takes
    defaults: dict = {}  # what the task changes of Config's defaults


TASKS = {
    "maze": Task(),
    "sudoku": Task(
        make=make_sudokus,
        solve=solve_sudokus,
        solved=sudoku_solved,
        views=sudoku_views,
        sizes=tuple(BOXES),
        letters=".123456789",
        alias=str.maketrans("0_*x?-", "......"),
        colours={"blank": "white", "digit": "#f4f1ea"},
        glyphs=" 123456789",
        options=("blanks",),
        defaults=BOARD | {"size": 9, "pace": 1, "examples": 36000},
    ),
    "nqueens": Task(
        make=make_queens,
        solve=solve_queens,
        solved=queens_solved,
        sizes=tuple(range(5, 11)),
        letters=".Q",
        alias=str.maketrans("0_*x?-1♛", "......QQ"),
        colours={"empty": "#f4f1ea", "queen": COLOURS[5]},
        glyphs=" ♛",
        options=(),
        defaults=BOARD | {"size": 8, "pace": 2, "train_size": 7200},
    ),
}


def tokens(rows: list, task: Task, size: int, width: int) -> torch.Tensor:
    """The tokens [H, W] uint8 of rows (line number, characters). Raises `UserError` if one does not fit."""
    letters = task.letters[: size + 1]  # a sudoku has as many digits; the others have fewer tokens
    known = letters + "".join(map(chr, task.alias))
    for n, row in rows:
        if bad := re.search(f"[^{re.escape(known)}]", row):
            raise UserError(f"line {n}, character {bad.start() + 1}: {bad[0]!r}; must be one of {known!r}")
        if len(row) != width:
            raise UserError(f"line {n}: {len(row)} cells; must be {width}")
    return torch.tensor([[letters.index(c) for c in row.translate(task.alias)] for _, row in rows]).byte()


COLUMNS = (("question", "answer"), ("quizzes", "solutions"), ("puzzle", "solution"))  # of CSV files
# a line of these is none of a board: remarks, words, frames
COMMENT = r"\s*[#;]|.*[A-PR-WYZa-wyz]{3}|[-+=|(){},;\[\]\s\u2500-\u257f]*$|[-+=|*.:'\s]*--[-+=|*.:'\s]*$"


def csv_rows(path: Path):
    """Yield (line, question, answer) of the rows of a CSV file, which may have more columns than COLUMNS."""
    what = f"a CSV file with two columns: {' or '.join(map(', '.join, COLUMNS))}"
    with naming(path, what), path.open(encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        ask, say = next(names for names in COLUMNS if {*names} <= {*(reader.fieldnames or ())})
        for row in reader:
            yield reader.line_num, row[ask] or "", row[say] or ""


def read_csv(path: Path, cfg, split: str, count: int, seed: int) -> Puzzles:
    """`count` puzzles of a CSV file, or all there are; for training in random symmetric views, as often."""
    rows, task, size, marks = [*csv_rows(path)], TASKS[cfg.task], cfg.size, (cfg.marks,) * cfg.marks
    if split != "test":  # valid: one row in 16 of train.csv, by a checksum of the question
        rows = [row for row in rows if (zlib.crc32(row[1].encode()) % 16 < 1) == (split == "valid")]
    rows = random.Random(seed).sample(rows, min(count, len(rows)))
    with naming(path, "a CSV file of puzzles with their solutions"):
        x, y = (tokens([(row[0], row[k]) for row in rows], task, size, size**2) for k in (1, 2))
        for n in (~task.solved(x, y)).nonzero():
            raise UserError(f"line {rows[n][0]}: the answer does not solve the question")
    if split == "train":
        chosen, view = torch.arange(count) % len(x), task.views(count, (size, size))
        x, y = (look(cells[chosen], *view) for cells in (x, y))
    parts = [task.solve(*part, *marks) for part in zip(x.split(5000), y.split(5000), strict=True)]
    return Puzzles(*map(torch.cat, zip(*parts, strict=True)))


def boards(text: str, task: Task, size: int) -> list:
    """The boards in a text, each as its rows [(line number, characters), ..]. Empty lines part mazes."""
    found = [[]]
    if task.glyphs:  # a line holds all cells, with anything around them, or a row of them among decoration
        cell = f"[{re.escape(task.letters + ''.join(map(chr, task.alias)))}]"
        for n, line in enumerate(text.splitlines(), 1):
            cells = "".join(re.findall(cell * size**2, line)[:1] or re.findall(cell, line))
            if len(cells) == size**2:
                found += [[(n, row) for row in re.findall(cell * size, cells)], []]
            elif not re.match(COMMENT, line):
                found[-1].append((n, cells))
                if len(found[-1]) == size or len(cells) != size:
                    found.append([])
    else:  # words part mazes, too
        lines = enumerate(re.sub(r"(?m)^.*[^\W\dWXxo_]{3}.*$", "", text).splitlines(), 1)
        for _, block in itertools.groupby(lines, lambda line: line[1] > ""):
            numbers, rows = zip(*block, strict=True)
            found += [[*zip(numbers, one_a_cell(rows), strict=True)]] * any(map(str.strip, rows))
    return [rows for rows in found if rows]


def one_a_cell(rows: list) -> list:
    """Lines of a maze as strings of equal length, a character for each cell, also if drawn with +--+."""
    if "+" in rows[0] or set(rows[0].strip()) <= set("#%X-") or all(row[:4] == "    " for row in rows):
        rows = textwrap.dedent("\n".join(map(str.rstrip, rows))).split("\n")  # blanks around a rim
    wide = max(map(len, rows))  # editors cut trailing blanks; an o in a question is open
    rows = [row.ljust(wide).replace("o", " ") for row in rows]
    if len(rows) > 3 and all(("+" in row) == (k % 2 == 0) for k, row in enumerate(rows)):
        w = 1 + min(map(len, re.findall(r"(?<=\+)[^+\n]+(?=\+)", "\n".join(rows))), default=1)
        pairs = [[(row[i], row[i + 1 : i + w]) for i in range(0, wide, w)] for row in rows]
        rows = ["".join(wall + (room.strip() or room)[:1] for wall, room in row) for row in pairs]
    elif re.search("[.01]", "".join(rows)) and not any(row[1::2].strip() for row in rows):
        rows = [row[::2] for row in rows]  # a blank between every two cells
    return rows


def inside(x: torch.Tensor) -> torch.Tensor:
    """A maze [H, W] without its rim, as in training; start and goal in the rim move to the cell inside."""
    inner = x[1:-1, 1:-1].clone()
    if not inner.numel() or OPEN in torch.cat([x[0], x[-1], x[:, 0], x[:, -1]]):
        return x
    ends = torch.cat([(x == end).nonzero() - 1 for end in (START, GOAL)]).clamp(min=0)  # [2, 2]
    ends = ends.minimum(torch.tensor(inner.shape) - 1)
    inner[tuple(ends.T)] = torch.tensor([START, GOAL], dtype=inner.dtype)
    return x if ends[0].equal(ends[1]) else inner


def outside(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The answer to x [H, W] that follows from one to inside(x)."""
    if answer.shape != x.shape:
        marked = (x[1:-1, 1:-1] == OPEN) & (answer > OPEN)  # start and goal are in the rim again
        answer, inner = x.clone(), answer.to(x.dtype).masked_fill(marked, PATH)
        answer[1:-1, 1:-1] = inner
    return answer


def read_board(rows: list, task: Task, cfg) -> tuple:
    """The puzzle x and a solution [H, W] uint8, and x as a model sees it. Raises `UserError`."""
    fixed, line = task.glyphs or cfg.mixer == "mlp", rows[0][0]
    x = tokens(rows, task, cfg.size, cfg.size if fixed else min(len(rows[0][1]), 200))
    if len(rows) > 200 or (fixed and len(rows) != cfg.size):
        raise UserError(f"line {line}: {len(rows)} rows; must be {cfg.size if fixed else 'at most 200'}")
    y = task.solve(x[None]).y.view_as(x)
    if not task.solved(x[None], y[None]):
        raise UserError(f"line {line}: no solution" + "; must have an S, a G and a way" * (not task.glyphs))
    return x, y, x if fixed else inside(x)


# ------------------------------------------------------------------------------------------------------------
# §9  Figures (matplotlib is needed for nothing else)


def draw_panel(ax, title: str, xlabel: str, curves: list) -> None:
    """Curves (label, x, y, *more): `more` is x and y of thin lines, or of one star, in the same colour."""
    for k, (label, x, y, *more) in enumerate(curves):
        colour, line, mark = COLOURS[k % 7], ("-", "--", "-.", ":")[k % 4], "." * (len(x) < 30)
        hidden = "_" * (k % math.ceil(len(curves) / 8))  # the legend shows at most eight
        ax.plot(x, y, line, marker=mark, color=colour, label=hidden + label)
        if more:
            ax.plot(*more, "-" if isinstance(x, range) else "*", color=colour, lw=0.6, ms=10, mec="black")
    if "nats" in title:
        ax.set_yscale("symlog", linthresh=1e-5)
    else:
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter("{x:.0%}")
    ax.locator_params("x", nbins=6, integer=True, min_n_ticks=1)
    ax.set(title=title, xlabel=xlabel)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def draw_diagnosis(found: dict, longer: dict):
    """A figure: what each step does, what guidance would do, and what more steps or early exit do."""
    from matplotlib.figure import Figure

    exact, each, ws, panels, exits = found["exact"], found["each"], found["ws"], [], []
    steps, solved = range(1, len(exact) + 1), each["exact"][:, -1] > 0
    groups = {"all": solved | True}
    if 0 < solved.sum() < len(solved):
        groups |= {"not solved": ~solved, "solved in the end": solved}
    for name, title in {
        "exact": "puzzles solved",
        "logp": "log π(y*), nats per cell",
        "gain": "gain in log π(y*), nats, 95% interval",
        "margin": "advantage margin, nats, 95% interval",
        "margin_positive": "cells with a positive margin",
        "kl": "KL(π_c ‖ π_u), nats per cell",
    }.items():
        curves = [(of, steps, each[name][rows].mean(0)) for of, rows in groups.items()]
        curves[0] += (steps, found[f"{name}_interval"]) if "interval" in title else ()
        panels.append((title, "latent step", curves))
    of_steps = zip(steps, found["w_star"], found["guided_exact"], strict=True)
    guided = [(f"step {s}", ws, y[:-1], min(max(w, ws[0]), ws[-1]), y[-1]) for s, w, y in of_steps]
    panels.append(("solved, if one step is guided", "guidance weight w (★: w*)", guided))
    curves = [(f"{s} x {s}", range(1, len(of["exact"]) + 1), of["exact"]) for s, of in longer.items()]
    panels.append(("solved, thinking longer", "steps taken", curves))
    for rule, of in found["halt"].items():
        passes, test = [s * found["passes"] / len(exact) for s in of["steps"]], found["halting"][rule]
        exits.append((rule, passes, of["exact"], test["passes"], test["exact"]))
    panels.append(("solved, with early exit", "mean passes (★: test)", exits))
    fig = Figure(figsize=(12, 10.8), layout="constrained")
    for ax, panel in zip(fig.subplots(3, 3).flat, panels, strict=True):
        draw_panel(ax, *panel)
    title = f"{exact[0]:.1%} of {len(solved)} solved after step 1, {exact[-1]:.1%} after step {len(exact)}"
    fig.suptitle(f"{title}\n{found['summary']}", wrap=True)
    return fig


def draw_frames(task: Task, frames: list, title: str):
    """A figure of at most 12 frames (caption, tokens [H, W]); crosses: what changed since the last one."""
    from matplotlib import colors, figure, patches

    frames = [frames[i] for i in sorted({round(k * (len(frames) - 1) / 11) for k in range(12)})]
    rows, last = math.ceil(len(frames) / 4), len(task.colours) - 1
    fig = figure.Figure(figsize=(10, 2.7 * rows + 0.8), layout="constrained")
    for i, ((_, before), (caption, cells)) in enumerate(itertools.pairwise([frames[0], *frames]), 1):
        ax, (H, W), shown = fig.add_subplot(rows, 4, i), cells.shape, cells.clamp(max=last).numpy()
        ax.imshow(shown, cmap=colors.ListedColormap([*task.colours.values()]), vmin=0, vmax=last)
        for row, col in cells.nonzero().tolist() if task.glyphs else ():
            ax.text(col, row, task.glyphs[cells[row, col]], ha="center", va="center", fontsize=88 / H)
        for k in range(H + 1) if task.glyphs else ():
            height, width = BOXES[H] if "1" in task.glyphs else (H, W)
            ax.axhline(k - 0.5, color="0.2", lw=0.3 if k % height else 1.2)
            ax.axvline(k - 0.5, color="0.2", lw=0.3 if k % width else 1.2)
        row, col = (cells != before).nonzero().T + 0.28 * bool(task.glyphs) * torch.tensor([[-1], [1]])
        (cross,) = ax.plot(col, row, "X", color=COLOURS[1], mec="white", ms=66 / max(H, W), label="changed")
        ax.set(xticks=[], yticks=[])
        ax.set_title(caption, fontsize="small")
    fig.suptitle(title, wrap=True)
    keys = [patches.Patch(fc=colour, ec="0.5", label=name) for name, colour in task.colours.items()]
    fig.legend(handles=[*keys, cross], loc="outside lower center", ncols=7, frameon=False)
    return fig


# ------------------------------------------------------------------------------------------------------------
# §10  Running: options, checkpoints, devices, processes, command line


@dataclass(frozen=True)
class Config(TrainConfig):
    """All options of a run. A field's comment is its help line, and the brackets hold its range."""

    task: str = "maze"  # what to solve
    scheme: str = "dis"  # how to train: sets T, n, n-sup, target, ..
    size: int = 11  # side of the grid in cells; in a maze, every second cell is a room [4, 61]
    blanks: int = 0  # sudoku: maximum number of empty cells; 0: as many as leave one solution [0, 64]
    loops: float = 0.0  # maze: share of mazes with walls opened at random, or of random obstacles [0, 1]
    marks: bool = False  # maze: answers tell the distance from the start, modulo 3; on with --loops
    data: str = ""  # folder with train.csv and test.csv (columns question, answer) to use instead
    train_size: int = 20000  # maximum number of distinct training puzzles [1, 1e8]
    pick: int = 2  # generate this many per training puzzle and keep the longest solution [1, 100]
    test_size: int = 1000  # held-out puzzles for the final evaluation [1, 1e7]
    seed: int = 0  # of the weights, of the training puzzles and their order [0, 2147483647]
    think: int = 0  # steps per rollout at evaluation; 0: as in training [0, 10000]
    halt: str = "off"  # early-exit rule at evaluation
    tries: int = 1  # views of a puzzle to try until the checker accepts an answer; --solve: 16 [1, 1000]
    device: str = "auto"  # auto: cuda if there is one, else cpu; mps was never run
    precision: str = "auto"  # of the matrix products in the net; auto: bf16 on cuda, else fp32
    compile: bool = False  # compile the net with torch.compile: pays off in long runs
    save_minutes: float = 10.0  # minutes between checkpoints to --resume from; 0: none [0, 1e6]
    out: str = ""  # folder for the results (default: runs/<task>-<scheme>)
    figures: bool = True  # draw the figures; needs matplotlib
    eval: str = ""  # evaluate this model.pt; do not train
    solve: str = ""  # solve the puzzles in this text file, or - for standard input
    compare: str = ""  # train and compare these schemes, also with options: trm,dis,dis+noise=0+pace=8
    resume: bool = False  # continue the same command where it was stopped
    checkpoint: str = ""  # with --solve: use this model.pt, not the newest of the task in runs/
    answers: str = ""  # with --solve: write the answers to this file, one a line
    steps_shown: bool = False  # with --solve: print every step of every puzzle, not only of a single one
    seeds: int = 1  # with --compare: number of seeds to train each with [1, 1000]


CHOICES = {"task": TASKS, "scheme": SCHEMES, "mixer": MIXERS, "target": TARGETS}
CHOICES |= {"device": ("auto", "cuda", "mps", "cpu"), "precision": ("auto", "fp32", "bf16")}
CHOICES["halt"] = ("off", *HALTS, "checker")
# without any of these, a model is trained; each with the options that go only with it:
MODES = {"eval": (), "solve": ("checkpoint", "answers", "steps_shown"), "compare": ("seeds",), "resume": ()}
# options that do not affect results; that may differ when training is resumed; and at evaluation:
ELSEWHERE = (*MODES, *sum(MODES.values(), ()), "device", "out", "figures", "compile", "save_minutes", "shape")
LATER = (*ELSEWHERE, "test_size", "think", "halt", "tries")
AT_EVALUATION = (*LATER, "precision", "data", "blanks", "loops", "size")
OPTIONS = {  # {name: (help, lowest, highest value)}, from the sources of the dataclasses
    name: (text, float(low or 0), float(high or 0))
    for cls in (ModelConfig, TrainConfig, Config)
    for name, text, low, high in re.findall(
        r"^    (?!vocab|shape)(\w+): .*?  # (.*?)(?: \[(\S+), (\S+)\])?$", inspect.getsource(cls), re.M
    )
}
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
SPENT = ("passes", "params", "examples_seen", "train_seconds")
RECORD = ("exact", "margin", "by_rounds", "tries", "curve", *SPENT)  # what compare.json keeps of a run


def flag(name: str) -> str:
    """n_sup -> --n-sup."""
    return "--" + name.replace("_", "-")


def configure(**given) -> Config:
    """The configuration for a task, with the scheme applied, and all `given` on top. Raises `UserError`."""
    task = TASKS[given.get("task", "maze")]
    values = {"scheme": "dis", "marks": given.get("loops", 0) > 0, **task.defaults}
    if given.get("data"):
        with naming(path := Path(given["data"]) / "train.csv", "a CSV file with puzzles"):
            values |= {"size": math.isqrt(len(next(csv_rows(path))[1])), "pick": 1}
    cfg = Config(**values | SCHEMES[given.get("scheme", values["scheme"])] | given)
    for name, (_, low, high) in OPTIONS.items():
        if high and not low <= getattr(cfg, name) <= high:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must be from {low:g} to {high:g}")
    for name, good, allowed in (
        ("size", cfg.size in task.sizes, f"one of {', '.join(map(str, task.sizes))}"),
        ("kernel", cfg.kernel % 2, "odd"),
        ("heads", cfg.mixer != "attention" or not cfg.width % (2 * cfg.heads), "half a divisor of --width"),
        ("halt", cfg.halt != "head" or cfg.act, "used with --act, which trains the head"),
        ("halt", cfg.halt == "off" or not cfg.compare, "used without --compare"),
        ("blanks", not cfg.blanks or "blanks" in task.options, "used with --task sudoku"),
        ("loops", not cfg.loops or "loops" in task.options, "used with --task maze"),
        ("marks", not cfg.marks or "marks" in task.options, "used with --task maze"),
        ("batch_size", cfg.batch_size % RANKS == 0, f"a multiple of the {RANKS} processes"),
    ):
        if not good:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must be {allowed}")
    vocab = len(task.letters[: cfg.size + 1]) + 2 * cfg.marks + (cfg.target == "mask")
    return replace(cfg, vocab=vocab, shape=(cfg.size, cfg.size))


def seal(content: dict) -> str:
    """A checksum of nested dicts, lists, numbers and tensors."""
    numbers = lambda t: [f"{t.dtype}", *t.shape, zlib.crc32(t.cpu().numpy().tobytes())]  # noqa: E731
    return f"{zlib.crc32(json.dumps(content, default=numbers).encode()):08x}"


def write(path: Path, content) -> None:
    """Write a text, a figure, or for `read` a dict (as .pt, else JSON); a full disk leaves the old file."""
    file, beside = io.BytesIO(), path.with_name(f".{os.getpid()}-{path.name}")
    if isinstance(content, str):
        file.write(content.encode())
    elif not isinstance(content, dict):
        content.savefig(file, format="png")
    elif path.suffix == ".pt":
        torch.save(content | {"seal": seal(content)}, file)
    else:
        content = json.loads(json.dumps(content), parse_constant=str)  # JSON has no inf and nan
        file.write(json.dumps(content | {"seal": seal(content)}, indent=1).encode())
    with naming(path, "a place to write to"):
        try:
            beside.write_bytes(file.getvalue())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def read(path: Path, what: str, wanted: dict, free: tuple) -> dict:
    """What `write` wrote. `UserError` if it is damaged, or options that are not `free` not as `wanted`."""
    with naming(path, what):
        is_text = path.suffix == ".json"
        content = json.loads(path.read_text()) if is_text else torch.load(path, "cpu", weights_only=True)
        if content.pop("seal") != seal(content):
            raise UserError("damaged or edited")
        for name, saved in content["config"].items():
            if name in wanted and name not in free and saved != wanted[name]:
                raise UserError(f"{flag(name)} {saved}, not {wanted[name]}")
    return content


def load_checkpoint(path: str, **given) -> tuple[LoopedModel, dict]:
    """A model and the facts of its training; `given`: options AT_EVALUATION. Raises `UserError` if unfit."""
    content = read(Path(path), "a model.pt of this version, used as it was trained", given, AT_EVALUATION)
    here = {name: getattr(Config, name) for name in (*LATER, "precision", "data")}
    with naming(path, "used with options that fit, and with the mlp mixer at its size"):
        model = LoopedModel(configure(**content["config"] | here | given))
        model.load_state_dict(content["model"])
    return place(model), content["facts"]


def average(tensors: list) -> None:
    """Replace tensors by their means over all processes."""
    for t in tensors if RANKS > 1 else ():
        dist.all_reduce(t)
        t /= RANKS


def resized(model: LoopedModel, shape: tuple[int, int]) -> LoopedModel:
    """The same weights for puzzles of another shape (rows, columns). Not for the mlp mixer."""
    other = LoopedModel(model.cfg, shape=tuple(shape)).to(model.y0.device)
    other.load_state_dict(model.state_dict())
    other.bf16 = model.bf16
    return other


def place(model: LoopedModel) -> LoopedModel:
    """The model on its device, in its precision, maybe compiled. Raises `UserError` without the device."""
    cfg, best = model.cfg, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    name = cfg.device.replace("auto", "cuda" if best.type == "cuda" else "cpu")
    if name not in (best.type, "cpu"):
        raise UserError(f"--device {name}: not here; must be one of auto, {best.type}, cpu")
    model.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and name == "cuda")
    for net in model.nets if cfg.compile else ():
        net.compile()
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def make_puzzles(cfg: Config, count: int, split: str, seed: int = 0) -> Puzzles:
    """Puzzles of a run: from --data, or made in chunks, with progress if that takes over two seconds."""
    task, parts, began = TASKS[cfg.task], [], time.monotonic()
    if cfg.data:
        path = Path(cfg.data) / ("test.csv" if split == "test" else "train.csv")
        return read_csv(path, cfg, split, count, seed)
    pick, chunk = cfg.pick if split == "train" else 1, 240_000 // cfg.size**2
    given = {name: getattr(cfg, name) for name in task.options}
    for k, done in enumerate(range(0, count, chunk)):
        draw = (seed + 2654435761 * k) % 2**32  # torch.Generator heeds 32 bits of a seed
        some = task.make(pick * min(chunk, count - done), cfg.size, split, draw, **given)
        length = (some.x != some.y).sum(1).view(-1, pick)  # long solutions are rare and learned last
        parts.append(some[length.argmax(1) + pick * torch.arange(len(length))])
        if time.monotonic() - began > 2 and done + chunk < count:
            print(f"making {count} puzzles: {(done + chunk) / count:.0%}", file=sys.stderr, flush=True)
    return Puzzles(*map(torch.cat, zip(*parts, strict=True)))


def fit(cfg: Config, path: Path, interrupts: list) -> tuple[LoopedModel, dict, bool]:
    """A trained model, the facts of its training, and whether a checkpoint could not be saved to `path`."""
    content = read(path, "a training.pt of this command", asdict(cfg), LATER) if cfg.resume else {"curve": []}
    torch.manual_seed(cfg.seed)
    model, failed, saved = place(LoopedModel(cfg)), [], [time.monotonic()]
    torch.manual_seed(cfg.seed + RANK)
    # each of N processes trains on every Nth puzzle, with 1 / N of the batch and its own noise
    count = cfg.train_size if cfg.budget_seconds else min(cfg.train_size, cfg.examples + cfg.batch_size)
    data = make_puzzles(cfg, count, "train", cfg.seed)[RANK::RANKS].to(model.y0.device)
    valid = make_puzzles(cfg, max(1, min(200, cfg.test_size // 5)), "valid").to(model.y0.device)
    facts = {"curve": content["curve"], "longest": (data.x != data.y).sum(1).max().item()}

    def watch(run: SimpleNamespace, loss: float | None) -> bool:
        """Shows progress, saves, and ends training after Ctrl-C or a lost loss."""
        if loss is not None:
            progress(run, loss, cfg, valid, facts)
        due = cfg.save_minutes and time.monotonic() - saved[-1] > 60 * cfg.save_minutes
        if not RANK and (due or interrupts):
            saved.append(time.monotonic())
            state = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(run).items()}
            more = {"config": asdict(cfg), "curve": facts["curve"], "random": torch.get_rng_state()}
            try:
                write(path, more | {"run": state})
            except UserError as e:
                print(f"\nlrpi: {e}; training goes on", file=sys.stderr)
                failed.append(path)
        ends = torch.tensor([run.share, bool(interrupts)], dtype=torch.double)
        average([ends])  # all processes end together
        run.share, stop = ends.tolist()
        return stop > 0

    def resume(run: SimpleNamespace) -> None:
        """Brings back what `watch` saved: on a CPU, training goes on as if it had never stopped."""
        torch.set_rng_state(torch.get_rng_state() if RANK else content["random"])
        for name, new in (content["run"] | {"queue": run.queue}).items():  # each process has its own
            if hasattr(old := getattr(run, name), "load_state_dict"):
                old.load_state_dict(new)
            elif isinstance(old, list):
                old[:] = (t.to(old[0].device) for t in new)
            else:
                setattr(run, name, new.to(old.device) if torch.is_tensor(new) else new)

    local = replace(cfg, batch_size=cfg.batch_size // RANKS, examples=-(-cfg.examples // RANKS))
    model = place(train(model, data, local, watch, average, resume if cfg.resume else None))
    return model, facts, bool(failed)


def progress(run: SimpleNamespace, loss: float, cfg: Config, valid: Puzzles, facts: dict) -> None:
    """Update the facts of a training; print a line of progress ten times, on a terminal all the time."""
    if not (math.isfinite(loss) and all(p.isfinite().all() for p in run.model.parameters())):
        raise UserError(f"the loss is not finite at update {run.updates}; --lr {cfg.lr} may be too high")
    share, seen = min(1, run.share), RANKS * run.seen.item()
    tenth = int(10 * run.share + 1e-6) > len(facts["curve"])
    now = {"updates": run.updates, "examples_seen": seen, "train_seconds": run.seconds}
    facts |= now
    if tenth:
        solved = TASKS[cfg.task].solved(valid.x, answer(run.averaged.module, valid.x)[0])
        facts["curve"].append(now | {"exact": solved.cpu().double().mean().item()})
    if tenth or sys.stdout.isatty():
        known = f"validation solved {facts['curve'][-1]['exact']:.1%}  " if facts["curve"] else ""
        speed = f"{seen / run.seconds:.0f} examples/s  {run.seconds / share - run.seconds:.0f} s left"
        line = f"{share:4.0%}  update {run.updates}  loss {loss:.4f}  {known}{speed}"
        print(line, end="\n" if tenth else "\r", flush=True)


def settled(model: LoopedModel, step: Step) -> torch.Tensor:
    """Where --solve and --tries stop thinking: the checker accepts the answer, or the step changed little."""
    asked, said = (cells.unflatten(1, model.cfg.shape) for cells in (step.x, step.logits_c.argmax(-1)))
    return TASKS[model.cfg.task].solved(asked, said) | stopping("change", 0.01)(model, step)


def attempts(model: LoopedModel, x: torch.Tensor, steps, tries: int) -> tuple:
    """Propose and verify: solve x [N, H, W] (on the CPU) in view after view, until an answer is accepted."""
    task, model, device, passes = TASKS[model.cfg.task], resized(model, x.shape[1:]), model.y0.device, []
    generator, start = torch.Generator().manual_seed(0), torch.stack([model.y0, model.z0]).cpu()
    views = [t[:, t[0].argsort()] for t in task.views(tries, tuple(x.shape[1:]), generator)]  # first as it is
    said, accepted = x.flatten(1).clone(), torch.zeros(len(x), dtype=torch.long)
    for view in zip(*views, strict=True):
        rows = (accepted == 0).nonzero()[:, 0]
        cell, new = (t.expand(len(rows), -1) for t in view)
        if (torch.cat(views, 1)[: len(passes)] == torch.cat(view)).all(1).any():  # seen: start elsewhere
            noise = torch.randn(2, cell.shape[1], start.shape[1], generator=generator)
            model.y0, model.z0 = (start[:, None] + model.cfg.noise * noise).to(device)
        asked = look(x[rows].flatten(1), cell, new).to(device)
        found, taken = answer(model, asked, steps, settled)
        said[rows] = look(found.cpu(), cell.argsort(1), new.argsort(1)).clamp(max=len(task.letters) - 1)
        passes.append(taken.sum().item() * model.cfg.T * (model.cfg.n + 1))
        accepted[rows[task.solved(x[rows], said[rows].view_as(x[rows]))]] = len(passes)
    return said.view_as(x), accepted, passes  # answers, the try that was accepted (0: none), of each try


def frames_of(model: LoopedModel, x: torch.Tensor, asked: torch.Tensor, steps) -> list:
    """[(caption, cells [H, W]), ..]: the puzzle x, which the model sees as `asked`, and its answers to it."""
    frames, task = [("puzzle", x)], TASKS[model.cfg.task]
    seen = asked.reshape(1, -1).to(model.y0.device)
    for s, step in enumerate(rollout(resized(model, asked.shape), seen, steps, settled), 1):
        said = step.logits_c.argmax(-1).clamp(max=len(task.letters) - 1)  # marks are shown as the path
        now = outside(x, said.view_as(asked).to(x))
        solved = "solved" if task.solved(x[None], now[None]) else "not solved"
        frames.append((f"step {s}: {solved}, {(now != frames[-1][1]).sum()} changed", now))
    return frames


def print_results(found: dict, longer: dict) -> None:
    """What `diagnose` found, a line for each step and each exit rule, and the thinking of each size."""
    print("\nstep solved  cells log pi(y*)         gain, 95%   margin    > 0 KL(c||u)    w*  at w*  verdict")
    line = "{:4} {:6.1%} {:6.1%} {:10.5f} {:8.5f} {:8.5f} {:8.5f} {:6.1%} {:8.5f} {:5.2f} {:6.1%}  {}"
    names = ("exact", "cells", "logp", "gain_interval", "margin", "margin_positive", "kl", "w_star")
    for k, verdict in enumerate(found["verdict"]):
        exact, cells, logp, gain, *more = (found[name][k] for name in names)
        words = verdict if verdict == "dead" else f"{verdict}, {found['step_size'][k]}"
        print(line.format(k + 1, exact, cells, logp, *gain, *more, found["guided_exact"][k][-1], words))
    print(f"\n{found['summary']}")
    if cut := found.get("cut"):
        print(f"with as many steps as improve, {cut['won']} more puzzles are solved, {cut['lost']} fewer")
    print("\nexit by   solved  passes   (thresholds from validation puzzles)")
    for rule, of in found["halting"].items():
        print(f"{rule:8}  {of['exact']:6.1%}  {of['passes']:6.1f}")
    steps = len(next(iter(longer.values()))["exact"])
    shown = sorted({round(steps * k / 12) for k in range(1, 13)} - {0})
    print("\nsolved after steps", *(f"{s:6}" for s in shown))
    for size, of in longer.items():
        print(f"{f'{size} x {size}':18}", *(f"{of['exact'][s - 1]:6.1%}" for s in shown))


def explain(model: LoopedModel, test: Puzzles, steps, out: Path) -> dict:
    """What `diagnose` finds, also on larger puzzles ("thinking"); printed and drawn."""
    cfg, device, task, longer = model.cfg, model.y0.device, TASKS[model.cfg.task], {}
    valid = make_puzzles(cfg, min(cfg.test_size, max(20, 60_000 // cfg.size**2)), "valid", 1).to(device)
    print(f"evaluating on {len(test)} test and {len(valid)} validation puzzles", flush=True)
    found = diagnose(model, test, valid, task.solved, steps)
    larger = () if cfg.mixer == "mlp" or cfg.data else (21, 31)
    for s in (cfg.size, *(s for s in larger if cfg.size < s and s in task.sizes)):
        count = max(5, min(24_000, test.x.numel()) // s**2)
        some, times = make_puzzles(replace(cfg, size=s), count, "test"), range(1, 4 * cfg.n_sup + 1)
        longer[s] = evaluate(resized(model, (s, s)), some.to(device), task.solved, times, scores={})
        longer[s]["puzzles"] = len(some)
        del longer[s]["each"]
    print_results(found, longer)
    if cfg.figures:
        write(out / "diagnosis.png", draw_diagnosis(found, longer))
        work = test.order.amax(1) + (test.x != test.y).sum(1)  # rounds of the solver, cells to find
        hard = test[work.argsort(stable=True)[-max(1, len(test) // 100)]]
        x, y = (t.view(cfg.shape).cpu() for t in (hard.x, hard.y))
        frames = [*frames_of(model, x, x, steps), ("solution", y)]
        title = f"A held-out {cfg.task} from the hardest 1%: {frames[-2][0]}"
        write(out / "solution.png", draw_frames(task, frames, title))
    return found | {"thinking": longer}


def report(model: LoopedModel, facts: dict, out: Path, began: float) -> None:
    """Evaluate a model, and unless it is one of --compare, `explain` it; print and write what was found."""
    cfg, task = model.cfg, TASKS[model.cfg.task]
    test = make_puzzles(cfg, cfg.test_size, "test").to(model.y0.device)
    steps = range(1, (cfg.think or cfg.n_sup) + 1)
    found = evaluate(model, test, task.solved, steps) if cfg.compare else explain(model, test, steps, out)
    exact, passes, solved = found["exact"][-1], found["passes"], found.pop("each")["exact"][:, -1]
    if cfg.halt != "off":
        exact, passes = found["halting"][cfg.halt].values()
    if cfg.tries > 1:
        _, accepted, spent = attempts(model, grid(test.x.cpu()), steps, cfg.tries)
        print("\ntries   solved  passes (mean)")
        found["tries"] = {}  # {number of tries: (share solved, mean passes)}
        for k in sorted({2**i for i in range(10) if 2**i < cfg.tries} | {cfg.tries}):
            share = ((accepted > 0) & (accepted <= k)).double().mean().item()
            found["tries"][k] = share, sum(spent[:k]) / len(test)
            print(f"{k:5}  {share:7.1%}  {found['tries'][k][1]:13.1f}")
    rounds = test.order.amax(1).cpu()  # that the solver needs
    each = ((r, solved[rounds == r]) for r in rounds.unique().tolist())
    found["by_rounds"] = {r: (some.mean().item(), len(some)) for r, some in each}  # share solved, puzzles
    params = sum(p.numel() for p in model.parameters())
    how = f"{round(passes, 1):g} forward passes each" + f" (--halt {cfg.halt}, mean)" * (cfg.halt != "off")
    print(f"\n{exact:.1%} of {len(test)} held-out puzzles solved, with {how}, by {params:,} parameters")
    if found["label"][-1] != found["exact"][-1]:
        print(f"{found['label'][-1]:.1%} are equal to the label; other solutions or marks are right as well")
    metrics = {name: getattr(cfg, name) for name in ("task", "scheme", "size", "seed")} | {"params": params}
    metrics |= {"device": str(model.y0.device), "torch": torch.__version__, **facts, **found}
    metrics |= {"config": asdict(cfg), "total_seconds": round(time.perf_counter() - began, 2)}
    write(out / "metrics.json", metrics)
    print(f"{metrics['total_seconds']:.0f} s in all; results are in {out}")


def interval_of_few(values: torch.Tensor) -> torch.Tensor:
    """Means of values [A, K] with Student's 95% interval [A, 3]: mean, low, high. Of one value: no bounds."""
    mean, K, reach = values.mean(1), values.shape[1], math.inf
    if K > 1:  # Student's T is sqrt(K - 1) tan(angle), and the density of the angle goes as its cos^(K - 2)
        angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.double)
        share = angle.cos().pow(K - 2).cumsum(0)
        t = math.sqrt(K - 1) * angle[(share < 0.95 * share[-1]).sum()].tan()
        reach = t / math.sqrt(K) * values.std(1)
    return torch.stack([mean, mean - reach, mean + reach], 1)


def compare(given: dict, interrupts: list) -> int:
    """Run all that --compare names, unless the results are there; print and write a table. The exit code."""
    arms, found = {}, {}
    for name in given["compare"].split(","):
        own = parse([f"--{part}" for part in f"scheme={name}".split("+")])
        if (shared := own.keys() & {"task", "seed", *AT_EVALUATION}) or name in arms:
            raise UserError(f"--compare {name}: must not stand twice, or have {[*map(flag, shared)]}")
        arms[name] = configure(**given | own)
    last = arms[name]
    folder = prepare_folder(last.out or f"runs/{last.task}-compare")
    for k, (name, cfg) in itertools.product(range(last.seeds), arms.items()):
        out = folder / f"{name}-{cfg.seed + k}"
        halfway, path = (out / "training.pt").exists(), out / "metrics.json"
        cfg = replace(cfg, seed=cfg.seed + k, out=str(out), resume=halfway)
        if (halfway or not path.exists()) and (code := learn(cfg, interrupts)):
            return code
        run = read(path, "a run of this command, or be removed", asdict(cfg), ELSEWHERE)
        run["curve"] = [at["exact"] for at in run["curve"]]
        found.setdefault(name, []).append({key: run[key] for key in RECORD if key in run})
    exact = torch.tensor([[run["exact"][-1] for run in runs] for runs in found.values()]).double()
    gaps = interval_of_few(exact - exact[0]).tolist()  # [arms][3], seed by seed, from the first arm
    print("\nsolved, least to most  less the first, 95%      passes     params  examples  seconds  scheme")
    line = "{:6.1%} {:6.1%} {:6.1%}  {:+6.1%} {:+6.1%} {:+6.1%}   {:6}  {:9,}  {:8}  {:7.0f}  {}"
    for (name, runs), values, gap in zip(found.items(), exact, gaps, strict=True):
        medians = [sorted(run[key] for run in runs)[len(runs) // 2] for key in SPENT]
        print(line.format(values.mean(), values.min(), values.max(), *gap, *medians, name))
    if not RANK:
        gaps = dict(zip(found, gaps, strict=True))
        content = {"options": given, "torch": torch.__version__, "gaps": gaps, "arms": found}
        write(folder / "compare.json", content)
    return 0


def solve(given: dict) -> int:
    """Solve and check the puzzles of a text. The exit code: 0; 1 if some are not solved; 2 for bad input."""
    if (source := given["solve"]) == given.get("answers"):
        raise UserError(f"--answers {source}: must be another file than that of --solve")
    saved = sorted(Path("runs").glob(f"{given.get('task', 'maze')}-*/model.pt"), key=os.path.getmtime)
    if not (path := given.get("checkpoint", saved and str(saved[-1]))):
        raise UserError(f"--solve {source}: no model in runs/; must be trained, or named by --checkpoint")
    model, facts = load_checkpoint(path, **{"tries": 16} | given)
    cfg, task, puzzles = model.cfg, TASKS[model.cfg.task], []
    steps = range(1, (cfg.think or cfg.n_sup * (1 if cfg.step_index else 8)) + 1)
    with naming(source, "a text file with puzzles, or -"):
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8-sig")
        if not (every := boards(text, task, cfg.size)):
            raise UserError("no puzzles")
    answers = {rows[0][0]: "" for rows in every}  # of the lines where puzzles begin
    for rows in every:
        try:
            puzzles.append((rows[0][0], *read_board(rows, task, cfg)))
        except UserError as e:
            print(f"lrpi: {source}, {e}", file=sys.stderr)
    for _, block in itertools.groupby(puzzles, lambda puzzle: puzzle[-1].shape):
        block = [*block]
        found = attempts(model, torch.stack([asked for *_, asked in block]), steps, cfg.tries)[:2]
        for (line, x, y, asked), said, tried in zip(block, *found, strict=True):
            said = outside(x, said)
            good, wrong, to_find = task.solved(x[None], said[None]).item(), (said != y).sum(), (x != y).sum()
            words = f"solved (checked), try {tried}" if good else f"not solved: {wrong} cells wrong"
            if good and (detour := (said != x).sum() - to_find):
                words += f"; {detour} cells longer than a shortest path"
            if to_find > (most := facts["longest"]):
                words += f"; {to_find} cells to find, at most {most} in training"
            flat = x.view(1, -1), y.view(1, -1)
            if cfg.task == "sudoku" and (other_solutions(*flat) != flat[1]).any():
                words += "; several solutions"
            if cfg.steps_shown or len(every) == 1:
                frames = frames_of(model, x, asked, steps)
                for caption, now in [*frames, (words, said)]:
                    drawn = ("".join(task.letters[t] for t in row) for row in now.tolist())
                    print(f"\n{caption}", *drawn, sep="\n")
                if cfg.out and cfg.figures:
                    picture = prepare_folder(cfg.out) / f"line-{line}.png"
                    write(picture, draw_frames(task, frames, words))
                    print(f"wrote {picture}")
            print(f"line {line}: {words}", flush=True)
            answers[line] = "".join(task.letters[t] for t in said.flatten()) * good
    print(f"{sum(map(bool, answers.values()))} of {len(every)} solved by {path}")
    if cfg.answers:
        write(Path(cfg.answers), "\n".join([*answers.values(), ""]))
    return 2 if len(puzzles) < len(every) else int(not all(answers.values()))


def learn(cfg: Config, interrupts: list) -> int:
    """Train a model, write it, and report on it. The exit code."""
    out, began = Path(cfg.out or f"runs/{cfg.task}-{cfg.scheme}"), time.perf_counter()
    path = out / "training.pt"
    if not cfg.resume:
        prepare_folder(out)
    print(f"{cfg.task} {cfg.size}x{cfg.size}, scheme {cfg.scheme}, seed {cfg.seed}: see {out}", flush=True)
    (model, facts, failed), stopped = fit(cfg, path, interrupts), [*interrupts]  # after it, all is trained
    if not RANK:
        write(out / "model.pt", {"config": asdict(cfg), "model": model.state_dict(), "facts": facts})
        report(model, facts, out, began)
    average([torch.zeros(1)])  # the others wait
    if stopped:
        print("\nlrpi: interrupted, saved and evaluated; --resume continues training", file=sys.stderr)
    elif path.is_file():
        path.unlink(missing_ok=True)
    return 130 if interrupts else 2 * failed


def prepare_folder(path: str | Path) -> Path:
    """The folder `path`, made if need be. Raises `UserError` if nothing can be written there."""
    with naming(f"--out {path}", "a folder that can be written to"):
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)


def parse(argv) -> dict:
    """The options on the command line that were given. Raises `UserError`."""

    def fail(message):  # without the usage of sixty options before it
        raise UserError(message.removeprefix("argument "))

    about = {"description": __doc__.split("\n")[0], "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("lrpi.py", allow_abbrev=False, **about)
    parser.error, modes = fail, parser.add_mutually_exclusive_group()
    for name, (text, low, high) in OPTIONS.items():
        default, choices = getattr(Config, name), CHOICES.get(name)
        how = {"type": type(default), "choices": choices, "metavar": "VALUE"}
        how = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else how
        how |= {"nargs": "?", "const": "kl"} if name == "halt" else {}
        text += f": {', '.join(choices)}" if choices else f", from {low:g} to {high:g}" * (high > 0)
        group = modes if name in MODES else parser
        group.add_argument(flag(name), help=f"{text} [{default}]".replace("%", "%%"), **how)
    return vars(parser.parse_args(argv))


def run(given: dict, interrupts: list) -> int:
    """Do what one of the MODES asks for; without any, train a model and report on it. The exit code."""
    for name, value in given.items():
        if value == "":
            raise UserError(f"{flag(name)} '': must not be empty")
        if "solve" in given and name in ("size", "data", "halt", "test_size"):
            raise UserError(f"{flag(name)} {value}: must go without --solve")
        for mode, only in MODES.items():
            if name in only and mode not in given:
                raise UserError(f"{flag(name)} {value}: must go with {flag(mode)}")
    if given.get("figures", True):
        with naming("--figures", "used where matplotlib is installed, or be --no-figures"):
            import matplotlib  # noqa: F401  now, and not only after the training
    if "solve" in given:
        return solve(given)
    if "compare" in given:
        return compare(given, interrupts)
    if "eval" not in given:
        return learn(configure(**given), interrupts)
    began, (model, facts) = time.perf_counter(), load_checkpoint(given["eval"], **given)
    report(model, facts, prepare_folder(model.cfg.out or Path(given["eval"]).parent / "eval"), began)
    return 0


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0, 2 after bad input or a failure, 130 after Ctrl-C."""
    interrupts = []
    for name in ("stdin", "stdout", "stderr"):  # None if closed by the shell: <&- or >&-
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))

    def interrupt(*_):  # the first Ctrl-C ends training in good order, the second ends the program
        if interrupts:
            sys.exit(130)
        interrupts.append(True)
        os.write(2, b"\nlrpi: interrupted, finishing up; Ctrl-C again to quit at once\n")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        if RANKS > 1:  # torchrun started several of us; all but rank 0 are silent
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if RANK else sys.stdout):
            return run(parse(argv), interrupts)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as e:
        message = e.args[0]
    except OSError as e:
        message = f"standard output: {e.strerror}; must be a place to write to"
    finally:
        signal.signal(signal.SIGINT, before)
        if RANKS > 1 and dist.is_initialized():
            gc.collect()  # what still holds the group would let its threads outlive Python
            dist.destroy_process_group()
    if not RANK:
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        print("lrpi:", line if len(line) < 450 else f"{line[:220]} .. {line[-220:]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
