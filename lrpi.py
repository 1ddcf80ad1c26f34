"""lrpi: latent reasoning is policy improvement, in one file.

THE QUESTION.  A very small network that loops over its own latent state solves puzzles at which large
one-pass networks fail. "It loops, so it is deep" is half an answer: many loop steps change nothing. Which
ones do the work?

THE IDEA, after "Your Latent Reasoning is Secretly Policy Improvement Operator" (arXiv 2511.16886):
  1. The model keeps an answer y and a scratchpad z, and refines both step by step, looking at the puzzle x.
  2. A readout turns y into logits over tokens for every cell. Those before a step, l_u, make the reference
     policy pi_u = softmax(l_u); those after it, l_c, the conditional policy pi_c. Let delta = l_c - l_u.
  3. One can go further along delta, or less far: l_w = l_u + w delta. That is classifier-free guidance, known
     from diffusion models; w = 1 is the step as the model took it.
  4. Read pi_c as pi_u conditioned on success, o = 1. By Bayes' rule p(o = 1 | a) ∝ pi_c(a) / pi_u(a), so
     A(a) = log pi_c(a) - log pi_u(a) scores token a as an advantage does in reinforcement learning, and the
     step is a step of policy improvement. Where A of the true token exceeds the mean of A under the guided
     policy, more of the step helps; where it falls short, less of it would. The difference is the *advantage
     margin*. Near 0, the step is dead compute if it did not move the policy, and of the right size if it did.
  5. The paper therefore gives every step a target of its own, closer to the solution than the last: Deep
     Improvement Supervision (DIS). It reports that 18 forward passes then do what takes the Tiny Recursive
     Model (TRM, arXiv 2510.04871) 336. How much of that holds for three small tasks stands in the README.
  6. So a trained model can be diagnosed, step by step: does it improve, is it dead, does it harm (§7)? Dead
     steps can be cut, thinking can stop where a puzzle's steps go dead, and go on where they do not.

THE LETTERS
  x, y, z    the puzzle, the current answer, the scratchpad, embedded: [B, L, D]
  y*, y†_s   the solution, and the target of step s: `y_star`, `y_dagger`, tokens [B, L]; Φ makes y† from y*
  net        the shared network; applying it once to one batch is a "forward pass"
  cycle      n times z <- net(x + y + z), then once y <- net(y + z)
  step s     T cycles, of which the last carries gradient; a rollout is N_sup steps: N_sup T (n + 1) passes
  w, delta   the guidance weight, and the residual that it multiplies
  B L D V S  batch, cells, width, vocabulary, steps; N puzzles of a data set; H W rows and columns of a grid

THE COMMANDS
  python lrpi.py --task maze                    train, evaluate, draw; all of it lands in runs/maze-dis/
  python lrpi.py --task sudoku                  or nqueens: the same for other puzzles
  python lrpi.py --scheme trm                   the same with TRM's recursion, targets and halting
  python lrpi.py --compare trm,dis,final        train by each scheme and compare; --seeds 3: thrice each
  python lrpi.py --eval runs/maze-dis/model.pt  diagnose a checkpoint again; --halt: stop early; --think 24:
                                                take 24 steps; --size 21: on larger mazes
  python lrpi.py --solve FILE                   solve puzzles of your own, as text, with a trained model
  python lrpi.py --task arc --data DIR          ARC-AGI; also for sudoku and maze: train.csv and test.csv
  python lrpi.py --preset paper-medium          the sizes and rates of a published model; also: trm
  python lrpi.py --resume                       go on where the same command was stopped
  python lrpi.py --bench                        how fast it is here; see --device, --precision, --compile
  torchrun --nproc_per_node=2 lrpi.py           the same in two processes; goes with all of these
  python lrpi.py --help                         every option, its meaning and its range

WHAT DEVIATES FROM THE PAPER, and why (figures in the README)
  - The default token mixer is a local convolution: on a CPU it learns mazes far faster than attention does.
    TRM's own block is --mixer attention (or mlp) --layers 2 --ffn 0; its widths are larger, too.
  - The default targets are a solver's edits, which the paper proposes and does not test: of a maze, what
    dead-end filling has after 8, 16, .. rounds. Training then uses more than puzzles and solutions. The
    paper's way, a share of the solution, is --target reveal --step-index. Its schedule is concave here,
    (s / N_sup)^0.3: which cells get revealed cannot be predicted, so below one half the best guess at them is
    the bare puzzle.
  - Scheme `dis-margin` adds to the loss what the advantage margin of a step lacks to 0 (--hinge): what the
    paper proves of good steps, made into a demand. The default for sudoku and queens, where it beats `dis`.
  - No step index: all steps are the same map, so that more of them than in training can be taken. Noise is
    added to the state before every training step, so that the map leads back to where it belongs.
  - In scheme `dis` the y update sees x, too ("recall"): y <- net(x + role + y + z). The `trm` schemes do not.
  - All steps weigh the same in the loss (in the paper, later ones weigh more), a softmax cross-entropy (TRM:
    stablemax), and the last answer is not fed back as input (--linear and --feedback do as the paper). Muon
    trains the matrices inside the blocks and AdamW all else, and weights are averaged. --preset undoes these.
  - Training takes the longer of every two mazes made (--pick): long solutions are rare, and learnt last.
"""

import argparse
import copy
import csv
import functools
import gc
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# ------------------------------------------------------------------------------------------------------------
# §1  Configuration: every number that a run depends on, and the training schemes as data


class UserError(Exception):
    """Something given cannot be used. The message is one line: what, its value, and what is allowed."""


def option(default, help, low=None, high=None, odd=False, choices=None, bare=None):
    """A field of `Config`: its help line, and the values it may take (`low` and `high` included).

    `bare` makes the value that the flag alone stands for.
    """
    limits = {"low": low, "high": high, "odd": odd, "choices": choices, "bare": bare}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    """What defines a run. The defaults are scheme `dis`.

    `Config(scheme="trm")` would change the label only; the values come with `configure(scheme="trm")`.
    Raises `UserError` for any value out of range, so that no run can start with one.
    """

    task: str = option("maze", "what to solve", choices=lambda: TASKS)
    scheme: str = option("dis", "how to train: sets T, n, n-sup, target, ...", choices=lambda: SCHEMES)
    preset: str = option("none", "sizes and rates of published models", choices=lambda: ("none", *PRESETS))
    size: int = option(11, "side of the grid in cells; of a maze, every second one is a room", 4, 61)
    blanks: int = option(0, "sudoku: empty cells at most, up to 2/3 of all; 0: half of all", 0, 54)
    data: str = option("", "folder with puzzles: train.csv and test.csv, or ARC's *challenges.json")
    views: int = option(1000, "with --data: symmetric views of a puzzle to train on; 1: as it is", 1, 10**6)
    votes: int = option(0, "arc: views of a test grid that vote on the answer; 0: all", 0, 10**6)
    identifiers: int = option(0, "learned puzzle embeddings; arc: one for each view of a task", 0, 10**8)
    seed: int = option(0, "seed of the weights, of the training puzzles and their order", 0, 2**31)
    device: str = option("auto", "auto: the first there is of the others", choices=lambda: ("auto", *DEVICES))
    precision: str = option(
        "auto", "of the matrix products in the net; auto: bf16 on cuda, else fp32", choices=lambda: PRECISIONS
    )
    compile: bool = option(False, "compile the net (torch.compile): pays off in long runs")
    deterministic: bool = option(False, "on a GPU, too, the same result from the same seed, if slower")
    save_minutes: float = option(10.0, "minutes between checkpoints to --resume from; 0: none", 0.0, 1e6)
    out: str = option("", "folder for the results (default: runs/<task>-<scheme>)")
    figures: bool = option(True, "draw the figures, which needs matplotlib")
    think: int = option(0, "steps in a rollout when evaluating; 0: as many as in training, n-sup", 0, 10_000)
    halt: str = option(
        "off",
        "when evaluating, stop thinking about a puzzle whose step looks dead by this rule",
        choices=lambda: ("off", *HALTS),
        bare=lambda: HALT_DEFAULT,
    )

    T: int = option(1, "cycles in a step; only the last one carries gradient", 1, 100)
    n: int = option(2, "updates of z in a cycle, before the one of y", 1, 100)
    n_sup: int = option(6, "steps in a rollout, each with a target", 1, 1000)
    target: str = option("edits", "what the target of each step is", choices=lambda: TARGETS)
    pace: int = option(8, "target edits: rounds of the solver in a step", 1, 10_000)
    power: float = option(
        0.3, "targets reveal, mask, replace: step s has the share (s / n-sup)^power of y*", 0.01, 10.0
    )
    trajectories: str = option("", "target file: the .npz with puzzles and the target of each step")
    linear: bool = option(False, "weigh step s in the loss by s, and not all the same")
    hinge: float = option(0.0, "weight in the loss of a negative advantage margin", 0.0, 1000.0)
    awr: float = option(
        0.0, "weigh cells in the loss by exp(A / this), 20 at most; 0: all the same", 0.0, 1e6
    )
    act: bool = option(False, "learn when to stop (ACT): solved puzzles leave the training batch")

    mixer: str = option("conv", "how cells exchange information", choices=lambda: MIXERS)
    width: int = option(64, "D, channels per cell", 4, 8192)
    layers: int = option(1, "blocks in the shared net", 1, 100)
    ffn: int = option(128, "inner width of SwiGLU; 0: as in TRM, 8 D / 3 rounded up to 256s", 0, 65536)
    kernel: int = option(7, "side of the conv mixer's window", 1, 31, odd=True)
    heads: int = option(4, "heads of the attention mixer; width / heads must be even", 1, 256)
    recall: bool = option(True, "let the y update see x too")
    noise: float = option(0.2, "std of what is added to y and z before each step in training", 0.0, 10.0)
    step_index: bool = option(False, "tell the model which step it is at")
    feedback: bool = option(False, "from step 2 on, show the model its last answer in place of the puzzle")
    stablemax: bool = option(False, "make policies by TRM's stablemax and not by softmax")
    untied: bool = option(False, "weights of its own for every forward pass of a step")

    train_size: int = option(20000, "puzzles to train on, at most: no more are made than get seen", 1, 10**8)
    pick: int = option(2, "puzzles made for each one to train on: the one with the longest solution", 1, 100)
    test_size: int = option(1000, "held-out puzzles for the final evaluation", 1, 10**7)
    examples: int = option(12000, "puzzles to train on, counting repetitions", 1, 10**10)
    budget_seconds: float = option(0.0, "train for so long, not for so many examples; 0: no", 0.0, 1e9)
    batch_size: int = option(12, "puzzles in a training batch", 1, 10**6)
    optimizer: str = option(
        "muon", "muon: of matrices, AdamW of all else; others: of all", choices=lambda: OPTIMIZERS
    )
    lr: float = option(0.01, "peak learning rate, with muon of embeddings, convolutions, readout", 0.0)
    muon_lr: float = option(0.01, "peak learning rate of Muon: the matrices inside the blocks", 0.0)
    embedding_lr: float = option(0.01, "peak learning rate of SignSGD: puzzle embeddings", 0.0)
    weight_decay: float = option(0.0, "decoupled weight decay", 0.0, 10.0)
    warmup: int = option(100, "steps of linear warm-up of the learning rates", 0, 10**9)
    cosine: bool = option(True, "let the learning rates fall to 0 along a cosine")
    ema: float = option(0.998, "decay of the averaged weights, which are kept; 0: none", 0.0, 0.999999)

    def __post_init__(self):
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            good = type(value) in ((int, float) if f.type is float else (f.type,))
            good = good and (not m["choices"] or value in m["choices"]())
            good = good and (m["low"] is None or m["low"] <= value < math.inf)
            good = good and (m["high"] is None or value <= m["high"]) and not (m["odd"] and value % 2 == 0)
            if not good:
                raise UserError(f"{flag(f.name)} {value}: must be {allowed(f)}")
        if bool(self.data) > bool(TASKS[self.task].peek) or self.task == "arc" and not self.data:
            raise UserError(
                f"--data {self.data or 'DIR'}: must go with --task maze, sudoku or arc; arc needs it"
            )
        if bool(self.identifiers) != (self.task == "arc"):
            raise UserError(f"--identifiers {self.identifiers}: must be left to --task arc")
        if self.data and self.pick > 1:
            raise UserError(f"--pick {self.pick}: must be 1 with --data")
        if self.task == "arc" and self.target == "edits":
            raise UserError("--target edits: arc has no solver; must be one of final, reveal, mask, replace")
        if self.size not in TASKS[self.task].sizes and not (self.data and self.task == "maze"):
            sizes = [*TASKS[self.task].sizes]
            few = sizes if len(sizes) < 8 else [*sizes[:3], "..", sizes[-1]]
            raise UserError(f"--size {self.size}: for {self.task} must be one of {', '.join(map(str, few))}")
        if self.task == "sudoku" and self.blanks > (most := 2 * self.size**2 // 3):
            raise UserError(f"--blanks {self.blanks}: for --size {self.size} must be from 0 to {most}")
        if (self.target == "file") != bool(self.trajectories):
            raise UserError("--trajectories FILE and --target file: must be given together")
        if self.halt == "head" and not self.act:
            raise UserError(
                "--halt head: must go with --act, which trains the halting head; or be another rule"
            )
        if self.mixer == "attention" and self.width % (2 * self.heads):
            raise UserError(f"--heads {self.heads}: twice that must divide --width, {self.width}")

    @property
    def thinks(self) -> range:
        """The steps of a rollout when evaluating."""
        return range(1, (self.think or self.n_sup) + 1)


def allowed(f) -> str:
    """In words, the values that the field `f` of `Config` accepts."""
    m = f.metadata
    if m["choices"]:
        return "one of " + ", ".join(m["choices"]())
    kind = {bool: "on or off", str: "text", int: "a whole number", float: "a number"}[f.type]
    bounds = [f"{word} {m[end]}" for word, end in (("from", "low"), ("to", "high")) if m[end] is not None]
    return " ".join(["an odd number" if m["odd"] else kind, *bounds])


def flag(name: str) -> str:
    """The command-line flag of a field of `Config`: n_sup -> --n-sup."""
    return "--" + name.replace("_", "-")


def configure(**given) -> Config:
    """The configuration for a task (`maze`), with a preset (none) and a scheme, and all `given` on top."""
    task = given.get("task", Config.task)
    defaults = TASKS[task].defaults if task in TASKS else {}
    defaults = {**defaults, **PRESETS.get(given.get("preset"), {})}
    scheme = given.get("scheme", defaults.get("scheme"))
    if given.get("data") and task in TASKS and (peek := TASKS[task].peek):
        defaults = defaults | peek(given["data"], given.get("views", defaults.get("views", Config.views)))
    return Config(**{**defaults, **SCHEMES.get(scheme, {}), **given})


PRECISIONS = ("auto", "fp32", "tf32", "bf16")
TRM = {"target": "final", "recall": False, "noise": 0.0, "act": True, "ema": 0.999}
SCHEMES = {  # what each changes of the task's defaults                forward passes: n_sup T (n + 1)
    "dis": {},  #                                                                       6 * 1 * 3 = 18
    "dis-margin": {"hinge": 1.0},  #                                                    6 * 1 * 3 = 18
    "final": {"target": "final"},  #                                                    6 * 1 * 3 = 18
    "one-pass": {"target": "final", "n": 17, "n_sup": 1, "untied": True},  #          1 * 1 * 18 = 18
    "trm": {**TRM, "T": 3, "n": 6, "n_sup": 16},  #                                   16 * 3 * 7 = 336
    "trm-medium": {**TRM, "T": 1, "n": 2, "n_sup": 16},  #                             16 * 1 * 3 = 48
}

TRM_RECIPE = {"mixer": "attention", "ffn": 0, "recall": False, "noise": 0.0, "pick": 1, "stablemax": True}
TRM_RECIPE |= {"lr": 1e-4, "weight_decay": 0.1, "warmup": 2000, "cosine": False, "batch_size": 768}
TRM_RECIPE |= {"examples": 1_000_000, "hinge": 0.0}
DIS_RECIPE = {**TRM_RECIPE, "scheme": "dis", "target": "reveal", "power": 1.0, "linear": True, "ema": 0.0}
DIS_RECIPE |= {"step_index": True, "feedback": True, "optimizer": "adamw"}
TRM_SIZE = {"width": 512, "layers": 2, "heads": 8}
PRESETS = {  # what each changes of the task's defaults
    "paper-compact": {**DIS_RECIPE, "width": 256, "layers": 1, "heads": 4},  # 0.8 million parameters
    "paper-medium": {**DIS_RECIPE, **TRM_SIZE},  # 7 million, as the next
    "trm": {**TRM_RECIPE, **TRM_SIZE, "scheme": "trm", "optimizer": "adam-atan2", "step_index": False},
}

# ------------------------------------------------------------------------------------------------------------
# §2  The maze task: generate, solve and check, whole batches at once

WALL, OPEN, START, GOAL, PATH = range(5)  # x is made of the first four tokens, y* of all five
SPLITS = {"test": (0,), "valid": (1,), "train": (2, 3)}  # fingerprint of a puzzle, modulo 4


@dataclass
class Puzzles:
    """N puzzles, their solutions, and a solver's way there: what tasks hand to training and evaluation.

    The solver works in rounds: it begins with `draft`, and each round fixes some cells for good, up to y.
    """

    x: torch.Tensor  # [N, L] uint8, the question
    y: torch.Tensor  # [N, L] uint8, the solution y*
    draft: torch.Tensor  # [N, L] uint8, the solver's answer before its first round
    order: torch.Tensor  # [N, L] whole numbers, the round that gave a cell its final value; 0: never changed
    plan: torch.Tensor | None = None  # [N, S, L] uint8, answers on somebody else's way to y

    def __post_init__(self):
        if self.plan is None:
            self.plan = self.x.new_empty(len(self.x), 0, self.x.shape[1])

    def stage(self, r: torch.Tensor) -> torch.Tensor:
        """The solver's answers after r [N] rounds: `draft` for r = 0, y from r = order.max() on. [N, L]"""
        return torch.where(self.order <= r[:, None], self.y, self.draft)

    def to(self, device) -> "Puzzles":
        return Puzzles(*(getattr(self, f.name).to(device) for f in fields(self)))

    def __getitem__(self, rows) -> "Puzzles":
        return Puzzles(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.x)


def spanning_trees(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform spanning trees of the side x side grid: each room's parent [count, side²], the root its own.

    Wilson's algorithm in its cycle-popping form (Propp & Wilson 1998), on all trees at once. Every room
    points at a random neighbour. Where pointers form a cycle, its rooms draw again. When no cycle is left,
    the pointers are a tree; every tree is equally likely, in whatever order the cycles were popped.
    """
    rooms = side * side
    room = torch.arange(rooms)
    row, col = room // side, room % side
    exists = torch.stack([row > 0, row < side - 1, col > 0, col < side - 1], 1)  # [rooms, 4]
    # neighbours that exist come first, so that a room's are the first `degree` columns of its row
    degree, existing_first = exists.sum(1), (~exists).int().argsort(dim=1, stable=True)
    neighbour = (room[:, None] + torch.tensor([-side, side, -1, 1])).gather(1, existing_first)  # [rooms, 4]

    def draw(room):
        return neighbour[room, (torch.rand(room.shape, generator=generator) * degree[room]).long()]

    root = rooms // 2
    parent = draw(room.expand(count, rooms))  # [count, rooms]
    parent[:, root] = root
    live = torch.arange(count)  # the trees that may still have cycles
    while len(live):
        reached = parent[live]  # doubling the moves: after `rooms` or more, one is on a cycle or at the root
        for _ in range(math.ceil(math.log2(rooms))):
            reached = reached.gather(1, reached)
        on_cycle = torch.zeros(len(live), rooms, dtype=torch.bool).scatter_(1, reached, True)
        on_cycle[:, root] = False
        tree, again = on_cycle.nonzero(as_tuple=True)
        parent[live[tree], again] = draw(again)
        live = live[on_cycle.any(1)]
    return parent


def carve(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random perfect mazes [count, size * size] uint8: rooms on every second cell, joined by a spanning tree.

    Every tree is equally likely, and so is every pair of start and goal among the rooms. In a tree,
    exactly one path leads from the one to the other.
    """
    side = size // 2 + 1
    parent, room = spanning_trees(count, side, generator), torch.arange(side * side)
    cell = 2 * (room // side) * size + 2 * (room % side)  # [rooms]: where each lies in the flattened maze
    x = torch.full((count, size * size), WALL, dtype=torch.uint8)
    x[:, cell] = OPEN
    x.scatter_(1, (cell + cell[parent]) // 2, OPEN)  # the cell midway between a room and its parent
    ends = torch.rand(count, side * side, generator=generator).topk(2).indices  # [count, 2]
    return x.scatter_(1, cell[ends], torch.tensor([START, GOAL], dtype=torch.uint8).expand(count, 2))


def grid(cells: torch.Tensor) -> torch.Tensor:
    """[N, L] -> [N, H, W] for square puzzles, without what stands before the grid; grids stay as they are."""
    side = math.isqrt(cells.shape[1])
    return cells if cells.ndim == 3 else cells[:, -(side**2) :].unflatten(1, (side, side))


def neighbours(mask: torch.Tensor) -> torch.Tensor:
    """How many of each cell's four neighbours are set: [N, H, W] bool -> [N, H, W] uint8."""
    m = F.pad(mask.to(torch.uint8), (1, 1, 1, 1))
    return m[:, :-2, 1:-1] + m[:, 2:, 1:-1] + m[:, 1:-1, :-2] + m[:, 1:-1, 2:]


def solve_mazes(x: torch.Tensor, y: torch.Tensor | None = None) -> Puzzles:
    """Solve perfect mazes x [N, L] by dead-end filling: each round fills all dead ends; the path remains.

    The draft marks every open cell as path; the order of a cell is the round that filled it. Where ways
    meet again, a solution y [N, L] must say which one to take: one last round fills the others.
    """
    maze = grid(x)  # [N, H, W]
    ends, left = maze >= START, maze != WALL
    order, r = torch.zeros_like(maze, dtype=torch.int16), 0
    while (dead := left & ~ends & (neighbours(left) <= 1)).any():
        r += 1
        order[dead] = r
        left &= ~dead
    if y is not None:
        other = left & ~ends & (grid(y) != PATH)
        order, left = torch.where(other, order.amax((1, 2), keepdim=True) + 1, order), left & ~other
    y, draft = (torch.where(marked & ~ends, PATH, maze).to(torch.uint8) for marked in (left, maze == OPEN))
    return Puzzles(x, y.flatten(1), draft.flatten(1), order.flatten(1))


def fingerprint(cells: torch.Tensor) -> torch.Tensor:
    """A number [N] int64 for square grids of numbers [N, L], the same for all 8 views of a grid."""
    size = math.isqrt(cells.shape[1])
    table = torch.randint(-(2**63), 2**63 - 1, (size, size), generator=torch.Generator().manual_seed(0))
    views = [t.rot90(k).flatten() for t in (table, table.T) for k in range(4)]
    return (cells.long() @ torch.stack(views, 1)).amin(1)  # each cell has a random weight in every view


def draw_split(count: int, size: int, split: str, draw, key) -> torch.Tensor:
    """`count` grids [count, L] out of those that draw(n) [n, L] makes, all of one of the SPLITS.

    The fingerprint of key(grids) [n, L] alone decides to which split a grid belongs, whatever the seed.
    """
    found, chunk = [], 32
    while sum(map(len, found)) < count:
        chunk = min(2 * chunk, 2**21 // size**2)
        cells = draw(chunk)
        found.append(cells[torch.isin(fingerprint(key(cells)) % 4, torch.tensor(SPLITS[split]))])
    return torch.cat(found)[:count]


def make_mazes(count: int, size: int = 11, split: str = "train", seed: int = 0) -> Puzzles:
    """`count` mazes of side `size`, solved, out of that part of all mazes which belongs to `split`.

    Its walls alone decide a maze's split, and symmetric mazes share it. So no layout of one split occurs in
    another, turned or mirrored, whatever the seeds and counts. Draws are independent.
    """
    generator = torch.Generator().manual_seed(seed)
    return solve_mazes(
        draw_split(count, size, split, lambda n: carve(n, size, generator), lambda x: x == WALL)
    )


def maze_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] solve their mazes x [B, L] (tokens): [B] bool. No label is consulted.

    Solved: walls, start and goal stand where they stood; the marked cells are one path from start to goal.
    """
    asked, said = grid(x), grid(answer)
    kept = torch.where(asked == OPEN, (said == OPEN) | (said == PATH), said == asked)
    on = (said == PATH) | (said == START) | (said == GOAL)
    line = ~on | (neighbours(on) == torch.where(said == PATH, 2, 1))  # marked neighbours: 1 at ends, else 2
    reached = said == START  # a closed loop beside the path meets `line`, too: so flood from the start
    while (more := on & ~reached & (neighbours(reached) > 0)).any():
        reached |= more
    return (kept & line & (reached == on)).all((1, 2))


def hardest(puzzles: Puzzles, pick: int) -> Puzzles:
    """Of every `pick` puzzles the one with the longest solution: training sees more of the hard ones."""
    if pick == 1:
        return puzzles
    length = (puzzles.x != puzzles.y).sum(1).view(-1, pick)  # [N / pick, pick]
    return puzzles[length.argmax(1) + pick * torch.arange(len(length))]


class Task(NamedTuple):
    """What training, evaluation and drawing need to know of a kind of puzzle."""

    make: Callable  # (cfg, count, split, seed) -> Puzzles
    solved: Callable | None  # (x [B, L], answer [B, L]) -> [B] bool; None: only the label is right
    legend: Callable  # size -> {name of a token: its colour}, in the order of the tokens
    sizes: range | tuple  # that there are
    defaults: dict  # what it changes of Config's
    glyphs: str = ""  # what is written into cells, by token
    boxes: Callable = lambda size: (size, size)  # size -> rows and columns between heavy lines
    letters: str = ""  # that stand for the tokens in text files
    alias: str = ""  # two letters: the first is read as the second
    peek: Callable | None = None  # (folder, views) -> what its files say of Config's values
    solver: Callable | None = None  # (x, y) -> Puzzles, for those from files
    views: Callable | None = None  # cfg -> the function of `Views` and its tables
    prefix: int = 0  # positions before the grid
    watched: str = "held-out"  # what of `valid` there is
    finish: Callable | None = None  # (model, out) -> bool: whether there is more to evaluate
    fault: Callable | None = None  # x [H, W] -> None, or row, column and what is wrong with a question


def solves(task: Task, puzzles: Puzzles, answers: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] solve their puzzles: [B] bool."""
    return task.solved(puzzles.x, answers) if task.solved else (answers == puzzles.y).all(1)


def from_files_or(make: Callable) -> Callable:
    """The `make` of a task that with --data reads puzzles instead."""
    return lambda cfg, count, split, seed=0: (read_csv if cfg.data else make)(cfg, count, split, seed)


MAZE_LEGEND = {"wall": "#30343f", "open": "#f4f1ea", "start": "#009e73", "goal": "#d55e00", "path": "#56b4e9"}
TASKS = {
    "maze": Task(
        from_files_or(lambda cfg, count, split, seed: make_mazes(count, cfg.size, split, seed)),
        maze_solved,
        lambda size: MAZE_LEGEND,
        range(5, 62, 2),
        {},
        letters="# SGo",
        alias=". ",
        fault=lambda x: maze_fault(x),
        peek=lambda *of: csv_size(*of),
        solver=solve_mazes,
        views=lambda cfg: maze_views(cfg),
    )
}


def legend(cfg: Config) -> dict:
    """The tokens that a model reads and writes, and their colours: with target `mask`, one more."""
    return TASKS[cfg.task].legend(cfg.size) | ({"masked": "#999999"} if cfg.target == "mask" else {})


# ------------------------------------------------------------------------------------------------------------
# §3  The looped model (paper section 2; TRM, arXiv 2510.04871): one small net, applied over and over


class RMSNorm(torch.autograd.Function):
    """Scale h to mean square 1 along an axis; no learned gain.

    Autograd would get the gradient from that of every single operation, with twice the passes over memory.
    """

    @staticmethod
    def forward(ctx, h, axis):
        r = torch.rsqrt(h.square().mean(axis, keepdim=True) + 1e-5)
        y = h * r
        ctx.save_for_backward(y, r)
        ctx.axis = axis
        return y

    @staticmethod
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(ctx.axis, keepdim=True), value=-1).mul_(r), None


def rms_norm(h: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """Scale h to mean square 1 along `axis`; no learned gain."""
    return RMSNorm.apply(h, axis)


def lecun_(weight: torch.Tensor, fan_in: int) -> torch.Tensor:
    """Fill with a normal of std 1 / sqrt(fan_in) whose tails are cut; 0.8796 makes up for the cut."""
    std = fan_in**-0.5 / 0.87962566
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Stablemax(nn.Linear):
    """A readout whose softmax is TRM's stablemax: s(v) / sum s(v), s(v) = 1 + v or, below 0, 1 / (1 - v)."""

    def forward(self, h):
        v = super().forward(h)
        return torch.where(v >= 0, v.clamp(min=0).log1p(), -v.neg().clamp(min=0).log1p())  # log s(v)


def linear(d_in: int, d_out: int, kind=nn.Linear) -> nn.Linear:
    """A bias-free linear layer with LeCun initialisation."""
    layer = kind(d_in, d_out, bias=False)
    lecun_(layer.weight, d_in)
    return layer


def length(cfg: Config, shape: tuple[int, int]) -> int:
    """L: the cells of the grid, and the positions before it."""
    return TASKS[cfg.task].prefix + math.prod(shape)


class SwiGLU(nn.Module):
    """down(silu(gate(h)) * up(h)) along the last axis, of width d."""

    def __init__(self, d: int, inner: int = 0):
        super().__init__()
        inner = inner or 256 * math.ceil(round(4 * d * 2 / 3) / 256)
        self.gate_up, self.down = linear(d, 2 * inner), linear(inner, d)

    def forward(self, h):
        gate, up = (F.linear(h, weight) for weight in self.gate_up.weight.chunk(2))
        return self.down(F.silu(gate) * up)


class DepthwiseConv(torch.autograd.Function):
    """F.conv2d of h [B, D, H, W] with a kernel for each channel [D, 1, K, K], for the CPU.

    torch's gradient of large kernels takes ten times as long as the convolution. But it is a convolution,
    too: of h, with the gradient of the result as the kernel, summed over the batch. The sum is had by laying
    the batch out along the rows, row r of puzzle b at r B + b, so that a stride of B moves all by one row.
    """

    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return F.conv2d(h, weight, padding="same", groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        D, p, by_weight = len(weight), weight.shape[-1] // 2, 0
        some = max(1, 1500 // h[0, 0].numel())  # puzzles at a time: a kernel of more cells falls out of cache
        for pair in zip(h.split(some), grad.split(some), strict=True):
            rows, kernel = (t.permute(2, 0, 3, 1).flatten(0, 1).permute(2, 0, 1) for t in pair)  # [D, H B, W]
            B = len(pair[0])
            part = F.conv2d(rows[None], kernel[:, None], stride=(B, 1), padding=(p * B, p), groups=D)
            by_weight = by_weight + part[0][:, None]
        return F.conv2d(grad, weight.flip(2, 3), padding=p, groups=D), by_weight


class Conv(nn.Module):
    """Depthwise convolution: each channel mixes a kernel x kernel window of the grid.

    Information moves (kernel - 1) / 2 cells at most in a pass: a light cone that bounds what few can solve.
    Positions before the grid, if there are any, see the mean of all cells, and all cells see the first one.
    """

    def __init__(self, cfg: Config, shape: tuple[int, int]):
        super().__init__()
        self.shape = shape
        self.conv = nn.Conv2d(cfg.width, cfg.width, cfg.kernel, padding="same", groups=cfg.width, bias=False)
        lecun_(self.conv.weight, cfg.kernel**2)

    def forward(self, h):  # [B, L, D]
        before, h = h[:, : -math.prod(self.shape)], h[:, -math.prod(self.shape) :]
        cells = h.unflatten(1, self.shape).permute(0, 3, 1, 2)  # [B, D, H, W]; no copy, it is channels_last
        ours = h.device.type == "cpu" and self.conv.weight.shape[-1] > 3
        ours = ours and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        cells = DepthwiseConv.apply(cells, self.conv.weight) if ours else self.conv(cells)
        cells = cells.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, D]
        if not before.shape[1]:
            return cells
        return torch.cat([before + h.mean(1, keepdim=True), cells + before[:, :1]], 1)


class Attention(nn.Module):
    """Multi-head attention over all cells, rotary positions along the flattened grid (TRM's default)."""

    def __init__(self, cfg: Config, shape: tuple[int, int]):
        super().__init__()
        self.heads, d = cfg.heads, cfg.width // cfg.heads
        self.qkv, self.out = linear(cfg.width, 3 * cfg.width), linear(cfg.width, cfg.width)
        frequency = 10_000.0 ** -(torch.arange(0, d, 2) / d).repeat(2)  # [d]
        angle = torch.outer(torch.arange(length(cfg, shape)), frequency)  # [L, d]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, q):  # [B, H, L, d]; channels i and i + d / 2 turn as a pair
        a, b = q.chunk(2, dim=-1)
        return q * self.cos + torch.cat([-b, a], dim=-1) * self.sin

    def forward(self, h):  # [B, L, D]
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, d]
        h = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.out(h.transpose(1, 2).flatten(2))  # [B, L, D]


class PositionMLP(nn.Module):
    """A SwiGLU across the cells, the same for all channels: for one fixed length (TRM's for sudoku)."""

    def __init__(self, cfg: Config, shape: tuple[int, int]):
        super().__init__()
        self.swiglu = SwiGLU(length(cfg, shape))

    def forward(self, h):  # [B, L, D]
        return self.swiglu(h.mT).mT


MIXERS = {"conv": Conv, "attention": Attention, "mlp": PositionMLP}


class Block(nn.Module):
    """Mix the cells, then the channels of each cell; norms come after the residual sums (post-norm)."""

    def __init__(self, cfg: Config, shape: tuple[int, int]):
        super().__init__()
        self.mix, self.swiglu = MIXERS[cfg.mixer](cfg, shape), SwiGLU(cfg.width, cfg.ffn)
        self.axis = -2 if cfg.mixer == "mlp" else -1  # as in TRM's code, the norm runs along what was mixed

    def forward(self, h):  # [B, L, D]
        h = rms_norm(h + self.mix(h), self.axis)
        return rms_norm(h + self.swiglu(h))


def in_bf16(cfg: Config, device: torch.device) -> bool:
    """Are the matrix products inside the net in bfloat16, on this device?"""
    return cfg.precision == "bf16" or cfg.precision == "auto" and device.type == "cuda"


class Identifiers(nn.Module):
    """A learned vector for each of N puzzles, 0 at first: its number is what the first positions of x spell.

    Only the rows that a batch uses have gradients, and an optimiser of their own without state, `SignSGD`.
    So the table is no parameter, and copies of a model (averages) share it: 400,000 rows cost their own size.
    """

    def __init__(self, N: int, D: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(N, D))
        self.used = None  # numbers [B] and vectors [B, D] of the last batch with gradient

    def __deepcopy__(self, memo):
        return self

    def forward(self, x, prefix: int):  # [B, L] tokens -> [B, D]
        number = spelt(x[:, :prefix])
        if not torch.is_grad_enabled():
            return self.weight[number]
        self.used = number, self.weight[number].requires_grad_()
        return self.used[1]


def powers(P: int, device) -> torch.Tensor:
    """What each of P decimal digits stands for [P]: .., 100, 10, 1."""
    return 10 ** torch.arange(P - 1, -1, -1, device=device)


def spelt(digits: torch.Tensor) -> torch.Tensor:
    """The numbers [B] that these decimal digits [B, P] spell."""
    return (digits.long() * powers(digits.shape[1], digits.device)).sum(1)


class LoopedModel(nn.Module):
    """TRM's recursion: the same `net` refines the scratchpad z and the answer y, and only y is ever read out.

    `forward_passes` counts how often `net` was applied.
    """

    def __init__(self, cfg: Config, shape: tuple[int, int] | None = None):
        super().__init__()
        self.cfg, self.forward_passes, D, V = cfg, 0, cfg.width, len(legend(cfg))
        self.shape = shape or (cfg.size, cfg.size)  # H, W
        net = nn.Sequential(*(Block(cfg, self.shape) for _ in range(cfg.layers)))
        copies = cfg.T * (cfg.n + 1) - 1 if cfg.untied else 0  # equal at first, so schemes start as one
        self.nets = nn.ModuleList([net, *(copy.deepcopy(net) for _ in range(copies))])
        self.tokens = nn.Embedding(V, D)
        lecun_(self.tokens.weight, D)
        self.readout = linear(D, V, Stablemax if cfg.stablemax else nn.Linear)  # f_O
        if cfg.step_index:
            self.step_table = nn.Parameter(torch.zeros(cfg.n_sup, D))
        if cfg.identifiers:
            self.puzzles = Identifiers(cfg.identifiers, D)
        if cfg.recall:
            self.role = nn.Parameter(torch.zeros(D))  # tells net which update this is, now that both see x
        if cfg.act:
            self.halting = nn.utils.skip_init(nn.Linear, D, 1)  # draws nothing, so schemes start as one
            nn.init.zeros_(self.halting.weight)
            nn.init.constant_(self.halting.bias, -5.0)  # at first it says: not solved
        self.register_buffer("y0", lecun_(torch.empty(D), 1))  # never trained, and the same for every cell
        self.register_buffer("z0", lecun_(torch.empty(D), 1))

    def start(self, B: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before the first step: y0 and z0 in every cell, each [B, L, D]."""
        L = length(self.cfg, self.shape)
        return self.y0.expand(B, L, -1), self.z0.expand(B, L, -1)

    def net(self, h: torch.Tensor) -> torch.Tensor:
        net = self.nets[self.forward_passes % len(self.nets)]
        self.forward_passes += 1
        if not in_bf16(self.cfg, h.device):
            return net(h)
        with torch.autocast(h.device.type, torch.bfloat16):
            return net(h)  # float32: matrix products are in bf16, sums and norms are not

    def cycle(self, x, y, z):
        seen = x + y
        for _ in range(self.cfg.n):
            z = self.net(seen + z)
        y = self.net(seen + z + self.role if self.cfg.recall else y + z)
        return y, z

    def forward(self, x, y, z, s) -> tuple[torch.Tensor, torch.Tensor]:
        """Step s [B], counted from 1, on the puzzles x [B, L] (tokens): the new y and z [B, L, D]."""
        question = x
        if self.cfg.feedback:
            x = torch.where(s[:, None] == 1, x, self.readout(y).argmax(-1))
        x = self.tokens(x.int())  # [B, L, D]
        if self.cfg.identifiers:
            vector = self.puzzles(question, TASKS[self.cfg.task].prefix)  # [B, D]
            x = x + F.pad(vector[:, None], (0, 0, 0, x.shape[1] - 1))  # at the first position
        x = math.sqrt(self.cfg.width) * x
        if self.cfg.step_index:
            x = x + self.step_table[s.clamp(max=self.cfg.n_sup) - 1][:, None]  # [B, 1, D]
        with torch.no_grad():
            for _ in range(self.cfg.T - 1):
                y, z = self.cycle(x, y, z)
        return self.cycle(x, y, z)


def resized(model: LoopedModel, size: int = 0, shape: tuple[int, int] | None = None) -> LoopedModel:
    """The same weights for puzzles of another size, or of any shape (rows, columns).

    Not for the mlp mixer, whose weights fit one length only.
    """
    other = LoopedModel(replace(model.cfg, size=size or model.cfg.size), shape).to(model.y0.device)
    other.load_state_dict(model.state_dict())
    return other


# ------------------------------------------------------------------------------------------------------------
# §4  Policy improvement (paper sections 3 and 4): what a step did, from the logits before and after it.
# Pure functions of two tensors of logits [.., V]; copy this section, it needs nothing but torch and math.

IGNORE = -100  # the label of a position that does not count, as in F.cross_entropy


def checked(logits_u, logits_c, y=None) -> tuple:
    """(l_u, l_c), as floats of 32 bits or more; with y also labels, 0 where ignored, and which are not [..].

    Raises `ValueError` unless the logits are finite and of one shape [.., V], V of 2 or more, and the labels
    y [..] whole numbers from 0 to V - 1, or IGNORE.
    """
    shape, V = tuple(logits_u.shape), logits_u.shape[-1] if logits_u.ndim else 0
    if shape != logits_c.shape or V < 2:
        raise ValueError(f"logits {[*shape]} and {[*logits_c.shape]}: must be of one shape [.., V], V > 1")
    for name, logits in (("logits_u", logits_u), ("logits_c", logits_c)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} {[*shape]} of {logits.dtype}: must be floating-point numbers")
        if not logits.isfinite().all():
            raise ValueError(f"{name} {[*shape]}: {(~logits.isfinite()).sum()} are NaN or infinite")
    wide = torch.promote_types(torch.promote_types(logits_u.dtype, logits_c.dtype), torch.float32)
    logits_u, logits_c = logits_u.to(wide), logits_c.to(wide)
    if y is None:
        return logits_u, logits_c
    if y.shape != shape[:-1] or y.is_floating_point():
        raise ValueError(f"labels {[*y.shape]} of {y.dtype}: must be whole numbers {[*shape[:-1]]}")
    y = y.long()
    counts = y != IGNORE
    if (wrong := counts & ((y < 0) | (y >= V))).any():
        raise ValueError(f"label {y[wrong][0]}: must be from 0 to {V - 1}, or {IGNORE} to be ignored")
    return logits_u, logits_c, y.where(counts, 0), counts


def guide(logits_u, logits_c, w: float | torch.Tensor) -> torch.Tensor:
    """l_w = l_u + w (l_c - l_u) [.., V] (Eq. 5); its policy is pi_w ∝ pi_u^(1-w) pi_c^w (Eq. 7).

    w is a number, or a tensor that broadcasts with the logits: [.., 1].
    """
    logits_u, logits_c = checked(logits_u, logits_c)
    return logits_u + w * (logits_c - logits_u)


def advantage(logits_u, logits_c) -> torch.Tensor:
    """A(a) = log pi_c(a) - log pi_u(a) [.., V], by Bayes' rule log p(o = 1 | a) up to a constant."""
    logits_u, logits_c = checked(logits_u, logits_c)
    return logits_c.log_softmax(-1) - logits_u.log_softmax(-1)


def derivatives(logits_u, logits_c, y, w: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dw and d²L/dw² [..] of L(w) = -log pi_w(y); 0 where y [..] is IGNORE (Prop. 4.1).

    dL/dw = E[delta] - delta(y) and d²L/dw² = Var[delta] for tokens drawn from pi_w. Softmax does not see a
    shift of the logits, so delta may be counted from delta(y), which keeps what is subtracted small.
    """
    logits_u, logits_c, y, counts = checked(logits_u, logits_c, y)
    delta = logits_c - logits_u
    pi_w = (logits_u + w * delta).softmax(-1)
    delta = delta - delta.gather(-1, y[..., None])
    slope = (pi_w * delta).sum(-1)
    return slope * counts, (pi_w * (delta - slope[..., None]).square()).sum(-1) * counts


def margin(logits_u, logits_c, y, w: float = 1.0) -> torch.Tensor:
    """The advantage margin A(y) - E_{a ~ pi_w}[A(a)] [..] of the true tokens y [..] (Prop. 4.1).

    It is -dL/dw for L(w) = -log pi_w(y): above 0 more of the step helps, below 0 less would be better; at 0
    its size is right, or it is dead (then `divergence` is 0, too). As L is convex, above 0 at w = 1 the whole
    step helped; below 0 it need not have harmed. Where pi_c is calibrated, the mean at w = 1 is 0.
    """
    return -derivatives(logits_u, logits_c, y, w)[0]


def best_guidance(logits_u, logits_c, y) -> float:
    """w* = argmin_w of L(w) summed over all positions: above 1 the step is too timid, below it overshoots.

    Newton's method with the two `derivatives`, in float64, within the bracket that the slope's sign leaves.
    inf (-inf): at every position, more (less) of the step is always better. nan: the step is dead, as its
    residuals differ by no more than the rounding of their logits does, or there are no positions. Where L is
    flat in float64, any of its minima.
    """
    dtypes = (logits_u.dtype, logits_c.dtype)
    logits_u, logits_c, y, counts = checked(logits_u, logits_c, y)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    l_u, l_c, y = logits_u[counts].cpu().double(), logits_c[counts].cpu().double(), y[counts].cpu()
    delta = l_c - l_u
    delta = delta - delta.gather(-1, y[:, None])
    rounding = 2 * eps * torch.maximum(l_u.abs(), l_c.abs()).amax(-1, keepdim=True)
    rises, falls = (delta < -rounding).any(), (delta > rounding).any()  # towards w = inf and -inf: pi_w(y)
    if not (rises and falls):
        return math.inf if rises else -math.inf if falls else math.nan
    w, low, high, last = 1.0, -math.inf, math.inf, 0.5
    for _ in range(300):
        slope, curvature = (d.sum().item() for d in derivatives(l_u, l_c, y, w))
        low, high = (w, high) if slope < 0 else (low, w)
        if high - low == math.inf:  # no bracket yet: twice as far each time, as tails are flat
            step = math.copysign(2 * last, -slope)
        else:
            step = -slope / curvature if curvature > 0 else math.inf
            if not (low < w + step < high and abs(step) < last / 2):  # Newton must halve its steps at least
                step = (low + high) / 2 - w
        last = abs(step)
        if slope == 0 or last <= 1e-12 * max(1.0, abs(w)):
            break
        w += step
    return w


def divergence(logits_u, logits_c) -> torch.Tensor:
    """KL(pi_c || pi_u) [..] in nats: how far the step moved the policy, for good or ill. Needs no label."""
    log_u, log_c = (logits.log_softmax(-1) for logits in checked(logits_u, logits_c))
    return (log_c.exp() * (log_c - log_u)).sum(-1).clamp(min=0)  # rounding may go below


def largest_change(logits_u, logits_c) -> torch.Tensor:
    """max_a |pi_c(a) - pi_u(a)| [..], from 0 to 1. Needs no label."""
    logits_u, logits_c = checked(logits_u, logits_c)
    return (logits_c.softmax(-1) - logits_u.softmax(-1)).abs().amax(-1)


def residual_norm(logits_u, logits_c) -> torch.Tensor:
    """|delta - its mean| [..]: the distance from a fixed point of the readout. Needs no label."""
    logits_u, logits_c = checked(logits_u, logits_c)
    delta = logits_c - logits_u
    return (delta - delta.mean(-1, keepdim=True)).norm(dim=-1)


# ------------------------------------------------------------------------------------------------------------
# §5  Targets (paper section 5): Φ gives every step its own target y†_s, and the last one is y*
# If targets come closer to y* at every step and the model fits them, every step leaves fewer wrong cells and
# has a positive expected margin (Prop. A.3, which assumes sufficient capacity and exact fitting).


def final(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """y†_s = y* at every step, as in TRM."""
    return puzzles.y


def share(s: torch.Tensor, cfg: Config) -> torch.Tensor:
    """How much of y* the target of step s [B] has: [B, 1], 1 from N_sup on."""
    return ((s / cfg.n_sup).clamp(max=1) ** cfg.power)[:, None]


def reveal(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """Shows the puzzle and, in a share of the cells in which they differ, the solution instead.

    Cells come in the order of their `noise` [B, L] in [0, 1). With one noise for a whole rollout, targets are
    nested: their Hamming distance to y* never grows from step to step, and share 1 is y* exactly. This holds
    for `mask` and `replace`, too.
    """
    differs = puzzles.x != puzzles.y
    rank = torch.where(differs, noise, 2.0).argsort(1).argsort(1)  # [B, L], ranks: differing cells come first
    shown = (share(s, cfg) * differs.sum(1, keepdim=True)).ceil()  # [B, 1]
    return torch.where(rank < shown, puzzles.y, puzzles.x)


def mask(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """Masked diffusion: a share of y*, and in all other cells a token of its own, the last of the V."""
    return torch.where(noise < share(s, cfg), puzzles.y, len(legend(cfg)) - 1)


def replace_at_random(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """Uniform diffusion: a share of y*, and in all other cells a random token, drawn once for a rollout."""
    drawn = (noise * 4096 % 1 * len(legend(cfg))).to(puzzles.y.dtype)  # from the last 12 of 24 random bits
    return torch.where(noise < share(s, cfg), puzzles.y, drawn)


def edits(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """What a solver has after pace * s of its rounds. For mazes: with the dead ends of that depth filled.

    Every step has the same thing to do, and the puzzle and the answer so far say what. So one map does for
    all steps; y* is its fixed point, and whoever takes more steps solves larger puzzles. The last target is
    y* even where the solver needs more than pace * N_sup rounds.
    """
    return puzzles.stage(torch.where(s < cfg.n_sup, cfg.pace * s, puzzles.order.max()))


def file(puzzles: Puzzles, s, cfg: Config, noise) -> torch.Tensor:
    """Somebody's way to y* that came with the puzzles (`load_trajectories`): S answers over N_sup steps."""
    S = puzzles.plan.shape[1]
    return puzzles.plan[torch.arange(len(s), device=s.device), ((s * S - 1) // cfg.n_sup).clamp(max=S - 1)]


TARGETS = {  # (puzzles [B], steps s [B], cfg, noise [B, L]) -> y† [B, L]
    "final": final,
    "reveal": reveal,
    "mask": mask,
    "replace": replace_at_random,
    "edits": edits,
    "file": file,
}

# ------------------------------------------------------------------------------------------------------------
# §6  Training (paper section 5): one loop for every scheme. A puzzle is an episode of latent steps
# torchrun starts it in N processes, each with B / N rows of the batch; what they do does not depend on N


def processes() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    alone = not (dist.is_available() and dist.is_initialized())
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def total(t: torch.Tensor) -> torch.Tensor:
    """The sum of t over all processes, in t."""
    if processes()[1] > 1:
        dist.all_reduce(t)
    return t


def everyones(t: torch.Tensor) -> torch.Tensor:
    """The rows t [B / N, ..] of all processes: [B, ..]."""
    if processes()[1] == 1:
        return t
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(processes()[1])]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def mine(t: torch.Tensor) -> torch.Tensor:
    """The rows of this process out of t [B, ..]."""
    rank, N = processes()
    return t[rank * len(t) // N : (rank + 1) * len(t) // N]


def largest(value: float) -> float:
    """The largest `value` of any process, for all to decide alike."""
    if processes()[1] > 1:
        dist.all_reduce(t := torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX)
        value = t.item()
    return value


def wait_for(device: torch.device) -> float:
    """The time at which the device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def draw_rows(draw, like: torch.Tensor) -> torch.Tensor:
    """draw(shape, device=..) for the whole batch, and of it the rows that `like` [B / N, ..] has."""
    return mine(draw((processes()[1] * len(like), *like.shape[1:]), device=like.device))


def orthogonal(m: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ for a matrix m = U S Vᵀ: Newton-Schulz steps take singular values to between 0.7 and 1.2.

    In bfloat16 on a GPU, which is enough for that; on a CPU, float32 is as fast.
    """
    X = m if m.shape[0] <= m.shape[1] else m.mT
    X = (X / X.norm().clamp(min=1e-7)).to(torch.bfloat16 if m.is_cuda else m.dtype)
    for _ in range(5):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return (X if m.shape[0] <= m.shape[1] else X.mT).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum made `orthogonal`. As torch.optim.Muon, but for that one's bfloat16 on a CPU, too.

    There it takes three times as long, and makes differences grow that are in the last bits of gradients, so
    that N processes would no longer do what one does (to 1e-5).
    """

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[p]):
                    state["m"] = torch.zeros_like(p)
                m = state["m"].lerp_(p.grad, 0.05)
                size = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(p.grad.lerp(m, 0.95)), alpha=size)


class AdamAtan2(torch.optim.Optimizer):
    """Adam with atan2(m, √v) for m / (√v + ε), TRM's choice: no ε, and no step longer than lr π / 2."""

    def __init__(self, params, lr: float, betas: tuple, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[p]):
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                m = state["m"].lerp_(p.grad, 1 - b1) / (1 - b1 ** state["t"])
                v = state["v"].lerp_(p.grad.square(), 1 - b2) / (1 - b2 ** state["t"])
                p.mul_(1 - lr * group["weight_decay"]).sub_(torch.atan2(m, v.sqrt()), alpha=lr)


OPTIMIZERS = {  # of the weights that Muon does not train
    "muon": functools.partial(torch.optim.AdamW, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adam-atan2": AdamAtan2,
}


class SignSGD(torch.optim.Optimizer):
    """Moves the rows of `Identifiers` that the last batch used by lr against the sign of their gradient."""

    def __init__(self, table: Identifiers, lr: float, weight_decay: float):
        super().__init__([table.weight], {"lr": lr, "weight_decay": weight_decay})
        self.table = table

    @torch.no_grad()
    def step(self):
        (numbers, vectors), group = self.table.used, self.param_groups[0]
        slopes = everyones(vectors.grad)  # DDP knows nothing of them, nor should it send the table around
        numbers = everyones(numbers)
        slope = (numbers[:, None] == numbers).to(slopes.dtype) @ slopes  # one may be in the batch twice
        kept = (1 - group["lr"] * group["weight_decay"]) * self.table.weight[numbers]
        self.table.weight[numbers] = kept - group["lr"] * slope.sign()


def make_optimizers(model: LoopedModel, cfg: Config) -> list:
    """Muon for the matrices inside the blocks and AdamW for all other weights, or one of others for all."""
    matrices = [p for p in model.nets.parameters() if p.ndim == 2 and cfg.optimizer == "muon"]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adam = OPTIMIZERS[cfg.optimizer](others, cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    optimizers = [Muon(matrices, cfg.muon_lr, cfg.weight_decay), adam] if matrices else [adam]
    optimizers += [SignSGD(model.puzzles, cfg.embedding_lr, cfg.weight_decay)] if cfg.identifiers else []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def step_loss(logits_u, logits_c, y_dagger, s, cfg: Config) -> torch.Tensor:
    """L_DIS of one step: cross-entropy of the logits after it [B, L, V] with its targets [B, L].

    Two additions use the logits before it, without gradient. --awr weighs cells by exp(A(y†) / awr), as
    advantage-weighted regression does. --hinge adds what the advantage margin of y† lacks to 0 (Prop. 4.1).
    """
    y_dagger = y_dagger.long()
    loss = F.cross_entropy(logits_c.flatten(0, 1), y_dagger.flatten(), reduction="none")  # [B L]
    loss = loss.view_as(y_dagger)  # [B, L]
    if cfg.awr:
        A = logits_c.detach().log_softmax(-1) - logits_u.log_softmax(-1)  # unchecked: a GPU need not wait
        A = A.gather(-1, y_dagger[..., None])[..., 0]
        loss = loss * (A / cfg.awr).exp().clamp(max=20)
    if cfg.hinge:
        delta = logits_c - logits_u
        lack = (logits_c.softmax(-1) * delta).sum(-1) - delta.gather(-1, y_dagger[..., None])[..., 0]
        loss = loss + cfg.hinge * F.relu(lack)
    if cfg.linear:
        loss = loss * (2 * s / (cfg.n_sup + 1))[:, None]  # 1 on average
    return loss.mean()


def act(model, y, logits, y_star, s):
    """Adaptive computation time as TRM trains it: its loss, and which puzzles [B] may leave the batch.

    The halting head reads the first cell of y [B, L, D] and predicts whether the answer is right. One time in
    ten, a puzzle must stay for a random number of steps all the same, so that the head sees what more of
    them would do. Evaluation takes all N_sup steps, as TRM does, unless --halt says otherwise.
    """
    q = model.halting(y[:, 0]).squeeze(-1)  # [B], a logit
    right = (logits.argmax(-1) == y_star).all(1)
    stay = draw_rows(functools.partial(torch.randint, 2, max(3, model.cfg.n_sup + 1)), s)
    stay = stay * (draw_rows(torch.rand, q) < 0.1)
    return 0.5 * F.binary_cross_entropy_with_logits(q, right.float()), (q > 0) & (s >= stay)


class Episodes:
    """The training batch: B puzzles, each at its own step. Who is done is replaced by the next in line.

    Of N processes, each holds B / N of the rows.
    """

    def __init__(self, cfg: Config, data: Puzzles, model: LoopedModel):
        B, device, self.data, self.model = cfg.batch_size // processes()[1], data.x.device, data, model
        self.line, self.seen = torch.randperm(len(data)).to(device), torch.tensor(0, device=device)
        self.row = self.s = torch.zeros(B, dtype=torch.long, device=device)  # [B]: which puzzle, which step
        self.noise = torch.zeros(B, data.x.shape[1], device=device)  # [B, L], for the targets
        self.y, self.z = model.start(B)  # [B, L, D]
        self.done = self.s == 0  # [B], all of them, so that the first batch is fresh

    def advance(self) -> Puzzles:
        """Replace the puzzles that are done, count one step on, and return the B puzzles."""
        done, model = self.done, self.model  # the k-th row that is done takes the k-th next puzzle in line
        everyone = everyones(done)
        place = self.seen + mine(everyone.cumsum(0)) - 1
        self.row = torch.where(done, self.line[place % len(self.line)], self.row)
        self.noise = torch.where(done[:, None], draw_rows(torch.rand, self.noise), self.noise)
        self.y = torch.where(done[:, None, None], model.y0, self.y)
        self.z = torch.where(done[:, None, None], model.z0, self.z)
        self.seen, self.s = self.seen + everyone.sum(), torch.where(done, 0, self.s) + 1
        return self.data[self.row]

    def progress(self, before: "Progress", seconds: float) -> "Progress":
        """How far training is, one update after `before`; puzzles that are under way count in part.

        Where rows keep step, this is known; else it is asked, a GPU every 10th time, as it waits for that.
        """
        cfg, step, B = self.model.cfg, before.steps_done + 1, self.model.cfg.batch_size
        seen, finished = B * math.ceil(step / cfg.n_sup), B * step / cfg.n_sup
        if cfg.act and step % 10 and self.s.device.type != "cpu":
            seen, finished = before.examples_seen, before.share * cfg.examples
        elif cfg.act:
            under_way = torch.where(self.done, 1.0, self.s.float() / cfg.n_sup).sum()
            seen = self.seen.item()
            finished = seen - B + total(under_way).item()
        share = seconds / cfg.budget_seconds if cfg.budget_seconds else finished / cfg.examples
        return Progress(share, step, seen, step * cfg.T * (cfg.n + 1), seconds)

    def state_dict(self) -> dict:
        rows = {name: everyones(getattr(self, name)) for name in ("row", "s", "noise", "y", "z", "done")}
        return {"seen": self.seen, **rows}

    def load_state_dict(self, state: dict) -> None:
        self.seen.copy_(state["seen"])
        for name in state.keys() - {"seen"}:
            setattr(self, name, mine(state[name]).to(self.seen.device))


def looks(share: float) -> int:
    """How often progress has been looked at by this share of a training: 200 times in all."""
    return min(200, int(200 * share + 1e-6))


class Progress(NamedTuple):
    """How far a training is."""

    share: float = 0.0  # of the examples or of the seconds
    steps_done: int = 0
    examples_seen: int = 0
    train_passes: int = 0  # applications of the net to a batch
    train_seconds: float = 0.0  # without what `watch` does


def compiled(model: LoopedModel) -> LoopedModel:
    """The model, its nets compiled if cfg.compile."""
    for net in model.nets if model.cfg.compile else ():
        net.compile()
    return model


def parallel(model: LoopedModel) -> nn.Module:
    """What to call for a step: the model; of several processes, one that averages their gradients, too."""
    cfg = compiled(model).cfg
    if processes()[1] == 1:
        return model
    for net in model.nets[: -cfg.n - 1] if cfg.untied else ():
        net.requires_grad_(False)  # DDP waits for every gradient, and cycles before the last one have none
    model._ddp_params_and_buffers_to_ignore = ["puzzles.weight"]  # `SignSGD` does the same to it everywhere
    return nn.parallel.DistributedDataParallel(model)


def update(optimizers: list, factor: float) -> None:
    """One step of all optimizers, at `factor` times their peak learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()


def train(cfg: Config, data: Puzzles, watch=lambda at, loss, model: "", keep=None) -> tuple:
    """Train a fresh model on `data`, on the device that holds it; returns it (averaged if cfg.ema) and facts.

    Without halting, all rows of the batch keep step, and this is the paper's pair of loops:
        for x, y* in batches:  y, z <- y0, z0;  for s = 1 .. N_sup:  y, z <- step s;  loss; update; detach
    With halting, rows are done at different times, so each counts its own s and is replaced alone.
    `watch` is called with a `Progress` before the first step (loss None) and after every one; any text that
    it returns ends training and becomes facts["stopped"]. `keep`, a `Snapshots`, lets it be resumed.
    """
    torch.manual_seed(cfg.seed)
    model = LoopedModel(cfg).to(data.x.device)
    kept = copy.deepcopy(model) if cfg.ema else model
    optimizers, batch, phi = make_optimizers(model, cfg), Episodes(cfg, data, model), TARGETS[cfg.target]
    at = keep.begin({"model": model, "kept": kept, "batch": batch}, optimizers) if keep else Progress()
    averaged, weights = [*kept.parameters()], [*model.parameters()]
    net, stopped = parallel(model), watch(at, None, kept)

    while at.share < 1 and not stopped:
        began, step = time.perf_counter(), at.steps_done + 1
        puzzles = batch.advance()
        y_dagger = phi(puzzles, batch.s, cfg, batch.noise)  # [B, L]

        y, z = (h + cfg.noise * draw_rows(torch.randn, h) if cfg.noise else h for h in (batch.y, batch.z))
        logits_u = model.readout(batch.y).detach() if cfg.awr or cfg.hinge else None
        y, z = net(puzzles.x, y, z, batch.s)  # the latent step
        logits_c = model.readout(y)  # [B, L, V]
        loss, done = step_loss(logits_u, logits_c, y_dagger, batch.s, cfg), batch.s == cfg.n_sup
        if cfg.act:
            act_loss, may_go = act(model, y, logits_c, puzzles.y, batch.s)
            loss, done = loss + act_loss, done | may_go

        loss.backward()
        warm = min(1.0, step / (cfg.warmup + 1))
        cosine = 0.5 + 0.5 * math.cos(math.pi * at.share) if cfg.cosine else 1.0
        update(optimizers, warm * cosine)
        if cfg.ema:
            get_ema_multi_avg_fn(cfg.ema if step > 1 else 0.0)(averaged, weights, step)  # begins as a copy
        batch.y, batch.z, batch.done = y.detach(), z.detach(), done  # no gradient crosses steps

        seconds = at.train_seconds + time.perf_counter() - began
        now = batch.progress(at, largest(seconds) if cfg.budget_seconds else seconds)
        if looks(now.share) > looks(at.share):  # `Watch` waits for a GPU now: let it count
            now = now._replace(train_seconds=at.train_seconds + wait_for(data.x.device) - began)
        at = now
        stopped = watch(at, loss.detach(), kept)
        if keep and (stopped == "interrupted" or keep.due(step)):
            keep.save(at)

    facts = {**at._asdict(), "train_seconds": round(at.train_seconds, 2), "stopped": stopped}
    return kept, {name: facts[name] for name in facts if name != "share"}


# ------------------------------------------------------------------------------------------------------------
# §7  Evaluation: one rollout gives the logits around every step; all else is computed from them


class Step(NamedTuple):
    """What a latent step leaves behind, for the B puzzles that are still thought about."""

    rows: torch.Tensor  # [B], their places in the batch that the rollout began with
    logits_u: torch.Tensor  # [B, L, V], the readout before the step
    logits_c: torch.Tensor  # [B, L, V], and after it
    y: torch.Tensor  # [B, L, D]


@torch.no_grad()
def rollout(model: LoopedModel, x: torch.Tensor, steps=(), stop=None):
    """The model thinks about puzzles x [B, L]: yields a `Step` for each of `steps` (default: cfg.thinks).

    Puzzles for which stop(model, step) [B] holds leave the batch, and cost nothing from then on.
    """
    rows, (y, z) = torch.arange(len(x), device=x.device), model.start(len(x))
    logits_c = model.readout(y)  # of y0, which no loss ever sees: as logits_u of step 1, it means little
    for s in steps or model.cfg.thinks:
        y, z = model(x, y, z, torch.full((len(x),), s, device=x.device))
        logits_u, logits_c = logits_c, model.readout(y)
        yield (step := Step(rows, logits_u, logits_c, y))
        if stop:
            on = ~stop(model, step)
            rows, x, y, z, logits_c = (t[on] for t in (rows, x, y, z, logits_c))
            if not len(rows):
                return


def at_once(model: LoopedModel, L: int, on_cpu: int) -> int:
    """How many puzzles of L cells to evaluate at a time: on a GPU, as many as half its free memory holds.

    A cell takes some vectors of D (x, y, z, sums of them), what SwiGLU computes, and logits for all guidance.
    """
    if model.y0.device.type != "cuda":
        return on_cpu
    inner = max(model.nets[0][0].swiglu.down.in_features, 2 * model.cfg.width)
    cell = 4 * (8 * model.cfg.width + 4 * inner + 40 * len(legend(model.cfg)))  # bytes
    fit = torch.cuda.mem_get_info(model.y0.device)[0] // 2 // (cell * L)
    fit = int(-largest(-fit))  # of all processes the least, as they deal out batches of one size
    return min(4096, max(1, fit))  # `evaluate` draws RESAMPLES numbers for each


def answer(model: LoopedModel, x: torch.Tensor, steps=(), stop=None, batch: int = 0) -> tuple:
    """The last answers [N, L] to the puzzles x [N, L], and how many steps were taken for each [N].

    Several processes share the batches, and all get all answers.
    """
    answers, taken = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.long, device=x.device)
    batch, (rank, count) = batch or at_once(model, x.shape[1], 256), processes()
    for i in range(rank * batch, len(x), count * batch):
        for k, step in enumerate(rollout(model, x[i : i + batch], steps, stop), 1):
            answers[i + step.rows] = step.logits_c.argmax(-1).to(x.dtype)
            taken[i + step.rows] = k
    return total(answers), total(taken)


# What is measured of a puzzle at each step: is it solved; and, as means over its cells: the share that is
# right, log pi_c(y*), what the step added to log pi(y*), the margin at w = 1, KL(pi_c || pi_u), the norm of
# the residual, and the share of cells with a positive margin (at a dead step, that is up to rounding).
METRICS = ("exact", "cells", "logp", "gain", "margin", "kl", "residual", "margin_positive")
MARGIN_EDGES = [sign * 10.0**k for sign, ks in ((-1, range(0, -6, -1)), (1, range(-5, 1))) for k in ks]
WS = [w / 4 for w in range(-2, 13)]  # the guidance weights that are tried at every step: -0.5 to 3
RESAMPLES = 4000  # of the bootstrap


def measure(task: Task, puzzles: Puzzles, step: Step, ws=()) -> dict:
    """The METRICS [B] of a step, a histogram of its margins [B, bins], and what guidance does [B, ws]."""
    u, c, y_star = step.logits_u, step.logits_c, puzzles.y.long()

    def logp(logits):
        return -F.cross_entropy(logits.mT, y_star, reduction="none").mean(1)

    def exact(logits):
        return solves(task, puzzles, logits.argmax(-1)).float()

    gap = margin(u, c, y_star)  # [B, L]
    bins = torch.bucketize(gap, torch.tensor(MARGIN_EDGES, device=gap.device))
    per_cell = {"cells": c.argmax(-1) == y_star, "margin": gap, "margin_positive": gap > 0}
    per_cell |= {"kl": divergence(u, c), "residual": residual_norm(u, c)}
    per_cell |= {"margins": F.one_hot(bins, len(MARGIN_EDGES) + 1)}
    values = {name: v.float().mean(1) for name, v in per_cell.items()}
    values |= {"exact": exact(c), "logp": logp(c), "gain": logp(c) - logp(u)}
    values["label"] = (c.argmax(-1) == y_star).all(1).float()  # where several answers are right, below exact
    guided = [guide(u, c, w) for w in ws]
    return values | {
        f"guided_{f.__name__}": torch.stack([f(l_w) for l_w in guided], 1) for f in (exact, logp) if guided
    }


def evaluate(model: LoopedModel, puzzles: Puzzles, steps=(), ws=None, batch: int = 0) -> dict:
    """{measure: [its mean over the puzzles after each of S steps]}; "passes": what each took, as counted.

    Beside them: the METRICS split by outcome, "solved" and "unsolved" (None where there are no such puzzles),
    and intervals [S, 2] for the means of gain and margin, from a bootstrap in which every puzzle counts
    Poisson(1) times; 95% for all S steps together (Bonferroni), infinite for fewer than about five puzzles.
    Only sums are kept, so that memory does not grow with the number of puzzles; processes share the batches.
    `ws` [S][..]: guidance weights to try at each step.
    """
    task, before, sums, resampled, ran = TASKS[model.cfg.task], model.forward_passes, {}, 0, 0
    generator, (rank, N) = torch.Generator().manual_seed(0), processes()
    L = puzzles.x.shape[1]
    batch = batch or at_once(model, L, max(1, 12_000 // L))  # so many cells fit into any memory
    for k, i in enumerate(range(0, len(puzzles), batch)):
        some, own = puzzles[i : i + batch], k % N == rank
        draws = torch.poisson(torch.ones(RESAMPLES, len(some)), generator=generator).double()
        if k and not own:  # of the first batch, all need the shapes
            continue
        ran += 1
        each = [
            measure(task, some, s, ws[k] if ws else ()) for k, s in enumerate(rollout(model, some.x, steps))
        ]
        each = {name: torch.stack([m[name] for m in each]).cpu().double() for name in each[0]}  # [S, B, ..]
        each = each if own else {name: torch.zeros_like(v) for name, v in each.items()}
        each["count"] = one = torch.full_like(each["exact"], own)
        solved = each["exact"][-1]  # [B]
        groups = torch.stack([one[0], solved, 1 - solved])  # [3, B]
        for name, v in each.items():
            sums[name] = sums.get(name, 0) + torch.einsum("gb,sb...->gs...", groups, v)
        sample = torch.stack([each["gain"], each["margin"], one])  # [3, S, B]
        resampled = resampled + torch.einsum("rb,psb->psr", draws, sample)
    sums, resampled = {name: total(v) for name, v in sums.items()}, total(resampled)
    count = sums.pop("count")[:, 0]  # [3]
    means = [{k: (v[g] / count[g]).tolist() for k, v in sums.items()} if count[g] else None for g in range(3)]
    outcomes = [mean and {name: mean[name] for name in METRICS} for mean in means[1:]]
    tail, n = 0.025 / len(means[0]["exact"]), len(puzzles)
    ends, ratios = torch.tensor([tail, 1 - tail]).double(), resampled[:2] / resampled[2]  # [2], [2, S, R]
    intervals = [[of_step.nanquantile(ends).tolist() for of_step in of] for of in ratios]
    if float(n) ** (1 - n) >= tail:  # so often a resample holds one puzzle only: nothing can be said
        intervals = [[[-math.inf, math.inf] for _ in of] for of in ratios]
    gain_interval, margin_interval = intervals
    curves = {**means[0], "gain_interval": gain_interval, "margin_interval": margin_interval}
    curves |= {"solved": outcomes[0], "unsolved": outcomes[1]}
    return {"passes": (model.forward_passes - before) // ran, **curves}


# Rules for when to stop thinking about a puzzle: when its score [B] is no higher than a threshold. The first
# two ask if the step was dead, with no label and no training: by KL(pi_c || pi_u) of the whole answer, which
# is the sum over its cells, and by the largest change of any cell's probability. The third is TRM's head.
HALTS = {
    "kl": lambda model, step: divergence(step.logits_u, step.logits_c).sum(1),
    "change": lambda model, step: largest_change(step.logits_u, step.logits_c).amax(1),
    "head": lambda model, step: -model.halting(step.y[:, 0]).squeeze(-1),
}
HALT_DEFAULT = "kl"
VALID_SIZE = 1000  # puzzles to calibrate on
HALT_LOSS = 0.003  # share of the validation puzzles that halting may cost, against the best


def halting_curve(scores: torch.Tensor, solved: torch.Tensor) -> dict:
    """What thresholds on the scores [N, S] lead to: mean "steps" and share "exact", solved being [N, S].

    "threshold" is the one with the fewest steps that falls short of the best by no more than HALT_LOSS.
    """
    candidates = [-math.inf, *scores.flatten().double().quantile(torch.linspace(0, 1, 201).double()).tolist()]
    curve = {"steps": [], "exact": []}
    for threshold in candidates:
        stop = scores <= threshold
        stop[:, -1] = True
        first = stop.int().argmax(1, keepdim=True)  # [N, 1]
        curve["steps"].append(1 + first.double().mean().item())
        curve["exact"].append(solved.gather(1, first).double().mean().item())
    good = [i for i, exact in enumerate(curve["exact"]) if exact >= max(curve["exact"]) - HALT_LOSS]
    return {"threshold": candidates[min(good, key=lambda i: curve["steps"][i])], **curve}


@torch.no_grad()
def calibrate(model: LoopedModel, valid: Puzzles, batch: int = 100) -> dict:
    """What is chosen before the test: "w_star" [S], and in "halt" a `halting_curve` for each of the HALTS."""
    rules = {name: score for name, score in HALTS.items() if name != "head" or model.cfg.act}
    kept = {}  # name -> [S][batches]
    for i in range(0, len(valid), batch):
        some = valid[i : i + batch]
        for k, step in enumerate(rollout(model, some.x)):
            found = {name: score(model, step) for name, score in rules.items()}
            found |= {"u": step.logits_u, "c": step.logits_c}
            found["solved"] = solves(TASKS[model.cfg.task], some, step.logits_c.argmax(-1))
            for name, v in found.items():
                kept.setdefault(name, [[] for _ in model.cfg.thinks])[k].append(v.cpu())
    kept = {name: [torch.cat(v) for v in steps] for name, steps in kept.items()}  # [S][N, ..]
    solved = torch.stack(kept["solved"], 1)  # [N, S]
    w_star = [best_guidance(u, c, valid.y.cpu()) for u, c in zip(kept["u"], kept["c"], strict=True)]
    return {"w_star": w_star, "halt": {r: halting_curve(torch.stack(kept[r], 1), solved) for r in rules}}


def stopping(rule: str, threshold: float):
    """The function that `rollout` asks whom to stop thinking about, by this rule of HALTS."""
    return lambda model, step: HALTS[rule](model, step) <= threshold


def compare_halting(model: LoopedModel, puzzles: Puzzles, halt: dict) -> dict:
    """{rule: share "exact", mean "passes", "puzzles_per_second"} in batches of 256; "none": no halting."""
    stops = {"none": None, **{rule: stopping(rule, found["threshold"]) for rule, found in halt.items()}}
    task, results, seconds = TASKS[model.cfg.task], {}, {name: [] for name in stops}
    for _ in range(3):  # all in turn, so that a busy moment of the machine does not fall on one alone
        for name, stop in stops.items():
            began = time.perf_counter()
            answers, taken = answer(model, puzzles.x, stop=stop)
            passes = taken.cpu().double().mean().item() * model.cfg.T * (model.cfg.n + 1)  # waits for the GPU
            seconds[name].append(time.perf_counter() - began)
            results[name] = {
                "exact": solves(task, puzzles, answers).cpu().double().mean().item(),
                "passes": passes,
            }
    for name in stops:
        results[name]["puzzles_per_second"] = len(puzzles) / sorted(seconds[name])[1]
    return results


SIZES = {-1: "overshoots", 0: "just right", 1: "too timid"}  # by the sign of w* - 1


def verdicts(intervals: list, below, within, above) -> list:
    """For each interval: is it all `below` 0, all `above` 0, or is 0 `within`?"""
    return [above if low > 0 else below if high < 0 else within for low, high in intervals]


def summary(verdict: list[str]) -> str:
    """["improves", "improves", "dead"] -> "steps 1-2 improve, step 3 is dead: 67% of the forward .."."""
    one = {"improves": "improves", "harms": "harms", "dead": "is dead"}
    many, parts = {"improves": "improve", "harms": "harm", "dead": "are dead"}, []
    for kind, run in itertools.groupby(range(1, len(verdict) + 1), key=lambda s: verdict[s - 1]):
        first, *more = run
        parts.append(f"steps {first}-{more[-1]} {many[kind]}" if more else f"step {first} {one[kind]}")
    share = verdict.count("improves") / len(verdict)
    return f"{', '.join(parts)}: {share:.0%} of the forward passes do the work"


def diagnose(model: LoopedModel, test: Puzzles, valid: Puzzles) -> dict:
    """Which steps work: all that `evaluate` finds on `test`, with what `calibrate` chose on `valid`, and

    "verdict": of each step, by the interval of its gain in log pi(y*): improves, dead (it may be 0) or harms;
    "step_size": too timid or overshoots, where the interval of its margin and w* say so; else just right;
    "guided_exact", "guided_logp" [S][ws]: under the guidance weights "ws" and, last, under the step's own w*
    (kept within `ws`, and 1 where it is undefined); "cut": what taking the other steps alone changes.
    (Without a step index, all steps are the same map: then it is a rollout of as many as are not dead.)
    """
    chosen = calibrate(model, valid)
    own = [1.0 if math.isnan(w) else min(max(w, WS[0]), WS[-1]) for w in chosen["w_star"]]
    found = {"ws": WS, **chosen, **evaluate(model, test, ws=[[*WS, w] for w in own])}
    found["verdict"] = verdicts(found["gain_interval"], "harms", "dead", "improves")
    by_margin = verdicts(
        found["margin_interval"], -1, 0, 1
    )  # of w* - 1, on the test puzzles; both must agree
    pairs = zip(by_margin, chosen["w_star"], strict=True)
    found["step_size"] = [SIZES[sign if sign * (w - 1) > 0 else 0] for sign, w in pairs]
    alive = [s for s, verdict in zip(model.cfg.thinks, found["verdict"], strict=True) if verdict != "dead"]
    found["summary"], found["halting"] = (
        summary(found["verdict"]),
        compare_halting(model, test, chosen["halt"]),
    )
    dead = [s for s in model.cfg.thinks if s not in alive]
    if alive and dead:  # leaving them all out would leave no answer
        full, cut = (answer(model, test.x, steps)[0] for steps in (model.cfg.thinks, alive))
        before, after = (solves(TASKS[model.cfg.task], test, answers) for answers in (full, cut))
        counts = {"changed": (full != cut).any(1), "lost": before & ~after, "won": after & ~before}
        found["cut"] = {"steps": dead, **{name: rows.sum().item() for name, rows in counts.items()}}
    return found


def think_longer(model: LoopedModel, cells: int = 30_000) -> dict:
    """{size: what `evaluate` finds in 4 N_sup steps}, on test puzzles of the model's size and of larger ones.

    Of every size so many puzzles that they have about `cells` cells, and 5 at least.
    """
    cfg, steps, task = model.cfg, range(1, 4 * model.cfg.n_sup + 1), TASKS[model.cfg.task]
    larger = [size for size in (15, 21, 31) if size > cfg.size and size in task.sizes and cfg.mixer != "mlp"]
    larger = [] if cfg.data else larger
    found = {}
    for size in [cfg.size, *larger]:
        other = resized(model, size)
        puzzles = task.make(other.cfg, max(5, cells // size**2), "test").to(model.y0.device)
        found[size] = {"puzzles": len(puzzles), **evaluate(other, puzzles, steps)}
    return found


# ------------------------------------------------------------------------------------------------------------
# §8  More tasks: the same few functions for sudoku and n queens; puzzles from text, from CSV files and of ARC

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of a sudoku -> rows and columns of its boxes


def units(size: int) -> torch.Tensor:
    """Rows, columns and boxes of a sudoku: 1 where cell l belongs to unit u, [3 size, L]."""
    (height, width), cell = BOXES[size], torch.arange(size**2)
    row, col = cell // size, cell % size
    box = row // height * height + col // width
    return torch.cat([F.one_hot(index, size).T for index in (row, col, box)]).float()


def digits(x: torch.Tensor, size: int) -> torch.Tensor:
    """1 where digit d stands in a cell: tokens [N, L], 0 for a blank, -> [N, L, size]."""
    return F.one_hot(x.long(), size + 1)[..., 1:].float()


def sudoku_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] solve their sudokus x [B, L] (tokens): [B] bool. No label is consulted.

    Solved: the given digits stand, and every row, column and box has every digit once.
    """
    x, answer = x.flatten(1), answer.flatten(1)
    size = math.isqrt(x.shape[1])
    valid = answer <= size  # a mask token is no digit
    once = units(size).to(x.device) @ digits(answer.where(valid, 0), size) == 1  # [B, 3 size, size]
    return ((x == 0) | (answer == x)).all(1) & once.all((1, 2))


def propagate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One round of constraint propagation on sudokus x [N, L].

    Returns x with all cells filled that have one possible digit only, or the only place of a digit in some
    unit; the digits `free` for each blank [N, L, size] before that; and which x contradict the rules [N].
    """
    size = math.isqrt(x.shape[1])
    U = units(size)
    has = U @ digits(x, size)  # [N, units, size]: how often a unit has a digit
    free = (x == 0)[..., None] & (U.T @ has == 0)
    places = U @ free.float()  # [N, units, size]: cells of the unit where the digit may go
    single = free & ((free.sum(-1, keepdim=True) == 1) | (U.T @ (places == 1).float() > 0))
    filled = torch.where(single.any(-1), single.int().argmax(-1) + 1, x).to(x.dtype)
    nowhere = (has + places == 0).any((1, 2)) | ((x == 0) & ~free.any(-1)).any(1)
    return filled, free, nowhere | (has > 1).any((1, 2))


def sudoku_grids(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random solved sudokus [count, L] uint8: guess a digit, propagate, and begin anew where that fails.

    Every eighth is found so; the others are views of it, with digits, rows and columns exchanged at random.
    """
    x = torch.zeros(-(-count // 8), size**2, dtype=torch.uint8)
    live = torch.arange(len(x))
    while len(live):
        now = x[live]
        filled, free, broken = propagate(now)
        filled[broken] = 0
        stuck = ((filled == now).all(1) & ~broken).nonzero()[:, 0]
        options = free[stuck].sum(-1) + torch.rand(now[stuck].shape, generator=generator)
        cell = torch.where(now[stuck] == 0, options, math.inf).argmin(1)  # one with the fewest options
        choice = torch.multinomial(free[stuck, cell].float(), 1, generator=generator)[:, 0] + 1
        filled[stuck, cell] = choice.to(torch.uint8)
        x[live] = filled
        live = live[~sudoku_solved(filled, filled)]
    return exchange(x.repeat_interleave(8, 0)[:count], generator)


def exchanges(N: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random symmetries of sudokus: which cell comes to each [N, L], and the digit for each old one [N, V].

    Digits, bands, stacks, and rows and columns within these are permuted.
    """

    def order(step):  # [N, size]: groups of `step` lines are permuted, and the lines in each group
        groups = torch.rand(N, size // step, generator=generator).argsort(1).repeat_interleave(step, 1)
        return (groups + torch.rand(N, size, generator=generator)).argsort(1)

    height, width = BOXES[size]
    cell = order(height)[:, :, None] * size + order(width)[:, None]  # [N, size, size]
    new = F.pad(torch.rand(N, size, generator=generator).argsort(1) + 1, (1, 0))  # a blank stays one
    return cell.flatten(1), new


def exchange(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sudokus [N, L], each in one of the `exchanges`."""
    cell, new = exchanges(len(y), math.isqrt(y.shape[1]), generator)
    return new.gather(1, y.gather(1, cell).long()).to(y.dtype)


def other_solutions(x: torch.Tensor, y: torch.Tensor, most: float = math.inf) -> torch.Tensor | None:
    """For sudokus x [N, L] with a solution y each: another solution, or y where there is no other. [N, L]

    A complete search: propagate, then try all digits of the blank with the fewest. None once it has
    looked at more than `most` boards.
    """
    other, boards, owner = y.clone(), x.clone(), torch.arange(len(x))
    while len(boards):
        if most < 0:
            return None
        last = slice(max(0, len(boards) - 3000), None)  # the newest first, so that memory stays bounded
        now, of = boards[last], owner[last]
        most -= len(now)
        filled, free, broken = propagate(now)
        found = sudoku_solved(now, now) & (now != y[of]).any(1)
        other[of[found]] = now[found]
        going = ~broken & (now == 0).any(1)
        moved = (filled != now).any(1)
        stuck = (going & ~moved).nonzero()[:, 0]
        cell = torch.where(now[stuck] == 0, free[stuck].sum(-1), 99).argmin(1)
        which, digit = free[stuck, cell].nonzero(as_tuple=True)
        branches = now[stuck[which]]
        branches[torch.arange(len(which)), cell[which]] = (digit + 1).to(x.dtype)
        on = going & moved
        boards = torch.cat([boards[: last.start], filled[on], branches])
        owner = torch.cat([owner[: last.start], of[on], of[stuck[which]]])
        open_ = (other[owner] == y[owner]).all(1)
        boards, owner = boards[open_], owner[open_]
    return other


def solve_sudokus(x: torch.Tensor, y: torch.Tensor) -> Puzzles:
    """Sudokus x [N, L] with their solutions y: cells come in the order in which propagation fills them.

    What propagation leaves open comes in one last round.
    """
    order, now, r = torch.zeros_like(x, dtype=torch.int16), x, 0
    while ((new := propagate(now)[0]) != now).any():
        r += 1
        order[new != now] = r
        now = new
    return Puzzles(x, y, x, torch.where(now == 0, order.amax(1, keepdim=True) + 1, order))


def make_sudokus(count: int, size: int = 9, blanks: int = 40, split: str = "train", seed: int = 0) -> Puzzles:
    """`count` sudokus with 1 to `blanks` empty cells and one solution each, of the given split.

    Cells are emptied at random; as long as there is a second solution, a cell that tells the two apart is
    given back. Its solution decides a sudoku's split, and splits have nothing in common but by chance.
    """
    generator = torch.Generator().manual_seed(seed + 2**32 * list(SPLITS).index(split))
    y = draw_split(count, size, split, lambda n: sudoku_grids(n, size, generator), lambda y: y)
    many = torch.randint(1, blanks + 1, (count, 1), generator=generator)
    x = torch.where(torch.rand(y.shape, generator=generator).argsort(1).argsort(1) < many, 0, y)
    live = torch.arange(count)
    while len(live):
        differs = other_solutions(x[live], y[live]) != y[live]
        live, cell = live[differs.any(1)], differs[differs.any(1)].int().argmax(1)
        x[live, cell] = y[live, cell]
    return solve_sudokus(x, y)


EMPTY, QUEEN = range(2)


@functools.cache
def placements(size: int) -> torch.Tensor:
    """All ways to place `size` queens so that none attacks another: [K, L] uint8, in reading order."""
    columns = torch.zeros(1, 0, dtype=torch.long)  # of the queens in the rows so far
    for row in range(size):
        columns = torch.cat(
            [columns.repeat_interleave(size, 0), torch.arange(size).repeat(len(columns))[:, None]], 1
        )
        apart = (columns[:, -1:] - columns[:, :-1]).abs()  # [.., row]
        columns = columns[((apart != 0) & (apart != torch.arange(row, 0, -1))).all(1)]
    return F.one_hot(columns, size).flatten(1).to(torch.uint8)


def make_queens(count: int, size: int = 8, split: str = "train", seed: int = 0) -> Puzzles:
    """`count` boards with 1 to size - 1 queens of a valid placement, to be completed, of the given split.

    The label is the first completion in reading order, so that the same question always has the same answer;
    others are as good. Its queens decide a board's split, and symmetric boards share it. A solver sets the
    queens row by row.
    """
    generator, every = torch.Generator().manual_seed(seed), placements(size)

    def draw(n):  # so many queens of a placement that some stay and some go
        y = every[torch.randint(len(every), (n,), generator=generator)]
        rank = torch.where(y == QUEEN, torch.rand(y.shape, generator=generator), 2.0).argsort(1).argsort(1)
        return y * (rank < torch.randint(1, size, (n, 1), generator=generator))

    x = draw_split(count, size, split, draw, lambda x: x)
    y = every[((x.float() @ every.T.float()) == x.sum(1, keepdim=True)).int().argmax(1)]
    new = y != x
    order = new.view(count, size, size).any(2).cumsum(1).repeat_interleave(size, 1) * new
    return Puzzles(x, y, x, order.to(torch.int16))


def queens_solved(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Which answers [B, L] complete their boards x [B, L] (tokens): [B] bool. No label is consulted.

    Solved: the given queens stand, each row and column has one queen, and no diagonal has two.
    """
    x, answer = x.flatten(1), answer.flatten(1)
    board = grid(answer == QUEEN).int()  # [B, H, W]
    diagonals = range(1 - board.shape[1], board.shape[1])
    sums = [b.diagonal(k, 1, 2).sum(1) for b in (board, board.flip(2)) for k in diagonals]  # each [B]
    lines = (board.sum(1) == 1).all(1) & (board.sum(2) == 1).all(1)
    return (answer <= QUEEN).all(1) & (answer >= x).all(1) & lines & (torch.stack(sums) <= 1).all(0)


BOARD = {"mixer": "mlp", "scheme": "dis-margin", "batch_size": 8, "pick": 1}
TASKS["sudoku"] = Task(
    from_files_or(
        lambda cfg, count, split, seed: make_sudokus(
            count, cfg.size, cfg.blanks or cfg.size**2 // 2, split, seed
        )
    ),
    sudoku_solved,
    lambda size: {"blank": "#ffffff", **{str(d): "#f4f1ea" for d in range(1, size + 1)}},
    tuple(BOXES),
    {"size": 9, **BOARD, "pace": 1},
    " 123456789",
    BOXES.get,
    letters=".123456789",
    alias="0.",
    fault=lambda x: sudoku_fault(x),
    peek=lambda *of: csv_size(*of),
    solver=solve_sudokus,
    views=lambda cfg: sudoku_views(cfg),
)
TASKS["nqueens"] = Task(
    lambda cfg, count, split, seed=0: make_queens(count, cfg.size, split, seed),
    queens_solved,
    lambda size: {"empty": "#f4f1ea", "queen": "#56b4e9"},
    range(5, 11),  # of the few boards of 4 x 4, none is in the split `valid`
    {"size": 8, **BOARD, "pace": 2, "train_size": 7200},
    " ♛",
    letters=".Q",
    alias="♛Q",
    fault=lambda x: queens_fault(x),
)

# ------------------------------------------------------------------------------------------------------------
# Puzzles of your own, as text


def clash(x: torch.Tensor, peers: torch.Tensor) -> tuple[int, int] | None:
    """Row and column of the first cell of x [H, W] with the token, not 0, of an earlier one of its peers."""
    cells = x.flatten()  # [L]; peers [L, L]
    bad = (peers & (cells[:, None] == cells) & (cells != 0)).tril(-1).any(1)
    return divmod(bad.int().argmax().item(), x.shape[1]) if bad.any() else None


def maze_fault(x: torch.Tensor) -> tuple | None:
    """Row, column and what is wrong with a maze x [H, W]: it needs one start, one goal, and a way between."""
    if path := (x == PATH).nonzero().tolist():
        return *path[0], "an o; must be of answers only"
    for token, name in ((START, "S"), (GOAL, "G")):
        at = (x == token).nonzero().tolist()
        if len(at) != 1:
            return (0, 0, f"no {name}; must be one") if not at else (*at[1], f"a second {name}; must be one")
    reached, free = (x == START)[None], (x != WALL)[None]
    while (more := free & ~reached & (neighbours(reached) > 0)).any():
        reached = reached | more
    return None if reached[0][x == GOAL].all() else (*at[0], "no way leads from S to this G")


def sudoku_fault(x: torch.Tensor) -> tuple | None:
    """Row, column and what is wrong with a sudoku x [H, W]: givens in conflict, or no solution."""
    U = units(len(x))
    if at := clash(x, U.T @ U > 0):
        return *at, f"{x[at]} stands in this row, column or box already"
    found = other_solutions(x.view(1, -1), torch.zeros_like(x).view(1, -1), most=500)  # a second
    return (0, 0, "this sudoku has no solution") if found is not None and not found.any() else None


def queens_fault(x: torch.Tensor) -> tuple | None:
    """Row, column and what is wrong with a board x [H, W]: queens attack each other, or none can be added."""
    cell = torch.arange(x.numel())
    rows, cols = (v[:, None] - v for v in (cell // len(x), cell % len(x)))  # [L, L]
    if at := clash(x, (rows == 0) | (cols == 0) | (rows.abs() == cols.abs())):
        return *at, "another queen attacks this one"
    fits = (placements(len(x)) >= x.flatten()).all(1).any()
    return None if fits else (0, 0, "these queens cannot be completed")


def boards(text: str, task: Task) -> list:
    """The puzzles in a text: each a list of rows, and a row a list of cells (line, column, character).

    Empty lines part them. Except in mazes, where a space is an open cell, spaces, | and lines of - + = are
    decoration, and a line longer than any board holds a whole one.
    """
    decoration, found = "" if " " in task.letters else " \t|", [[]]
    for number, line in enumerate(text.splitlines(), 1):
        row = [(number, col, c) for col, c in enumerate(line, 1) if c not in decoration]
        if decoration and row and {c for *_, c in row} <= set("-+="):
            continue
        if decoration and len(row) > max(task.sizes):
            side = math.isqrt(len(row))
            whole = side**2 == len(row) and side in task.sizes
            found += [[row[i : i + side] for i in range(0, len(row), side)] if whole else [row], []]
        elif row:
            found[-1].append(row)
        else:
            found.append([])
    return [rows for rows in found if rows]


def tokens_of(rows: list, cfg: Config) -> torch.Tensor:
    """The puzzle [H, W] uint8 in rows of `boards`. Raises `UserError` with line and column if it is none."""
    task, H, W, first = TASKS[cfg.task], len(rows), len(rows[0]), rows[0][0][0]
    letters = task.letters[: len(task.legend(cfg.size))]
    for row in rows:
        for line, col, c in row:
            if c not in (known := letters + task.alias[:1]):
                raise UserError(f"line {line}, column {col}: {c!r}; must be one of {known!r}")
        if len(row) != W:
            col = row[min(len(row), W + 1) - 1][1]
            raise UserError(f"line {line}, column {col}: {len(row)} cells; must be {W}, as in line {first}")
    if (task.glyphs or cfg.mixer == "mlp") and (H, W) != (cfg.size, cfg.size):
        right = f"{cfg.size} x {cfg.size}," + f" or {cfg.size**2} in one line," * bool(task.glyphs)
        raise UserError(f"line {first}: {H} x {W} cells; must be {right} as in training")
    read = str.maketrans(task.alias[:1], task.alias[1:])
    cells = [[letters.index(c.translate(read)) for *_, c in row] for row in rows]
    return torch.tensor(cells, dtype=torch.uint8)


ALIVE = 0.01  # a step is dead for --solve if it changes no probability by more than this


def think_aloud(model: LoopedModel, x: torch.Tensor) -> tuple[list, str]:
    """[(caption, answer [H, W], changed cells [H, W]), ..] for a puzzle x [H, W] and each step; how it went.

    Without --think, the model may take four times its steps in training, and stops at the first dead one.
    What surrounds a maze as a rim of walls is no part of what the model sees: it was trained without.
    """
    cfg, inner, steps, alive = model.cfg, (slice(None), slice(None)), model.cfg.thinks, 0
    if cfg.task == "maze" and cfg.mixer != "mlp":
        inner = tuple(slice(i.min(), i.max() + 1) for i in (x != WALL).nonzero(as_tuple=True))
    if not cfg.think and not cfg.step_index:
        steps = range(1, 4 * cfg.n_sup + 1)
    model, now = resized(model, shape=tuple(x[inner].shape)), x.to(model.y0.device)
    frames = [("puzzle", x, torch.zeros_like(x, dtype=torch.bool))]
    for s, step in enumerate(rollout(model, now[inner].reshape(1, -1), steps), 1):
        last, now = now, now.clone()
        now[inner] = step.logits_c.argmax(-1).view(model.shape).to(now.dtype)
        moved = largest_change(step.logits_u, step.logits_c).max().item()
        alive += moved > ALIVE
        frames.append((f"step {s}: {(now != last).sum()} changed", now.cpu(), (now != last).cpu()))
        if moved <= ALIVE and not cfg.think and not cfg.step_index:
            break
    solved = TASKS[cfg.task].solved(x[None], now[None].cpu()).item()
    how, sure = "solved" if solved else "not solved", step.logits_c.softmax(-1).amax(-1).min()
    return frames, f"{how}, {alive} of {s} steps alive, confidence {sure:.1%}"


def picture(cfg: Config, tokens: torch.Tensor, changed: torch.Tensor) -> str:
    """Tokens [H, W] as text, "?" where one is masked; a ' behind a cell says that it has `changed`."""
    task = TASKS[cfg.task]
    letters = task.letters[: len(task.legend(cfg.size))] + "?"
    rows = zip(tokens.tolist(), changed.tolist(), strict=True)
    cells = [[letters[t] + " '"[c] for t, c in zip(*row, strict=True)] for row in rows]
    return "\n".join("".join(row).rstrip() for row in cells)


def solve(given: dict, source: str, checkpoint: str | None, interrupts: list) -> int:
    """Solve the puzzles in the file `source`, or in standard input for "-", and print how. The exit code."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise UserError(f"--solve {source}: {why}; must be a text file with puzzles, or -") from e
    if checkpoint is None:
        name = given.get("task", Config.task)
        if name not in (able := [name for name, task in TASKS.items() if task.letters]):
            raise UserError(f"--task {name}: must be one of {', '.join(able)} with --solve")
        found = sorted(Path("runs").glob(f"{name}-*/model.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"--solve {source}: no runs/{name}-*/model.pt; train one, or give --checkpoint")
        checkpoint = str(found[-1])
    try:
        model, _ = load_checkpoint(checkpoint, **given)
    except UserError as e:
        raise UserError(str(e).replace("--eval", "--checkpoint")) from e
    cfg, task, bad = model.cfg, TASKS[model.cfg.task], 0
    if not (every := boards(text, task)):
        raise UserError(f"--solve {source}: empty; must be a text file with puzzles, or -")
    if not task.letters:
        raise UserError(f"--solve {source}: must go with --task maze, sudoku or nqueens, not {cfg.task}")
    out, model = prepare_folder(Path(cfg.out)) if cfg.out else None, model.to(pick_device(cfg.device))
    print(f"{len(every)} of task {cfg.task}, by {checkpoint}; ' marks what a step changed")
    for k, rows in enumerate(every, 1):
        if interrupts:
            return 130
        try:
            x = tokens_of(rows, cfg)
            if fault := task.fault(x):
                line, col, _ = rows[fault[0]][fault[1]]
                raise UserError(f"line {line}, column {col}: {fault[2]}")
        except UserError as e:
            print(f"lrpi: {source}, {e}", file=sys.stderr)
            bad += 1
            continue
        frames, found = think_aloud(model, x)
        for caption, *cells in frames:
            print(f"\n{caption}\n{picture(cfg, *cells)}", flush=True)
        print(f"\npuzzle {k}, line {rows[0][0][0]}: {found}")
        if out:
            names = draw_frames(cfg, frames, f"{cfg.task} {k}: {found}", out / f"puzzle-{k}", "changed")
            print(f"wrote {', '.join(names)}")
    return 2 if bad else 0


# ------------------------------------------------------------------------------------------------------------
# Puzzles from files, in symmetric views: Sudoku-Extreme and Maze-Hard as CSV


class Views:
    """N puzzles, each in `count` symmetric views made when asked for: row v N + i is view v of puzzle i.

    `view` takes puzzles [B], the `tables`, the numbers v [B] and pseudo-random numbers [B] in [0, 1), the
    same whenever the same row is asked for. View 0 is the puzzle as it is, except that arc shifts it.
    """

    def __init__(self, puzzles: Puzzles, view: Callable, tables: tuple, count: int):
        self.puzzles, self.view, self.tables, self.count, self.x = puzzles, view, tables, count, puzzles.x

    def to(self, device) -> "Views":
        return Views(self.puzzles.to(device), self.view, [t.to(device) for t in self.tables], self.count)

    def __len__(self) -> int:
        return len(self.puzzles) * self.count

    def __getitem__(self, rows: torch.Tensor) -> Puzzles:
        u = (rows * 2654435761 >> 4 & 0xFFFFFF).float() / 2**24  # Knuth's multiplicative hash
        return self.view(self.puzzles[rows % len(self.puzzles)], *self.tables, rows // len(self.puzzles), u)


def dihedral(grid, k: int, inverse: bool = False):
    """One of the 8 symmetries of a grid [H, W], or its inverse: bits of k flip rows, columns, transpose."""
    grid = grid.T if inverse and k & 4 else grid
    grid = np.flip(grid, 0) if k & 1 else grid
    grid = np.flip(grid, 1) if k & 2 else grid
    return grid.T if k & 4 and not inverse else grid


def maze_views(cfg: Config) -> tuple:
    """The 8 symmetries of mazes, for `Views`."""
    index = np.arange(cfg.size**2).reshape(cfg.size, -1)
    cells = torch.from_numpy(np.stack([dihedral(index, k).flatten() for k in range(8)]))  # [8, L]
    return lambda puzzles, cells, v, u: viewed(puzzles, cells[v % 8]), [cells]


def sudoku_views(cfg: Config, many: int = 4096) -> tuple:
    """Symmetries of sudokus drawn at random, for `Views`: as `exchange`, and transposed where boxes allow."""
    cell, new = exchanges(many, cfg.size, torch.Generator().manual_seed(0))
    if BOXES[cfg.size][0] == BOXES[cfg.size][1]:
        cell[::2] = grid(cell[::2]).mT.flatten(1)
    cell[0], new[0] = torch.arange(cell.shape[1]), torch.arange(new.shape[1])

    def view(puzzles, cell, new, v, u):
        k = torch.where(v == 0, 0, 1 + (u * (many - 1)).long())
        return viewed(puzzles, cell[k], new[k])

    return view, [cell, new]


def viewed(puzzles: Puzzles, cell: torch.Tensor, new: torch.Tensor | None = None) -> Puzzles:
    """Puzzles whose cell l is what `cell` [B, L] says of the old ones, with `new` [B, V] for old tokens."""
    x, y, draft = (tokens.gather(1, cell) for tokens in (puzzles.x, puzzles.y, puzzles.draft))
    if new is not None:
        x, y, draft = (new.gather(1, tokens.long()).to(tokens.dtype) for tokens in (x, y, draft))
    return Puzzles(x, y, draft, puzzles.order.gather(1, cell))


def csv_rows(path: Path, many: int = 20_000):
    """Questions and answers of a CSV file in chunks: lists of (line number, question, answer)."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            if not {"question", "answer"} <= {*header}:
                found = ",".join(header)[:50]
                raise UserError(f"--data {path}, line 1: {found!r}; must be source,question,answer,rating")
            columns, chunk = [header.index("question"), header.index("answer")], []
            for row in filter(None, reader):  # not empty lines
                if len(row) != len(header):
                    raise UserError(
                        f"--data {path}, line {reader.line_num}: {len(row)} columns; must be {len(header)}"
                    )
                chunk.append((reader.line_num, *(row[c] for c in columns)))
                if len(chunk) == many:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk
    except OSError as e:
        raise UserError(f"--data {path}: {e.strerror}; must be a CSV file of questions and answers") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"--data {path}: not text ({e}); must be a CSV file of questions and answers") from e


def csv_size(folder: str, views: int) -> dict:
    """What the first row of train.csv says of Config's values. Raises `UserError` if a file is not there."""
    for name in ("test.csv", "train.csv"):
        for (_, question, _), *_ in itertools.islice(csv_rows(Path(folder) / name, 1), 1):
            size = math.isqrt(len(question))
            if size**2 != len(question):
                found = f"question of {len(question)} characters"
                raise UserError(f"--data {Path(folder) / name}, line 2: {found}; must be those of a square")
            break
        else:
            raise UserError(f"--data {Path(folder) / name}: has no rows; must have some")
    return {"size": size, "pick": 1}


def tokenised(texts: list, lines: list, what: str, cfg: Config) -> np.ndarray:
    """Texts of L letters as tokens [N, L] uint8. Raises `UserError` with line and column if one is not."""
    task, L = TASKS[cfg.task], cfg.size**2
    letters, code = task.letters[: len(task.legend(cfg.size))], np.full(256, 255, np.uint8)
    code[np.frombuffer(letters.encode(), np.uint8)] = np.arange(len(letters))
    code[ord(task.alias[0])] = letters.index(task.alias[1])
    for text, line in zip(texts, lines, strict=True):
        if len(text) != L:
            raise UserError(
                f"line {line}: {what} of {len(text)} characters; must be {L}, for --size {cfg.size}"
            )
    tokens = code[np.frombuffer("".join(texts).encode("latin-1", "replace"), np.uint8)].reshape(-1, L)
    for i, j in np.argwhere(tokens == 255)[:1]:
        found = texts[i][j]
        raise UserError(f"line {lines[i]}: {what}, character {j + 1}: {found!r}; must be one of {letters!r}")
    return tokens


def read_csv(cfg: Config, count: int, split: str, seed: int = 0) -> Puzzles | Views:
    """`count` puzzles of --data, drawn at random, or all: test.csv, or train.csv with one in 16 for `valid`.

    The file is read in chunks, and only what is kept is held, by reservoir sampling (Vitter's algorithm R).
    Training puzzles come in `Views`, as many as get seen, cfg.views at most.
    """
    path = Path(cfg.data) / ("test.csv" if split == "test" else "train.csv")
    task, L, size = TASKS[cfg.task], cfg.size**2, path.stat().st_size if path.exists() else 0
    rng, seen = np.random.default_rng([seed, list(SPLITS).index(split)]), 0
    kept = np.empty((min(count, size // (2 * L) + 1), 2, L), np.uint8)  # memory is taken as it fills
    for chunk in csv_rows(path):
        if split != "test":
            chunk = [row for row in chunk if (zlib.crc32(row[1].encode()) % 16 == 0) == (split == "valid")]
        at = np.arange(seen, seen := seen + len(chunk))
        at = np.where(at < len(kept), at, rng.integers(0, at + 1))
        if not (at < len(kept)).any():
            continue
        lines, x, y = zip(*(chunk[i] for i in np.flatnonzero(at < len(kept))), strict=True)
        try:
            tokens = [tokenised(*of, cfg) for of in ((x, lines, "question"), (y, lines, "answer"))]
            good = task.solved(*map(torch.from_numpy, tokens))
            if not good.all():
                raise UserError(
                    f"line {lines[(~good).int().argmax()]}: the answer does not solve the question"
                )
        except UserError as e:
            raise UserError(f"--data {path}, {e}") from e
        kept[at[at < len(kept)]] = np.stack(tokens, 1)
    if not seen:
        raise UserError(f"--data {path}: no rows for --task {cfg.task}, {split}; must have more")
    x, y = torch.from_numpy(kept[:seen]).unbind(1)
    puzzles = Puzzles(x, y, x, x.new_zeros(1, dtype=torch.int16).expand(x.shape))
    if cfg.target == "edits":  # rounds are no more than cells, so most fit into a byte
        puzzles.order, drafts = torch.empty(x.shape, dtype=torch.uint8 if L < 256 else torch.int16), []
        for i in range(0, len(x), 5000):
            part = task.solver(x[i : i + 5000], y[i : i + 5000])
            puzzles.order[i : i + 5000] = part.order
            drafts += [part.draft] if part.draft is not part.x else []
        puzzles.draft = torch.cat(drafts) if drafts else x
    if split != "train":
        return puzzles
    most = 10**7 if cfg.budget_seconds else cfg.examples + cfg.batch_size
    return Views(puzzles, *task.views(cfg), min(cfg.views, -(-most // len(x))))


# ------------------------------------------------------------------------------------------------------------
# ARC-AGI (arxiv.org/abs/1911.01547): a 30 x 30 canvas, after 16 positions that spell the number of the puzzle

CANVAS, PREFIX, PAD, BORDER, BLACK = 30, 16, 0, 1, 2  # colour c is token BLACK + c


def read_json(path: Path) -> dict:
    """The object in a JSON file, or a `UserError`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise UserError(f"--data {path}: {e.strerror}; must be a JSON file of ARC") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"--data {path}: not JSON ({e}); must be a JSON file of ARC") from e
    return of_arc(content, dict, f"--data {path}")


def of_arc(value, kind: type, where: str, key: str | None = None):
    """`value`, or value[key], if it is of this kind. Raises `UserError` if it is not."""
    if key is not None:
        value, where = of_arc(value, dict, where).get(key), f"{where}: {key}"
    if not isinstance(value, kind):
        raise UserError(
            f"{where}: {json.dumps(value)[:40]}; must be {'an object' if kind is dict else 'a list'}"
        )
    return value


def arc_grid(value, where: str) -> np.ndarray:
    """A grid [H, W] uint8 of colours 0 to 9. Raises `UserError` that says in which cell it is none."""
    for i, row in enumerate(of_arc(value, list, where), 1):
        if len(of_arc(row, list, f"{where}, row {i}")) != len(value[0]):
            raise UserError(f"{where}, row {i}: {len(row)} cells; must be {len(value[0])}, as in row 1")
        for j, colour in enumerate(row, 1):
            if type(colour) is not int or not 0 <= colour <= 9:
                raise UserError(f"{where}, row {i}, column {j}: {colour!r}; must be a colour from 0 to 9")
    size = len(value), len(value[0]) if value else 0
    if not (1 <= min(size) and max(size) <= CANVAS):
        raise UserError(f"{where}: {size[0]} x {size[1]} cells; must be from 1 x 1 to {CANVAS} x {CANVAS}")
    return np.array(value, np.uint8)


@functools.cache
def read_arc(folder: str) -> tuple[dict, set]:
    """{task: (its demonstrations and tests, pairs of grids; None: unknown)}, and the tested tasks.

    Those of *training_challenges.json are tested only if there is no other file of challenges.
    """
    tasks, tested, files = {}, set(), sorted(Path(folder).glob("*challenges.json"))
    if not files:
        raise UserError(f"--data {folder}: no *challenges.json; must be a folder with the files of ARC")
    for path in files:
        answers = path.with_name(path.name.replace("challenges", "solutions"))
        solutions = read_json(answers) if answers.exists() else {}
        for name, task in read_json(path).items():
            where, known = f"--data {path}, task {name}", solutions.get(name)
            train, test = (of_arc(task, list, where, kind) for kind in ("train", "test"))
            if known is not None and len(of_arc(known, list, f"--data {answers}, task {name}")) != len(test):
                raise UserError(f"--data {answers}, task {name}: {len(known)} grids; must be {len(test)}")
            asked = [arc_grid(*pick(pair, "input", f"{where}, test {i}")) for i, pair in enumerate(test, 1)]
            there = f"--data {answers}, task {name}, test"
            right = [arc_grid(g, f"{there} {i}") for i, g in enumerate(known or [], 1)] or [None] * len(test)
            shown = [
                tuple(arc_grid(*pick(pair, side, f"{where}, train {i}")) for side in ("input", "output"))
                for i, pair in enumerate(train, 1)
            ]
            if known is None and name in tasks and len(tasks[name][1]) == len(test):  # as in another file
                right = [y for _, y in tasks[name][1]]
            tasks[name] = shown, list(zip(asked, right, strict=True))
            if "training" not in path.name:
                tested.add(name)
    if not tasks:
        raise UserError(f"--data {files[0]}: no tasks; must have some")
    return tasks, tested or {*tasks}


def pick(pair, side: str, where: str) -> tuple:
    """The input or output of a pair, and where it stands."""
    return of_arc(pair, list, where, side), f"{where} {side}"


def arc_size(folder: str, views: int) -> dict:
    """What the files say of Config's values."""
    return {"identifiers": views * len(read_arc(folder)[0])}


def spell(numbers: torch.Tensor) -> torch.Tensor:
    """The decimal digits [N, PREFIX] uint8 of numbers [N]: what `spelt` reads."""
    return (numbers[:, None] // powers(PREFIX, numbers.device) % 10).to(torch.uint8)


def arc_puzzles(pairs: list) -> Puzzles:
    """(identifier, input, output) as puzzles: each grid in the corner of its canvas, yet without a border."""

    def canvas(g):
        return np.pad(g + BLACK, ((0, CANVAS - len(g)), (0, CANVAS - len(g[0])))).flatten()

    numbers = spell(torch.tensor([number for number, *_ in pairs], dtype=torch.long))
    x, y = (torch.from_numpy(np.stack([canvas(pair[i]) for pair in pairs])) for i in (1, 2))
    x, y = torch.cat([numbers, x], 1), torch.cat([numbers, y], 1)
    return Puzzles(x, y, x, torch.zeros(1, dtype=torch.int16).expand(x.shape))


def arc_views(cfg: Config) -> tuple:
    """Symmetries and colours of all identifiers, drawn at random: black stays; view 0 is plain."""
    generator, plain = torch.Generator().manual_seed(0), torch.arange(cfg.identifiers) % cfg.views == 0
    turns = torch.randint(8, (cfg.identifiers,), generator=generator).masked_fill(plain, 0)
    colours = torch.rand(cfg.identifiers, 9, generator=generator).argsort(1)
    colours = F.pad(torch.where(plain[:, None], torch.arange(9), colours) + BLACK + 1, (3, 0)).to(torch.uint8)
    colours[:, :3] = torch.tensor([PAD, BORDER, BLACK])
    return arc_view, [turns.to(torch.uint8), colours]


def arc_view(puzzles: Puzzles, turns, colours, v, u) -> Puzzles:
    """View v [B] of each puzzle, shifted on the canvas by a share u [B] of the room that there is."""
    number = spelt(puzzles.x[:, :PREFIX]) + v
    k, new = turns[number].view(-1, 1, 1), colours[number]
    x, y = (puzzle[:, PREFIX:].unflatten(1, (CANVAS, CANVAS)) for puzzle in (puzzles.x, puzzles.y))
    sizes = [torch.stack([(g[:, :, 0] > BORDER).sum(1), (g[:, 0] > BORDER).sum(1)]) for g in (x, y)]  # [2, B]
    room = CANVAS + 1 - torch.maximum(*sizes)
    room = torch.where(k[:, 0, 0] & 4 > 0, room.flip(0), room)
    shift = (torch.stack([u, u * 997 % 1]) * room).long()[..., None, None]  # [2, B, 1, 1]
    x, y = (
        torch.cat([spell(number), place(g, size, k, new, shift)], 1)
        for g, size in zip((x, y), sizes, strict=True)
    )
    return Puzzles(x, y, x, puzzles.order)


def place(g, size, k, new, shift) -> torch.Tensor:
    """Grids in the corners of g [B, 30, 30], of `size` [2, B], as view k with `new` [B, V] tokens: [B, 900].

    The border stands right of the grid and below it, where the canvas does not end there.
    """
    (h, w), at = size[..., None, None], torch.arange(CANVAS, device=g.device)
    row, col = at[:, None] - shift[0], at - shift[1]  # [B, 30, 30] after broadcasting: places in the view
    turned = k & 4 > 0
    H, W = torch.where(turned, w, h), torch.where(turned, h, w)
    inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
    border = (row >= 0) & (row <= H) & (col >= 0) & (col <= W) & ~inside
    i, j = torch.where(turned, col, row), torch.where(turned, row, col)
    i, j = torch.where(k & 1 > 0, h - 1 - i, i), torch.where(k & 2 > 0, w - 1 - j, j)
    old = g.flatten(1).gather(1, torch.where(inside, i * CANVAS + j, 0).flatten(1))
    return torch.where(inside.flatten(1), new.gather(1, old.long()), border.flatten(1).to(g.dtype))


def crop(canvas: np.ndarray) -> np.ndarray | None:
    """The largest rectangle of colours in the corner of an answer [30, 30], a grid; None if there is none."""
    width = np.minimum.accumulate((canvas >= BLACK).cumprod(1).sum(1))  # [30], of the first 1, 2, .. rows
    area = width * np.arange(1, CANVAS + 1)
    rows = area.argmax() + 1
    return canvas[:rows, : width[rows - 1]] - BLACK if area.max() else None


def make_arc(cfg: Config, count: int, split: str, seed: int = 0) -> Puzzles | Views:
    """Demonstrations to train on, in `Views`; `valid`: demonstrations as they are; `test`: the tests.

    As in the paper, demonstrations of tested tasks are trained on, and so are tests of all other tasks.
    """
    tasks, tested = read_arc(cfg.data)
    if cfg.identifiers != cfg.views * len(tasks):
        many = f"{len(tasks)} tasks with --views {cfg.views}"
        raise UserError(f"--data {cfg.data}: {many}; the model was made for {cfg.identifiers} in all")
    pairs = []
    for number, (name, (shown, asked)) in enumerate(tasks.items()):
        use = {"train": name not in tested, "valid": False, "test": name in tested}[split]  # its tests?
        of = (shown if split != "test" else []) + (asked if use else [])
        pairs += [(number * cfg.views, *pair) for pair in of if pair[1] is not None]
    if len(pairs) > count and split != "train":
        some = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
        pairs = [pairs[i] for i in sorted(some)]
    if not pairs:
        raise UserError(f"--data {cfg.data}: no outputs are known for {split}")
    puzzles, (view, tables) = arc_puzzles(pairs), arc_views(cfg)
    if split == "train":
        return Views(puzzles, view, tables, cfg.views)
    none = torch.zeros(len(puzzles), dtype=torch.long)
    return view(puzzles, *tables, none, none.float())


@torch.no_grad()
def arc_votes(model: LoopedModel, asked: list) -> list:
    """For every (identifier, input) the answers [(grid, confidence), ..] in cfg.votes views, mapped back.

    A confidence is the mean log-probability of the cells of the canvas.
    """
    cfg, votes, (view, tables) = model.cfg, [[] for _ in asked], arc_views(model.cfg)
    plain = arc_puzzles([(number, g, g) for number, g in asked])
    every = Views(plain, lambda p, *rest: view(p, *rest[:-1], torch.zeros_like(rest[-1])), tables, cfg.views)
    batch, (rank, N), cast = at_once(model, plain.x.shape[1], 32), processes(), []
    for rows in torch.arange(len(asked) * (min(cfg.votes, cfg.views) or cfg.views)).split(batch)[rank::N]:
        puzzles = every[rows].to(model.y0.device)
        for step in rollout(model, puzzles.x):
            pass
        sure, answers = step.logits_c[:, PREFIX:].log_softmax(-1).max(-1)  # [B, 900]
        numbers = spelt(puzzles.x[:, :PREFIX])
        each = (v.tolist() for v in (rows, numbers, sure.mean(1)))
        for row, number, c, canvas in zip(*each, answers.view(-1, CANVAS, CANVAS).cpu().numpy(), strict=True):
            found = crop(canvas)
            if found is not None:
                old = tables[1][number, BLACK:].argsort().numpy().astype(np.uint8)
                cast.append((row, dihedral(old[found], tables[0][number], True), c))
    if N > 1:
        dist.all_gather_object(shares := [None] * N, cast)
        cast = sorted(itertools.chain(*shares), key=lambda of: of[0])
    for row, found, c in cast:
        votes[row % len(asked)].append((found, c))
    return votes


def attempts(votes: list) -> list:
    """The two grids with most votes (grid, confidence), the more confident first where these are equal."""
    groups = {}
    for g, confidence in votes:
        groups.setdefault((g.shape, g.tobytes()), []).append((g, confidence))
    ranked = sorted(groups.values(), key=lambda of: (-len(of), -sum(c for _, c in of) / len(of)))
    return [of[0][0] for of in ranked[:2]]


def finish_arc(model: LoopedModel, out: Path) -> bool:
    """Print how many demonstrations the model reproduces; vote on the tests; write and score submission.json.

    Returns whether there was anything to score by.
    """
    cfg, (tasks, tested) = model.cfg, read_arc(model.cfg.data)
    shown = make_arc(cfg, 10**9, "valid").to(model.y0.device)
    answers, _ = answer(model, shown.x, batch=at_once(model, shown.x.shape[1], 32))
    exact = solves(TASKS["arc"], shown, answers).cpu().double().mean()
    print(f"{exact:.1%} of {len(shown)} demonstrations reproduced exactly")
    places = [
        (i, name, t) for i, name in enumerate(tasks) if name in tested for t in range(len(tasks[name][1]))
    ]
    votes = arc_votes(model, [(i * cfg.views, tasks[name][1][t][0]) for i, name, t in places])
    submission, right = {}, {}
    for (_, name, t), of in zip(places, votes, strict=True):
        tries = attempts(of) or [np.zeros((1, 1), np.uint8)]
        submission.setdefault(name, []).append(
            {f"attempt_{k + 1}": tries[min(k, len(tries) - 1)].tolist() for k in (0, 1)}
        )
        if (y := tasks[name][1][t][1]) is not None:
            right.setdefault(name, []).append([np.array_equal(g, y) for g in tries] + [False])
    if processes()[0] == 0:
        with replacing(out / "submission.json") as beside:
            beside.write_text(json.dumps(submission))
    views = min(cfg.votes, cfg.views) or cfg.views
    said = "no solutions to score by"
    if right:
        score = [
            np.mean([np.mean([any(of[:k]) for of in tests]) for tests in right.values()]) for k in (1, 2)
        ]
        said = f"pass@1 {score[0]:.1%}, pass@2 {score[1]:.1%} of {len(right)} tasks"
    print(f"{said}, by {views} votes for each of {len(places)} test grids: see submission.json")
    return bool(right)


ARC = ("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00")  # the colours in which these grids are shown
ARC += ("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25")
TASKS["arc"] = Task(
    make_arc,
    None,
    lambda size: {"pad": "#ffffff", "border": "#e0e0e0", **{str(c): colour for c, colour in enumerate(ARC)}},
    (CANVAS,),
    {"size": CANVAS, "target": "reveal", "views": 100, "pick": 1, "step_index": True, "train_size": 10**8},
    peek=arc_size,
    prefix=PREFIX,
    watched="demonstrations",
    finish=finish_arc,
)

# ------------------------------------------------------------------------------------------------------------
# §9  Figures (matplotlib is imported here and nowhere else)


def pyplot():
    """matplotlib.pyplot, drawing to files. Raises `UserError` where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("--figures: matplotlib is not installed; install it, or pass --no-figures") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@contextmanager
def figure(path: Path, title: str, rows: int, cols: int, size: tuple, xlabel: str = "latent step"):
    """A figure of rows x cols panels to draw in [rows, cols], which becomes the file `path` in the end."""
    plt = pyplot()
    fig, axes = plt.subplots(rows, cols, figsize=size, layout="constrained", squeeze=False)
    fig.suptitle(title)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel(xlabel if ax in axes[-1] else "")
    yield axes
    with replacing(path) as beside:
        fig.savefig(beside, dpi=110)
    plt.close(fig)


def percent(ax) -> None:
    """An axis of shares, from 0 to 100%."""
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


LABELS = {
    "exact": "puzzles solved",
    "cells": "cells right",
    "logp": "log π(y*), nats per cell",
    "gain": "gain in log π(y*), 95% interval",
    "margin": "advantage margin at w = 1",
    "margin_positive": "cells with positive margin",
    "kl": "KL(π_c ‖ π_u), nats per cell",
    "residual": "norm of the residual l_c − l_u",
}
OUTCOMES = {"solved": ("#009e73", "s--", "solved in the end"), "unsolved": ("#d55e00", "^:", "not solved")}


def draw_improvement(found: dict, title: str, path: Path) -> None:
    """All METRICS over the steps, a panel each, also split by outcome; and the distribution of margins."""
    steps = range(1, len(found["exact"]) + 1)
    with figure(path, title, 3, 3, (10, 8)) as axes:
        for ax, (name, label) in zip(axes.flat, LABELS.items(), strict=False):
            for outcome, (colour, style, text) in OUTCOMES.items():
                if found[outcome]:
                    ax.plot(steps, found[outcome][name], style, color=colour, ms=3, lw=1, label=text)
            ax.plot(steps, found[name], "o-", color="#0072b2", ms=4, label="all puzzles")
            ax.set_title(label, fontsize=10)
            if name in ("exact", "cells", "margin_positive"):
                percent(ax)
            elif name in ("kl", "residual"):  # fall by orders of magnitude as the answer settles
                ax.set_yscale("log")
            else:
                ax.set_yscale(
                    "symlog", linthresh=1e-3
                )  # step 1 leaves an untrained answer: by far the largest
                ax.axhline(0, color="0.5", lw=0.8)
        axes[1, 0].fill_between(steps, *zip(*found["gain_interval"], strict=True), color="#0072b2", alpha=0.3)
        axes[0, 0].legend(fontsize=8)
        draw_margins(axes[2, 2], found["margins"])


def draw_margins(ax, margins: list) -> None:
    """The shares of cells [S][bins] whose margins lie between MARGIN_EDGES, stacked for each step."""
    low, last, colours = [0.0] * len(margins), len(MARGIN_EDGES), pyplot().colormaps["RdBu"]
    names = {0: "below −1", last // 2: "within 1e-5 of 0", last: "above 1"}
    for k, shares in enumerate(zip(*margins, strict=True)):  # [S]
        ax.bar(range(1, len(margins) + 1), shares, 0.9, low, color=colours(k / last), label=names.get(k))
        low = [a + b for a, b in zip(low, shares, strict=True)]
    ax.set_title("margins of the cells, by powers of ten", fontsize=10)
    ax.legend(fontsize=7, loc="center right")
    percent(ax)


def draw_guidance(found: dict, title: str, path: Path) -> None:
    """Puzzles solved and log π(y*) against the guidance weight w, a curve for each step, w* marked."""
    S, ws = len(found["exact"]), found["ws"]
    with figure(path, title, 1, 3, (11, 4), "guidance weight w") as axes:
        for k in range(S):
            colour = pyplot().colormaps["viridis"](0.95 * k / max(1, S - 1))
            for ax, name in zip(axes[0], ("guided_exact", "guided_logp"), strict=False):
                *curve, at_best = found[name][k]
                label = f"step {k + 1}" if k % math.ceil(S / 6) == 0 or k == S - 1 else None
                ax.plot(ws, curve, color=colour, label=label)
                w = found["w_star"][k]
                ax.plot(min(max(w, ws[0]), ws[-1]), at_best, "*", color=colour, mec="black", mew=0.5, ms=11)
        for ax in axes[0, :2]:
            ax.axvline(1, color="0.5", lw=0.8)
        axes[0, 0].set_title("puzzles solved", fontsize=10)
        axes[0, 1].set_title("log π_w(y*), nats per cell; ★: w* of other puzzles", fontsize=10)
        axes[0, 1].set_yscale("symlog", linthresh=1e-3)
        axes[0, 1].set_ylim(top=0)
        ax, at_best = axes[0, 2], [exact[-1] for exact in found["guided_exact"]]
        ax.bar([k + 0.8 for k in range(S)], found["exact"], 0.4, label="w = 1", color="#0072b2")
        ax.bar([k + 1.2 for k in range(S)], at_best, 0.4, label="w = w*", color="#e69f00")
        ax.set(title="puzzles solved at w = 1 and at w*", xlabel="latent step")
        axes[0, 0].legend(fontsize=8)
        ax.legend(fontsize=8)
        percent(axes[0, 0])
        percent(ax)


RULES = {
    "kl": ("#0072b2", "KL(π_c ‖ π_u)"),
    "change": ("#009e73", "largest change"),
    "head": ("#d55e00", "head"),
}


def draw_halting(found: dict, title: str, path: Path) -> None:
    """Puzzles solved against forward passes, for each halting rule: its curve on validation puzzles, and
    where its calibrated threshold came to lie on test puzzles."""
    per_step = found["passes"] / len(found["exact"])
    with figure(path, title, 1, 1, (6.5, 4.2), "forward passes, mean over the puzzles") as axes:
        ax = axes[0, 0]
        for rule, curve in found["halt"].items():
            colour, label = RULES[rule]
            ax.plot([s * per_step for s in curve["steps"]], curve["exact"], color=colour, label=label)
            at = found["halting"][rule]
            ax.plot(at["passes"], at["exact"], "*", color=colour, mec="black", ms=13)
        ax.plot(found["passes"], found["halting"]["none"]["exact"], "ko", label="no halting")
        ax.set_ylabel("puzzles solved")
        ax.legend(title="stop by (★: on test puzzles)", fontsize=8)
        percent(ax)


def draw_thinking(found: dict, n_sup: int, title: str, path: Path) -> None:
    """Puzzles solved and the norm of the residual against steps taken, for mazes of each size."""
    names = ("exact", "residual")
    with figure(path, title, 1, 2, (10, 4)) as axes:
        for k, (size, of) in enumerate(found.items()):
            colour, steps = pyplot().colormaps["viridis"](k / 3.5), range(1, len(of["exact"]) + 1)
            for ax, name in zip(axes[0], names, strict=True):
                ax.plot(steps, of[name], color=colour, label=f"{size} x {size} ({of['puzzles']} puzzles)")
        for ax, name in zip(axes[0], names, strict=True):
            ax.axvline(n_sup, color="0.5", lw=0.8, ls="--", label="steps in training")
            ax.set_title(LABELS[name], fontsize=10)
        axes[0, 1].set_yscale("log")
        axes[0, 0].legend(fontsize=8)
        percent(axes[0, 0])


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


def draw_comparison(found: dict, task: str, path: Path) -> None:
    """Held-out puzzles solved, mean and range over the seeds, against three prices of training."""
    axes_of = {"examples_seen": "examples seen", "train_passes": "forward passes in training"}
    axes_of |= {"train_seconds": "seconds of training"}
    best = max(found, key=lambda name: found[name]["exact"])
    each = (f"{name} {of['exact']:.1%} in {of['train_seconds']:.0f} s" for name, of in found.items())
    title = "; ".join(text.replace(" ", "\N{NO-BREAK SPACE}") for text in each)
    title = f"{task}: {best} solves the most\n" + textwrap.fill(title, 110, break_on_hyphens=False)
    with figure(path, title, 1, 3, (11, 4.5), "") as axes:
        for ax, (price, label) in zip(axes[0], axes_of.items(), strict=True):
            for i, (name, of) in enumerate(found.items()):
                marks = list(zip(*(run["curve"] for run in of["runs"]), strict=False))  # [10][seeds]
                spent = [sum(at[price] for at in mark) / len(mark) for mark in marks]
                exact = [[at["exact"] for at in mark] for mark in marks]
                style = {
                    "color": COLOURS[i % len(COLOURS)],
                    "marker": "os^vDPX"[i % 7],
                    "ms": 4,
                    "label": name,
                }
                ax.plot(spent, [sum(e) / len(e) for e in exact], **style, lw=1.2)
                ax.fill_between(
                    spent, [*map(min, exact)], [*map(max, exact)], color=style["color"], alpha=0.15
                )
            ax.set_xlabel(label)
            ax.set_title("held-out puzzles solved", fontsize=10)
            percent(ax)
        axes[0, 1].set_xscale("log")
        axes[0, 2].legend(fontsize=8)


def solution_frames(model: LoopedModel, puzzle: Puzzles) -> tuple[list, str]:
    """[(caption, tokens [L], wrong cells [L]), ..]: question, each step's answer, solution; how it went."""
    x, y_star, frames, found = puzzle.x, puzzle.y, [], "not solved"
    for s, step in enumerate(rollout(model, x), 1):
        answer = step.logits_c.argmax(-1)  # [1, L]
        solved = solves(TASKS[model.cfg.task], puzzle, answer).item()
        wrong = (answer[0] != y_star[0]) & (not solved)  # [L]; a solution need not be the label
        frames.append((f"step {s}: " + ("solved" if solved else f"{wrong.sum()} wrong"), answer[0], wrong))
        found = f"solved at step {s}" if solved and found == "not solved" else found
    none = torch.zeros_like(frames[0][2])
    return [("puzzle", x[0], none), *frames, ("solution", y_star[0], none)], found


def draw_frame(ax, cfg: Config, caption: str, tokens, wrong) -> None:
    """Tokens [L] or [H, W] as coloured cells, with what the task writes there; crosses mark `wrong` ones."""
    from matplotlib.colors import ListedColormap

    cells, wrong = (grid(v[None])[0].cpu().numpy() for v in (tokens, wrong))
    task, colours, size = TASKS[cfg.task], list(legend(cfg).values()), 44 / max(cells.shape)
    ax.imshow(cells, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
    for (row, col), token in np.ndenumerate(cells) if task.glyphs else ():
        ax.text(col, row, task.glyphs[token : token + 1], ha="center", va="center", fontsize=2 * size)
    rows, cols = wrong.nonzero()
    for colour, width in (("white", 3), ("#d55e00" if task.glyphs else "black", 1.2)):  # a rim: seen on all
        ax.plot(cols, rows, "x", color=colour, ms=size, mew=width)
    if task.glyphs:
        for line, step in zip((ax.axhline, ax.axvline), task.boxes(cfg.size), strict=True):
            for k in range(cfg.size + 1):
                line(k - 0.5, color="0.2", lw=0.3 if k % step else 1.2)
    ax.set(title=caption, xticks=[], yticks=[])


def draw_solution(model: LoopedModel, puzzle: Puzzles, out: Path) -> list[str]:
    """`draw_frames` of how a held-out puzzle is solved."""
    frames, found = solution_frames(model, puzzle)
    title = f"A held-out {model.cfg.task} from the hardest 1%: {found}"
    return draw_frames(model.cfg, frames, title, out / "solution", "wrong")


def draw_frames(cfg: Config, frames: list, title: str, path: Path, mark: str) -> list[str]:
    """`path`.png, all frames side by side, and .gif, one by one; crosses `mark` cells. Returns the names."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.patches import Patch

    png, gif = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "gif"))
    frames = [frames[i] for i in sorted({round(k * (len(frames) - 1) / 17) for k in range(18)})]  # 18 at most
    cols = 4 if len(frames) <= 8 else 6
    rows = math.ceil(len(frames) / cols)
    fig, axes = plt.subplots(rows, cols, figsize=(2.3 * cols, 2.5 * rows + 0.6), layout="constrained")
    fig.suptitle(title)
    for ax, frame in zip(axes.flat, frames, strict=False):
        draw_frame(ax, cfg, *frame)
    for ax in axes.flat[len(frames) :]:
        ax.axis("off")
    keys = [Patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in legend(cfg).items()]
    keys = [] if TASKS[cfg.task].glyphs else keys
    keys.append(plt.Line2D([], [], color="black", marker="x", ls="", label=mark))
    fig.legend(handles=keys, loc="outside lower center", ncols=min(7, len(keys)), frameon=False)
    with replacing(png) as beside:
        fig.savefig(beside, dpi=110)
    plt.close(fig)

    fig, ax = plt.subplots(figsize=(3.2, 3.5), layout="constrained")

    def show(i):
        ax.clear()
        draw_frame(ax, cfg, *frames[i])

    order = [*range(len(frames) - 1), len(frames) - 2, len(frames) - 1]  # lingers on the last answer
    animation = FuncAnimation(fig, show, order)
    with replacing(gif) as beside:
        animation.save(beside, writer=PillowWriter(fps=1), dpi=90)
    plt.close(fig)
    return [png.name, gif.name]


# ------------------------------------------------------------------------------------------------------------
# §10  Files: written beside their place and renamed when complete; checked when read

HOW = ("device", "out", "figures", "compile", "deterministic", "save_minutes")  # nothing that results tell
LATER_OPTIONS = (*HOW, "test_size", "think", "halt", "votes")  # may differ when training is resumed
RUN_OPTIONS = (*LATER_OPTIONS, "precision", "data")  # may differ between training and a later evaluation
FACTS = {
    "steps_done": int,
    "examples_seen": int,
    "train_passes": int,
    "train_seconds": float,
}  # of the training
FACTS |= {"stopped": str, "curve": list}


@contextmanager
def replacing(path: Path):
    """A path beside `path` to write to, which becomes `path` only when the block has come to its end."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def prepare_folder(out: Path) -> Path:
    """`out`, made if need be. Raises `UserError` if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}; must be a folder that can be written to") from e


def save_checkpoint(path: Path, model: LoopedModel, facts: dict) -> None:
    """Write what `load_checkpoint` reads. Raises `OSError` if it cannot; an older file then stays."""
    write_whole(path, {"config": asdict(model.cfg), "model": model.state_dict(), "facts": facts})


def write_whole(path: Path, content: dict) -> None:
    """torch.save `content` to `path`, or leave what is there: first to memory, then beside, then renamed."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as beside:
        beside.write_bytes(buffer.getvalue())


def load_checkpoint(path: str, **given) -> tuple[LoopedModel, dict]:
    """The model and the facts of its training; of its configuration, `given` may change the RUN_OPTIONS only.

    Raises `UserError` if `path` is not a complete checkpoint of this program, or not one of what is `given`.
    """
    wanted = "must be a model.pt written by this program"
    if not os.path.isfile(path):
        raise UserError(f"--eval {path}: there is no such file; {wanted}")
    if not zipfile.is_zipfile(path):  # a zip file ends with its directory, so a truncated one is none
        raise UserError(f"--eval {path}: truncated, or not a checkpoint; {wanted}")
    trained = None
    try:
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        trained = Config(**content["config"])
        facts = {name: kind(content["facts"][name]) for name, kind in FACTS.items()}
        # where and what to write comes from the command line or the defaults, never from the file
        free = (*RUN_OPTIONS, "blanks") if trained.mixer == "mlp" else (*RUN_OPTIONS, "blanks", "size")
        here = {name: getattr(Config, name) for name in RUN_OPTIONS if name not in ("test_size", "data")}
        here |= {name: value for name, value in given.items() if name in free}
        here |= {"pick": 1} if given.get("data") else {}  # `pick` is of generated puzzles
        model = LoopedModel(replace(trained, **here))
        model.load_state_dict(content["model"])
    except Exception as e:  # what a damaged or foreign file makes torch.load and the rest raise has no end
        if trained and isinstance(e, UserError):  # about what was given now
            raise
        why = str(e) if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"--eval {path}: not a checkpoint of this version ({why}); {wanted}") from e
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise UserError(f"--eval {path}: has weights that are not finite; {wanted}")
    for name, value in given.items():
        if name not in free and value != getattr(trained, name):
            only = getattr(trained, name)
            raise UserError(f"{flag(name)} {value}: --eval {path} allows only {only}, as trained")
    return model, facts


class Snapshots:
    """The state of a training in a file, from which it goes on as if it had never stopped.

    It is written every cfg.save_minutes, or else by Ctrl-C; when the training is complete, it goes. Raises
    `UserError` if it is to `resume`, and there is no such file, or one of another configuration.
    """

    def __init__(self, path: Path, cfg: Config, resume: bool = False):
        self.path, self.cfg, self.saved, self.parts = path, cfg, time.monotonic(), {}
        self.content = self.read() if resume else None

    def read(self) -> dict:
        wanted = "must be a training.pt that this program left when it was stopped"
        if not self.path.is_file():
            raise UserError(f"--resume: there is no {self.path}; {wanted}")
        try:
            if not zipfile.is_zipfile(self.path):
                raise UserError("truncated")
            content = dict(torch.load(self.path, map_location="cpu", weights_only=True))
            then, now = dict(content["config"]), asdict(self.cfg)
        except Exception as e:  # what a damaged or foreign file makes torch.load raise has no end
            why = str(e) if isinstance(e, UserError) else type(e).__name__
            raise UserError(f"--resume: {self.path} is damaged ({why}); {wanted}") from e
        other = [name for name in now if name not in LATER_OPTIONS and now[name] != then.get(name)]
        if other:
            said = ", ".join(f"{flag(name)} {now[name]}, not {then.get(name)}" for name in other)
            raise UserError(f"--resume: {self.path} is of another run ({said}); all must be the same")
        return content

    def begin(self, parts: dict, optimizers: list) -> Progress:
        """Take note of all that has a state; bring back the state of `content`, and say how far that is."""
        self.parts |= parts | {f"optimizer {i}": of for i, of in enumerate(optimizers)}
        if not self.content:
            return Progress()
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.content[name])
            torch.set_rng_state(self.content["random"])
            if "random there" in self.content and self.device.type != "cpu":
                torch.get_device_module(self.device).set_rng_state(self.content["random there"])
            return Progress(**self.content["at"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise UserError(f"--resume: {self.path} is of another version of this program") from e

    @property
    def device(self) -> torch.device:
        return self.parts["batch"].seen.device

    def due(self, step: int) -> bool:
        """Is it time to save? All processes must say the same, so they are asked every tenth update."""
        if not self.cfg.save_minutes or step % 10:
            return False
        return largest(time.monotonic() - self.saved) >= 60 * self.cfg.save_minutes

    def save(self, at: Progress) -> None:
        """Replace the file. If that fails, say so and keep the old one: training is worth more."""
        content = {"config": asdict(self.cfg), "at": at._asdict(), "random": torch.get_rng_state()}
        if self.device.type != "cpu":
            content["random there"] = torch.get_device_module(self.device).get_rng_state()
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        try:
            if processes()[0] == 0:
                write_whole(self.path, content)
        except OSError as e:
            print(f"\nlrpi: {self.path}: {e.strerror}; not saved, training goes on", file=sys.stderr)
        self.saved = time.monotonic()


def load_trajectories(cfg: Config) -> Puzzles:
    """The puzzles of the file --trajectories: an .npz as numpy.savez writes it, with the arrays

    x [N, L] (questions) and plan [N, S, L] (S answers on the way, the last of them right), L = size * size,
    whole numbers that stand for the tokens of the task. Raises `UserError` if the file holds anything else.
    """
    where, V = f"--trajectories {cfg.trajectories}", len(TASKS[cfg.task].legend(cfg.size))
    if cfg.data:
        raise UserError(f"{where}: must go without --data")
    try:
        with np.load(cfg.trajectories, allow_pickle=False) as content:
            x, plan = content["x"], content["plan"]
    except OSError as e:
        raise UserError(f"{where}: {e.strerror or 'not an .npz file'}; must be a file by numpy.savez") from e
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{where}: must be an .npz file with the arrays x and plan") from e
    N, S, L = len(x) if x.ndim else 0, plan.shape[1] if plan.ndim == 3 else 0, cfg.size**2
    if x.shape != (N, L) or plan.shape != (N, S, L) or 0 in (N, S):
        shapes = f"x {[*x.shape]}, plan {[*plan.shape]}"
        raise UserError(f"{where}: {shapes}; must be [N, {L}] and [N, S, {L}], N and S of 1 or more")
    for name, tokens in (("x", x), ("plan", plan)):
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= V:
            found = f"{tokens.dtype} from {tokens.min()} to {tokens.max()}"
            raise UserError(f"{where}: {name} has {found}; must have whole numbers from 0 to {V - 1}")
    x, plan = (torch.from_numpy(tokens.astype(np.uint8)) for tokens in (x, plan))
    if not (solved := TASKS[cfg.task].solved(x, plan[:, -1])).all():
        bad = (~solved).nonzero()[0].item()
        raise UserError(f"{where}: the last answer of puzzle {bad} does not solve it; all must be right")
    return Puzzles(x, plan[:, -1], x, torch.zeros_like(x, dtype=torch.int16), plan)


# ------------------------------------------------------------------------------------------------------------
# §11  Command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and does not print the usage of thirty options before it."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def parse(argv) -> dict:
    """The options that were given on the command line: fields of `Config`, and COMMANDS."""
    parser = Parser(prog="lrpi.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--eval", metavar="CHECKPOINT", help="evaluate this model.pt; do not train")
    parser.add_argument("--compare", metavar="LIST", help=COMPARE_HELP)
    parser.add_argument("--solve", metavar="FILE", help="solve the puzzles in this text file, or - for stdin")
    parser.add_argument(
        "--checkpoint", help="with --solve: by this model.pt [the newest of the task in runs/]"
    )
    parser.add_argument("--seeds", metavar="VALUE", help="with --compare: seeds to train each with [1]")
    again = "go on where the same command was stopped, from the checkpoint in its folder"
    parser.add_argument("--resume", action="store_true", help=again)
    fast = "measure how fast training and evaluation are, and do neither; see bench.json in the folder"
    parser.add_argument("--bench", action="store_true", help=fast)
    own = {name: task.defaults for name, task in TASKS.items()} | SCHEMES
    own |= {f"preset {name}": of for name, of in PRESETS.items()}
    for f in fields(Config):

        def read(text, f=f):
            try:
                return f.type(text)
            except ValueError:
                raise UserError(f"{flag(f.name)} {text}: must be {allowed(f)}") from None

        by_default = [str(f.default), *(f"{name}: {of[f.name]}" for name, of in own.items() if f.name in of)]
        help = f"{f.metadata['help']}; {allowed(f)} [{', '.join(by_default)}]".replace("%", "%%")
        kind = {"type": read, "metavar": "VALUE"}
        if f.metadata["bare"]:
            kind |= {"nargs": "?", "const": f.metadata["bare"]()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **kind)
    given = vars(parser.parse_args(argv))
    if given.get("budget_seconds") == 0:
        raise UserError("--budget-seconds 0: must be more; leave it out for no budget")
    return given


DEVICES = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}


def pick_device(name: str) -> torch.device:
    """The device called `name`; the first that is there for "auto". Raises `UserError` if it is not there."""
    there = [device for device, available in DEVICES.items() if available()]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: this machine has none; must be one of auto, {', '.join(there)}")
    name = there[0] if name == "auto" else name
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if name == "cuda" and rank >= count:
        raise UserError(
            f"--device cuda: process {rank + 1} on this machine has none; must be {count} at most"
        )
    return torch.device(f"cuda:{rank}" if name == "cuda" else name)


def set_up(cfg: Config, device: torch.device) -> None:
    """Set what torch has global switches for."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if cfg.precision == "fp32" else "high")  # high is TF32
        torch.backends.cudnn.allow_tf32 = cfg.precision != "fp32"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS if deterministic
    torch.use_deterministic_algorithms(cfg.deterministic)


@contextmanager
def joined_processes():
    """Under torchrun, join the other processes; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if processes()[0] else sys.stdout):
            yield
    finally:
        gc.collect()  # DDP is part of cycles; none of it must outlive the group, whose threads it uses
        dist.destroy_process_group()


class Watch:
    """What the command line does during training: show progress, heed Ctrl-C, and stop when the loss is lost.

    Losses are looked at about 200 times, as a GPU must be waited for. Weights seen then count as good once
    the losses up to the next look are finite; the last good ones come back when some are not. Ten times the
    share of held-out puzzles solved is measured: `curve` keeps it, with how far the training was.
    """

    def __init__(self, held_out: Puzzles, interrupts: list):
        self.held_out, self.interrupts = held_out, interrupts
        self.good = self.newest = None  # (step, weights)
        self.losses, self.looked, self.curve = [], 0, []
        self.live = sys.stdout.isatty()

    def __call__(self, at: Progress, loss: torch.Tensor | None, model: LoopedModel) -> str:
        self.losses += [] if loss is None else [loss]
        look = looks(at.share)
        alone = processes()[1] == 1  # several must hear of an interrupt at the same step
        if look == self.looked and loss is not None and not (self.interrupts and alone):
            return ""
        values = torch.stack(self.losses) if self.losses else torch.zeros(0)
        values, self.losses = (total(values) / processes()[1]).tolist(), []  # waits for the GPU
        bad = [i for i, v in enumerate(values, at.steps_done - len(values) + 1) if not math.isfinite(v)]
        if bad or not all(v.isfinite().all() for v in model.state_dict().values()):
            model.load_state_dict(self.good[1])
            first = bad[0] if bad else at.steps_done + 1
            return f"the loss is no longer finite at step {first}, kept is step {self.good[0]}"
        now = (at.steps_done, copy.deepcopy(model.state_dict()))
        self.good, self.newest = self.newest or now, now
        if loss is not None:
            tenth, self.looked = look // 20 > self.looked // 20, look
            self.show(at, sum(values) / len(values), model, tenth)
        return "interrupted" if largest(len(self.interrupts)) else ""

    def state_dict(self) -> dict:
        return {"curve": self.curve, "looked": self.looked}

    def load_state_dict(self, state: dict) -> None:
        self.curve, self.looked = state["curve"], state["looked"]

    def show(self, at: Progress, loss: float, model: LoopedModel, tenth: bool) -> None:
        """The progress line: rewritten in place on a terminal; elsewhere printed ten times in all."""
        if tenth:
            x, steps = self.held_out.x, range(1, model.cfg.n_sup + 1)
            solved = solves(TASKS[model.cfg.task], self.held_out, answer(model, x, steps)[0])
            self.curve.append({**at._asdict(), "exact": solved.cpu().double().mean().item()})
        if tenth or self.live:
            held_out = (
                f"  {TASKS[model.cfg.task].watched} solved {self.curve[-1]['exact']:.1%}"
                if self.curve
                else ""
            )
            took, end = at.train_seconds, "" if at.share < 1 else "\n"
            left = took / at.share - took if at.share < 1 else 0
            line = f"{min(1, at.share):4.0%}  step {at.steps_done}  loss {loss:.4f}{held_out}"
            line += f"  {took:.0f} s, {left:.0f} s left"
            start, end = ("\r\033[K", end) if self.live else ("", "\n")
            print(start + line, end=end, flush=True)


def print_table(found: dict) -> None:
    """What `diagnose` found, a line for each step."""
    head = "step  solved   cells  log pi(y*)   gain, 95% interval    margin    > 0  KL(c||u)    w*   at w*"
    line = (
        "{:4}  {:6.1%}  {:6.1%}  {:10.5f}  {:8.5f} {:8.5f}  {:8.5f}  {:5.1%}  {:8.5f}  {:5.2f}  {:6.1%}  {}"
    )
    print(f"\n{head}  verdict")
    for k, (interval, verdict) in enumerate(zip(found["gain_interval"], found["verdict"], strict=True)):
        exact, cells, logp = (found[name][k] for name in ("exact", "cells", "logp"))
        how = (found[name][k] for name in ("margin", "margin_positive", "kl", "w_star"))
        words = verdict if verdict == "dead" else f"{verdict}, {found['step_size'][k]}"
        print(line.format(k + 1, exact, cells, logp, *interval, *how, found["guided_exact"][k][-1], words))
    print(f"\n{found['summary']}")
    if cut := found.get("cut"):
        said = "with the others alone, {changed} answers differ: {won} more are solved, {lost} no longer are"
        print(said.format(**cut))
    print("\nstop by   solved  passes  puzzles/s   (thresholds from validation puzzles)")
    for rule, of in found["halting"].items():
        print(f"{rule:8}  {of['exact']:6.1%}  {of['passes']:6.1f}  {of['puzzles_per_second']:9.0f}")


def print_thinking(found: dict) -> None:
    """Puzzles solved after 1, 2, 3, .. and more steps, a line for each size."""
    steps = len(next(iter(found.values()))["exact"])
    shown = sorted({round(steps * k / 12) for k in range(1, 13)} - {0})
    print("\nsolved after steps " + " ".join(f"{s:6}" for s in shown))
    for size, of in found.items():
        print(f"{f'{size} x {size}':18} " + " ".join(f"{of['exact'][s - 1]:6.1%}" for s in shown))


def check_share(cfg: Config) -> None:
    """Raise `UserError` unless all processes can have as many rows of the batch."""
    if cfg.batch_size % (N := processes()[1]):
        raise UserError(f"--batch-size {cfg.batch_size}: must be a multiple of the number of processes, {N}")


def fit(cfg: Config, device: torch.device, interrupts: list, keep=None) -> tuple[LoopedModel, dict]:
    """A freshly trained model and the facts of its training, "curve" among them: what `Watch` measured."""
    task = TASKS[cfg.task]
    check_share(cfg)
    if cfg.target == "file":
        data = load_trajectories(cfg)
    else:
        seen = cfg.train_size if cfg.budget_seconds else min(cfg.train_size, cfg.examples + cfg.batch_size)
        data = hardest(task.make(cfg, cfg.pick * seen, "train", cfg.seed), cfg.pick)
    watch = Watch(task.make(cfg, min(200, cfg.test_size), "valid").to(device), interrupts)
    if keep:
        keep.parts["watch"] = watch
    model, facts = train(cfg, data.to(device), watch, keep)
    return model, {**facts, "curve": watch.curve}


def obtain(given: dict, checkpoint: str | None, resume: bool, interrupts: list) -> tuple:
    """The model, loaded or freshly trained and saved; facts of its training; the folder for results."""
    model, facts = (None, {}) if checkpoint is None else load_checkpoint(checkpoint, **given)
    cfg = model.cfg if model else configure(**given)
    folder = Path(checkpoint).parent / "eval" if model else Path("runs") / f"{cfg.task}-{cfg.scheme}"
    device, folder = pick_device(cfg.device), Path(cfg.out or folder)
    keep = None if model else Snapshots(folder / "training.pt", cfg, resume)
    out = prepare_folder(folder)
    set_up(cfg, device)
    if cfg.figures:
        pyplot()  # if it is missing, say so now and not after the training
    print(f"{cfg.task} {cfg.size}x{cfg.size}, scheme {cfg.scheme}, seed {cfg.seed}, on {device}: see {out}")
    if not model:
        model, facts = fit(cfg, device, interrupts, keep)
        if processes()[0] == 0:
            save_checkpoint(out / "model.pt", model, facts)
            if not facts["stopped"]:
                keep.path.unlink(missing_ok=True)
        if facts["stopped"] and processes()[0] == 0:
            goes_on = "; --resume goes on with training" * (facts["stopped"] == "interrupted")
            print(f"\nlrpi: {facts['stopped']}; saved and now evaluated{goes_on}", file=sys.stderr)
    return compiled(model.to(device)), facts, out


def draw_all(model: LoopedModel, test: Puzzles, found: dict, longer: dict, out: Path) -> list[str]:
    """Every figure of a run; returns the file names."""
    cfg, exact, best = model.cfg, found["exact"], [e[-1] for e in found["guided_exact"]]
    title = f"{cfg.task}, {cfg.scheme}: {exact[0]:.1%} of {len(test)} held-out puzzles solved after step 1, "
    title += f"{exact[-1]:.1%} after step {len(exact)}\n{found['summary']}"
    draw_improvement(found, title, out / "improvement.png")
    k = max(range(len(exact)), key=lambda k: abs(best[k] - exact[k]))
    title = f"Guiding step {k + 1} by its own w* takes it from {exact[k]:.1%} to {best[k]:.1%} solved"
    draw_guidance(found, f"{title}, the last from {exact[-1]:.1%} to {best[-1]:.1%}", out / "guidance.png")
    rule = min(found["halt"], key=lambda rule: found["halting"][rule]["passes"])
    plain, halted = (found["halting"][name] for name in ("none", rule))
    title = (
        f"Stopping by {RULES[rule][1]}: {halted['exact']:.1%} solved with {halted['passes']:.1f} passes,\n"
    )
    title += f"without: {plain['exact']:.1%} with {plain['passes']:.0f}"
    draw_halting(found, title, out / "halting.png")
    size, of = list(longer.items())[-1]
    most = max(of["exact"])
    title = f"{cfg.task} {size} x {size}: {most:.0%} solved, first at step {of['exact'].index(most) + 1}"
    title += f"; {cfg.n_sup} steps in training"
    draw_thinking(longer, cfg.n_sup, title, out / "thinking.png")
    work = test.order.amax(1) + (test.x != test.y).sum(1)  # rounds of the solver, and length of the solution
    order = work.argsort(stable=True)
    puzzle = test[order[-max(1, len(test) // 100)]][None]  # the easiest of the hardest 1%
    names = ["improvement.png", "guidance.png", "halting.png", "thinking.png"]
    return [*names, *draw_solution(model, puzzle, out)]


def readable(value):
    """`value` with numbers as JSON has them: what is not finite becomes text."""
    if isinstance(value, dict):
        return {k: readable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [readable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


COMPARE_HELP = (
    "train each of these and compare: schemes separated by commas, each with options of its own if need be, "
    "as in trm,dis,dis+target=reveal+step-index+noise=0"
)


SAME = ("task", "size", "blanks", "seed", *RUN_OPTIONS)  # for all that --compare compares


def parse_arms(text: str, given: dict) -> dict:
    """What --compare is to compare: {"dis+noise=0": its `Config`, ..}, the options `given` being for all."""
    arms = {}
    for name in text.split(","):
        scheme, *changes = name.split("+")
        try:
            own = parse([f"--scheme={scheme}", *(f"--{change}" for change in changes)])
            same = [flag(k) for k in own if k in SAME or own[k] and k not in Config.__annotations__]
            if same:
                raise UserError(f"{', '.join(same)}: must be the same for all, and stand outside of the list")
            arms[name] = configure(**given | {k: v for k, v in own.items() if k in Config.__annotations__})
        except UserError as e:
            raise UserError(f"--compare {name}: {e}") from e
    if len(arms) < len(text.split(",")):
        raise UserError(f"--compare {text}: must not name anything twice")
    return arms


def read_run(path: Path, cfg: Config) -> dict | None:
    """The finished run in the file `path`, if there is one. Raises `UserError` if it is not one of `cfg`."""
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        now, then = asdict(cfg), run["config"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a run of --compare; must be removed") from e
    other = [flag(name) for name in now if name not in HOW and then.get(name) != now[name]]
    if other:
        raise UserError(f"{path}: a run with other {', '.join(other)}; give another --out, or remove it")
    return run


def run_arm(cfg: Config, device: torch.device, path: Path, interrupts: list) -> dict | None:
    """Train one arm with one seed, and test it: what becomes the file `path`. None if interrupted."""
    set_up(cfg, device)
    model, facts = fit(cfg, device, interrupts)
    if facts["stopped"] == "interrupted":
        return None
    found = evaluate(model, TASKS[cfg.task].make(cfg, cfg.test_size, "test").to(device))
    run = {"seed": cfg.seed, **facts, "exact": found["exact"], "passes": found["passes"]}
    run |= {"params": sum(p.numel() for p in model.parameters()), "config": asdict(cfg)}
    if processes()[0]:
        return run
    save_checkpoint(path.with_suffix(".pt"), model, facts)
    with replacing(path) as beside:
        beside.write_text(json.dumps(readable(run), indent=1))
    return run


def summarise(runs: list) -> dict:
    """Of an arm's runs: "exact" after the last step as mean, least and most; the rest as medians."""
    exact, median = [run["exact"][-1] for run in runs], {}
    for name in ("passes", "params", "examples_seen", "train_passes", "train_seconds"):
        median[name] = sorted(run[name] for run in runs)[len(runs) // 2]
    return {"exact": sum(exact) / len(exact), "least": min(exact), "most": max(exact), **median}


def compare(given: dict, text: str, seeds: str, interrupts: list) -> int:
    """Train all that --compare names with every seed; print, write and draw how they did. The exit code.

    Each run is kept in a file of its own as soon as it is finished, and not made again.
    """
    if not (seeds.isdecimal() and 1 <= int(seeds) <= 1000):
        raise UserError(f"--seeds {seeds}: must be a whole number from 1 to 1000")
    arms, draws = parse_arms(text, given), given.get("figures", True)
    first, runs = next(iter(arms.values())), {name: [] for name in arms}
    out, device = prepare_folder(Path(first.out or f"runs/{first.task}-compare")), pick_device(first.device)
    if draws:
        pyplot()
    todo = [(name, replace(cfg, seed=cfg.seed + k)) for k in range(int(seeds)) for name, cfg in arms.items()]
    files = [out / f"{name}-{cfg.seed}.json" for name, cfg in todo]
    done = [read_run(path, cfg) for path, (_, cfg) in zip(files, todo, strict=True)]
    print(f"{first.task}: {len(arms)} schemes, {seeds} seeds, {len(todo)} runs on {device}: see {out}")
    for i, ((name, cfg), path) in enumerate(zip(todo, files, strict=True), 1):
        print(f"\n{name}, seed {cfg.seed}, run {i} of {len(todo)}" + ", is there already" * bool(done[i - 1]))
        run = done[i - 1] or run_arm(cfg, device, path, interrupts)
        if not run:
            print(f"{i - 1} of {len(todo)} runs are finished; the same command goes on from there")
            return 130
        runs[name].append(run)
        print(
            f"{run['exact'][-1]:.1%} of the test puzzles solved"
            + f"; {run['stopped']}" * bool(run["stopped"])
        )
    found = {name: {**summarise(of), "runs": of} for name, of in runs.items()}
    if processes()[0]:
        return 0
    print_comparison(found)
    with replacing(out / "compare.json") as beside:
        beside.write_text(
            json.dumps({"task": first.task, "torch": torch.__version__, "arms": found}, indent=1)
        )
    with replacing(out / "compare.csv") as beside, beside.open("w", newline="") as lines:
        columns = ["scheme", "seed", *Progress._fields, "exact"]
        writer = csv.DictWriter(lines, columns, extrasaction="ignore")
        writer.writeheader()
        for name, of in runs.items():
            writer.writerows({"scheme": name, "seed": run["seed"], **at} for run in of for at in run["curve"])
    if draws:
        draw_comparison(found, first.task, out / "compare.png")
    print(f"wrote compare.json, compare.csv{', compare.png' * draws}")
    return 0


def print_comparison(found: dict) -> None:
    """What `compare` found, a line for each arm."""
    width = max(map(len, found))
    print(
        f"\n{'':{width}}  solved, least to most    passes     params  examples  passes in training  seconds"
    )
    for name, of in found.items():
        line = (
            f"{name:{width}}  {of['exact']:6.1%}, {of['least']:6.1%} to {of['most']:6.1%}  {of['passes']:6}"
        )
        line += f"  {of['params']:9,}  {of['examples_seen']:8}  {of['train_passes']:18}"
        print(f"{line}  {of['train_seconds']:7.0f}")


BENCH_SECONDS = 5.0  # to measure for
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
FLOPS = {  # where torch counts too many (gradients of a depthwise convolution) or none (attention on a CPU)
    torch.ops.aten.convolution_backward: lambda grad, x, w, *rest, **_: (
        2 * math.prod(grad) * math.prod(w[1:]) * sum(rest[-1][:2])
    ),
    getattr(torch.ops.aten, ATTENTION): lambda *s, **_: sdpa_flop_count(*s[:3]),  # of the tensors' shapes
    getattr(torch.ops.aten, f"{ATTENTION}_backward"): lambda *s, **_: sdpa_backward_flop_count(*s[:4]),
}


def product_speed(cfg: Config, device: torch.device) -> float:
    """FLOP/s of a large matrix product in the precision of the net: the best of ten, of every process."""
    n, times = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if in_bf16(cfg, device) else torch.float32)
    for _ in range(10):
        began = wait_for(device)
        a @ a
        times.append(wait_for(device) - began)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return processes()[1] * 2 * n**3 / min(times)


def training_speed(cfg: Config, data: Puzzles, device: torch.device) -> dict:
    """Examples and applications of the net to a batch, a second; FLOPs of an update, counted by shape."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        train(replace(cfg, compile=False), data, lambda at, loss, model: "one" * at.steps_done)
    marks = []

    def watch(at, loss, model):  # from update 10 on, when caches are warm and all is compiled
        known = at.steps_done >= 10 and not (cfg.act and at.steps_done % 10)  # see `Episodes.progress`
        if known and (not marks or largest(time.perf_counter() - marks[0][0]) > BENCH_SECONDS):
            marks.append((wait_for(device), at))
        return "enough" * (len(marks) == 2)

    train(cfg, data, watch)
    (began, first), (ended, last) = marks
    examples, updates = (last.share - first.share) * cfg.examples, last.steps_done - first.steps_done
    passes, flops = last.train_passes - first.train_passes, processes()[1] * counter.get_total_flops()
    return speeds(examples, passes, updates * flops, ended - began, device)


def evaluation_speed(cfg: Config, data: Puzzles, device: torch.device) -> dict:
    """The same for answers to puzzles, in batches as large as `answer` makes them."""
    model, N = compiled(LoopedModel(cfg).to(device)), processes()[1]
    batch = at_once(model, data.x.shape[1], 256)
    x, calls = data.x[torch.arange(N * batch, device=device) % len(data)], 0
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        answer(LoopedModel(cfg).to(device), x)
    answer(model, x)
    before, began = model.forward_passes, wait_for(device)
    while largest(wait_for(device) - began) < BENCH_SECONDS:
        answer(model, x)
        calls += 1
    took, passes = wait_for(device) - began, model.forward_passes - before
    return speeds(calls * len(x), N * passes, N * calls * counter.get_total_flops(), took, device)


def speeds(examples: float, passes: int, flops: int, seconds: float, device: torch.device) -> dict:
    """What --bench says of training or evaluation. Memory: of tensors on CUDA, else of the whole process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif os.name == "nt":
        peak = math.nan  # Windows does not say
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rates = {"examples_per_second": examples / seconds, "passes_per_second": passes / seconds}
    return {**rates, "flops_per_second": flops / seconds, "peak_bytes": peak}


def print_speeds(found: dict) -> None:
    """What `bench` found, a line each for training and evaluation."""
    product = found["product_flops_per_second"]
    print(f"{found['processes']} x {found['device']}: a matrix product makes {product / 1e9:.0f} GFLOP/s\n")
    print(f"{'':10}  examples/s  passes/s   GFLOP/s  of a product  peak MB")
    for what in ("training", "evaluation"):
        examples, passes, flops, peak = found[what].values()
        line = f"{what:10}  {examples:10.1f}  {passes:8.1f}  {flops / 1e9:8.1f}  {flops / product:12.0%}"
        print(f"{line}  {peak / 1e6:7.0f}")


def bench(given: dict) -> int:
    """Print, and write to bench.json, how fast this configuration trains and evaluates, and how well it uses
    the machine: its FLOP/s against those of a large matrix product, measured in the same run."""
    cfg = configure(**given)
    check_share(cfg)
    device, out = pick_device(cfg.device), prepare_folder(Path(cfg.out or f"runs/{cfg.task}-{cfg.scheme}"))
    set_up(cfg, device)
    make, few = TASKS[cfg.task].make, min(cfg.batch_size, 200)
    data = load_trajectories(cfg) if cfg.target == "file" else make(cfg, few, "train", cfg.seed)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found = {"device": name, "processes": processes()[1], "threads": torch.get_num_threads()}
    found["product_flops_per_second"] = product_speed(cfg, device)
    long = replace(cfg, examples=10**10, budget_seconds=0.0)
    found["training"] = training_speed(long, data.to(device), device)
    found["evaluation"] = evaluation_speed(cfg, data.to(device), device)
    if processes()[0] == 0:
        print_speeds(found)
        with replacing(out / "bench.json") as beside:
            found |= {"torch": torch.__version__, "config": asdict(cfg)}
            beside.write_text(json.dumps(readable(found), indent=1))
        print(f"\nwrote {out / 'bench.json'}")
    return 0


COMMANDS = ("eval", "compare", "seeds", "solve", "checkpoint", "resume", "bench")


def run(given: dict, started: float, interrupts: list) -> int:
    """Do what one of the COMMANDS asks for; without any, train a model and report on it. The exit code."""
    checkpoint, arms, seeds, puzzles, by, resume, benches = (given.pop(name) for name in COMMANDS)
    modes = {"--solve": puzzles, "--eval": checkpoint, "--compare": arms}
    modes |= {"--resume": resume or None, "--bench": benches or None}
    modes = [f"{name} {of}".removesuffix(" True") for name, of in modes.items() if of is not None]
    if len(modes) > 1:
        raise UserError(f"{modes[0]}: must go without {modes[1]}")
    for name, value, other, there in (
        ("--seeds", seeds, "--compare", arms),
        ("--checkpoint", by, "--solve", puzzles),
    ):
        if value is not None and there is None:
            raise UserError(f"{name} {value}: must go with {other}")
    if puzzles is not None:
        return solve(given, puzzles, by, interrupts)
    if benches:
        return bench(given)
    if arms is not None:
        return compare(given, arms, seeds or "1", interrupts)
    model, facts, out = obtain(given, checkpoint, resume, interrupts)
    lost = report(model, facts, out, checkpoint is None, started) and facts["stopped"] and checkpoint is None
    return 130 if interrupts else 2 if lost else 0


def report(model: LoopedModel, facts: dict, out: Path, fresh: bool, started: float) -> bool:
    """Diagnose a model, `fresh` from training or loaded; print, draw and write what was found, if any was."""
    cfg, params, make = model.cfg, sum(p.numel() for p in model.parameters()), TASKS[model.cfg.task].make
    if TASKS[cfg.task].finish and not TASKS[cfg.task].finish(model, out):
        return False
    test = make(cfg, cfg.test_size, "test").to(model.y0.device)
    valid = make(cfg, min(cfg.test_size, VALID_SIZE), "valid", 1).to(model.y0.device)
    found = diagnose(model, test, valid)
    print_table(found)
    longer = think_longer(model, min(30_000, test.x.numel()))
    print_thinking(longer)
    halted = cfg.halt != "off"
    got = found["halting"][cfg.halt if halted else "none"]
    passes = f"{got['passes']:.1f}".removesuffix(".0") + f" of {found['passes']}" * halted
    how = f"{passes} forward passes each" + f" on average (--halt {cfg.halt})" * halted
    print(
        f"\n{got['exact']:.1%} of {len(test)} held-out puzzles solved, with {how}, by {params:,} parameters"
    )
    if found["label"] != found["exact"]:
        print(f"{found['label'][-1]:.1%} are the label, cell by cell; others are right as well")
    if processes()[0]:
        return True
    drawn = draw_all(model, test, found, longer, out) if cfg.figures else []
    written = ["model.pt"] * fresh + ["metrics.json", *drawn]
    metrics = {"task": cfg.task, "scheme": cfg.scheme, "size": cfg.size, "seed": cfg.seed, "params": params}
    metrics |= {"device": str(model.y0.device), "torch": torch.__version__, **facts, **found}
    metrics |= {"thinking": longer, "config": asdict(cfg)}
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    with replacing(out / "metrics.json") as beside:
        beside.write_text(json.dumps(readable(metrics), indent=1))
    print(f"{metrics['total_seconds']:.0f} s in all; wrote {', '.join(written)}")
    return True


def main(argv=None, started: float | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 after bad input or a diverged loss, 130 after Ctrl-C."""
    interrupts = []

    def interrupt(*_):  # the first Ctrl-C ends training in good order, the second ends the program
        if interrupts:
            sys.exit(130)
        interrupts.append(True)
        os.write(2, b"\nlrpi: interrupted, finishing up; Ctrl-C again to quit at once\n")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with joined_processes():
            return run(parse(argv), time.perf_counter() if started is None else started, interrupts)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"lrpi: {e}", file=sys.stderr)
    except BrokenPipeError:  # whoever reads what is printed has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"lrpi: {e.filename or '--out'}: {e.strerror}; must be a place to write to", file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, before)
    return 2


if __name__ == "__main__":
    sys.exit(main(started=time.perf_counter() - time.process_time()))  # imports count, by their CPU time
