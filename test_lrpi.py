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
import time
import types
import warnings
from collections import Counter, defaultdict, deque
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import lrpi
from lrpi import GOAL, OPEN, PATH, START, WALL

TOTAL, METHOD, FUNCTION, LINE = 1800, 680, 50, 110  # lines of lrpi.py, of §1 to §6, of a function; columns
HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # results do not depend on the machine, and small tensors are faster


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stage(puzzles, r):
    """The solver's answer after r rounds."""
    return torch.where(puzzles.order <= r, puzzles.y, puzzles.draft)


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
    """Breadth-first: a shortest path from start to goal, how many there are, and all reachable cells."""
    start, goal = maze.index(START), maze.index(GOAL)
    distance, ways, came, queue = {start: 0}, {start: 1}, {}, deque([start])
    while queue:
        here = queue.popleft()
        for there in [n for n in neighbours_of(here, side) if maze[n] != WALL]:
            if there not in distance:
                distance[there], ways[there], came[there] = distance[here] + 1, 0, here
                queue.append(there)
            if distance[there] == distance[here] + 1:
                ways[there] += ways[here]
    path, cell = set(), came[goal]
    while cell != start:
        path.add(cell)
        cell = came[cell]
    return path, ways[goal], set(distance)


@pytest.mark.parametrize("size, count", [(5, 90), (11, 60), (21, 10), (61, 2)])
def test_mazes_are_perfect_labels_the_unique_path_and_rounds_fill_dead_ends(size, count):
    puzzles = lrpi.make_mazes(count, size, "train", seed=3)
    rooms = {r * size + c for r in range(0, size, 2) for c in range(0, size, 2)}
    assert len(puzzles) == count and puzzles.x.dtype == puzzles.y.dtype == torch.uint8
    stages = [stage(puzzles, r).tolist() for r in range(puzzles.order.max() + 1)]
    for i, (maze, label) in enumerate(rows_of(puzzles.x, puzzles.y)):
        spaces = {cell for cell, token in enumerate(maze) if token != WALL}
        assert rooms <= spaces and {maze.index(START), maze.index(GOAL)} <= rooms
        assert maze.count(START) == maze.count(GOAL) == 1 and PATH not in maze
        path, ways, reached = search(maze, size)
        edges = sum(there in spaces for here in spaces for there in neighbours_of(here, size)) // 2
        assert reached == spaces and edges == len(spaces) - 1, "a tree"
        assert ways == 1 and label == [PATH if cell in path else token for cell, token in enumerate(maze)]
        answer = [PATH if token == OPEN else token for token in maze]
        for filled in stages:
            assert filled[i] == answer
            marked = {cell for cell in spaces if answer[cell] != OPEN}
            for cell in [c for c in marked if sum(n in marked for n in neighbours_of(c, size)) <= 1]:
                answer[cell] = OPEN if answer[cell] == PATH else answer[cell]
        assert stages[-1][i] == label


def test_spanning_trees_and_ends_are_uniform():
    """The 192 trees of a 3 x 3 grid (Kirchhoff's theorem), and 72 pairs of rooms; chi-square, 6 sigma."""
    parents, mazes = lrpi.spanning_trees(19_200, 3, generator()), lrpi.carve(7200, 5, generator(1))
    trees = [frozenset(frozenset((i, p)) for i, p in enumerate(row) if i != p) for row in parents.tolist()]
    ends = [(maze.index(START), maze.index(GOAL)) for maze in mazes.tolist()]
    for draws, cells in ((trees, 192), (ends, 72)):
        counts = Counter(draws)
        chi2 = sum((n - 100) ** 2 / 100 for n in counts.values())  # of cells - 1 degrees of freedom
        assert len(counts) == cells and abs(chi2 - (cells - 1)) < 6 * math.sqrt(2 * (cells - 1))


def symmetric_views(cells, side):
    rows = [tuple(cells[r * side : (r + 1) * side]) for r in range(side)]
    for _ in range(4):
        rows = list(zip(*rows[::-1], strict=True))  # a quarter turn
        yield from (tuple(itertools.chain(*rows)), tuple(itertools.chain(*(row[::-1] for row in rows))))


@pytest.mark.parametrize("task, size, count", [
    ("maze", 5, 300), ("maze", 11, 300), ("sudoku", 6, 60), ("sudoku", 9, 12), ("nqueens", 6, 60),
])  # fmt: skip
def test_splits_share_nothing_under_the_8_symmetries(task, size, count):
    """No walls of mazes, solutions of sudokus, questions of queens. The seed alone decides what is made."""
    seen, first = defaultdict(set), {}
    for split, seed in itertools.product(lrpi.SPLITS, (0, 1, 0)):
        puzzles = lrpi.TASKS[task].make(count, size, split, seed)
        assert len(puzzles) == count and same([*puzzles], first.setdefault((split, seed), [*puzzles]))
        cells = {"maze": puzzles.x == WALL, "sudoku": puzzles.y, "nqueens": puzzles.x}[task]
        seen[split] |= {min(symmetric_views(row, size)) for row in cells.tolist()}
    assert all(a and b and not a & b for a, b in itertools.combinations(seen.values(), 2))
    assert not same(first["train", 0], first["train", 1])


def solved_by_hand(maze, answer, side):
    """Walk from the start along marked cells: the walk must end at the goal and take in all marks."""
    changed = [(a, b) for a, b in zip(maze, answer, strict=True) if a != b]
    marked = {cell for cell, token in enumerate(answer) if token in (PATH, START, GOAL)}
    walk = [maze.index(START)]
    while walk[-1] != maze.index(GOAL):
        onward = [n for n in neighbours_of(walk[-1], side) if n in marked and n not in walk]
        if len(onward) != 1:
            return False
        walk += onward
    return set(walk) == marked and set(changed) <= {(OPEN, PATH)}


def test_maze_solved_agrees_with_a_walk_along_the_marks():
    """True labels, labels with one cell changed, and random answers, in perfect mazes and open fields."""
    rng, verdicts = random.Random(0), []
    for size, open_field in ((5, False), (7, False), (5, True)):
        for maze in lrpi.make_mazes(40, size, "train", seed=2).x.tolist():
            if open_field:
                maze = [OPEN if token == WALL and rng.random() < 0.8 else token for token in maze]
            path, *_ = search(maze, size)
            truth = [PATH if cell in path else token for cell, token in enumerate(maze)]
            near = itertools.product(range(size * size), range(5))
            answers = [truth, maze, *([*truth[:cell], token, *truth[cell + 1 :]] for cell, token in near)]
            answers += [[PATH if t == OPEN and rng.random() < 0.5 else t for t in maze] for _ in range(50)]
            expected = [solved_by_hand(maze, answer, size) for answer in answers]
            x, said = torch.tensor([maze] * len(answers)), torch.tensor(answers)
            assert lrpi.maze_solved(x, said).tolist() == expected
            verdicts += expected
    assert 120 < sum(verdicts) < len(verdicts) / 2, "both verdicts occurred"
    texts = ("S   # ## #   G##         ", "Sooo# ##o#   G##         ", "S   #o## #oooG##         ")
    texts += ("S G########   ## # ##   #", "SoG########ooo##o#o##ooo#")
    x, y, other, ring, loop = (torch.tensor([["# SGo".index(c) for c in text]]).byte() for text in texts)
    assert search(x[0].tolist(), 5)[1] == 2 and lrpi.maze_solved(x, y) and lrpi.maze_solved(x, other)
    assert torch.equal(stage(lrpi.solve_mazes(x, y), 25), y) and not lrpi.maze_solved(ring, loop)


# --- Sudoku and queens --------------------------------------------------------------------------------------
def sudoku_solutions(board, size, limit):
    """Up to `limit` solutions, by backtracking over the cell with the fewest candidates."""
    (height, width), free = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size], {}
    for i in [i for i in range(size**2) if not board[i]]:
        r, c = divmod(i, size)
        rows, cols = range(size), range(size)
        box = [(p, q) for p in rows for q in cols if (p // height, q // width) == (r // height, c // width)]
        units = [*((r, q) for q in cols), *((p, c) for p in rows), *box]
        free[i] = set(range(1, size + 1)) - {board[p * size + q] for p, q in units}
    found, cell = [], min(free, key=lambda i: len(free[i]), default=None)
    for digit in free.get(cell, ()):
        if len(found) < limit:
            found += sudoku_solutions([*board[:cell], digit, *board[cell + 1 :]], size, limit - len(found))
    return found if free else [list(board)]


def test_sudokus_have_one_solution_and_near_misses_are_wrong():
    for size, blanks, count in ((4, 10, 60), (6, 24, 30), (9, 40, 8), (9, 54, 4)):
        puzzles = lrpi.make_sudokus(count, size, "train", 1, blanks)
        assert lrpi.sudoku_solved(puzzles.x, puzzles.y).all() and puzzles.x.dtype == torch.uint8
        for puzzle, label in rows_of(puzzles.x, puzzles.y):
            assert 1 <= puzzle.count(0) <= blanks and sudoku_solutions(puzzle, size, 2) == [label]
    x, y, *_ = lrpi.make_sudokus(20, 9)
    for i, cell in enumerate(torch.randint(81, (20,), generator=generator()).tolist()):
        said = y[i : i + 1].repeat(9, 1)
        said[:, cell] = (y[i, cell] + torch.arange(9)) % 10  # the first is right, the others are not
        assert lrpi.sudoku_solved(x[i].expand(9, -1), said).tolist() == [True] + 8 * [False]
    renamed = (y % 9) + 1  # a valid grid, but every given is changed
    assert lrpi.sudoku_solved(y * 0, renamed).all() and not lrpi.sudoku_solved(x, renamed).any()
    assert not lrpi.sudoku_solved(x, torch.where(torch.arange(81) == 40, 10, y)).any(), "10 is the mask token"
    said = torch.tensor([[*map(int, digits)] for digits in ("1234341223414123", "1234234134124123")])
    assert lrpi.sudoku_solved(said * 0, said).tolist() == [True, False], "boxes count"


def placements(size):
    for p in itertools.permutations(range(size)):
        if len({r + c for r, c in enumerate(p)}) == len({r - c for r, c in enumerate(p)}) == size:
            yield [int(col == p[row]) for row in range(size) for col in range(size)]


def test_queens_labels_are_the_first_completion_and_any_completion_is_right():
    """Checked: all boards of 4 x 4; placements of 8 x 8 with two cells exchanged, or one changed."""
    valid, puzzles = list(placements(8)), lrpi.make_queens(300, 8, "train", seed=2)
    stages = [stage(puzzles, r).tolist() for r in range(8)]
    for i, (board, label) in enumerate(rows_of(puzzles.x, puzzles.y)):
        assert label == next(s for s in valid if all(b <= a for a, b in zip(s, board, strict=True)))
        assert 1 <= sum(board) <= 7 and stages[-1][i] == label
        for r, k in enumerate(k for k in range(0, 64, 8) if not any(board[k : k + 8])):
            assert stages[r][i] == board, "the solver goes row by row"
            board[k : k + 8] = label[k : k + 8]
    rng, near = random.Random(0), []
    for board, _ in itertools.product(valid, range(20)):
        a, b = rng.sample(range(64), 2)
        near += [[board[{a: b, b: a}.get(i, i)] for i in range(64)], [board[i] ^ (i == a) for i in range(64)]]
    small = [[n >> i & 1 for i in range(16)] for n in range(2**16)]
    for said, right in ((small, list(placements(4))), (near, valid)):
        found = lrpi.queens_solved(torch.tensor(said) * 0, torch.tensor(said)).tolist()
        assert found == [board in right for board in said] and 0 < sum(found) < len(found)
    corner, valid = (torch.arange(64) == 0).expand(92, -1).long(), torch.tensor(valid)
    assert lrpi.queens_solved(corner, valid).equal(valid[:, 0] == 1), "the given queen must stand"


# --- Model --------------------------------------------------------------------------------------------------
def tiny(**given):
    return lrpi.configure(**{"size": 5, "width": 16, "ffn": 24, "heads": 2, **given})


def model_and_state(cfg, B=3):
    torch.manual_seed(0)
    model, L = lrpi.LoopedModel(cfg), math.prod(cfg.shape)
    for p in model.parameters():  # weights that are zero at first would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    y, z = torch.randn(2, B, L, cfg.width)
    return model, torch.randint(0, 4, (B, L), dtype=torch.uint8), y, z, torch.ones(B, dtype=torch.long)


def test_forward_passes_are_counted():
    for scheme in lrpi.SCHEMES:
        model, calls = lrpi.LoopedModel(tiny(scheme=scheme, width=8, ffn=8)), []
        for net in model.nets:
            net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        passes = {"trm": 336, "trm-medium": 48}.get(scheme, 18)
        assert lrpi.evaluate(model, lrpi.make_mazes(6, 5, "test"))["passes"] == passes == len(calls)


def rms(v):
    return v / (v.square().mean() + 1e-5).sqrt()


def swiglu(W, name, v):
    gate, up = (W[f"{name}.gate_up.weight"] @ v).chunk(2)
    return W[f"{name}.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def plain_attention(W, name, h, cfg):
    """TRM's attention, head by head; rotary positions are complex rotations."""
    L, d, out = len(h), cfg.width // cfg.heads, []
    angles = torch.arange(L).double()[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    for head in range(cfg.heads):
        parts = [W[f"{name}.qkv.weight"][k * cfg.width + head * d :][:d] for k in range(3)]
        q, k, v = (torch.stack([part @ cell for cell in h]) for part in parts)
        q, k = (torch.complex(*of.chunk(2, 1)) * torch.polar(angles**0, angles) for of in (q, k))
        p = ((q @ k.conj().T).real / math.sqrt(d)).exp()
        out.append(p @ v / p.sum(1, keepdim=True))
    return torch.cat(out, 1) @ W[f"{name}.out.weight"].T


def plain_conv(W, name, h, cfg):
    """The separable convolution cell by cell: weights w2[i] w1[j] of the cells i rows and j columns away."""
    (H, wide), K, mixed = cfg.shape, cfg.kernel // 2, []
    w1, w2 = W[f"{name}.convs.0.weight"][:, 0, 0], W[f"{name}.convs.1.weight"][:, 0, :, 0]
    for r, c in itertools.product(range(H), range(wide)):
        rows, cols = range(max(0, r - K), min(H, r + K + 1)), range(max(0, c - K), min(wide, c + K + 1))
        mixed.append(sum(w2[:, i - r + K] * w1[:, j - c + K] * h[i * wide + j] for i in rows for j in cols))
    return mixed


def plain_step(model, x, y, z, s):
    """One step on one puzzle in float64: the recursion of TRM, block by block and cell by cell."""
    cfg, W = model.cfg, {name: w.double() for name, w in model.state_dict().items()}
    passes = itertools.count()

    def net(h):
        k = next(passes) * cfg.untied
        for name in [f"nets.{k}.{layer}" for layer in range(cfg.layers)]:
            if cfg.mixer == "mlp":  # along the cells, channel by channel; so is its norm
                h = torch.stack([rms(v + swiglu(W, f"{name}.mix", v)) for v in h.T]).T
            else:
                mix = {"attention": plain_attention, "conv": plain_conv}[cfg.mixer](W, f"{name}.mix", h, cfg)
                h = torch.stack([rms(cell + other) for cell, other in zip(h, mix, strict=True)])
            h = torch.stack([rms(cell + swiglu(W, f"{name}.swiglu", cell)) for cell in h])
        return h

    y, z = y.double(), z.double()
    x = (y @ W["readout.weight"].T).argmax(-1) if cfg.feedback and s > 1 else x.long()
    e = W["tokens.weight"][x] + (W["step_table.weight"][min(s, cfg.n_sup) - 1] if cfg.step_index else 0)
    for _ in range(cfg.T):
        for _ in range(cfg.n):
            z = net(z + (y + math.sqrt(cfg.width) * e))
        y = net(y + z + (math.sqrt(cfg.width) * e + W["role"] if cfg.recall else 0))
    return y, z


@pytest.mark.parametrize("given", [
    *({"T": 3, "n": 6, "layers": 2, "recall": False, "mixer": mixer} for mixer in lrpi.MIXERS),
    {"T": 2, "kernel": 5, "step_index": True, "feedback": True}, {"scheme": "one-pass"},
])  # fmt: skip
def test_a_step_is_that_of_trm(given):
    """With equal weights, in float32: atol 1e-5."""
    model, x, y, z, s = model_and_state(replace(tiny(**given), shape=(3, 4)), B=1)
    for p in model.nets.parameters():
        p.data *= 0.5  # a net that does not amplify rounding
    for k in (1, 2, 9):
        for got, plain in zip(model(x, y, z, k * s), plain_step(model, x[0], y[0], z[0], k), strict=True):
            assert torch.allclose(got[0].double(), plain, atol=1e-5)


def test_only_the_last_cycle_carries_gradient():
    """T = 2 has the gradients of T = 1 from the state after a cycle (rtol 1e-5), and none for that before."""
    (model, x, y, z, s), found = model_and_state(tiny(T=1)), []
    for T, state in ((2, (y, z)), (1, model(x, y, z, s))):
        model.cfg, (y, z) = replace(model.cfg, T=T), (h.detach().requires_grad_() for h in state)
        out = model(x, y, z, s)[0].pow(3).sum()
        found.append(torch.autograd.grad(out, [*model.nets.parameters(), y], allow_unused=True))
    assert all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(found[0][:-1], found[1][:-1], strict=True))
    assert found[0][-1] is None and found[1][-1].abs().max() > 0


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
    for mixer in lrpi.MIXERS:  # bfloat16 is for the products: states, logits and weights stay float32
        (model, *state), inside = model_and_state(tiny(mixer=mixer)), []
        hook = model.nets[0][0].swiglu.down.register_forward_hook
        hook(lambda module, args, out, inside=inside: inside.append(out.dtype))
        plain, model.bf16 = model(*state)[0], True
        rounded = model(*state)[0]
        rounded.square().sum().backward()
        assert inside == [torch.float32] * 3 + [torch.bfloat16] * 3
        pairs = [(p, p.grad) for p in model.nets.parameters()]
        assert {of.dtype for of in (rounded, model.readout(rounded), *sum(pairs, ()))} == {torch.float32}
        assert 0 < (plain - rounded).abs().mean() < 0.05


# --- Policy improvement -------------------------------------------------------------------------------------
def two_logits(seed=0, shape=(4, 5), V=7, scale=3.0):
    g = generator(seed)
    u, c = (scale * torch.randn(*shape, V, dtype=torch.float64, generator=g) for _ in range(2))
    return u, c, torch.randint(0, V, shape, generator=g)


def test_section_2_against_autograd_differences_and_distributions():
    """Prop. 4.1, 3,000 cases: margin = -dL/dw, and d²L/dw²; autograd 1e-10, central differences 1e-5."""
    u, c, y = two_logits(3, (3000,), 6, 4.0)
    w = (4 * torch.rand(3000, dtype=torch.float64, generator=generator(1)) - 1).requires_grad_()

    def loss(w):
        return F.cross_entropy(u + w[:, None] * (c - u), y, reduction="none")

    slope = torch.autograd.grad(loss(w).sum(), w, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), w)[0]
    got = lrpi.derivatives(u, c, y, w.detach()[:, None])
    assert torch.allclose(got[0], slope, atol=1e-10) and torch.allclose(got[1], curvature, atol=1e-10)
    assert torch.equal(lrpi.margin(u, c, y, w.detach()[:, None]), -got[0])
    assert torch.allclose(lrpi.margin(u, c, y, w[0].item())[0], -slope[0], atol=1e-10), "one w for all"
    below, here, above = (loss(w + d) for d in (-1e-4, 0, 1e-4))
    assert torch.allclose(got[0], (above - below) / 2e-4, atol=1e-5)
    assert torch.allclose(got[1], (above - 2 * here + below) / 1e-8, atol=1e-5) and (got[1] > 0).any()
    # Against torch's distributions, 1e-12. A shift changes nothing, 1e-9. Logits of +-1e4 in float32, 2%.
    u, c, y = two_logits()
    pi_u, pi_c = (torch.distributions.Categorical(logits=logits) for logits in (u, c))
    taken = lrpi.advantage(u, c).gather(-1, y[..., None]).squeeze(-1)
    pairs = [(lrpi.divergence(u, c), torch.distributions.kl_divergence(pi_c, pi_u))]
    pairs += [(lrpi.largest_change(u, c), (pi_u.probs - pi_c.probs).abs().amax(-1))]
    pairs += [(taken, pi_c.log_prob(y) - pi_u.log_prob(y))]
    for w in (-0.5, 0.0, 0.3, 1.0, 2.0):
        mixture = pi_u.probs ** (1 - w) * pi_c.probs**w  # geometric
        pairs += [(lrpi.guide(u, c, w).softmax(-1), mixture / mixture.sum(-1, keepdim=True))]
    assert all(torch.allclose(got, expected, atol=1e-12) for got, expected in pairs)
    functions = [lrpi.divergence, lrpi.largest_change, lrpi.advantage]
    functions += [lambda u, c, w=w: torch.stack(lrpi.derivatives(u, c, y, w)) for w in (-0.5, 0.0, 1.0, 3.0)]
    large = [(5e3 * logits).clamp(-1e4, 1e4) for logits in (u, c)]
    for f in functions:
        for other in ((u + 7.0, c - 13.0 * torch.rand(4, 5, 1)), (u.log_softmax(-1), c.log_softmax(-1))):
            assert torch.allclose(f(*other), f(u, c), atol=1e-9)
        rounded = f(*(logits.float() for logits in large)).double()
        assert torch.allclose(rounded, f(*large), rtol=0.02, atol=0.01)


def test_best_guidance_against_a_grid_search_in_degenerate_cases_and_with_ignored_labels():
    """Neither a grid nor the neighbours on both sides have a lower loss than w*."""
    leans = {1.0: 0.5, 3.0: 1.5, 8.0: 3.0, 0.05: 0.02, 100.0: 60.0}.items()
    for seed, (scale, lean) in itertools.product(range(20), leans):
        u, c, y = two_logits(seed, (40,), 5, scale)
        c.scatter_add_(1, y[:, None], torch.full((40, 1), lean, dtype=torch.float64))
        w = lrpi.best_guidance(u, c, y)
        grid = [w, w - 1e-3, w + 1e-3, *(k / 10 for k in range(-40, 80))]
        best, *others = [F.cross_entropy(u + v * (c - u), y, reduction="sum").item() for v in grid]
        slope, curvature = (d.sum().item() for d in lrpi.derivatives(u, c, y, w))
        assert min(others) >= best - 1e-9 * abs(best) and abs(slope / curvature) < 1e-9
    u, y, nan = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 1]), math.nan
    towards = u + F.one_hot(y, 3)
    away, half = 2 * u - towards, torch.tensor([0, -100])  # negative labels are ignored
    harmed, dead_but_one = torch.cat([towards[:1], away[1:]]), torch.cat([u[:1], away[1:]])
    rounding = u + 1000 + 1e-4 * torch.rand(2, 3, generator=generator())
    for a, b, label, expected in (
        *((u, towards, y, math.inf), (u, away, y, -math.inf), (u, u, y, nan), (u, u + 5.0, y, nan)),
        *((u + 1000, rounding, y, nan), (u, towards, half - 200, nan), (u[:0], u[:0], y[:0], nan)),
        *((u, harmed, half, math.inf), (u, dead_but_one, y, -math.inf)),
    ):
        w = lrpi.best_guidance(a, b, label)
        assert w == expected or (math.isnan(w) and math.isnan(expected))
    assert math.isfinite(lrpi.best_guidance(u, harmed, y))
    for k, d in itertools.product((-300.0, 0.5, 40.0, 2000.0), (1e-3, 1.0, 50.0, 1e4, -1.0)):  # far from 1
        a, b = (torch.tensor([v, 0.0], dtype=torch.float64).expand(8, 2) for v in (k, k - d))
        w, expected = lrpi.best_guidance(a, b, torch.arange(8) // 6), (k - math.log(3)) / d  # pi_w(0) = 6 / 8
        assert abs(w - expected) < 1e-6 * max(1.0, abs(expected))
    u, c, y = two_logits()
    some = torch.where(torch.arange(4)[:, None] % 2 == 0, -100, y)
    for part, whole in zip(lrpi.derivatives(u, c, some, 0.3), lrpi.derivatives(u, c, y, 0.3), strict=True):
        assert (part[::2] == 0).all() and torch.equal(part[1::2], whole[1::2])
    assert abs(lrpi.best_guidance(u, c, some) - lrpi.best_guidance(u[1::2], c[1::2], y[1::2])) < 1e-12
    for bad in ((u, c[..., :3], y), (u, c, y[:2]), (u, c, y.float()), (u, c * nan, y), (u, c, y + 7)):
        with pytest.raises(ValueError, match="no match|finite"):
            lrpi.best_guidance(*bad)


# --- Targets ------------------------------------------------------------------------------------------------
def targets_of(puzzles, cfg, steps):
    u, phi = torch.rand(len(puzzles), 2, puzzles.x.shape[1], generator=generator()), lrpi.TARGETS[cfg.target]
    return [phi(tuple(puzzles), torch.full((len(puzzles),), s), u, cfg) for s in steps]


@pytest.mark.parametrize("task, size", [("maze", 11), ("sudoku", 6), ("nqueens", 8)])
@pytest.mark.parametrize("target", ["final", "reveal", "mask", "replace", "edits"])
def test_targets_are_nested_come_closer_and_end_in_the_solution(target, task, size):
    """And show a share of s / 6 with power 1: exactly, rounded down, or within 5 sigma."""
    cfg = lrpi.configure(task=task, size=size, target=target, power=1.0, pace=1)
    puzzles = lrpi.TASKS[task].make(60, size, "train")
    targets = targets_of(puzzles, cfg, range(1, 10))
    assert all(torch.equal(t, puzzles.y) for t in targets[5:]), "y* at step 6 = N_sup, and after it"
    for s, (a, b) in enumerate(itertools.pairwise(targets), 1):
        assert (b == puzzles.y)[a == puzzles.y].all() and 0 <= a.min() <= a.max() < cfg.vocab, "nested"
        shown = (a == puzzles.y).double().mean() - (s < 6 and target == "replace") * (6 - s) / 6 / cfg.vocab
        close = abs(shown - min(1, s / 6)) < 5 * math.sqrt(1 / 4 / a.numel())
        assert close if target in ("mask", "replace") else target == "final" or s > 1 or shown < 1
        n, left = (puzzles.x != puzzles.y).sum(1), (a != puzzles.y).sum(1)
        assert target != "reveal" or torch.equal(n - left, n * min(s, 6) // 6)


def test_edits_obey_the_lyapunov_bound():
    """A.2: wrong cells fall by `pace` a step at least until none is left: in V0 / pace steps, rounded up."""
    puzzles = lrpi.make_mazes(100, 11, "train", seed=4)
    for pace in (1, 8):
        first = before = (puzzles.draft != puzzles.y).sum(1)
        cfg = lrpi.configure(pace=pace, n_sup=130)  # large, so that no puzzle ends because N_sup is reached
        for s, target in enumerate(targets_of(puzzles, cfg, range(1, 130 // pace)), 1):
            wrong = (target != puzzles.y).sum(1)
            assert torch.equal(target, stage(puzzles, pace * s)) and (wrong[s * pace >= first] == 0).all()
            assert ((wrong <= before - pace) | (wrong == 0)).all()
            before = wrong
        assert torch.equal(targets_of(puzzles, replace(cfg, n_sup=2), [2])[0], puzzles.y), "the last is y*"


# --- Training -----------------------------------------------------------------------------------------------
def trained_model(data, cfg, callback=None, seed=0, **given):
    torch.manual_seed(seed)
    model = lrpi.LoopedModel(cfg)
    return lrpi.train(model, data, cfg, callback, **given), model  # with averaged and with the last weights


def test_learns_5x5_mazes():
    """Untrained, the model solves none of these mazes; after 5 seconds of training, most of them."""
    cfg, seen = lrpi.configure(size=5, width=32, ffn=64, examples=2400, linger=0.0), []
    model, _ = trained_model(lrpi.make_mazes(2400, 5), cfg, lambda run, loss: seen.append((run.step, loss)))
    losses = [loss for _, loss in seen if loss is not None]
    assert seen[-1][0] == len(seen) == 1200 and 190 <= len(losses) <= 200, "12 rows, 6 steps each"
    found = lrpi.evaluate(model, lrpi.make_mazes(300, 5, "test"), lrpi.maze_solved)
    assert found["exact"][-1] > max(0.7, found["exact"][0]) and sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("target", ["final", "edits", "reveal"])
def test_training_is_a_pair_of_nested_loops(target, monkeypatch):
    """AdamW, warm-up and cosine by hand; all noise is 1. Weights move by 0.03; atol 1e-6."""
    given = {"examples": 12, "n_sup": 3, "batch_size": 4, "warmup": 2, "ema": 0.0, "noise": 0.3, "pace": 2}
    cfg, phi, calls = tiny(target=target, step_index=True, linger=0.0, **given), lrpi.TARGETS[target], []
    data, state = lrpi.make_mazes(40, 5), ()

    def spy(puzzles, s, u, cfg):
        calls.append((*(t.clone() for t in puzzles), u.clone()))
        assert s.tolist() == [(len(calls) - 1) % 3 + 1] * 4
        return phi(puzzles, s, u, cfg)

    monkeypatch.setitem(lrpi.TARGETS, target, spy)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    trained, model = (torch.manual_seed(0) and lrpi.LoopedModel(cfg) for _ in range(2))
    lrpi.train(trained, data, cfg)
    seen = {tuple(row) for x, *_ in calls[::3] for row in x.tolist()}
    assert len(calls) == 9 and len(seen) == 12 and seen <= {tuple(row) for row in data.x.tolist()}
    assert not any((calls[i][-1] == calls[i + 3][-1]).any() for i in (0, 3)), "new noise for every rollout"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, (*puzzles, u) in enumerate(calls):
        assert same(calls[step // 3 * 3], calls[step]), "the same puzzles and noise for a whole rollout"
        s = torch.full((4,), step % 3 + 1)
        y, z = model(puzzles[0], *(h + 0.3 for h in (state if step % 3 else model.start(4))), s)
        optimizer.zero_grad()
        F.cross_entropy(model.readout(y).transpose(1, 2), phi(puzzles, s, u, cfg).long()).backward()
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / 9)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / 3) * cosine
        optimizer.step()
        state = y.detach(), z.detach()
    pairs = zip(trained.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_rows_leave_when_halting_says_so_and_the_next_puzzles_enter(monkeypatch):
    """Against a queue by hand, with a halting rule that draws lots; row by row."""
    cfg = replace(tiny(scheme="trm", T=1, n=1, n_sup=4, examples=60, batch_size=3), target="spy")
    data, rng, forward, updates = lrpi.make_mazes(7, 5), random.Random(0), lrpi.LoopedModel.forward, []

    def phi(puzzles, s, u, cfg):
        updates.append(SimpleNamespace(x=puzzles[0].tolist(), s=s.tolist(), u=u.clone()))
        return puzzles[1]

    def spy(self, x, y, z, s):
        assert y.grad_fn is None and z.grad_fn is None, "no gradient crosses steps"
        updates[-1].before, updates[-1].after = (y, z), forward(self, x, y, z, s)
        return updates[-1].after

    def halting(model, y, *_):
        updates[-1].lots = [rng.random() < 0.4 for _ in range(3)]
        return 0 * y.sum(), torch.tensor(updates[-1].lots)

    monkeypatch.setitem(lrpi.TARGETS, "spy", phi)
    monkeypatch.setattr(lrpi.LoopedModel, "forward", spy)
    monkeypatch.setattr(lrpi, "halting_loss", halting)
    seen, line = [], []
    _, model = trained_model(data, cfg, lambda run, loss: seen.append(run.seen.item()))
    updates.insert(0, SimpleNamespace(lots=[True] * 3, s=[4] * 3))
    for k, (last, now) in enumerate(itertools.pairwise(updates)):
        for row in range(3):
            fresh = last.lots[row] or last.s[row] == 4
            line += [now.x[row]] if fresh else []
            assert now.s[row] == 1 if fresh else (now.x[row], now.s[row]) == (last.x[row], last.s[row] + 1)
            assert k == 0 or torch.equal(now.u[row], last.u[row]) is not fresh
            states = [of[0] for of in model.start(1)] if fresh else [of[row] for of in last.after]
            assert same(states, [of[row] for of in now.before])
        assert seen[k] == len(line)
    assert sorted(line[:7]) == sorted(data.x.tolist()) and line[7:] == line[:-7]
    assert 60 <= len(line) <= 65 and len({tuple(now.lots) for now in updates}) > 4


@pytest.mark.parametrize("given", [{}, {"linear": True}, {"awr": 0.7}, {"hinge": 1.5},
                                   {"linear": True, "awr": 2.0, "hinge": 0.1}])  # fmt: skip
def test_the_loss_of_a_step_against_plain_loops(given, monkeypatch):
    """Its value cell by cell in float64, and its gradient by central differences; atol 1e-6. It calls §2."""
    cfg, (u, c, y), s = tiny(n_sup=5, **given), two_logits(), torch.tensor([1, 2, 5, 4])

    def by_hand(c, held):  # the weights see the logits `held`, which carry no gradient
        total = 0.0
        for b, cell in itertools.product(range(4), range(5)):
            label, before = y[b, cell].item(), u[b, cell].log_softmax(-1)
            logp, A = c[b, cell].log_softmax(-1), (held[b, cell].log_softmax(-1) - before)[label].item()
            loss = -logp[label].item() * (min(20, math.exp(A / cfg.awr)) if cfg.awr else 1)
            lack = (logp.exp() * (logp - before)).sum() - (logp - before)[label]
            loss += cfg.hinge * max(0.0, lack.item())
            total += loss * (s[b].item() / 3 if cfg.linear else 1) / 20  # 3 is the mean of 1 .. 5
        return total

    held = c.clone()
    loss = lrpi.step_loss(u, c.requires_grad_(), y, s, cfg)
    gradient = torch.autograd.grad(loss, c)[0].flatten()
    assert abs(loss.item() - by_hand(held, held)) < 1e-6
    for i in range(0, held.numel(), 7):
        nudge = 1e-5 * (torch.arange(held.numel()) == i).double().view_as(held)
        slope = (by_hand(held + nudge, held) - by_hand(held - nudge, held)) / 2e-5
        assert abs(gradient[i].item() - slope) < 1e-6
    monkeypatch.setattr(lrpi, "advantage", lambda u, c: torch.full_like(u, math.log(3.0)))
    monkeypatch.setattr(lrpi, "margin", lambda u, c, y, w=1.0: torch.full(y.shape, -5.0))
    plain, cfg = lrpi.step_loss(u, c, y, s, replace(cfg, awr=0.0, hinge=0.0)), replace(cfg, linear=False)
    changed = lrpi.step_loss(u, c, y, s, replace(cfg, awr=1.0, hinge=2.0))
    assert given.get("linear") or torch.allclose(changed, 3 * plain + 10)


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
    for k, p in ((1, 0.1), (2, 0.1 * 2 / 3), (3, 0.1 / 3), (4, 0.0)):
        stayed = (~leaves[(q > 0) & (s == k)]).double()
        assert abs(stayed.mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / len(stayed))


def test_averaged_weights_follow_the_decay_the_seed_decides_and_a_budget_ends_training():
    """With any data set of pairs (x, y*)."""
    data, trail, shares = TensorDataset(*[*lrpi.make_mazes(30, 5)][:2]), [], []
    cfg = tiny(examples=10, target="reveal", linger=0.0)
    last, mean, cfg = replace(cfg, ema=0.0), replace(cfg, ema=0.7), replace(cfg, budget_seconds=0.3)
    models = [*trained_model(data, last, lambda run, loss: trail.append(run.model.role.clone()))]
    models += [*trained_model(data, mean), *trained_model(data, last, seed=1)]
    expected = trail[0]
    for weight in trail[1:]:
        expected = 0.7 * expected + 0.3 * weight
    assert len(trail) == 5 and torch.allclose(models[2].role, expected, atol=1e-6)
    first, *others = [[*model.parameters()] for model in models]
    assert [same(first, other) for other in others] == [True, False, True, False, False]
    trained_model(data, cfg, lambda run, loss: shares.append((run.seconds, run.share)))
    assert shares == sorted(shares) and shares[-2][1] < 1 <= shares[-1][1] and shares[-1][0] >= 0.3


# --- Evaluation ---------------------------------------------------------------------------------------------
def synthetic(monkeypatch, puzzles, leans, spread=0.0):
    """Lets rollouts give logits [N, S + 1, L, V] that lean towards the label by leans[s] after step s."""
    lean = F.one_hot(puzzles.y.long(), 5).float()[:, None] * torch.tensor(leans)[:, None, None]
    logits = lean + spread * torch.randn(lean.shape, generator=generator())
    keys = {tuple(row): i for i, row in enumerate(puzzles.x.tolist())}

    def rollout(model, x, steps=None, stop=None):
        rows = torch.tensor([keys[tuple(row)] for row in x.tolist()])
        for s in steps or range(1, len(leans)):
            yield lrpi.Step(torch.arange(len(x)), logits[rows, s - 1], logits[rows, s], None)

    monkeypatch.setattr(lrpi, "rollout", rollout)
    return logits.double()


def test_evaluation_against_plain_loops(monkeypatch):
    """Every measure of every puzzle and step, cell by cell in float64, atol 1e-5; and their means."""
    puzzles, ws = lrpi.make_mazes(12, 5, "test"), [0.0, 1.0, 2.5]
    logits = synthetic(monkeypatch, puzzles, [0.0, 3.0, 3.5, 4.0], 1.0)
    found = lrpi.evaluate(lrpi.LoopedModel(tiny()), puzzles, lrpi.maze_solved, ws=[ws] * 3)
    for i, s in itertools.product(range(12), range(3)):
        want, bins = defaultdict(float), [0.0] * (len(lrpi.MARGIN_EDGES) + 1)
        u, c, maze, label = logits[i, s], logits[i, s + 1], puzzles.x[i].tolist(), puzzles.y[i].tolist()
        answer = c.argmax(-1).tolist()
        want["exact"], want["label"] = solved_by_hand(maze, answer, 5), answer == label
        for cell, a in enumerate(label):
            pu, pc = u[cell].softmax(-1).tolist(), c[cell].softmax(-1).tolist()
            A = [math.log(q / p) for p, q in zip(pu, pc, strict=True)]
            kl = sum(q * b for q, b in zip(pc, A, strict=True))
            values = {"cells": answer[cell] == a, "logp": math.log(pc[a]), "gain": A[a], "kl": kl}
            for name, value in (values | {"margin": A[a] - kl, "margin_positive": A[a] > kl}).items():
                want[name] += value / 25
            bins[sum(A[a] - kl > edge for edge in lrpi.MARGIN_EDGES)] += 1 / 25
            want["change"] = max(want["change"], *(abs(q - p) for p, q in zip(pu, pc, strict=True)))
        guided, want["margins"] = [u + w * (c - u) for w in ws], bins
        want["guided_exact"] = [float(solved_by_hand(maze, l_w.argmax(-1).tolist(), 5)) for l_w in guided]
        want["guided_logp"] = [-F.cross_entropy(l_w, puzzles.y[i].long()).item() for l_w in guided]
        assert set(want) == set(found["each"])
        for name, value in want.items():
            got = found["each"][name][i, s].double()
            assert torch.allclose(got, torch.tensor(value).double(), atol=1e-5), name
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
    # 60 sets of 5 means of 0: all intervals hold it in 57, 3 sigma: 52. Ends to a fifth of the width.
    values, rng = torch.randn(60, 200, 5, generator=generator()), random.Random(0)
    right = sum(all(low <= 0 <= high for low, high in lrpi.intervals(v, 600)) for v in values)
    assert 52 <= right < 60
    for N in (1, 5, 6):
        assert all(math.isfinite(end) is (N > 5) for ends in lrpi.intervals(values[0, :N]) for end in ends)
    for s, (low, high) in enumerate(lrpi.intervals(values[0, :, :3].exp())):  # 98.33% each
        means = sorted(sum(rng.choices(values[0, :, s].exp().tolist(), k=200)) / 200 for _ in range(4000))
        assert abs(low - means[33]) + abs(high - means[-34]) < 0.2 * (high - low)


@pytest.mark.parametrize("rule", ["kl", "change", "head"])
def test_halting_gives_the_answers_of_the_plain_rollout_at_the_halting_step(rule):
    """Bit for bit, and puzzles that left cost nothing. Scores by hand; 1e-5."""
    model, *_ = model_and_state(tiny(act=True, n_sup=6))
    puzzles, sizes = lrpi.make_mazes(80, 5, "test"), []
    plain = list(lrpi.rollout(model, puzzles.x, range(1, 10)))  # longer than in training
    assert all(torch.equal(a.logits_c, b.logits_u) for a, b in itertools.pairwise(plain)) and len(plain) == 9
    scores = torch.stack([lrpi.HALTS[rule](model, step) for step in plain], 1)  # [80, 9]
    p, q = plain[4].logits_u.softmax(-1), plain[4].logits_c.softmax(-1)
    head = plain[4].y[:, 0] @ model.halting.weight[0] + model.halting.bias
    by_hand = {"kl": (q * (q / p).log()).sum(-1).mean(1), "change": (q - p).abs().amax((1, 2)), "head": -head}
    assert torch.allclose(scores[:, 4], by_hand[rule], atol=1e-5)
    threshold = scores.quantile(0.3).item()
    model.nets[0].register_forward_hook(lambda net, args, out: sizes.append(len(out)))
    answers, taken = lrpi.answer(model, puzzles.x, range(1, 10), lrpi.stopping(rule, threshold))
    for i in range(80):
        first = next((s for s in range(9) if scores[i, s] <= threshold), 8)
        assert taken[i] == first + 1
        assert torch.equal(answers[i].long(), plain[first].logits_c[i].argmax(-1))
    assert len(taken.unique()) > 2 and sum(sizes) == 3 * taken.sum().item()
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
SMALL = "--no-figures --test-size 30"
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
def ctrl_c(*updates):
    """Sends SIGINT at these updates of the training, counted from 0."""
    count, loss = itertools.count(), lrpi.step_loss
    with pytest.MonkeyPatch.context() as patch:
        hit = {k: lambda: signal.raise_signal(signal.SIGINT) for k in updates}
        patch.setattr(lrpi, "step_loss", lambda *args: (hit.get(next(count), int)(), loss(*args))[1])
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run of the real command in an empty folder: what it printed, and where its results lie."""
    done = process(f"{PROGRAM} --task maze --seed 5 {QUICK}", cwd=(folder := tmp_path_factory.mktemp("run")))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout, folder / "runs" / "maze-dis"


def test_the_command_writes_everything_and_eval_reproduces_it_halts_and_thinks_longer(trained, capsys):
    from PIL import Image

    (said, out), before, found = trained, contents(trained[1]), read(trained[1])
    assert {name for name in before if name[-4:] not in (".png", ".gif")} == {"metrics.json", "model.pt"}
    for name in ("improvement.png", "guidance.png", "thinking.png", "solution.png", "solution.gif"):
        with Image.open(out / name) as image:
            assert image.format == name[-3:].upper() and len(image.convert("RGB").getcolors(10**6)) > 5
            assert name[-3:] == "png" or 4 <= image.n_frames <= 7, "puzzle, three steps, solution"
    expected = {"task": "maze", "scheme": "dis", "size": 5, "seed": 5, "passes": 9}
    assert expected.items() <= found.items() and found["config"]["seed"] == 5 and len(found["curve"]) == 10
    assert 120 <= found["examples_seen"] < 135 and found["longest"] <= 15
    assert found["params"] == sum(w.numel() for w in weights(out)) - 32, "y0 and z0 are not trained"
    assert found["halting"]["none"] == {"exact": found["exact"][2], "passes": 9}
    assert all(len(found[name]) == 3 for name in ("exact", "verdict", "w_star", "kl", "gain_interval"))
    table = [line for line in said.splitlines() if re.match(r" +\d +\d", line)]
    for row, exact, verdict in zip(table, found["exact"], found["verdict"], strict=True):
        assert f" {exact:.1%} " in row and verdict in row
    assert found["summary"] in said and said.count("validation solved") == 10
    assert f"{found['exact'][2]:.1%} of 40 held-out puzzles solved, with 9 " in said
    assert command(f"--eval {out}/model.pt --no-figures --test-size 40") == 0 and contents(out) == before
    assert all(found[k] == v for k, v in read(out / "eval").items() if k not in ("total_seconds", "config"))
    line = f"--eval {out}/model.pt --out o --no-figures --test-size 40 --halt --think 9 --size 9"
    assert command(line) == 0 and "(--halt kl" in capsys.readouterr().out
    found, test = read("o"), lrpi.make_mazes(40, 9, "test")
    assert (len(found["exact"]), found["passes"], found["size"]) == (9, 27, 9)
    model, _ = lrpi.load_checkpoint(f"{out}/model.pt", size=9)
    stop = lrpi.stopping("kl", float(found["halt"]["kl"]["threshold"]))
    answers, taken = lrpi.answer(model, test.x, range(1, 10), stop)
    exact, passes = lrpi.maze_solved(test.x, answers).double().mean().item(), 3 * taken.double().mean().item()
    assert found["halting"]["kl"] == {"exact": exact, "passes": pytest.approx(passes)}


def test_other_options(capsys, monkeypatch):
    """A head, bfloat16, torch.compile with a backend that needs no compiler; a terminal, slow generation."""
    compiled, plain, clock = [], torch.nn.Module.compile, itertools.count(step=0.9)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(plain(net, backend="eager")))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = "--mixer mlp --act --halt head --precision bf16 --compile --no-figures --train-size 30000 --out o"
    assert command(f"{QUICK} {line} --budget-seconds 3") == 0 and compiled
    found, said = read("o"), capsys.readouterr()
    assert [*found["halting"]] == ["none", "kl", "change", "head"] and [*found["thinking"]] == ["5"]
    assert all(words in said.out for words in (" s left\r", "100%", "(--halt head"))
    assert re.search(r"making 30000 puzzles: \d+%", said.err)
    with pytest.raises(SystemExit, match="0"):
        command("--help")
    text, names = " ".join(capsys.readouterr().out.split()), lrpi.Config.__dataclass_fields__.keys()
    assert all(f" --{name.replace('_', '-')}" in text for name in names - {"vocab", "shape"})
    assert "from 1 to 1000 [6]" in text and ": auto, cuda, mps, cpu [auto]" in text


@pytest.mark.parametrize("given", ["", "--ema 0 --mixer conv ", "--scheme trm --T 1 --n 1 "])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(given, capsys):
    """Ctrl-C within a rollout: evaluated in good order, exit code 130; in the end the same weights, curve."""
    line = f"{BRIEF} {given} --examples 80 --out"
    with ctrl_c(2, 9):
        for more, code in (("", 130), ("--resume", 130), ("--resume", 0)):
            assert command(f"{line} b {more}") == code and len(read("b")["exact"]) == 2
            assert ("training.pt" in contents("b")) == ("--resume" in capsys.readouterr().err) == bool(code)
    assert command(f"{line} a") == 0 and same(weights("a"), weights("b"))
    curves = [[at["exact"] for at in read(name)["curve"]] for name in "ab"]
    assert curves[0] == curves[1] and len(curves[0]) == 10


@pytest.mark.skipif(os.name == "nt", reason="kills as Unix does")
def test_kill_9_then_resume():
    line = f"{BRIEF} --examples 800 --save-minutes 1e-6 --out "
    running = subprocess.Popen(f"exec {PROGRAM} {line} b", shell=True, env=ENV, text=True, stdout=-1)
    while "validation solved" not in running.stdout.readline():  # a tenth of the training is done
        assert running.poll() is None
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL and set(contents("b")) == {"training.pt"}
    assert command(f"{line} b --resume") == command(f"{line} a") == 0
    assert same(weights("a"), weights("b")) and "training.pt" not in contents("b")


ARMS = ["dis+feedback+linear+target=mask", "trm-medium+n-sup=2+step-index", "one-pass+stablemax+awr=1"]
COMPARE = f"{BRIEF} --figures --examples 80 --seeds 2 --compare {','.join(ARMS)} --out "


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    assert command(COMPARE + str(out := tmp_path_factory.mktemp("compare"))) == 0
    return out


def test_a_comparison_writes_its_runs_continues_after_ctrl_c_and_repeats_none(compared, capsys):
    names = [f"{arm}-{seed}" for arm in ARMS for seed in (0, 1)]
    runs, found = [read(compared / name) for name in names], read(compared, "compare")["arms"]
    assert set(contents(compared)) == {"compare.json", "compare.png"} and [*found] == ARMS
    assert {path.name for path in compared.iterdir() if path.is_dir()} == {*names}
    for k, of in enumerate(found.values()):
        assert of["exact"] == pytest.approx(sum(run["exact"][-1] for run in runs[2 * k : 2 * k + 2]) / 2)
        for run, record in zip(runs[2 * k : 2 * k + 2], of["runs"], strict=True):
            assert record.items() <= run.items() and record["passes"] == (6, 6, 36)[k]
            assert len(run["curve"]) == 10 and 80 <= run["examples_seen"] < 96
    with ctrl_c(runs[0]["steps_done"] + 3):  # in the middle of the second run
        assert command(f"{COMPARE} o") == 130
    before = [contents(Path("o") / name) for name in names[:1]]
    capsys.readouterr()
    assert command(f"{COMPARE} o --no-figures") == 0
    assert before == [contents(Path("o") / name) for name in names[:1]] and "compare.json" in contents("o")
    assert [read(f"o/{name}")["exact"] for name in names] == [run["exact"] for run in runs]


# --- Puzzles of your own: text and CSV files ----------------------------------------------------------------
SUDOKU = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ROWS = [SUDOKU[i : i + 9] for i in range(0, 81, 9)]
BOARDS = {  # {task: (a text, its two boards)}
    "maze": ("#####\n#S.G#\n#####\n\nS #\n# #\n  G\n", ["#####\n#S G#\n#####", "S #\n# #\n  G"]),
    "sudoku": ("\n".join([SUDOKU, "5 3 0 | 0 7 0 | 0 0 0", "---+--", *ROWS[1:]]), ["\n".join(ROWS)] * 2),
    "nqueens": ("Q......." + "." * 56 + "\n\n" + "........\n" * 7 + ". . . . . Q . .",
                ["Q......." + "\n........" * 7, "........\n" * 7 + ".....Q.."]),
}  # fmt: skip


def model_of(task):
    torch.manual_seed(0)
    model = lrpi.LoopedModel(lrpi.configure(task=task, width=8, ffn=8, n_sup=2, mixer="conv"))
    lrpi.write(Path("m.pt"), {"config": asdict(model.cfg), "model": model.state_dict(), "facts": {}})
    return model


@pytest.mark.parametrize("task", [*BOARDS])
def test_solving_reads_cell_by_cell_and_prints_what_a_plain_rollout_answers(task, capsys, monkeypatch):
    """From standard input with a byte-order mark, and from a file written by Windows."""
    (text, expected), model, shown, letters = BOARDS[task], model_of(task), [], lrpi.TASKS[task].letters
    data = ("\N{BYTE ORDER MARK}" + text).encode()
    Path("p.txt").write_bytes(data.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    for source in ("-", "p.txt --out o"):
        line = f"--task {task} --checkpoint m.pt --think 1 --tries 1 --steps-shown --solve {source}"
        assert command(line) == 1, "an untrained model"
        parts = [part.split("\n") for part in capsys.readouterr().out.strip("\n").split("\n\n")]
        parts = [
            rows[1:] for rows in parts if rows[0] == "puzzle" or rows[0].startswith("step 1: not solved")
        ]
        shown.append(["\n".join(row.rstrip() for row in rows) for rows in parts])
    assert shown[0] == shown[1] and shown[0][::2] == expected and len(contents("o")) == 4
    for asked, said in zip(expected, shown[0][1::2], strict=True):
        if asked[:5] == "#####":
            asked, said = "S G", said[7:10].replace("o", "?")  # the rim is not shown to models
        rows = asked.split("\n")
        x = torch.tensor([[letters.index(c) for c in row.ljust(len(rows[0]))] for row in rows])
        answer, _ = lrpi.answer(lrpi.resized(model, x.shape), x.view(1, -1), range(1, 2))
        answer = ["".join(letters[t] for t in row).rstrip() for row in answer.view(x.shape)]
        if asked == "S G":  # there, start and goal where they cannot be count as marks
            answer[0] = answer[0][0] + re.sub("[SGo]", "?", answer[0][1]) + answer[0][2:]
        assert "\n".join(answer) == said


SQUARE = [" ".join(row) for row in ROWS]
BANDS = [*SQUARE[:3], "------+-------+------", "", *SQUARE[3:6], "╠═══╪═══╣", *SQUARE[6:]]
FORMATS = {  # each holds the same puzzle, or two mazes
    "sudoku": [f"17f3 {SUDOKU} 2.1", f"id,puzzle,solution\n1,{SUDOKU.replace('.', '0')},{'1' * 81}",
               f"Grid 01\n{chr(10).join(ROWS)}", "# of today\n====\n[Puzzle]\n" + "\n".join(BANDS),
               "\n".join(f"[{', '.join(row)}]," for row in ROWS), "\n".join(f"| {row} |" for row in ROWS),
               *(SUDOKU.replace(".", blank) for blank in "0_*x?-")],
    "maze": ["S #\n# #\n  G", "s.#\n#.#\n..g", "A0X\n101\n00B", "P %\n% %\n  F",
             "  #####\n  #S ##\n  ## ##\n  #  E#\n  #####"],
    "nqueens": [BOARDS["nqueens"][0].split("\n")[0], "1" + "0" * 63],
}  # fmt: skip


def test_formats_and_rims():
    """Start and goal in the rim move inside and come back; what is marked then is solved as it was drawn."""
    for task, texts in FORMATS.items():
        of, cfg = (
            lrpi.TASKS[task],
            lrpi.configure(task=task, size={"sudoku": 9}.get(task, 8 + (task == "maze")), mixer="conv"),
        )
        found = [
            [lrpi.read_board(rows, n, of, cfg)[2] for n, rows in lrpi.boards(text, of, cfg.size)]
            for text in texts
        ]
        assert [len(boards) for boards in found] == [1] * len(texts)
        assert all(torch.equal(boards[0], found[0][0]) for boards in found), task
    of, cfg = lrpi.TASKS["maze"], lrpi.configure()
    for text in ("#S###\n#  ##\n## ##\n#   G\n#####", "#####\n#   S\n# #G#\n#####", "#####\n#S G#\n#####"):
        (line, rows), *_ = lrpi.boards(text, of, 11)
        x, y, inner = lrpi.read_board(rows, line, of, cfg)
        answer = lrpi.TASKS["maze"].solve(inner[None]).y.view_as(inner)
        assert inner.shape == (len(rows) - 2, len(rows[0]) - 2) and (inner == START).sum() == 1
        assert torch.equal(lrpi.outside(x, answer), y) and lrpi.maze_solved(x[None], y[None])


@pytest.mark.parametrize("task, size", [("maze", 7), ("sudoku", 6), ("sudoku", 9), ("nqueens", 6)])
def test_views_come_back_and_checkers_judge_them_alike(task, size):
    """Puzzles, solutions and near misses; sudokus that are views of each other are of one kind."""
    of = lrpi.TASKS[task]
    x, y, *_ = of.make(24, size)
    cell, new = of.views(24, (size, size), generator())
    near = torch.where(torch.arange(size**2) == 3, 1 + y % 2, y)
    seen = [lrpi.look(cells, cell, new) for cells in (x, y, near)]
    for cells, view in zip((x, y, near), seen, strict=True):
        assert torch.equal(lrpi.look(view, cell.argsort(1), new.argsort(1)), cells)
    assert torch.equal(of.solved(x, near), of.solved(seen[0], seen[2])) and of.solved(seen[0], seen[1]).all()
    assert not of.solved(x, near).all() and len({*map(tuple, cell.tolist())}) >= 8
    if task == "sudoku":
        assert (
            torch.equal(lrpi.sudoku_kind(y), lrpi.sudoku_kind(seen[1]))
            and len(lrpi.sudoku_kind(y).unique()) > 2
        )


def test_shortest_ways_in_mazes_with_loops_and_obstacles():
    rng, solved = random.Random(0), 0
    for size, share in itertools.product((5, 9), (0.1, 0.3, 0.5) * 10):
        maze = [WALL if rng.random() < share else OPEN for _ in range(size**2)]
        for token, cell in zip((START, GOAL), rng.sample(range(size**2), 2), strict=True):
            maze[cell] = token
        puzzle = lrpi.TASKS["maze"].solve(torch.tensor([maze], dtype=torch.uint8))
        label = puzzle.y[0].tolist()
        if maze.index(GOAL) in search_all(maze, size):
            path, *_ = search(maze, size)
            assert solved_by_hand(maze, label, size) and label.count(PATH) == len(path)
            assert torch.equal(stage(puzzle, puzzle.order.max()), puzzle.y)
            solved += 1
        else:
            assert PATH not in label
    assert 20 < solved < 60


def search_all(maze, side):
    """All cells that can be reached from the start."""
    reached, queue = {maze.index(START)}, [maze.index(START)]
    while queue:
        new = {n for n in neighbours_of(queue.pop(), side) if maze[n] != WALL} - reached
        reached, queue = reached | new, queue + [*new]
    return reached


def test_tries_take_an_accepted_answer_and_call_no_wrong_one_solved(monkeypatch):
    """A model that is right in its third try, and then only about every second maze; others stay unsolved."""
    puzzles, calls, sizes = lrpi.make_mazes(20, 5), itertools.count(1), []

    def answer(model, x, steps, stop=None):
        sizes.append(len(x))
        right = lrpi.solve_mazes(x).y
        good = (right == PATH).sum(1) % 4 == 1
        return torch.where(good[:, None] & (next(calls) == 3), right, x), torch.full((len(x),), 2)

    monkeypatch.setattr(lrpi, "answer", answer)
    model, x = lrpi.LoopedModel(tiny()), lrpi.grid(puzzles.x)
    said, accepted, passes = lrpi.attempts(model, x, [1, 2], 5)
    good = (puzzles.y == PATH).sum(1) % 4 == 1
    assert accepted.tolist() == (3 * good).tolist() and torch.equal(lrpi.maze_solved(x, said), good)
    left = 20 - good.sum().item()
    assert sizes == [20, 20, 20, left, left] and passes == [6 * n for n in sizes] and 0 < left < 20


def write_csv(name, task, puzzles):
    """With a byte-order mark and empty lines."""
    letters, pairs = lrpi.TASKS[task].letters, rows_of(puzzles.x, puzzles.y)
    texts = (",".join("".join(letters[t] for t in of) for of in pair) for pair in pairs)
    text = "\n\nme,".join(["\N{BYTE ORDER MARK}source,question,answer", *texts])
    Path(f"{name}.csv").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("task, size", [("sudoku", 4), ("maze", 7), ("nqueens", 5)])
def test_csv_files_are_read_trained_on_and_evaluated_on(task, size):
    """Train and valid share nothing; rows are drawn evenly, 5 sigma; views and their rounds are solved."""
    of = lrpi.TASKS[task]
    train, test = of.make(300, size, "train"), of.make(40, size, "test")
    write_csv("train", task, train)
    write_csv("test", task, test)
    cfg = lrpi.configure(task=task, data=".", views=False)
    data, valid, again = (lrpi.make_puzzles(cfg, 10**6, split) for split in ("train", "valid", "test"))
    rows = {*map(tuple, test.x.tolist())}
    assert rows == {*map(tuple, again.x.tolist())} and of.solved(again.x, again.y).all() and len(again) == 40
    parts = [{*map(tuple, puzzles.x.tolist())} for puzzles in (data, valid, train)]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1] and parts[1]
    some = torch.cat([lrpi.make_puzzles(cfg, 10, "test", k).x for k in range(200)])
    drawn, copies = (Counter(tuple(row) for row in x.tolist()) for x in (some, test.x))
    assert all(abs(drawn[row] - 50 * n) < 31 * n for row, n in copies.items())
    view = lrpi.make_puzzles(replace(cfg, views=True), 500, "train")
    assert len(view) == 500 and of.solved(view.x, view.y).all()
    assert len({*map(tuple, view.x.tolist())} - parts[0]) > 30
    assert task == "nqueens" or same([*view], [*of.solve(view.x, view.y)])
    assert command(f"--task {task} --data . {SMALL} --examples 20 --width 16 --ffn 32 --n-sup 2 --out o") == 0
    assert command(f"--eval o/model.pt --data . {SMALL}") == 0
    assert read("o/eval")["exact"] == read("o")["exact"]


# --- Bad input: one line that starts with "lrpi: ", exit code 2, no traceback, and nothing lost -------------
# each case names its last option and the value of that
BAD = """--task chess; --scheme magic; --target none; --mixer fft; --size 12; --size 3; --size 63
--size big; --size 1e1; --size 7.0; --lr fast
--seed 9999999999; --examples 0; --examples 1.5; --batch-size -4; --train-size 0; --test-size 0; --n-sup 0
--n-sup 1000000000; --width 100000; --kernel 4; --lr nan; --lr inf; --lr -1; --ema 1
--mixer attention --heads 5; --device tpu; --pace 0; --noise -1; --think -1; --halt never; --halt head
--task sudoku --size 8; --task nqueens --size 4; --task nqueens --size 11; --blanks -1; --blanks 65
--hinge -1; --budget-seconds -1; --precision fp8; --save-minutes -1
--seeds 2; --compare dis --seeds 0; --compare dis --seeds two; --compare dis --size 12; --out /dev/null/x
--checkpoint m.pt"""
WORDS = {  # cases that name something else
    "--size ''": "--size", "--speed 9": "--speed", "--size": "--size", "maze": "maze", "--act=3": "--act",
    f"--size {'9' * 5000}": "99", f"--task {'x' * 5000}": "nqueens", "--task 'ma\nze\x1b[31m'": "--task",
    "--compare 'a\nb'": "a", "--solve 'a\nb'": "a", "--eval 'a\nb.pt'": "a", "--data 'a\nb'": "a",
    f"--out {'x/' * 3000}": "x/x", f"--eval {'d/' * 60}last.pt": "last.pt", "--eval no.pt": "no.pt",
    "--eval ''": "", "--data ''": "", "--solve ''": "", "--compare ''": "", "--compare dis,": "",
    "--compare dis,best": "best", "--compare dis+noise=loud": "loud", "--compare dis+eval=x": "--eval",
    "--compare dis,dis": "dis", "--compare dis+task=maze": "--task", "--compare dis+": "", "--solve .": ".",
    "--data no": "train.csv", "--data /dev/null": "/dev/null", "--solve no.txt": "no.txt", "--eval .": "",
    "--resume": "training.pt", "--solve p.txt": "--checkpoint",
    f"--device {'mps' if torch.cuda.is_available() else 'cuda'}": "--device",
}  # fmt: skip
ALONE = "eval resume, eval compare, eval solve, eval checkpoint, eval seeds, solve compare, solve resume,"
ALONE += " solve seeds, solve data, compare resume, compare checkpoint"


def refused(capsys, line, *words):
    assert command(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("lrpi: ") and said.find("\n") == len(said) - 1 < 500, said
    assert all(word in said for word in words), (said, words)


def test_bad_options(capsys, monkeypatch):
    Path("p.txt").touch()
    for line in re.split("; |\n", BAD):
        refused(capsys, line, *shlex.split(line)[-2:])
    for line, words in WORDS.items():
        refused(capsys, line, words)
    for a, b in map(str.split, ALONE.split(",")):
        for value in [""] if b == "resume" else ["=", "=x"]:  # refused even when they are empty
            refused(capsys, f"--{a}=x --{b}{value}", f"--{b}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, QUICK, "matplotlib", "--no-figures")
    assert [path.name for path in Path().rglob("*.*")] == ["p.txt"], "refused before anything was written"


def test_bad_puzzles_and_csv_files(capsys):
    """A bad puzzle is located and the others are solved."""
    far, tail = 1_000_000, ".....Q..\n......Q."
    for task, bad in {
        "maze": {"S #\n# x\n#G ": "line 2, character 3: 'x'", "S G\n# #S": "no solution", "S G\n#S#": "",
                 "###\n  G": "", "###\nS  ": "", "S#\n#G": "", "S" + " " * far + "G": ""},
        "sudoku": {SUDOKU[:80]: "9", SUDOKU[:80] + "a": "80 cells", "12": "2 cells", "1" * far: "",
                   "77" + "." * 79: "no solution", "12345678." + "." * 17 + "9" + "." * 54: "no solution"},
        "nqueens": {"........\n" * 6 + tail: "no solution", "Q" * 64: "no solution"},
    }.items():  # fmt: skip
        model_of(task)
        for text, words in bad.items():
            Path("p.txt").write_text(f"{text}\n\n{BOARDS[task][1][0]}\n")
            assert command(f"--task {task} --solve p.txt --checkpoint m.pt") == 2
            out, err = capsys.readouterr()
            assert err.startswith("lrpi: p.txt, line ") and words in err and "not solved" in out
            assert err.find("\n") == len(err) - 1 < 300
    for data in (b"", b"\n\n", b"\xff\xfe\x00S"):
        Path("p.txt").write_bytes(data)
        refused(capsys, "--solve p.txt --checkpoint m.pt --task nqueens", "p.txt")
    write_csv("train", "sudoku", lrpi.make_sudokus(300, 4))
    text = Path("train.csv").read_text(encoding="utf-8-sig")
    for data, words in {
        "": "", text.replace("question", "puzzle"): "question", text[:22]: "", f"{text}\nme,1": "line",
        text.replace("me,", "me,1", 1): "line 3", text.replace("me,", "me,\0", 1): "", text + "x" * far: "",
        f"{text}\nme,{'.' * 16},{'1' * 16}": "line", f"{text}\nme,{'.' * 15}5,{'1' * 16}": "'5'",
    }.items():  # fmt: skip
        Path("train.csv").write_text(data)
        refused(capsys, "--task sudoku --data . --no-figures --out o", "train.csv", words)


def spoilt(content, rng):
    """A copy in which one entry, somewhere, is missing or of another type, shape or value."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        content = content.copy()
        key = rng.choice([*content] if isinstance(content, dict) else range(len(content)))
        old = content.pop(key)
        if rng.random() < 0.9:
            new = spoilt(old, rng)
            content = content | {key: new} if isinstance(content, dict) else [*content, new]
        return content
    others = ["x", None, [content], 10**9, math.nan, {}]
    return rng.choice(others + ([content * math.nan, content[None]] if torch.is_tensor(content) else []))


def test_damaged_files_of_its_own(compared, capsys):
    """model.pt, training.pt and a run of --compare: refused, or where the damage is of no account, used."""

    def save(content, path):
        if path.suffix == ".pt" and not isinstance(content, bytes):
            torch.save(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    with ctrl_c(5):
        assert command(f"{BRIEF} --examples 60 --out o") == 130
    run, rng = compared / f"{ARMS[0]}-1" / "metrics.json", random.Random(0)
    for path, line in {
        Path("o/model.pt"): "--eval o/model.pt --no-figures --test-size 6",
        Path("o/training.pt"): f"{BRIEF} --examples 60 --resume --out o",
        run: f"{COMPARE} {compared}",
    }.items():
        before, whole = contents(path.parent), path.read_bytes()
        content = read(run.parent) if path == run else torch.load(path)
        cut = [whole[: len(whole) * k // 4] for k in range(4)] + [whole[:-1], b"\xff\xfe", b"[" * 10**5]
        for damage in [7, [1], {}, "x", None, *cut, *(spoilt(content, rng) for _ in range(40))]:
            save(damage, path)
            damaged, _ = contents(path.parent), capsys.readouterr()
            code, said = command(line), capsys.readouterr().err
            if code:
                assert code == 2 and said.startswith("lrpi: ") and said.find("\n") == len(said) - 1, said
                assert path.name in said and contents(path.parent) == damaged
        for name, data in before.items():
            (path.parent / name).write_bytes(data)
    content = torch.load("o/model.pt")
    for key, value in {"n_sup": 10**9, "width": 10**5, "layers": 100, "untied": True}.items():
        save(content | {"config": content["config"] | {key: value}}, Path("m.pt"))
        refused(capsys, "--eval m.pt", "m.pt")
    for change in (lambda w: w * math.nan, lambda w: w.long(), lambda w: w[None]):
        save(content | {"model": {name: change(w) for name, w in content["model"].items()}}, Path("m.pt"))
        refused(capsys, "--eval m.pt", "m.pt")
    for given in ("--width 11", "--scheme trm", "--halt head", "--task sudoku", "--size 12"):
        refused(capsys, f"--eval o/model.pt --no-figures {given}", given.split()[0])
    refused(capsys, f"{BRIEF} --examples 60 --resume --out o --seed 3", "--seed", "3")
    refused(capsys, f"{COMPARE} {compared} --noise 0.1", "-0/metrics.json", "--noise")


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
    assert contents("o") == before and model_of("maze")
    solve = f"{PROGRAM} --solve - --checkpoint m.pt --think 1"
    for line, code, err in (
        *((f"{solve} <&-", 2, "lrpi: "), (f"echo 'S G' | {solve} >&-", 1, "")),
        (f"(yes 'S G' | head -n 99; echo) | {solve} 2>&1 | head -n 1", 0, ""),
    ):
        done = process(line)
        assert (done.returncode, done.stderr[:6], done.stderr.count("\n")) == (code, err, bool(err)), done
        assert "Traceback" not in done.stdout


# --- Several processes --------------------------------------------------------------------------------------
WORK = """
import copy, os, sys, torch, lrpi
train = lrpi.train
def spy(model, data, cfg, callback, average, resume):
    twins, found, rank = [copy.deepcopy(model) for _ in range(2)], [], int(os.environ["RANK"])
    for twin in twins:  # of all processes: the same puzzles and the same noise
        torch.manual_seed(0)
        found.append(train(twin, lrpi.make_queens(30, 5), cfg, None, average))
    torch.manual_seed(rank)
    found.append(train(model, data, cfg, callback, average, resume))
    torch.save([[*of.state_dict().values()] for of in found], f"rank{rank}.pt")
    return found[-1]
lrpi.train = spy
sys.exit(lrpi.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes here")
def test_two_processes_share_their_weights_and_leave_one_set_of_results():
    """With the same puzzles and noise in both, they do what one does, bit for bit."""
    Path("work.py").write_text(WORK)
    run = f"{shlex.quote(sys.executable)} -m torch.distributed.run --nproc-per-node=2 --standalone work.py"
    done = process(f"{run} {BRIEF} --examples 40 --batch-size 8 --out o", timeout=300)
    assert done.returncode == 0 and done.stdout.count("held-out puzzles solved, with") == 1, done.stderr
    assert set(contents("o")) == {"metrics.json", "model.pt"} and 40 <= read("o")["examples_seen"] < 60
    ranks = [torch.load(f"rank{k}.pt") for k in (0, 1)]
    assert all(same(a, b) for a, b in zip(*ranks, strict=True)), "ranks' weights are equal"
    cfg = lrpi.configure(task="nqueens", size=5, width=8, ffn=8, n_sup=2, batch_size=4, examples=20)
    torch.manual_seed(cfg.seed)
    model = lrpi.LoopedModel(cfg)
    torch.manual_seed(0)
    one = [*lrpi.train(model, lrpi.make_queens(30, 5), cfg).state_dict().values()]
    assert same(one, ranks[0][0]) and same(one, ranks[0][1]) and not same(one, ranks[0][2])


# --- The file itself: its size, and sections that can be copied ---------------------------------------------
SOURCE = (HERE / "lrpi.py").read_text()
TREE = ast.parse(SOURCE)
SECTIONS = re.split(r"^# -{60,}\n(?=# §\d+  )", SOURCE, flags=re.MULTILINE)  # of which the first is §0


def test_the_file_is_short():
    sizes = [1 + text.count("\n") for text in SECTIONS]
    assert [int(text[3 : text.index("  ")]) for text in SECTIONS[1:]] == [*range(1, 11)]
    assert max(map(len, SOURCE.splitlines())) <= LINE and sum(sizes[1:7]) <= METHOD
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= FUNCTION]
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {re.split("[ .]", ast.unparse(node))[1] for node in imports}
    assert modules - sys.stdlib_module_names == {"torch", "matplotlib"} and SOURCE.count("\n") <= TOTAL


def copied(*numbers):
    """The names of sections that are run with nothing but the file's import statements."""
    imports = [ast.unparse(node) for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec("\n".join([*imports, *(SECTIONS[number] for number in numbers)]), names := {})
    return SimpleNamespace(**names)


def test_sections_can_be_copied():
    """Each alone, and §1 to §4 together, where the loss of 200 updates falls by a third at least."""
    model = copied(1).LoopedModel(vocab=3, shape=(4, 4), width=16, ffn=16)
    y, z = model(torch.zeros(2, 16), *model.start(2), torch.ones(2))
    assert model.readout(y).shape == (2, 16, 3) and z.shape == (2, 16, 16) and model.forward_passes == 3
    u, c, label = two_logits()
    assert copied(2).best_guidance(u, c, label) == lrpi.best_guidance(u, c, label)
    puzzles, s, noise = tuple(lrpi.make_mazes(100, 5)), torch.arange(100) % 6 + 1, torch.rand(100, 2, 25)
    for name, phi in copied(3).TARGETS.items():
        cfg = SimpleNamespace(n_sup=6, power=0.3, pace=2, vocab=6)
        assert torch.equal(phi(puzzles, s, noise, cfg), lrpi.TARGETS[name](puzzles, s, noise, cfg))
    method, seen = copied(1, 2, 3, 4), []
    given = {"examples": 400, "target": "reveal", "hinge": 1.0, "linger": 0.0}
    cfg = method.TrainConfig(shape=(5, 5), width=32, ffn=32, **given)
    model = method.LoopedModel(cfg)
    method.train(model, TensorDataset(*puzzles[:2]), cfg, lambda run, loss: seen.append(loss))
    losses = [loss for loss in seen if loss is not None]
    assert len(seen) == 200 and sum(losses[-20:]) < 0.67 * sum(losses[:20])
    maze, boards = copied(5), copied(7)
    puzzles = maze.make_mazes(20, 7, "valid")
    assert maze.maze_solved(puzzles.x, maze.solve_mazes(puzzles.x).y).all() and len(puzzles) == 20
    y = boards.sudoku_grids(10, 6, generator())
    x = boards.minimal(y, generator())
    assert boards.sudoku_solved(x, y).all() and (boards.other_solutions(x, y) == y).all() and (x == 0).any()
    y = boards.placements(6)
    x = boards.queens_boards(10, 6, generator())
    assert all(boards.queens_solved(row.expand_as(y), y).any() for row in x) and (x.sum(1) < 6).all()


# ------------------------------------------------------------------------------------------------------------
# The tutorial: run as it stands in quick mode, without Jupyter, and its exercises with right answers

TUTORIAL = json.loads((HERE / "tutorial.ipynb").read_text())["cells"]
CODE = {i: "".join(cell["source"]) for i, cell in enumerate(TUTORIAL) if cell["cell_type"] == "code"}
PROSE = "\n\n".join("".join(cell["source"]) for cell in TUTORIAL if cell["cell_type"] == "markdown")
SOLUTIONS = re.findall(r"<summary>(\d+):.*?```python\n(.*?)```", PROSE, re.DOTALL)
STORED = {i: TUTORIAL[i]["outputs"] for i in CODE}
STREAMS = "\n".join("".join(o.get("text", "")) for outputs in STORED.values() for o in outputs)


def drawn(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.fixture(scope="module")
def tutorial():
    """The namespace after the last cell, and {cell: (what it printed, how many figures it opened)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads, namespace, left = torch.get_num_threads(), {"__name__": "__main__"}, {}
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context(), warnings.catch_warnings():
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
    torch.set_num_threads(threads)
    return namespace, left


def test_the_tutorial_runs_and_stores_what_each_cell_leaves(tutorial):
    for i, (printed, figures) in tutorial[1].items():
        kinds = [o["output_type"] for o in STORED[i]]
        assert "error" not in kinds, f"cell {i} has a stored error"
        assert bool(printed) <= ("stream" in kinds), f"cell {i} prints, but no output is stored"
        assert figures <= drawn(STORED[i]), f"cell {i} draws, but no figure is stored"
        assert all(o.get("name") != "stderr" for o in STORED[i]), f"cell {i} has a stored warning"
    counts = [TUTORIAL[i]["execution_count"] for i in CODE]
    assert counts == [*range(1, len(CODE) + 1)], "outputs are those of one run from top to bottom"


def test_the_tutorial_keeps_its_form():
    lines = sorted(sum(map(bool, map(str.strip, source.split("\n")))) for source in CODE.values())
    assert 35 <= len(TUTORIAL) <= 55 and lines[len(lines) // 2] <= 10 and lines[-1] <= 25
    assert 8 <= sum(map(drawn, STORED.values())) <= 12
    assert (HERE / "tutorial.ipynb").stat().st_size < 2e6
    magic = re.search(r"^\s*[%!]", "\n".join(CODE.values()), re.MULTILINE)
    assert not magic, "plain Python, so that it runs anywhere"


def test_the_tutorial_names_only_what_there_is():
    text = PROSE + "\n".join(CODE.values())
    names = set(re.findall(r"\blrpi\.([A-Za-z_]\w*)", text)) - {"py", "zip"}
    assert len(names) > 20 and not {name for name in names if not hasattr(lrpi, name)}
    flags = {option for name in lrpi.OPTIONS for option in (lrpi.flag(name), "--no-" + name)} | {
        *map(lrpi.flag, lrpi.COMMANDS)
    }
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
        check = types.FunctionType(namespace[f"check_{number}"].__code__, own)
        check()
