"""Tests of lrpi.py against independent oracles: brute force, plain loops, autograd, finite differences."""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lrpi
from lrpi import GOAL, OPEN, PATH, START, WALL

TOTAL, METHOD, FUNCTION, LINE = 1824, 680, 50, 110  # lines of lrpi.py, of §1 to §6, of a function; columns
HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # results do not depend on the machine, and small tensors are faster


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stage(puzzles, r):
    """The solver's answer after r rounds."""
    _, y, draft, order, *between = puzzles
    return torch.where(order <= r, y, torch.where(between[1] <= r, between[0], draft) if between else draft)


def rows_of(*tensors):
    return zip(*(t.tolist() for t in tensors), strict=True)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


# --- Mazes --------------------------------------------------------------------------------------------------
def neighbours_of(cell, side):
    r, c = divmod(cell, side)
    near = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
    return [i * side + j for i, j in near if 0 <= i < side and 0 <= j < side]


def search(maze, side):
    """Breadth-first: {cell: distance from the start}; where it is reached from, first in reading order."""
    start = maze.index(START)
    far, came, queue = {start: 0}, {}, [start]
    for here in queue:  # which grows
        for there in neighbours_of(here, side):
            if maze[there] != WALL and there not in far:
                far[there] = far[here] + 1
                queue.append(there)
            if far.get(there) == far[here] + 1:
                came[there] = min(here, came.get(there, here))
    return far, came


def solved_by_hand(maze, answer, side):
    """Walk from the start along marked cells: the walk must end at the goal and take in all marks."""
    changed = {(a, b) for a, b in zip(maze, answer, strict=True) if a != b}
    marked = {cell for cell, token in enumerate(answer) if token in (PATH, START, GOAL)}
    walk = [maze.index(START)]
    while walk[-1] != maze.index(GOAL):
        onward = [n for n in neighbours_of(walk[-1], side) if n in marked and n not in walk]
        if len(onward) != 1:
            return False
        walk += onward
    return set(walk) == marked and changed <= {(OPEN, PATH)}


def maze_of(kind, side, rng):
    """A perfect maze by depth-first search, Prim's or Kruskal's algorithm, or random obstacles."""
    k = side // 2 + 1
    cells = [2 * (room // k) * side + 2 * (room % k) for room in range(k * k)]  # of the rooms
    edges = [(a, b) for a in range(k * k) for b in neighbours_of(a, k)]
    rng.shuffle(edges)
    tree, part = [], [*range(k * k)]
    front = edges[:] if kind == "kruskal" else [edge for edge in edges if edge[0] == 0]
    while front:
        a, b = front.pop(rng.randrange(len(front)) if kind == "prim" else -1)
        if part[a] != part[b]:  # rooms that are joined have the same number
            tree.append((a, b))
            part = [part[a] if of == part[b] else of for of in part]
            front += [] if kind == "kruskal" else [edge for edge in edges if edge[0] == b]
    spaces, ends = {*cells, *((cells[a] + cells[b]) // 2 for a, b in tree)}, rng.sample(cells, 2)
    if kind == "obstacles":
        spaces = {cell for cell in range(side**2) if rng.random() < 0.6}
    maze = [OPEN if cell in spaces else WALL for cell in range(side**2)]
    maze[ends[0]], maze[ends[1]] = START, GOAL
    return maze


@pytest.mark.parametrize("kind, side, count", [
    ("uniform", 5, 90), ("uniform", 11, 60), ("uniform", 21, 10), ("uniform", 61, 2), ("loops", 9, 60),
    *itertools.product(("depth-first", "prim", "kruskal"), (11, 21), (12,)), ("obstacles", 9, 40),
])  # fmt: skip
def test_mazes_are_read_labels_are_shortest_paths_and_rounds_fill_dead_ends(kind, side, count):
    """Ours and other perfect mazes, obstacles, our mazes with loops, as text with a rim."""
    rng, task, solvable = random.Random(side), lrpi.TASKS["maze"], 0
    puzzles = task.make(count, side, seed=3, loops=float(kind == "loops"))
    if kind not in ("uniform", "loops"):
        puzzles = task.solve(torch.tensor([maze_of(kind, side, rng) for _ in range(count)]).byte())
    noted, rounds = lrpi.solve_any_mazes(puzzles.x, None, True), range(puzzles.order.max() + 1)
    stages, notes = ([stage(of, r).tolist() for r in rounds] for of in (puzzles, noted))
    for i, (maze, label) in enumerate(rows_of(puzzles.x, puzzles.y)):
        (far, came), letters = search(maze, side), [task.letters[token] for token in maze]
        rows = [f"#{''.join(letters[k : k + side])}#" for k in range(0, side**2, side)]
        [rows] = lrpi.boards("\n".join(["#" * (side + 2), *rows, "#" * (side + 2)]), task, 11)
        if maze.index(GOAL) not in far:
            assert PATH not in label
            continue
        path = far[maze.index(GOAL)] - 1  # cells of a shortest one
        drawn, whole, x = lrpi.read_board(rows, task, lrpi.configure())
        assert x.flatten().tolist() == maze and whole[1:-1, 1:-1].flatten().tolist() == label
        assert task.solved(drawn[None], whole[None]) and task.solved(drawn[None], drawn[None]) == (path == 0)
        assert solved_by_hand(maze, label, side) and label.count(PATH) == path
        spaces = {cell for cell, token in enumerate(maze) if token != WALL}
        rooms = {r * side + c for r in range(0, side, 2) for c in range(0, side, 2)}
        if kind not in ("obstacles", "loops"):
            edges = sum(there in spaces for here in spaces for there in neighbours_of(here, side)) // 2
            assert {*far} == spaces and edges == len(spaces) - 1, "a tree"
            assert {maze.index(START), maze.index(GOAL)} <= rooms <= spaces
        answer = [PATH if token == OPEN else token for token in maze]
        numbers = [far.get(cell, 9999) for cell in range(side**2)]
        for r, filled in enumerate(stages):  # the flood has reached cells r away, and cuts loops
            marks = zip(answer, numbers, strict=True)
            marks = [PATH + n % 3 if token == PATH and n <= r else token for token, n in marks]
            assert filled[i] == answer and notes[r][i] == marks
            marked, late = {cell for cell in spaces if answer[cell] != OPEN}, max(far.values()) + 1
            ways = {cell: {*neighbours_of(cell, side)} & marked for cell in marked}
            kept = {(a, b) for a in marked for b in ways[a] if max(far.get(a, late), far.get(b, late)) > r}
            kept |= {way for way in came.items() if {*way} <= marked}
            kept |= {(b, a) for a, b in kept}
            for cell in [cell for cell in marked if sum((cell, n) in kept for n in ways[cell]) <= 1]:
                answer[cell] = OPEN if answer[cell] == PATH else answer[cell]
        assert answer == label
        solvable += 1
    assert solvable == count or kind == "obstacles" and 10 < solvable < count


def test_spanning_trees_and_ends_are_uniform():
    """The 192 trees of a 3 x 3 grid (Kirchhoff's theorem), and 72 pairs of rooms; chi-square, 6 sigma."""
    parents, mazes = lrpi.spanning_trees(19_200, 3, generator()), lrpi.carve(7200, 5, generator(1))
    trees = [frozenset(frozenset((i, p)) for i, p in enumerate(row) if i != p) for row in parents.tolist()]
    ends = [(maze.index(START), maze.index(GOAL)) for maze in mazes.tolist()]
    for draws, cells in ((trees, 192), (ends, 72)):
        counts = Counter(draws)
        chi2 = sum((n - 100) ** 2 / 100 for n in counts.values())  # of cells - 1 degrees of freedom
        assert len(counts) == cells and abs(chi2 - (cells - 1)) < 6 * math.sqrt(2 * (cells - 1))


def test_maze_solved_agrees_with_a_walk_along_the_marks():
    """All marks in fields of 4 x 4, also on walls and as loops beside the path; labels with one change."""
    fields = [(OPEN,) * 14, (OPEN, WALL, OPEN, OPEN, OPEN, OPEN, WALL) * 2]
    marked = [[*itertools.product(*({token, PATH} for token in field))] for field in fields]
    cases = [[[START, *m[:9], GOAL, *m[9:]] for m in sorted(marks)] for marks in marked]
    cases += [[[*m, START, GOAL] for m in sorted(marked[0])]]
    for maze, label in rows_of(*[*lrpi.make_mazes(50, 7, seed=2)][:2]):
        near = itertools.product(range(49), range(5))
        cases += [[maze, *([*label[:cell], new, *label[cell + 1 :]] for cell, new in near)]]
    for answers in cases:  # the first is the maze itself, as PATH is the last token
        expected = [solved_by_hand(answers[0], said, math.isqrt(len(said))) for said in answers]
        assert 0 < sum(expected) < len(expected) / 2
        maze, said = torch.tensor(answers[:1] * len(answers)), torch.tensor(answers)
        assert lrpi.maze_solved(maze, said).tolist() == expected


@pytest.mark.parametrize("task, size, count", [
    ("maze", 5, 300), ("maze", 11, 300), ("sudoku", 6, 60), ("sudoku", 9, 12), ("nqueens", 6, 60),
])  # fmt: skip
def test_splits_share_nothing_under_any_symmetry(task, size, count):
    """No walls of mazes, kinds of sudokus, questions of queens. The seed alone decides what is made."""
    seen, first = defaultdict(set), {}
    for split, seed in (("test", 0), ("valid", 0), ("train", 0), ("train", 1), ("train", 0)):
        puzzles = lrpi.TASKS[task].make(count, size, split, seed)
        assert len(puzzles) == count and same([*puzzles], first.setdefault((split, seed), [*puzzles]))
        kinds = lrpi.sudoku_kind(puzzles.y) if task == "sudoku" else puzzles.x
        cells = lrpi.grid(kinds == WALL if task == "maze" else kinds)
        views = torch.stack([of.rot90(k, (1, 2)).flatten(1) for of in (cells, cells.mT) for k in range(4)], 1)
        seen[split] |= {min(map(tuple, of)) for of in views.tolist()}
    assert all(a and b and not a & b for a, b in itertools.combinations(seen.values(), 2))
    assert not same(first["train", 0], first["train", 1])


# --- Sudoku and queens --------------------------------------------------------------------------------------
def sudoku_solutions(board, size, limit):
    """Up to `limit` solutions, by backtracking over the cell with the fewest candidates."""
    (height, width), free, lines = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size], {}, range(size)
    for r, c in itertools.product(lines, lines):
        box = [(p, q) for p in lines for q in lines if (p // height, q // width) == (r // height, c // width)]
        seen = {board[p * size + q] for p, q in (*box, *((r, q) for q in lines), *((p, c) for p in lines))}
        if not board[r * size + c]:
            free[r * size + c] = {*range(1, size + 1)} - seen
    found, cell = [], min(free, key=lambda i: len(free[i]), default=None)
    for digit in free.get(cell, ()):
        if len(found) < limit:
            found += sudoku_solutions([*board[:cell], digit, *board[cell + 1 :]], size, limit - len(found))
    return found if free else [list(board)]


@pytest.mark.parametrize("size, blanks, count", [(4, 10, 60), (6, 24, 30), (9, 40, 8), (9, 0, 4)])
def test_sudokus_have_one_solution_and_near_misses_are_wrong(size, blanks, count):
    x, y, *_ = lrpi.make_sudokus(count, size, "train", 1, blanks)
    assert lrpi.sudoku_solved(x, y).all() and x.dtype == torch.uint8
    for puzzle, label in rows_of(x, y):
        assert 1 <= puzzle.count(0) <= (blanks or 64) and sudoku_solutions(puzzle, size, 2) == [label]
    for i, cell in enumerate(torch.randint(size**2, (count,), generator=generator()).tolist()):
        said = y[i : i + 1].repeat(size + 1, 1)
        said[:, cell] = (y[i, cell] + torch.arange(size + 1)) % (size + 2)  # the first alone is right
        assert lrpi.sudoku_solved(x[i].expand_as(said), said).tolist() == [True] + size * [False]
    renamed = (y % size) + 1  # a valid grid, but every given is changed
    assert lrpi.sudoku_solved(y * 0, renamed).all() and not lrpi.sudoku_solved(x, renamed).any()
    square = (torch.arange(size)[:, None] + torch.arange(size)) % size + 1  # rows and columns are good
    assert not lrpi.sudoku_solved(x[:1] * 0, square.view(1, -1))


def placements(size):
    for p in itertools.permutations(range(size)):
        if len({r + c for r, c in enumerate(p)}) == len({r - c for r, c in enumerate(p)}) == size:
            yield [int(col == p[row]) for row in range(size) for col in range(size)]


def test_queens_labels_are_the_first_completion_and_any_completion_is_right():
    """The checker is tried on all boards of 4 x 4, and on what is right in 8 x 8."""
    valid, puzzles = list(placements(8)), lrpi.make_queens(300, 8, "train", seed=2)
    stages = [stage(puzzles, r).tolist() for r in range(8)]
    for i, (board, label) in enumerate(rows_of(puzzles.x, puzzles.y)):
        assert label == next(s for s in valid if all(b <= a for a, b in zip(s, board, strict=True)))
        assert 1 <= sum(board) <= 7 and stages[-1][i] == label
        for r, k in enumerate(k for k in range(0, 64, 8) if not any(board[k : k + 8])):
            assert stages[r][i] == board, "the solver goes row by row"
            board[k : k + 8] = label[k : k + 8]
    small, right = [[n >> i & 1 for i in range(16)] for n in range(2**16)], list(placements(4))
    found = lrpi.queens_solved(torch.tensor(small) * 0, torch.tensor(small)).tolist()
    assert found == [board in right for board in small] and sum(found) == 2
    corner, valid = (torch.arange(64) == 0).expand(92, -1).long(), torch.tensor(valid)
    assert lrpi.queens_solved(corner, valid).equal(valid[:, 0] == 1), "the given queen must stand"


# --- Model --------------------------------------------------------------------------------------------------
def tiny(**given):
    return lrpi.configure(**{"size": 5, "width": 16, "ffn": 24, "heads": 2, **given})


def model_and_state(cfg, B=3):
    model, L = torch.manual_seed(0) and lrpi.LoopedModel(cfg), math.prod(cfg.shape)
    for p in model.parameters():  # weights that are zero at first would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    y, z = torch.randn(2, B, L, cfg.width)
    return model, torch.randint(0, 4, (B, L), dtype=torch.uint8), y, z, torch.ones(B, dtype=torch.long)


def swiglu(W, name, v):
    gate, up = (W[f"{name}.gate_up.weight"] @ v).chunk(2)
    return W[f"{name}.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def plain_attention(W, name, h, cfg):
    """TRM's attention, head by head; rotary positions are complex rotations."""
    L, d, out = len(h), cfg.width // cfg.heads, []
    angles = torch.arange(L).double()[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    for head in range(cfg.heads):
        q, k, v = (h @ W[f"{name}.qkv.weight"][i * cfg.width + head * d :][:d].T for i in range(3))
        q, k = (torch.complex(*of.chunk(2, 1)) * torch.polar(angles**0, angles) for of in (q, k))
        p = ((q @ k.conj().T).real / math.sqrt(d)).exp()
        out.append(p @ v / p.sum(1, keepdim=True))
    return torch.cat(out, 1) @ W[f"{name}.out.weight"].T


def plain_conv(W, name, h, cfg):
    """The separable convolution as one of K x K, with weights w2[i] w1[j] i rows and j columns away."""
    w1, w2 = W[f"{name}.convs.0.weight"][:, 0, 0], W[f"{name}.convs.1.weight"][:, 0, :, 0]
    kernel, grid = (w2[:, :, None] * w1[:, None])[:, None], h.T.reshape(1, -1, *cfg.shape)
    return F.conv2d(grid, kernel, padding=cfg.kernel // 2, groups=cfg.width).flatten(2)[0].T


def plain_step(model, x, y, z, s):
    """One step on one puzzle in float64: the recursion of TRM, block by block and cell by cell."""
    cfg, W = model.cfg, {name: w.double() for name, w in model.named_parameters()}
    passes = itertools.count()

    def net(h):
        k = next(passes) * cfg.untied
        for name in [f"nets.{k}.{layer}" for layer in range(cfg.layers)]:
            if cfg.mixer == "mlp":  # along the cells, channel by channel; so is its norm
                h = torch.stack([v + swiglu(W, f"{name}.mix", v) for v in h.T])
                h = F.rms_norm(h, h.shape[1:], eps=1e-5).T
            else:
                mix = {"attention": plain_attention, "conv": plain_conv}[cfg.mixer](W, f"{name}.mix", h, cfg)
                h = F.rms_norm(h + mix, h.shape[1:], eps=1e-5)
            h = torch.stack([cell + swiglu(W, f"{name}.swiglu", cell) for cell in h])
            h = F.rms_norm(h, h.shape[1:], eps=1e-5)
        return h

    y, z = y.double(), z.double()
    x = (y @ W["readout.weight"].T).argmax(-1) if cfg.feedback and s > 1 else x.long()
    e = W["tokens.weight"][x] + (W["step_table.weight"][min(s, cfg.n_sup) - 1] if cfg.step_index else 0)
    for _ in range(cfg.T):
        y, z = y.detach(), z.detach()  # only the last cycle carries gradient
        for _ in range(cfg.n):
            z = net(z + (y + math.sqrt(cfg.width) * e))
        y = net(y + z + (math.sqrt(cfg.width) * e + W["role"] if cfg.recall else 0))
    return y, z, next(passes)


@pytest.mark.parametrize("given", [
    *({"T": 3, "n": 6, "layers": 2, "recall": False, "mixer": mixer} for mixer in lrpi.MIXERS),
    {"T": 2, "kernel": 5, "step_index": True, "feedback": True}, {"scheme": "one-pass"},
])  # fmt: skip
def test_a_step_is_that_of_trm(given):
    """With equal weights, in float32: values, atol 1e-5; gradients, 1e-4 of the largest; forward passes."""
    model, x, y, z, s = model_and_state(replace(tiny(**given), shape=(3, 4)), B=1)
    for p in model.nets.parameters():
        p.data *= 0.5  # a net that does not amplify rounding
    for k in (1, 2, 9):
        before, plain = model.forward_passes, plain_step(model, x[0], y[0], z[0], k)
        got = model(x, y, z, k * s)
        assert all(torch.allclose(a[0].double(), b, atol=1e-5) for a, b in zip(got, plain[:2], strict=True))
        assert model.forward_passes - before == plain[2]
        grads = [torch.autograd.grad(of.pow(3).sum(), model.nets.parameters()) for of in (got[0], plain[0])]
        assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(*grads, strict=True))
    calls = {scheme: (cfg := tiny(scheme=scheme)).n_sup * cfg.T * (cfg.n + 1) for scheme in lrpi.SCHEMES}
    assert calls.pop("trm") == 336 and calls.pop("trm-medium") == 48 and {*calls.values()} == {18}


def test_initial_spread_stablemax_and_bfloat16_are_as_stated():
    """std 1 / sqrt(fan-in), truncated at 2 / 0.88 of it, 5 sigma; s(v) is v + 1 or 1 / (1 - v), atol 1e-5."""
    torch.manual_seed(0)
    model = lrpi.LoopedModel(vocab=500, width=256, n_sup=60, step_index=True, act=True)
    spread = {"tokens": 256, "step_table": 256, "readout": 256, "nets.0.0.swiglu.down": 128}
    for name, fan_in in (spread | {"nets.0.0.swiglu.gate_up": 256, "nets.0.0.mix.convs.0": 7}).items():
        w = model.get_parameter(f"{name}.weight") * math.sqrt(fan_in)
        assert abs(w.std().item() - 1) < 5 / math.sqrt(2 * w.numel()) and 2 < w.abs().max() < 2.28, name
    assert torch.sigmoid(model.halting(torch.randn(5, 256))).max() < 0.01, "nothing counts as solved at first"
    readout, h = lrpi.LoopedModel(tiny(stablemax=True)).readout, 30 * torch.randn(50, 16)
    v = h.double() @ readout.weight.double().T
    s = torch.where(v >= 0, v + 1, 1 / (1 - v))
    assert torch.allclose(readout(h).softmax(-1).double(), s / s.sum(-1, keepdim=True), atol=1e-5)
    (model, *state), inside = model_and_state(tiny()), []
    model.nets[0][0].swiglu.down.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    plain, model.bf16 = model(*state)[0], True
    rounded = model(*state)[0]  # bfloat16 is for the products: states, logits and weights stay float32
    rounded.square().sum().backward()
    assert inside == [torch.float32] * 3 + [torch.bfloat16] * 3 and 0 < (plain - rounded).abs().mean() < 0.05
    stored = [rounded, model.readout(rounded), *(of for p in model.nets.parameters() for of in (p, p.grad))]
    assert {of.dtype for of in stored} == {torch.float32}


# --- Policy improvement -------------------------------------------------------------------------------------
def two_logits(seed=0, shape=(4, 5), V=7, scale=3.0):
    g = generator(seed)
    u, c = (scale * torch.randn(*shape, V, dtype=torch.float64, generator=g) for _ in range(2))
    return u, c, torch.randint(0, V, shape, generator=g)


def test_section_2_against_autograd_differences_and_distributions():
    """Prop. 4.1, 3,000 cases: margin = -dL/dw, and d²L/dw²; autograd 1e-10, central differences 1e-5."""
    u, c, y = two_logits(3, (3000,), 6, 4.0)
    y[::9] = -100  # labels that are ignored
    w = (4 * torch.rand(3000, dtype=torch.float64, generator=generator(1)) - 1).requires_grad_()
    policies = [u + (w + d)[:, None] * (c - u) for d in (-1e-4, 0, 1e-4)]
    below, here, above = (F.cross_entropy(logits, y, reduction="none") for logits in policies)
    slope = torch.autograd.grad(here.sum(), w, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), w)[0]
    got = lrpi.derivatives(u, c, y, w.detach()[:, None])
    assert torch.allclose(got[0], slope, atol=1e-10) and torch.allclose(got[1], curvature, atol=1e-10)
    assert torch.allclose(lrpi.margin(u, c, y, w[1].item())[1], -slope[1], atol=1e-10), "one w for all"
    assert torch.allclose(got[0], (above - below) / 2e-4, atol=1e-5)
    assert torch.allclose(got[1], (above - 2 * here + below) / 1e-8, atol=1e-5) and (got[1] > 0).any()
    # Distributions, 1e-12. A shift of the logits changes nothing, 1e-9. Logits of +-1e4 in float32, 2%.
    u, c, y = two_logits()
    large = [(5e3 * logits).clamp(-1e4, 1e4) for logits in (u, c)]
    pi_u, pi_c = (torch.distributions.Categorical(logits=logits) for logits in (u, c))
    pairs = [(lrpi.divergence(u, c), torch.distributions.kl_divergence(pi_c, pi_u)),
             (lrpi.largest_change(u, c), (pi_u.probs - pi_c.probs).abs().amax(-1)),
             (lrpi.advantage(u, c), (pi_c.probs / pi_u.probs).log())]  # fmt: skip
    for w in (-0.5, 0.0, 0.3, 1.0, 2.0):
        mixture = pi_u.probs ** (1 - w) * pi_c.probs**w  # geometric
        pairs += [(lrpi.guide(u, c, w).softmax(-1), mixture / mixture.sum(-1, keepdim=True))]
    assert all(torch.allclose(got, expected, atol=1e-12) for got, expected in pairs)
    derivatives = [lambda u, c, w=w: torch.stack(lrpi.derivatives(u, c, y, w)) for w in (-0.5, 1.0, 3.0)]
    for f in (lrpi.divergence, lrpi.largest_change, lrpi.advantage, *derivatives):
        assert torch.allclose(f(u + 7.0, c - 13.0 * torch.rand(4, 5, 1)), f(u, c), atol=1e-9)
        rounded = f(*(logits.float() for logits in large)).double()
        assert torch.allclose(rounded, f(*large), rtol=0.02, atol=0.01)


def test_best_guidance_against_a_grid_search_a_formula_and_in_degenerate_cases():
    """Neither a grid nor the neighbours on both sides have a lower loss than w*."""
    for seed, scale in itertools.product(range(20), (0.05, 1, 3, 8, 100)):
        u, c, y = two_logits(seed, (40,), 5, scale)
        c[torch.arange(40), y] += scale / 2
        w = lrpi.best_guidance(u, c, y)
        grid = [w, w - 1e-3, w + 1e-3, *(k / 10 for k in range(-40, 80))]
        best, *others = [F.cross_entropy(u + v * (c - u), y, reduction="sum").item() for v in grid]
        assert min(others) >= best - 1e-9 * abs(best)
    for k, d in itertools.product((-300.0, 0.5, 40.0, 2000.0), (1e-3, 1.0, 50.0, 1e4, -1.0)):  # far from 1
        a, b = (torch.tensor([v, 0.0], dtype=torch.float64).expand(8, 2) for v in (k, k - d))
        w, expected = lrpi.best_guidance(a, b, torch.arange(8) // 6), (k - math.log(3)) / d  # pi_w(0) = 6 / 8
        assert abs(w - expected) < 1e-6 * max(1.0, abs(expected))
    u, y, nan = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 1]), math.nan
    towards, away = u + F.one_hot(y, 3), u - F.one_hot(y, 3)
    rounding = u + 1000 + 1e-4 * torch.rand(2, 3, generator=generator())
    for a, b, label, expected in [
        (u, towards, y, math.inf), (u, away, y, -math.inf), (u, torch.cat([u[:1], away[1:]]), y, -math.inf),
        (u, torch.cat([towards[:1], away[1:]]), torch.tensor([0, -1]), math.inf),  # the second is ignored
        (u, u, y, nan), (u, u + 5.0, y, nan), (u + 1000, rounding, y, nan), (u, towards, y - 9, nan),
    ]:  # fmt: skip
        assert lrpi.best_guidance(a, b, label) == pytest.approx(expected, nan_ok=True)
    for bad in ((u, u[..., :2], y), (u, u, y[:1]), (u, u, y.float()), (u, u * nan, y), (u, u, y + 3)):
        with pytest.raises(ValueError, match="no match|finite"):
            lrpi.best_guidance(*bad)


# --- Targets ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task, size", [("maze", 11), ("sudoku", 6), ("nqueens", 8)])
@pytest.mark.parametrize("target", ["final", "reveal", "mask", "replace", "edits"])
def test_targets_are_nested_come_closer_and_end_in_the_solution(target, task, size):
    """And show a share of s / 6: exactly, rounded down, within 5 sigma, or two rounds of the solver."""
    cfg, phi = lrpi.configure(task=task, size=size, target=target, power=1.0, pace=2), lrpi.TARGETS[target]
    puzzles, u = lrpi.TASKS[task].make(60, size, "train"), torch.rand(60, 2, size**2, generator=generator())
    targets = [phi(tuple(puzzles), torch.full((60,), s), u, cfg) for s in range(1, 10)]
    assert all(torch.equal(t, puzzles.y) for t in targets[5:]), "y* at step 6 = N_sup, and after it"
    for s, (a, b) in enumerate(itertools.pairwise(targets[:6]), 1):
        assert (b == puzzles.y)[a == puzzles.y].all() and 0 <= a.min() <= a.max() < cfg.vocab, "nested"
        n, left = (puzzles.x != puzzles.y).sum(1), (a != puzzles.y).sum(1)
        by_chance, sigma = (target == "replace") * (6 - s) / 6 / cfg.vocab, math.sqrt(1 / 4 / a.numel())
        near = abs((a == puzzles.y).double().mean() - by_chance - s / 6) < 5 * sigma
        edited = torch.equal(a, stage(puzzles, 2 * s))
        exactly = {"final": left.sum() == 0, "reveal": torch.equal(n - left, n * s // 6), "edits": edited}
        assert exactly.get(target, near)


# --- Training -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target, act", [("final", False), ("edits", False), ("reveal", True)])
def test_training_is_a_pair_of_nested_loops(target, act, monkeypatch):
    """And, if halting draws lots, a queue. By hand; all noise is 1. Averaged weights: atol 1e-6."""
    given = {"examples": 24, "n_sup": 3, "batch_size": 4, "warmup": 2, "ema": 0.7, "noise": 0.3, "pace": 2}
    cfg = tiny(target=target, step_index=True, linger=0.0, act=act, **given)
    puzzles, phi, rng = lrpi.make_mazes(7, 5), lrpi.TARGETS[target], random.Random(0)
    updates, line, seen, share = [], [], [], 0

    def spy(puzzles, s, u, cfg):
        updates.append(SimpleNamespace(puzzles=puzzles, s=s, u=u, lots=torch.zeros(4, dtype=torch.bool)))
        return phi(puzzles, s, u, cfg)

    def halting(model, y, *_):
        updates[-1].lots = torch.tensor([rng.random() < 0.4 for _ in y])
        return 0 * y.sum(), updates[-1].lots

    monkeypatch.setitem(lrpi.TARGETS, target, spy)
    monkeypatch.setattr(lrpi, "halting_loss", halting)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    trained, model = (torch.manual_seed(0) and lrpi.LoopedModel(cfg) for _ in range(2))
    data = puzzles if target == "edits" else torch.utils.data.TensorDataset(puzzles.x, puzzles.y)
    averaged = lrpi.train(trained, data, cfg, lambda run, loss: seen.append((run.seen.item(), run.share)))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    last, state, mean = SimpleNamespace(s=torch.full((4,), 3), lots=False), model.start(4), None
    for step, now in enumerate(updates):
        fresh = (last.s == 3) | last.lots
        assert share < 1 and torch.equal(now.s, torch.where(fresh, 1, last.s + 1))
        for a, b in zip((*last.puzzles, last.u), (*now.puzzles, now.u), strict=True) if step else ():
            assert torch.equal(a[~fresh], b[~fresh]), "the same puzzles and noise for a whole rollout"
        assert step == 0 or not (last.u == now.u)[fresh].any(), "new noise for every rollout"
        line += now.puzzles[0][fresh].tolist()
        state = [torch.where(fresh[:, None, None], *of) for of in zip(model.start(4), state, strict=True)]
        y, z = model(now.puzzles[0], *(h + 0.3 for h in state), now.s)
        optimizer.zero_grad()
        F.cross_entropy(model.readout(y).mT, phi(now.puzzles, now.s, now.u, cfg).long()).backward()
        cosine = 0.5 + 0.5 * math.cos(math.pi * share)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / 3) * cosine
        optimizer.step()
        new = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        mean = 0.7 * mean + 0.3 * new if step else new
        state, last = (y.detach(), z.detach()), now
        share = (len(line) - torch.where(now.lots, 0, 1 - now.s / 3).sum().item()) / 24
        assert seen[step] == (len(line), pytest.approx(share))
    assert share >= 1 and sorted(line[:7]) == sorted(puzzles.x.tolist()) and line[7:] == line[:-7]
    assert torch.allclose(torch.nn.utils.parameters_to_vector(averaged.parameters()), mean, atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"awr": 0.7}, {"hinge": 1.5}, dict(linear=True, awr=2, hinge=0.1)])
def test_the_loss_of_a_step_against_plain_loops(given):
    """Its value cell by cell in float64, and the gradient of that; atol 1e-6."""
    cfg, (u, c, y), s = tiny(n_sup=5, **given), two_logits(), torch.tensor([1, 2, 5, 4])
    losses = [lrpi.step_loss(u, c.requires_grad_(), y, s, cfg), 0.0]
    for b, cell in itertools.product(range(4), range(5)):
        label, before, after = y[b, cell], u[b, cell].log_softmax(-1), c[b, cell].log_softmax(-1)
        A = after - before
        loss = -after[label] * (min(20, math.exp(A[label].item() / cfg.awr)) if cfg.awr else 1)
        loss += cfg.hinge * max(0.0, (after.exp() * A).sum() - A[label])
        losses[1] += loss * (s[b].item() / 3 if cfg.linear else 1) / 20  # 3 is the mean of 1 .. 5
    assert torch.allclose(*losses, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(loss, c)[0] for loss in losses), atol=1e-6)
    assert {"margin", "advantage"} <= {*lrpi.step_loss.__code__.co_names}, "the functions of §2"


def test_halting_loss_and_who_may_leave():
    """Half of the binary cross-entropy, 1e-4; one row in ten has to stay for 2, 3 or 4 steps, 5 sigma."""
    model, B = lrpi.LoopedModel(tiny(scheme="trm", n_sup=4)), 4000
    torch.manual_seed(0)
    torch.nn.init.normal_(model.halting.weight, std=5.0)
    y, s, y_star = torch.randn(B, 25, 16), torch.randint(1, 5, (B,)), torch.randint(0, 5, (B, 25))
    logits, right = F.one_hot(y_star, 5).float(), torch.arange(B) % 2 == 1
    logits[::2, 7] = logits[::2, 7].roll(1, -1)  # every second answer has one wrong cell
    loss, leaves = lrpi.halting_loss(model, y, logits, y_star, s)
    q = model.halting(y[:, 0])[:, 0]
    expected = -0.5 * torch.where(right, F.logsigmoid(q.double()), F.logsigmoid(-q.double())).mean()
    assert abs(loss.item() - expected.item()) < 1e-4 and not leaves[q <= 0].any()
    for k in (1, 2, 3, 4):
        p, stayed = 0.1 * (4 - k) / 3, (~leaves[(q > 0) & (s == k)]).double()
        assert abs(stayed.mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / len(stayed))


# --- Evaluation ---------------------------------------------------------------------------------------------
def synthetic(monkeypatch, puzzles, leans, spread=0.0):
    """Lets rollouts give logits [N, S + 1, L, V] that lean towards the label by leans[s] after step s."""
    lean = F.one_hot(puzzles.y.long(), 5).float()[:, None] * torch.tensor(leans)[:, None, None]
    logits = lean + spread * torch.randn(lean.shape, generator=generator())
    keys = {tuple(row): i for i, row in enumerate(puzzles.x.tolist())}

    def rollout(model, x, steps=None, stop=None):
        rows = torch.tensor([keys[tuple(row)] for row in x.tolist()])
        for s in steps or range(1, len(leans)):
            yield lrpi.Step(torch.arange(len(x)), x, logits[rows, s - 1], logits[rows, s], None)

    monkeypatch.setattr(lrpi, "rollout", rollout)
    return logits.double()


def test_evaluation_against_formulas(monkeypatch):
    """Every measure of every puzzle and step, from probabilities in float64, atol 1e-5; and their means."""
    puzzles, ws = lrpi.make_mazes(12, 5, "test"), [0.0, 1.0, 2.5]
    logits = synthetic(monkeypatch, puzzles, [0.0, 3.0, 3.5, 4.0], 1.0)
    found = lrpi.evaluate(lrpi.LoopedModel(tiny()), puzzles, lrpi.maze_solved, ws=[ws] * 3)
    for i, s in itertools.product(range(12), range(3)):
        u, c, maze, y = logits[i, s], logits[i, s + 1], puzzles.x[i].tolist(), puzzles.y[i].long()
        p, q, guided, at = u.softmax(-1), c.softmax(-1), [u + w * (c - u) for w in ws], (range(25), y)
        A, KL, hits = (q / p).log(), (q * (q / p).log()).sum(-1), c.argmax(-1) == y
        right = [solved_by_hand(maze, of.argmax(-1).tolist(), 5) for of in (c, *guided)]
        want = {"exact": right[0], "label": hits.all(), "cells": hits.double().mean(), "kl": KL.mean(),
                "logp": q[at].log().mean(), "gain": A[at].mean(), "margin": (A[at] - KL).mean(),
                "margin_positive": (A[at] > KL).double().mean(), "change": (q - p).abs().max(),
                "guided_exact": right[1:],
                "guided_logp": [of.log_softmax(-1)[at].mean() for of in guided]}  # fmt: skip
        assert set(want) == set(each := found["each"])
        for name, value in want.items():
            assert torch.allclose(each[name][i, s].double(), torch.as_tensor(value).double(), atol=1e-5), name
    assert 0 < found["exact"][1] < 1
    assert all(torch.allclose(torch.tensor(found[k]), v.mean(0), atol=1e-5) for k, v in found["each"].items())


def test_verdicts_on_steps_built_to_improve_do_nothing_or_harm_and_their_intervals(monkeypatch):
    """With noise of 1 on every logit: a step that only draws new noise moves, and no gain is shown."""
    puzzles, model = lrpi.make_mazes(600, 5, "test"), lrpi.LoopedModel(tiny(n_sup=5))
    test, valid = puzzles[:300], puzzles[300:]
    synthetic(monkeypatch, puzzles, [0.0, 2.0, 2.0, 3.0, 2.0, 2.0], spread=1.0)
    found = lrpi.diagnose(model, test, valid, lrpi.maze_solved)
    assert found["verdict"] == ["improves", "moves", "improves", "harms", "moves"]
    assert "harms: step 4; moves: step 5. 2 of 5 steps improve" in found["summary"]
    assert found["kl"][1] > 0.1 and found["step_size"][3] == "overshoots"
    synthetic(monkeypatch, puzzles, [0.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    found = lrpi.diagnose(model, test, valid, lrpi.maze_solved)
    assert found["verdict"] == ["improves", "dead", "dead", "dead", "improves"]
    assert found["step_size"][0] == found["step_size"][4] == "too timid", "all residuals favour the label"
    assert found["w_star"][0] == math.inf and all(math.isnan(w) for w in found["w_star"][1:4])
    assert found["cut"] == {"lost": 0, "won": 0}, "without the dead steps"
    values, rng = torch.randn(200, 3, generator=generator()).exp(), random.Random(0)
    assert lrpi.intervals(values[:5]) == [[-math.inf, math.inf]] * 3, "too few"
    for of, (low, high) in zip(values.T.tolist(), lrpi.intervals(values), strict=True):
        means = sorted(sum(rng.choices(of, k=200)) / 200 for _ in range(4000))  # 98.33% each, as by hand
        assert abs(low - means[33]) + abs(high - means[-34]) < 0.2 * (high - low)
    for K, t in ((2, 12.706), (3, 4.3027), (5, 2.7764), (10, 2.2622)):  # Student's, within 0.1%
        few, signs = torch.rand(4, K, generator=generator(K)).double(), torch.tensor([[0], [-1], [1]])
        want = (few.mean(1) + signs * t * few.std(1) / K**0.5).T
        assert torch.allclose(lrpi.interval_of_few(few), want, rtol=0, atol=1e-3 * t * few.std().item())
    assert lrpi.interval_of_few(few[:, :1]).isinf().sum() == 8, "one value says nothing of the spread"


@pytest.mark.parametrize("rule", ["kl", "change", "head"])
def test_halting_gives_the_answers_of_the_plain_rollout_at_the_halting_step(rule):
    """Bit for bit, and puzzles that left cost nothing."""
    model, *_ = model_and_state(tiny(act=True, n_sup=6))
    puzzles, sizes = lrpi.make_mazes(80, 5, "test"), []
    plain = list(lrpi.rollout(model, puzzles.x, range(1, 10)))  # longer than in training
    assert all(torch.equal(a.logits_c, b.logits_u) for a, b in itertools.pairwise(plain)) and len(plain) == 9
    scores = torch.stack([lrpi.HALTS[rule](model, step) for step in plain], 1)  # [80, 9]
    head = plain[4].y[:, 0] @ model.halting.weight[0] + model.halting.bias
    assert rule != "head" or torch.allclose(scores[:, 4], -head, atol=1e-5)
    threshold = scores.quantile(0.3).item()
    first = torch.tensor([[*(row <= threshold).nonzero()[:, 0].tolist(), 8][0] for row in scores])
    model.nets[0].register_forward_hook(lambda net, args, out: sizes.append(len(out)))
    answers, taken = lrpi.answer(model, puzzles.x, range(1, 10), lrpi.stopping(rule, threshold))
    assert torch.equal(taken, first + 1) and len(taken.unique()) > 2 and sum(sizes) == 3 * taken.sum().item()
    said = torch.stack([step.logits_c.argmax(-1) for step in plain], 1)  # [80, 9, L]
    assert torch.equal(answers.long(), said[range(80), first])
    odd = lambda x, answer: (x + answer).sum(-1) % 5 == 0  # a checker for this test  # noqa: E731
    found, right = lrpi.diagnose(model, puzzles, puzzles, odd, range(1, 10)), odd(puzzles.x[:, None], said)
    for name in (rule, "checker"):
        leaves = right if name == "checker" else scores <= found["halt"][rule]["threshold"]
        first = torch.tensor([[*row, True].index(True) for row in leaves[:, :8].tolist()])
        exact, passes = right[range(80), first].double().mean().item(), 3 * (1 + first.double().mean().item())
        assert found["halting"][name] == pytest.approx({"exact": exact, "passes": passes}) and 3 < passes < 27
    solved = (torch.rand(80, 9, generator=generator()) < torch.linspace(0.3, 0.9, 9)).cummax(1).values
    curve = lrpi.halting_curve(scores, solved, loss=0.05)
    first = [next((s for s in range(8) if row[s] <= curve["threshold"]), 8) for row in scores.tolist()]
    chosen = sum(first) / 80 + 1, sum(row[s] for row, s in rows_of(solved, torch.tensor(first))) / 80
    points, best = [*zip(curve["steps"], curve["exact"], strict=True)], max(curve["exact"])
    assert chosen[1] >= best - 0.05 and all(s > chosen[0] - 1e-6 or e < best - 0.05 for s, e in points)


# --- The command line ---------------------------------------------------------------------------------------
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
PROGRAM = shlex.join([sys.executable, str(HERE / "lrpi.py")])
QUICK = "--size 5 --examples 120 --train-size 200 --test-size 40 --width 16 --ffn 32 --n-sup 3 "
BRIEF = "--task nqueens --size 5 --width 8 --ffn 8 --n-sup 2 --test-size 6 --train-size 60 --no-figures "


def command(line):
    return lrpi.main(shlex.split(line))


def process(line, **given):
    return subprocess.run(line, shell=True, env=ENV, text=True, capture_output=True, **given)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def read(folder, name="metrics"):
    return json.loads((Path(folder) / f"{name}.json").read_text())


def weights(folder):
    return [*torch.load(Path(folder) / "model.pt")["model"].values()]


@contextlib.contextmanager
def ctrl_c(*calls, of="step_loss"):
    """Sends SIGINT at these calls of a function, counted from 0: at updates of the training."""
    count, function = itertools.count(), getattr(lrpi, of)
    with pytest.MonkeyPatch.context() as patch:
        hit = lambda: next(count) in calls and signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(lrpi, of, lambda *args: (hit(), function(*args))[1])
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_command_writes_everything_and_eval_reproduces_it_halts_and_thinks_longer(capsys):
    done, out = process(f"{PROGRAM} --task maze --seed 5 {QUICK}"), Path("runs/maze-dis")
    before, found = contents(out), read(out)
    assert (done.returncode, done.stderr, len(before)) == (0, "", 4)
    assert all(before[f"{name}.png"].startswith(b"\x89PNG") for name in ("diagnosis", "solution"))
    assert [found[name] for name in ("task", "scheme", "size", "seed", "passes")] == ["maze", "dis", 5, 5, 9]
    assert 120 <= found["examples_seen"] < 135 and found["longest"] <= 15
    assert found["params"] == sum(w.numel() for w in weights(out)) - 32, "y0 and z0 are not trained"
    assert found["halting"]["none"] == {"exact": found["exact"][2], "passes": 9}
    for s, (exact, verdict) in enumerate(zip(found["exact"], found["verdict"], strict=True), 1):
        assert re.search(rf"^ +{s} +{exact:.1%} .* {verdict}", done.stdout, re.MULTILINE)
    last = f"{found['exact'][2]:.1%} of 40 held-out puzzles solved, with 9 "
    assert last in done.stdout and found["summary"] in done.stdout
    assert done.stdout.count("validation solved") == len(found["curve"]) == 10
    assert command(f"--eval {out}/model.pt --no-figures --test-size 40") == 0 and contents(out) == before
    other = ("total_seconds", "config", "seal")
    assert all(found[k] == v for k, v in read(out / "eval").items() if k not in other)
    line = f"--eval {out}/model.pt --out o --no-figures --test-size 40 --halt --think 9 --size 9"
    assert command(line) == 0 and "(--halt kl" in capsys.readouterr().out
    assert [len(read("o")["exact"]), *(read("o")[name] for name in ("passes", "size"))] == [9, 27, 9]


def test_other_options(capsys, monkeypatch):
    """A head, bfloat16, torch.compile with a backend that needs no compiler; a terminal, slow generation."""
    compiled, plain, clock = [], torch.nn.Module.compile, itertools.count(step=0.9)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(plain(net, backend="eager")))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = "--mixer mlp --act --halt head --precision bf16 --compile --no-figures --train-size 30000 --out o"
    assert command(f"{QUICK} {line} --budget-seconds 2 --tries 3") == 0 and compiled
    found, said = read("o"), capsys.readouterr()
    assert [*found["halting"]] == ["none", "kl", "change", "head", "checker"] and found["train_seconds"] >= 2
    assert all(words in said.out for words in (" s left\r", "100%", "(--halt head", "\n    3   "))
    assert re.search(r"making 30000 puzzles: \d+%", said.err)
    with pytest.raises(SystemExit, match="0"):
        command("--help")
    text, names = " ".join(capsys.readouterr().out.split()), {*asdict(lrpi.Config())} - {"vocab", "shape"}
    assert all(f" {lrpi.flag(name)}" in text for name in names)
    assert all(words in text for words in ("from 1 to 1000 [6]", ": auto, cuda, mps, cpu [auto]"))


@pytest.mark.parametrize("given", ["", "--ema 0 --mixer conv", "--scheme trm --T 1 --n 1"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(given, capsys):
    """Ctrl-C within a rollout: evaluated in good order, exit code 130; kill -9. Same weights and curve."""
    line, killed = f"{BRIEF} {given} --examples 400 --out", not given and os.name != "nt"
    if killed:
        words = shlex.split(f"{PROGRAM} {line} b --save-minutes 1e-6")
        with subprocess.Popen(words, env=ENV, text=True, stdout=subprocess.PIPE) as run:
            while "validation solved" not in run.stdout.readline():  # a tenth of the training is done
                assert run.poll() is None
            run.kill()
        assert run.returncode == -signal.SIGKILL and set(contents("b")) == {"training.pt"}
    with ctrl_c(2, 9):
        for more, code in (("--resume" if killed else "", 130), ("--resume", 130), ("--resume", 0)):
            assert command(f"{line} b {more}") == code and len(read("b")["exact"]) == 2
            assert ("training.pt" in contents("b")) == ("--resume" in capsys.readouterr().err) == bool(code)
    with ctrl_c(0, of="diagnose"):  # when there is nothing left to train
        assert command(f"{line} a") == 130 and "--resume" not in capsys.readouterr().err
    assert same(weights("a"), weights("b"))
    curves = [[at["exact"] for at in read(name)["curve"]] for name in "ab"]
    assert curves[0] == curves[1] and len(curves[0]) == 10


ARMS = ["dis+feedback+linear+target=mask", "trm-medium+n-sup=2+step-index", "one-pass+stablemax+awr=1"]
COMPARE = f"{BRIEF} --examples 80 --seeds 2 --compare {','.join(ARMS)} --out "


def test_a_comparison_writes_its_runs_continues_after_ctrl_c_and_repeats_none(capsys):
    names = [f"{arm}-{seed}" for seed in (0, 1) for arm in ARMS]
    with ctrl_c(30):  # in the second run
        assert command(f"{COMPARE} o") == 130
    whole = contents(f"o/{names[0]}")
    assert [path.parent.name for path in Path("o").glob("*/training.pt")] == names[1:2]
    assert command(f"{COMPARE} o") == command(f"{COMPARE} o") == 0 and contents(f"o/{names[0]}") == whole
    found = read("o", "compare")["arms"]
    assert sorted(path.name for path in Path("o").iterdir()) == sorted(["compare.json", *names])
    for (arm, seed), passes in zip(itertools.product(ARMS, (0, 1)), (6, 6, 6, 6, 36, 36), strict=True):
        run, record = read(f"o/{arm}-{seed}"), found[arm][seed]
        assert len(run["curve"]) == 10 and 80 <= run["examples_seen"] < 96
        assert record.pop("curve") == [at["exact"] for at in run["curve"]]
        assert record.items() <= run.items() and record["passes"] == passes
    assert command(f"{BRIEF} --examples 80 --scheme {ARMS[1].replace('+', ' --')} --out a") == 0
    assert same(weights("a"), weights(f"o/{names[1]}")), "as if it had not been interrupted"


# --- Puzzles of your own: text and CSV files ----------------------------------------------------------------
SUDOKU = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
ROWS = [SUDOKU[i : i + 9] for i in range(0, 81, 9)]
BANDS = ["# today\n====\n[Puzzle]\n*--*", *ROWS[:3], "---+---", "", *ROWS[3:6], "╠═══╪═══╣", *ROWS[6:], "];"]
QUEENS = "Q......." + "." * 56
FORMATS = {  # each holds the same puzzle
    "sudoku": [f"17f3 {SUDOKU} 2.1", f"id,puzzle,solution\n1,{SUDOKU.replace('.', '0')},{'1' * 81}",
               "\n".join(["Grid 01", *ROWS]), "\n".join(f"|{' '.join(r)}|" for r in BANDS[1:]),
               "\n".join(BANDS), "\n".join(f"[{', '.join(r)}]," for r in ROWS), f"[[{', '.join(SUDOKU)}]]",
               *(text.replace(".", blank) for blank in "0_*x?-" for text in (SUDOKU, "\n".join(ROWS)))],
    "maze": ["S  \n## \n  G", "    s..\n    ##.\n    ..g", "A 0 0\n1 X 0\n0 0 B", "   \n\nmaze:\nP\n%%\n  F",
             "  #####\n  #S  #\n  ### #\n  #  E#\n  #####", " +-+-+ \n |S  |\n +-+ +\n |  G|\n +-+-+",
             "A00\n1X0\n00B", " +-----+ \n | S   |\n +--+  +\n |   G |\n +--+--+"],
    "nqueens": [QUEENS, "1" + "0" * 63, "Q . . . . . . .\n" + "........\n" * 7],
}  # fmt: skip
TWO = {  # a text with two puzzles; the answers, in one line, and how many cells they find
    "sudoku": ("\n".join([SUDOKU, "5 3 0 | 0 7 0 | 0 0 0", "---+--", *ROWS[1:]]), [(SOLVED, 51)] * 2),
    "maze": ("#####\n#S.G#\n#####\n\n###G+\n#   #\n# ###\nS ###\n#####\n",  # the second's are in the rim
             [("######SoG######", 1), ("###G##ooo##o###So########", 5)]),
    "nqueens": (QUEENS + "\n........" * 7 + "\n. . . . . Q . .\n",
                [("Q...........Q..........Q.....Q....Q...........Q..Q.........Q....", 7),
                 ("..Q.....Q.............Q.....Q..........Q.Q.........Q.........Q..", 7)]),
}  # fmt: skip


def model_of(task):
    cfg = lrpi.configure(task=task, width=8, ffn=8, n_sup=2, mixer="conv")
    model = torch.manual_seed(0) and lrpi.LoopedModel(cfg)
    lrpi.write(Path("m.pt"), {"config": asdict(cfg), "model": model.state_dict(), "facts": {"longest": 0}})


@pytest.mark.parametrize("task", [*TWO])
def test_solving_reads_checks_and_prints_answers(task, capsys, monkeypatch):
    """From standard input with a byte-order mark, and a file written by Windows. The second step is right."""
    of, cfg = lrpi.TASKS[task], lrpi.configure(task=task, mixer="conv")
    asked = [lrpi.read_board(*lrpi.boards(text, of, cfg.size), of, cfg)[2] for text in FORMATS[task]]
    assert all(torch.equal(x, asked[0]) for x in asked)
    for text, mixer in (("#####\n#S  #\n# # #\n# #G#\n#####", "mlp"), ("#S#\n#G#\n###", "conv")):
        [rows] = lrpi.boards(text, lrpi.TASKS["maze"], 5)
        drawn, _, x = lrpi.read_board(rows, lrpi.TASKS["maze"], lrpi.configure(size=5, mixer=mixer))
        assert torch.equal(x, drawn), "the rim stays: mlp works at its size alone; two ends need two cells"

    def rollout(model, x, steps=None, stop=None):
        y = of.solve(x.view(-1, *model.cfg.shape)).y.flatten(1)
        before, after = (50.0 * F.one_hot(cells.long(), model.cfg.vocab) for cells in (x, y))
        for u, c in ((0 * before, before), (before, after)):
            yield lrpi.Step(torch.arange(len(x)), x, u, c, None)

    text, answers = model_of(task) or TWO[task]
    Path("p.txt").write_bytes((data := f"\N{BYTE ORDER MARK}{text}".encode()).replace(b"\n", b"\r\n"))
    line = f"--task {task} --checkpoint m.pt --answers a.png --solve"
    assert command(f"{line} p.txt") == 1 and "0 of 2 solved" in capsys.readouterr().out, "an untrained model"
    assert Path("a.png").read_text() == "\n\n"
    monkeypatch.setattr(lrpi, "rollout", rollout)
    for source in ("- --steps-shown", "p.txt --steps-shown --out o"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        assert command(f"{line} {source}") == 0
        blocks = [block.split("\n") for block in capsys.readouterr().out.strip("\n").split("\n\n")]
        captions = ["puzzle", "step 1: not solved", "step 2: solved", "solved (checked)"]
        assert [block[0].split(",")[0] for block in blocks] == 2 * captions
        for block, (answer, cells) in zip(blocks[3::4], answers, strict=True):
            assert block[0].endswith(f", try 1; {cells} cells to find, at most 0 in training")
            assert "".join(block[1:]).startswith(answer)
        assert Path("a.png").read_text().split("\n") == [*(answer for answer, _ in answers), ""]
    assert len(contents("o")) == 2
    Path("p.txt").write_text("." * 81)
    assert task != "sudoku" or command(f"{line} p.txt") == 0 and "several" in capsys.readouterr().out


@pytest.mark.parametrize("task, size", [("maze", 7), ("sudoku", 6), ("sudoku", 9), ("nqueens", 6)])
def test_views_come_back_and_checkers_judge_them_alike(task, size):
    """Puzzles, solutions and near misses; sudokus that are views of each other are of one kind."""
    of = lrpi.TASKS[task]
    (x, y, *_), (cell, new) = of.make(24, size), of.views(24, (size, size), generator())
    near = torch.where(torch.arange(size**2) == 3, 1 + y % 2, y)
    seen = [lrpi.look(cells, cell, new) for cells in (x, y, near)]
    for cells, view in zip((x, y, near), seen, strict=True):
        assert torch.equal(lrpi.look(view, cell.argsort(1), new.argsort(1)), cells)
    assert torch.equal(of.solved(x, near), of.solved(seen[0], seen[2])) and of.solved(seen[0], seen[1]).all()
    assert not of.solved(x, near).all() and len({*map(tuple, cell.tolist())}) >= 8
    kinds = [lrpi.sudoku_kind(cells) for cells in (y, seen[1])] if task == "sudoku" else []
    assert not kinds or torch.equal(*kinds) and len(kinds[0].unique()) > 2


@pytest.mark.parametrize("turn", range(1, 11))
@pytest.mark.parametrize("task, size", [("maze", 5), ("sudoku", 4)])
def test_tries_take_an_accepted_answer_and_call_no_wrong_one_solved(task, size, turn, monkeypatch):
    """A model that is right in one of its tries, and only with some puzzles; others stay unsolved."""
    of, puzzles, sizes, starts = lrpi.TASKS[task], lrpi.TASKS[task].make(20, size), [], []
    asked, good = [], (puzzles.x != puzzles.y).sum(1) % 4 > 1

    def answer(model, x, steps, stop=None):
        sizes.append(len(x))
        starts.append((*model.y0.shape, model.y0.sum().item()))
        right = of.solve(x, None, *[True] * (task == "maze")).y  # with marks
        able = (x != right).sum(1, keepdim=True) % 4 > 1
        asked.append(x[~able[:, 0]].tolist())
        return torch.where(able & (len(sizes) == turn), right, x), torch.full((len(x),), 2)

    monkeypatch.setattr(lrpi, "answer", answer)
    model = lrpi.LoopedModel(tiny(task=task, size=size))
    said, accepted, passes = lrpi.attempts(model, lrpi.grid(puzzles.x), [1, 2], 10)
    assert accepted.tolist() == (turn * good).tolist() and torch.equal(of.solved(puzzles.x, said), good)
    assert said.max() < len(of.letters), "marks are read as the path"
    assert sizes == [20] * turn + [20 - good.sum().item()] * (10 - turn) and passes == [6 * n for n in sizes]
    assert asked[0] == puzzles.x[~good].tolist() and len({*map(str, asked[:8])}) == 8, "no view comes twice"
    assert len({*starts[:8]}) == 1 and len({*starts}) == (3 if task == "maze" else 1), "a grid has 8 views"


def write_csv(name, task, puzzles):
    rows = (("".join(lrpi.TASKS[task].letters[t] for t in of) for of in pair) for pair in rows_of(*puzzles))
    text = "\n\nme,".join(["\N{BYTE ORDER MARK}source,question,answer", *(",".join(row) for row in rows)])
    Path(f"{name}.csv").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("task, size", [("sudoku", 4), ("maze", 7), ("nqueens", 5)])
def test_csv_files_are_read_trained_on_and_evaluated_on(task, size, monkeypatch):
    """Train and valid share nothing; views and their rounds are solved."""
    of = lrpi.TASKS[task]
    train, test = of.make(300, size, "train"), of.make(40, size, "test")
    write_csv("train", task, [*train][:2])
    write_csv("test", task, [*test][:2])
    cfg = lrpi.configure(task=task, data=".")
    valid, again = (lrpi.make_puzzles(cfg, 10**6, split) for split in ("valid", "test"))
    with monkeypatch.context() as patch:
        patch.setattr(lrpi, "look", lambda cells, *view: cells)
        data = lrpi.make_puzzles(cfg, 10**3, "train")
    parts = [{*map(tuple, puzzles.x.tolist())} for puzzles in (data, valid, train, test, again)]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1] and parts[1] and parts[3] == parts[4]
    some = torch.cat([lrpi.make_puzzles(cfg, 10, "test", seed).x for seed in range(30)])
    assert {*map(tuple, some.tolist())} == parts[3], "others with every seed"
    view = lrpi.make_puzzles(cfg, 500, "train")
    assert len(view) == 500 and len({*map(tuple, view.x.tolist())} - parts[0]) > 30
    assert all(of.solved(puzzles.x, puzzles.y).all() for puzzles in (view, again))
    assert task == "nqueens" or same([*view], [*of.solve(view.x, view.y)])
    given = f"--data . --no-figures --test-size 30 {'--marks' * (task == 'maze')}"
    assert command(f"--task {task} {given} --examples 20 --width 16 --ffn 32 --n-sup 2 --out o") == 0
    assert command(f"--eval o/model.pt {given}") == 0 and read("o/eval")["exact"] == read("o")["exact"]


# --- Bad input: one line that starts with "lrpi: ", exit code 2, no traceback, and nothing lost -------------
BAD = """--size 12; --size 3; --size 63; --size big; --size 7.0; --blanks 9; --lr fast; --lr nan; --lr inf
--seed 9999999999; --examples 1.5; --kernel 4; --mixer attention --heads 5; --halt head; --checkpoint m.pt
--task sudoku --size 8; --task nqueens --size 4; --task nqueens --size 11; --seeds 2; --compare dis --seeds 0
--compare dis --size 12; --task sudoku --loops 1.0; --out /dev/null/x; --compare dis --halt kl
--compare dis --seeds two"""
WORDS = {  # the cases above name their last option and its value; these, something else
    "--size ''": "--size", "--speed 9": "--speed", "--size": "--size", "maze": "maze", "--act=3": "--act",
    f"--size {'9' * 5000}": "99", f"--task {'x' * 5000}": "nqueens", "--task 'ma\nze\x1b[31m'": "--task",
    "--compare 'a\nb'": "a", "--solve 'a\nb'": "a", "--eval 'a\nb.pt'": "a", "--data 'a\nb'": "a",
    f"--out {'x/' * 3000}": "x/x", f"--eval {'d/' * 60}last.pt": "last.pt", "--eval no.pt": "no.pt",
    "--eval ''": "", "--data ''": "", "--solve ''": "", "--compare ''": "", "--compare dis,": "",
    "--compare dis,best": "best", "--compare dis+noise=loud": "loud", "--compare dis+eval=x": "--eval",
    "--compare dis,dis": "dis", "--compare dis+task=maze": "--task", "--compare dis+": "", "--solve .": ".",
    "--data no": "train.csv", "--data /dev/null": "/dev/null", "--solve no.txt": "no.txt", "--eval .": "",
    "--resume": "training.pt", "--solve p.txt": "--checkpoint", "--task sudoku --marks": "--marks",
    f"--device {'mps' if torch.cuda.is_available() else 'cuda'}": "--device",
}  # fmt: skip
ALONE = "eval resume, eval compare, eval solve, eval checkpoint, eval seeds, solve compare, solve resume,"
ALONE += " solve seeds, solve data, solve answers, compare resume, compare checkpoint"


def refused(capsys, line, *words):
    assert command(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("lrpi: ") and said.find("\n") == len(said) - 1 < 500, said
    assert all(word in said for word in words), (said, words)


def test_bad_options(capsys, monkeypatch):
    """They are refused before anything is written."""
    Path("p.txt").touch()
    ranges = [(lrpi.flag(name), low, high) for name, (_, low, high) in lrpi.OPTIONS.items() if high]
    beyond = [f"{name} {int(value)}" for name, low, high in ranges for value in (low - 1, 2 * high)]
    for line in [*beyond, *(f"{lrpi.flag(name)} magic" for name in lrpi.CHOICES), *re.split("; |\n", BAD)]:
        refused(capsys, line, *shlex.split(line)[-2:])
    for line, words in WORDS.items():
        refused(capsys, line, words)
    for a, b in map(str.split, ALONE.split(",")):
        for value in [""] if b == "resume" else ["=", "=x"]:  # refused even when they are empty
            refused(capsys, f"--{a}=x --{b}{value}", f"--{b}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, QUICK, "matplotlib", "--no-figures")
    assert [path.name for path in Path().rglob("*.*")] == ["p.txt"]
    assert lrpi.parse(["--size= 7", "--lr= 7", "--seed=٧"]) == dict(size=7, lr=7, seed=7)


def test_bad_puzzles_and_csv_files(capsys):
    far, tail = 1_000_000, ".....Q..\n......Q."
    for task, bad in {
        "maze": {"S #\n# x\n#G ": "line 2, character 3: 'x'", "S G\n# #S": "no solution", "S G\n##\nS G": "",
                 "###\n  G": "", "###\nS  ": "", "S#\n#G": "", "S" + " " * far + "G": "",
                 "###\n# #\n###": "", "S G\n#S#": ""},
        "sudoku": {SUDOKU[:80]: "9", SUDOKU[:80] + "a": "80 cells", "12": "2 cells", "1" * far: "",
                   "77" + "." * 79: "no solution", "12345678." + "." * 17 + "9" + "." * 54: "no solution"},
        "nqueens": {"........\n" * 6 + tail: "no solution", "Q" * 64: "no solution"},
    }.items():  # fmt: skip
        model_of(task)
        for text, words in bad.items():
            Path("p.txt").write_text(f"{text}\n\n{TWO[task][0]}\n")
            assert command(f"--task {task} --solve p.txt --checkpoint m.pt") == 2
            out, err = capsys.readouterr()
            assert err.startswith("lrpi: p.txt, line ") and words in err and "not solved" in out
            assert err.find("\n") == len(err) - 1 < 300
    for data in (b"", b"\n\n", b"\xff\xfe\x00S"):
        Path("p.txt").write_bytes(data)
        refused(capsys, "--solve p.txt --checkpoint m.pt --task nqueens", "p.txt")
    write_csv("train", "sudoku", [*lrpi.make_sudokus(300, 4)][:2])
    text = Path("train.csv").read_text(encoding="utf-8-sig")
    for data, words in {
        "": "", text.replace("question", "puzzle"): "question", text[:22]: "", f"{text}\nme,1": "line",
        text.replace("me,", "me,1", 1): "line 3", text.replace("me,", "me,\0", 1): "", text + "x" * far: "",
        f"{text}\nme,{'.' * 16},{'1' * 16}": "line", f"{text}\nme,{'.' * 15}5,{'1' * 16}": "'5'",
    }.items():  # fmt: skip
        Path("train.csv").write_text(data)
        refused(capsys, "--task sudoku --data . --no-figures --budget-seconds 1 --out o", "train.csv", words)


def spoilt(content, rng):
    """A copy in which one entry, somewhere, is missing or something else."""
    if not (isinstance(content, dict) and content) or rng.random() < 0.1:
        return rng.choice(["x", None, [content], {}, 10**9, math.nan])
    content, key = content.copy(), rng.choice([*content])
    new = spoilt(content.pop(key), rng)
    return content if rng.random() < 0.1 else content | {key: new}


def test_damaged_files_of_its_own(capsys):
    """model.pt, training.pt and a run of --compare: refused, or where the damage is of no account, used."""
    with ctrl_c(5):
        assert command(f"{BRIEF} --examples 60 --out o") == 130
    assert command(f"{COMPARE} c") == 0
    run, rng = Path(f"c/{ARMS[0]}-1/metrics.json"), random.Random(0)
    for path, line in {
        Path("o/model.pt"): "--eval o/model.pt --no-figures --test-size 6",
        Path("o/training.pt"): f"{BRIEF} --examples 60 --resume --out o",
        run: f"{COMPARE} c",
    }.items():
        whole, content = path.read_bytes(), read(run.parent) if path == run else torch.load(path)
        edited = [content | {"config": content["config"] | {name: 10**5}} for name in ("width", "n_sup")]
        cut = [*(whole[: len(whole) * k // 4] for k in range(4)), whole[:-1], b"\xff\xfe", b"[" * 10**5]
        for damage in [*cut, 7, [1], {}, *edited, *(spoilt(content, rng) for _ in range(40))]:
            torch.save(damage, path)
            if path == run or isinstance(damage, bytes):
                path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage).encode())
            damaged, _ = contents(path.parent), capsys.readouterr()
            if command(line):
                said = capsys.readouterr().err
                assert said.startswith("lrpi: ") and said.find("\n") == len(said) - 1 and path.name in said
                assert contents(path.parent) == damaged
        path.write_bytes(whole)
    for given in ("--width 11", "--scheme trm", "--halt head", "--task sudoku", "--size 12"):
        refused(capsys, f"--eval o/model.pt --no-figures {given}", given.split()[0])
    refused(capsys, f"{BRIEF} --examples 60 --resume --out o --seed 3", "--seed", "3")
    refused(capsys, f"{COMPARE} c --noise 0.1", "-0/metrics.json", "--noise")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disks_closed_streams_and_lost_losses(capsys, monkeypatch):
    line, loss, write = f"{BRIEF} --examples 60 --out o", lrpi.step_loss, Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(lrpi, "step_loss", lambda *args: loss(*args) * math.nan)
        refused(capsys, line, "finite")
    Path("o/training.pt").mkdir(parents=True)  # cannot be replaced by a file
    assert command(f"{line} --save-minutes 1e-9") == 2
    said, before = capsys.readouterr().err, contents("o")
    assert "lrpi: o/training.pt: " in said and set(before) == {"model.pt", "metrics.json"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, data: write(Path("/dev/full"), data))
        refused(capsys, line, "o/model.pt", "No space left")
    assert contents("o") == before
    model_of("maze")
    solve = f"{PROGRAM} --solve - --checkpoint m.pt --think 1"
    for line, code, said in [
        (f"{solve} <&-", 2, "lrpi: "), (f"echo 'S G' | {solve} >&-", 1, ""),
        (f"(yes 'S G' | head -n 99; echo) | {solve} 2>&1 | head -n 1", 0, ""),
    ]:  # fmt: skip
        done = process(line)
        assert (done.returncode, done.stderr[:6], done.stderr.count("\n")) == (code, said, bool(said)), done
        assert "Traceback" not in done.stdout


# --- Several processes --------------------------------------------------------------------------------------
WORK = """
import copy, os, signal, sys, torch, lrpi
def spy(model, data, cfg, callback, average, resume, train=lrpi.train):
    twin, rank = copy.deepcopy(model), int(os.environ["RANK"])
    torch.manual_seed(0)  # in all processes: the same puzzles and the same noise
    found = [train(twin, lrpi.make_queens(30, 5), cfg, None, average)]
    "--resume" in sys.argv or signal.raise_signal(signal.SIGINT)
    found += [torch.manual_seed(rank) and train(model, data, cfg, callback, average, resume)]
    torch.save([[*of.state_dict().values()] for of in found], f"rank{rank}.pt")
    return found[1]
lrpi.train = spy
sys.exit(lrpi.main(sys.argv[1:]))
"""


def test_two_processes_share_their_weights_and_leave_one_set_of_results():
    """Stopped and resumed. With the same puzzles and noise in both, they do what one does, bit for bit."""
    Path("work.py").write_text(WORK)
    run = f"{shlex.quote(sys.executable)} -m torch.distributed.run --nproc-per-node=2 --standalone work.py"
    assert process(f"{run} {BRIEF} --examples 41 --batch-size 8 --out o", timeout=300).returncode
    done = process(f"{run} {BRIEF} --examples 41 --batch-size 8 --out o --resume", timeout=300)
    assert done.returncode == 0 and done.stdout.count("held-out puzzles solved, with") == 1, done.stderr
    assert set(contents("o")) == {"metrics.json", "model.pt"} and 40 <= read("o")["examples_seen"] < 60
    ranks = [torch.load(f"rank{k}.pt") for k in (0, 1)]
    assert all(same(a, b) for a, b in zip(*ranks, strict=True)), "ranks' weights are equal"
    cfg = lrpi.configure(task="nqueens", size=5, width=8, ffn=8, n_sup=2, batch_size=4, examples=21)
    model = torch.manual_seed(0) and lrpi.LoopedModel(cfg)
    one = torch.manual_seed(0) and lrpi.train(model, lrpi.make_queens(30, 5), cfg)
    assert [same([*one.state_dict().values()], of) for of in ranks[0]] == [True, False]


# --- The file itself: its size, and sections that can be copied ---------------------------------------------
SOURCE = (HERE / "lrpi.py").read_text()
TREE = ast.parse(SOURCE)
IMPORTS = [ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
SECTIONS = re.split(r"^# -{60,}\n(?=# §\d+  )", SOURCE, flags=re.MULTILINE)  # of which the first is §0


def test_the_file_is_short():
    sizes = [1 + text.count("\n") for text in SECTIONS]
    assert [int(text[3 : text.index("  ")]) for text in SECTIONS[1:]] == [*range(1, 11)]
    assert max(map(len, SOURCE.splitlines())) <= LINE and sum(sizes[1:7]) <= METHOD
    assert all(f.end_lineno - f.lineno < FUNCTION for f in ast.walk(TREE) if isinstance(f, ast.FunctionDef))
    modules = {re.split("[ .]", line)[1] for line in IMPORTS}
    assert modules - sys.stdlib_module_names == {"torch", "matplotlib"} and SOURCE.count("\n") <= TOTAL


def copied(*numbers):
    """The names of sections that are run with nothing but the file's import statements."""
    exec("\n".join([*IMPORTS, *(SECTIONS[number] for number in numbers)]), names := {})
    return SimpleNamespace(**names)


def test_sections_can_be_copied_and_the_copy_learns():
    """Each alone, and §1 to §4 together: after 600 updates, most mazes of 5 x 5 are solved."""
    model = copied(1).LoopedModel(vocab=3, shape=(4, 4), width=16, ffn=16)
    y, z = model(torch.zeros(2, 16), *model.start(2), torch.ones(2))
    assert model.readout(y).shape == (2, 16, 3) and z.shape == (2, 16, 16)
    assert copied(2).best_guidance(*two_logits()) == lrpi.best_guidance(*two_logits())
    puzzles, cfg = lrpi.make_mazes(2400, 5), SimpleNamespace(n_sup=6, power=0.3, pace=2, vocab=6)
    given = tuple(puzzles), torch.arange(2400) % 6 + 1, torch.rand(2400, 2, 25), cfg
    assert all(phi(*given).equal(lrpi.TARGETS[name](*given)) for name, phi in copied(3).TARGETS.items())
    method, seen = copied(1, 2, 3, 4), []
    cfg = method.TrainConfig(shape=(5, 5), width=32, ffn=64, examples=1200, hinge=0.1, linger=0.0)
    model = torch.manual_seed(0) and method.LoopedModel(cfg)
    method.train(model, puzzles, cfg, lambda run, loss: seen.append(loss))
    losses = [loss for loss in seen if loss is not None]
    assert len(seen) == 600 and 190 <= len(losses) <= 200 and sum(losses[-20:]) < 0.5 * sum(losses[:20])
    found = lrpi.evaluate(model, lrpi.make_mazes(300, 5, "test"), lrpi.maze_solved)
    assert found["exact"][-1] > max(0.4, 2 * found["exact"][0])
    maze, boards = copied(5), copied(7)
    puzzles = maze.make_mazes(20, 7, "valid")
    assert maze.maze_solved(puzzles.x, maze.solve_mazes(puzzles.x).y).all() and len(puzzles) == 20
    y = boards.other_solutions(empty := torch.zeros(10, 36, dtype=torch.uint8), empty, generator())
    assert boards.sudoku_solved(boards.minimal(y, generator()), y).all()
    y, x = boards.placements(6), boards.queens_boards(10, 6, generator())
    assert all(boards.queens_solved(row.expand_as(y), y).any() for row in x)


# --- The tutorial: run as it stands in quick mode, without Jupyter, and its exercises with right answers ----
TUTORIAL = json.loads((HERE / "tutorial.ipynb").read_text())["cells"]
CODE = {i: "".join(cell["source"]) for i, cell in enumerate(TUTORIAL) if cell["cell_type"] == "code"}
PROSE = "\n\n".join("".join(cell["source"]) for cell in TUTORIAL if cell["cell_type"] == "markdown")
SOLUTIONS = re.findall(r"<summary>(\d+):.*?```python\n(.*?)```", PROSE, re.DOTALL)
STORED = {i: TUTORIAL[i]["outputs"] for i in CODE}
DRAWN = {i: sum("image/png" in o.get("data", {}) for o in outputs) for i, outputs in STORED.items()}
STREAMS = "\n".join("".join(o.get("text", "")) for outputs in STORED.values() for o in outputs)


@pytest.fixture(scope="module")
def tutorial():
    """The namespace after the last cell, and {cell: (what it printed, how many figures it opened)}."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    namespace, left = {"__name__": "__main__"}, {}
    with pytest.MonkeyPatch.context() as patch, plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LRPI_QUICK", "1")
        patch.chdir(HERE)
        for i, source in CODE.items():
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(source, f"tutorial.ipynb, cell {i}", "exec"), namespace)  # noqa: S102
            left[i] = printed.getvalue(), len(plt.get_fignums())
            for number in plt.get_fignums():
                plt.figure(number).canvas.draw()  # as a notebook would, so that what cannot be drawn is found
            plt.close("all")
    return namespace, left


def test_the_tutorial_runs_and_stores_what_each_cell_leaves(tutorial):
    for i, (printed, figures) in tutorial[1].items():
        kinds = [o["output_type"] for o in STORED[i]]
        assert "error" not in kinds, f"cell {i} has a stored error"
        assert bool(printed) <= ("stream" in kinds), f"cell {i} prints, but no output is stored"
        assert figures <= DRAWN[i], f"cell {i} draws, but no figure is stored"
        assert all(o.get("name") != "stderr" for o in STORED[i]), f"cell {i} has a stored warning"
    counts = [TUTORIAL[i]["execution_count"] for i in CODE]
    assert counts == [*range(1, len(CODE) + 1)], "outputs are those of one run from top to bottom"


def test_the_tutorial_keeps_its_form():
    lines = sorted(sum(map(bool, map(str.strip, source.split("\n")))) for source in CODE.values())
    assert 35 <= len(TUTORIAL) <= 55 and lines[len(lines) // 2] <= 15 and lines[-1] <= 25
    assert 8 <= sum(DRAWN.values()) <= 13 and (HERE / "tutorial.ipynb").stat().st_size < 2e6
    assert not re.search(r"^\s*[%!]", "\n".join(CODE.values()), re.MULTILINE), "plain Python runs anywhere"


def test_the_tutorial_names_only_what_there_is():
    text = PROSE + "\n".join(CODE.values())
    names = set(re.findall(r"\blrpi\.([A-Za-z_]\w*)", text)) - {"py", "zip"}
    assert len(names) > 20 and not {name for name in names if not hasattr(lrpi, name)}
    flags = {option for name in lrpi.OPTIONS for option in (lrpi.flag(name), "--no-" + name)}
    named = set(re.findall(r"(?<=[\s`])--[a-z][a-z-]*", text))
    assert named and named <= flags
    for name in set(re.findall(r'record\("([\w-]+)"\)', text)):
        assert (HERE / "figures" / f"{name}.json").exists()


def test_numbers_in_the_tutorials_prose_are_printed_by_its_cells():
    prose = PROSE[: PROSE.index("## Solutions")]
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"\$.*?\$", r"`[^`]*`", r"\(http[^)]*\)|arXiv \d{4}\.\d+"):
        prose = re.sub(pattern, " ", prose, flags=re.DOTALL)
    prose = re.sub(r"\d+ × \d+|Proposition \S+", " ", prose)
    numbers = re.findall(r"(?<![\w.])\d[\d,]*\.?\d*%?(?![\w])", prose)
    claimed = {n.rstrip(".,") for n in numbers if re.search(r"%|\.\d|\d,\d{3}|\d\d", n)}
    assert claimed
    assert not {n for n in claimed if not re.search(rf"(?<![\d.,]){re.escape(n)}(?![\d])", STREAMS)}


def test_every_exercise_waits_for_an_answer_and_takes_the_right_one(tutorial):
    namespace, left = tutorial
    checks = sorted(int(name[6:]) for name in namespace if name.startswith("check_"))
    assert len(checks) >= 12 and checks == [*range(1, len(checks) + 1)]
    assert [int(number) for number, _ in SOLUTIONS] == checks
    assert sum(printed.count("still to do\n") for printed, _ in left.values()) == len(checks)
    for number in checks:
        with pytest.raises(NotImplementedError):
            namespace[f"check_{number}"]()
    for number, solution in SOLUTIONS:
        exec(compile(solution, f"solution {number}", "exec"), own := dict(namespace))  # noqa: S102
        FunctionType(namespace[f"check_{number}"].__code__, own)()
