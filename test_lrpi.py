"""Tests of lrpi.py against independent oracles: brute force, plain loops, autograd, finite differences.

    python -m pytest -q

What is checked is computed a second time in this file by other means. Tolerances are stated where they are used.
"""

import ast
import contextlib
import copy
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from collections import Counter, defaultdict, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import lrpi
from lrpi import GOAL, OPEN, PATH, START, WALL

TOTAL, METHOD, FUNCTION, LINE = (
    1400,
    680,
    50,
    110,
)  # most lines of lrpi.py, of §1 to §6, of a function; longest line
HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stage(puzzles, r):
    """The solver's answer after r rounds."""
    return torch.where(puzzles.order <= r, puzzles.y, puzzles.draft)


# ------------------------------------------------------------------------------------------------------------
# Mazes


def neighbours_of(cell, side):
    r, c = divmod(cell, side)
    for i, j in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
        if 0 <= i < side and 0 <= j < side:
            yield i * side + j


def shortest_paths(maze, side):
    """By breadth-first search: the cells of a shortest path from start to goal, and how many such paths there are."""
    start, goal = maze.index(START), maze.index(GOAL)
    distance, ways, came, queue = {start: 0}, {start: 1}, {}, deque([start])
    while queue:
        here = queue.popleft()
        for there in neighbours_of(here, side):
            if maze[there] == WALL:
                continue
            if there not in distance:
                distance[there], ways[there], came[there] = distance[here] + 1, 0, here
                queue.append(there)
            if distance[there] == distance[here] + 1:
                ways[there] += ways[here]
    path, cell = [], goal
    while cell != start:
        cell = came[cell]
        path.append(cell)
    return set(path) - {start}, ways[goal]


@pytest.mark.parametrize("size, count", [(5, 60), (11, 60), (21, 10), (61, 2)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mazes_are_perfect_and_labels_are_their_unique_path(size, count, split):
    puzzles = lrpi.make_mazes(count, size, split, seed=3)
    assert puzzles.x.shape == puzzles.y.shape == (count, size * size) and puzzles.x.dtype == torch.uint8
    rooms = [r * size + c for r in range(0, size, 2) for c in range(0, size, 2)]
    for maze, label in zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True):
        assert maze.count(START) == maze.count(GOAL) == 1 and PATH not in maze
        spaces = [cell for cell, token in enumerate(maze) if token != WALL]
        assert set(rooms) <= set(spaces) and maze.index(START) in rooms and maze.index(GOAL) in rooms
        edges = sum(maze[there] != WALL for here in spaces for there in neighbours_of(here, size)) // 2
        reached, stack = {spaces[0]}, [spaces[0]]
        while stack:
            for there in neighbours_of(stack.pop(), size):
                if maze[there] != WALL and there not in reached:
                    reached.add(there)
                    stack.append(there)
        assert len(reached) == len(spaces) == edges + 1, "connected, with one edge less than cells: a tree"
        path, ways = shortest_paths(maze, size)
        assert ways == 1 and label == [PATH if cell in path else token for cell, token in enumerate(maze)]


def test_the_solvers_rounds_fill_dead_ends():
    puzzles = lrpi.make_mazes(20, 11, "train", seed=1)
    rounds = puzzles.order.max().item()
    for i, maze in enumerate(puzzles.x.tolist()):
        answer = [PATH if token == OPEN else token for token in maze]
        for r in range(rounds + 2):
            assert stage(puzzles, r)[i].tolist() == answer
            marked = {cell for cell, token in enumerate(answer) if token in (PATH, START, GOAL)}
            for cell in [c for c in marked if sum(n in marked for n in neighbours_of(c, 11)) <= 1]:
                answer[cell] = OPEN if answer[cell] == PATH else answer[cell]
    assert torch.equal(stage(puzzles, rounds), puzzles.y)


def chi_square(counts, cells, draws):
    """Of a uniform distribution, in units of its standard deviation, which is that of cells - 1 degrees of freedom."""
    assert len(counts) == cells
    chi2 = sum((n - draws / cells) ** 2 * cells / draws for n in counts.values())
    return abs(chi2 - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_spanning_trees_and_ends_are_uniform():
    """The 3 x 3 grid has 192 spanning trees (Kirchhoff) and 72 ordered pairs of rooms; chi-square, 6 sigma."""
    laplacian = torch.zeros(9, 9, dtype=torch.float64)
    for here in range(9):
        for there in neighbours_of(here, 3):
            laplacian[here, here] += 1
            laplacian[here, there] -= 1
    assert round(torch.linalg.det(laplacian[1:, 1:]).item()) == 192
    parents = lrpi.spanning_trees(19_200, 3, generator()).tolist()
    trees = Counter(
        frozenset((min(i, p), max(i, p)) for i, p in enumerate(tree) if i != p) for tree in parents
    )
    assert chi_square(trees, 192, 19_200) < 6
    mazes = lrpi.carve(7200, 5, generator(1)).tolist()
    assert chi_square(Counter((maze.index(START), maze.index(GOAL)) for maze in mazes), 72, 7200) < 6


def symmetric_views(cells, side):
    rows = [tuple(cells[r * side : (r + 1) * side]) for r in range(side)]
    for _ in range(4):
        rows = list(zip(*rows[::-1], strict=True))  # a quarter turn
        yield tuple(rows)
        yield tuple(row[::-1] for row in rows)


@pytest.mark.parametrize("task, size, count", [("maze", 5, 300), ("maze", 7, 500), ("maze", 11, 300),
    ("sudoku", 4, 60), ("sudoku", 9, 30), ("nqueens", 5, 60), ("nqueens", 8, 60)])  # fmt: skip
def test_splits_share_nothing_under_the_8_symmetries(task, size, count):
    """No walls of mazes, no solutions of sudokus, no questions of queens; and the same seed makes the same puzzles."""
    of, seen, first = lrpi.TASKS[task], {split: set() for split in lrpi.SPLITS}, {}
    for split, seed in itertools.product(seen, (0, 1, 0)):
        puzzles = of.make(count, size, split, seed)
        again = first.setdefault((split, seed), puzzles)
        assert all(torch.equal(a, b) for a, b in zip(puzzles, again, strict=True)) and len(puzzles) == count
        cells = {"maze": puzzles.x == WALL, "sudoku": puzzles.y, "nqueens": puzzles.x}[task]
        seen[split] |= {min(symmetric_views(row, size)) for row in cells.tolist()}
    for a, b in itertools.combinations(seen.values(), 2):
        assert a and b and not a & b


def test_mazes_of_other_seeds_differ_and_more_begin_with_the_same():
    a, b = (lrpi.make_mazes(50, 11, "train", seed).x for seed in (0, 1))
    assert len(torch.cat([a, b]).unique(dim=0)) == 100
    assert torch.equal(lrpi.make_mazes(10, 11, "train", 0).x, a[:10])


def solved_by_hand(maze, answer, side):
    """Walk from the start along marked cells: the walk must end at the goal and take in all marks."""
    if any(said != asked and (asked, said) != (OPEN, PATH) for asked, said in zip(maze, answer, strict=True)):
        return False
    marked = {cell for cell, token in enumerate(answer) if token in (PATH, START, GOAL)}
    walk = [answer.index(START)]
    while walk[-1] != answer.index(GOAL):
        onward = [n for n in neighbours_of(walk[-1], side) if n in marked and n not in walk]
        if len(onward) != 1:
            return False
        walk.append(onward[0])
    return set(walk) == marked


def test_maze_solved_agrees_with_a_walk_along_the_marks():
    """True labels, labels with one cell changed, and random answers, in perfect mazes and open fields."""
    rng, verdicts = random.Random(0), []
    for size, open_field in ((5, False), (7, False), (5, True)):
        for maze in lrpi.make_mazes(40, size, "train", seed=2).x.tolist():
            if open_field:
                maze = [OPEN if token == WALL and rng.random() < 0.8 else token for token in maze]
            path, _ = shortest_paths(maze, size)
            truth = [PATH if cell in path else token for cell, token in enumerate(maze)]
            answers = [truth, maze]
            for cell in range(size * size):
                answers += [[*truth[:cell], token, *truth[cell + 1 :]] for token in range(5)]
            for _ in range(50):
                answers.append([PATH if token == OPEN and rng.random() < 0.5 else token for token in maze])
            expected = [solved_by_hand(maze, answer, size) for answer in answers]
            x = torch.tensor([maze] * len(answers))
            assert lrpi.maze_solved(x, torch.tensor(answers)).tolist() == expected
            verdicts += expected
    assert 120 < sum(verdicts) < len(verdicts) / 2, "both verdicts occurred"
    rows = ["SoG##", "#####", "#ooo#", "#o#o#", "#ooo#"]  # a path, and a closed loop beside it
    loop = torch.tensor(["# SGo".index(c) for row in rows for c in row])[None]
    without = torch.where(torch.arange(25) > 9, loop.where(loop == WALL, OPEN), loop)
    x = loop.where(loop != PATH, OPEN)
    assert not lrpi.maze_solved(x, loop).item() and lrpi.maze_solved(x, without).item()


def test_mazes_with_several_ways_are_solved_by_the_label_and_by_any_other_way():
    text = ["S   #", " ## #", "   G#", "#    ", "     "]
    x = torch.tensor(["# SGo".index(c) for row in text for c in row], dtype=torch.uint8)[None]
    ways = ([1, 2, 3, 8], [5, 10, 11, 12])
    y, other = (
        torch.where(torch.isin(torch.arange(25), torch.tensor(way)), PATH, x).to(torch.uint8) for way in ways
    )
    assert shortest_paths(x[0].tolist(), 5)[1] == 2
    assert lrpi.maze_solved(x, y).item() and lrpi.maze_solved(x, other).item()
    puzzles = lrpi.solve_mazes(x, y)
    wrong = [(stage(puzzles, r) != y).sum().item() for r in range(26)]
    assert wrong[-1] == 0 and wrong == sorted(wrong, reverse=True) and puzzles.y.equal(y)


# ------------------------------------------------------------------------------------------------------------
# Sudoku and queens

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def sudoku_units(size):
    """Rows, columns and boxes as lists of cells."""
    height, width = BOX[size]
    keys = defaultdict(list)
    for i in range(size**2):
        r, c = divmod(i, size)
        for key in (("row", r), ("column", c), ("box", r // height, c // width)):
            keys[key].append(i)
    return list(keys.values())


def candidates(board, size):
    """{blank cell: digits that no cell in its units has}."""
    taken = defaultdict(set)
    for unit in sudoku_units(size):
        for cell in unit:
            taken[cell] |= {board[other] for other in unit}
    return {i: set(range(1, size + 1)) - taken[i] for i in range(size**2) if not board[i]}


def sudoku_solutions(puzzle, size, limit):
    """Up to `limit` solutions, by backtracking over the cell with the fewest candidates."""
    free = candidates(puzzle, size)
    if not free:
        return [list(puzzle)]
    cell, found = min(free, key=lambda i: len(free[i])), []
    for digit in sorted(free[cell]):
        if len(found) < limit:
            found += sudoku_solutions([*puzzle[:cell], digit, *puzzle[cell + 1 :]], size, limit - len(found))
    return found


@pytest.mark.parametrize("size, blanks, count", [(4, 10, 60), (6, 24, 30), (9, 40, 8), (9, 54, 4)])
def test_sudokus_have_one_solution_and_it_is_the_label(size, blanks, count):
    puzzles = lrpi.make_sudokus(count, size, "train", 1, blanks)
    assert (
        puzzles.x.dtype == puzzles.y.dtype == torch.uint8 and lrpi.sudoku_solved(puzzles.x, puzzles.y).all()
    )
    for puzzle, label in zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True):
        assert 1 <= puzzle.count(0) <= blanks and sudoku_solutions(puzzle, size, 2) == [label]


def test_other_solutions_are_found_wherever_there_are_any():
    """Against backtracking, on 4 x 4 grids with many cells emptied at random."""
    y = lrpi.sudoku_grids(120, 4, g := generator(3))
    x = torch.where(torch.rand(y.shape, generator=g) < 0.7, 0, y)
    several = []
    for puzzle, label, other in zip(x.tolist(), y.tolist(), lrpi.other_solutions(x, y).tolist(), strict=True):
        solutions = sudoku_solutions(puzzle, 4, 300)
        several.append(len(solutions) > 1)
        assert other in solutions and (other != label) == several[-1]
    assert 20 < sum(several) < 120


@pytest.mark.parametrize("size, blanks", [(6, 24), (9, 54)])
def test_the_rounds_of_sudokus_are_naked_and_hidden_singles(size, blanks):
    puzzles = lrpi.make_sudokus(80, size, "train", 0, blanks)
    rounds, stuck = puzzles.order.max().item(), 0
    for i, (puzzle, label) in enumerate(zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True)):
        board = list(puzzle)
        for r in range(1, rounds + 1):
            free = candidates(board, size)
            new = {cell for cell, digits in free.items() if len(digits) == 1}
            for unit, digit in itertools.product(sudoku_units(size), range(1, size + 1)):
                places = [cell for cell in unit if digit in free.get(cell, ())]
                new |= set(places) if len(places) == 1 else set()
            stuck += len(free) if not new else 0  # propagation cannot go on: all other cells come at once
            for cell in new or free:
                board[cell] = label[cell]
            assert stage(puzzles, r)[i].tolist() == board
    assert rounds > 1 and (size < 9 or stuck), "both branches were taken"


def test_sudoku_solved_rejects_near_misses():
    puzzles, g = lrpi.make_sudokus(20, 9), generator()
    x, y = puzzles.x, puzzles.y
    assert lrpi.sudoku_solved(x, y).all() and not lrpi.sudoku_solved(x, x).any()
    for i in range(20):
        cell = torch.randint(81, (1,), generator=g).item()
        wrong = y[i : i + 1].repeat(9, 1)
        wrong[:, cell] = (y[i, cell] + torch.arange(9)) % 10  # the first is right, the others are not
        assert lrpi.sudoku_solved(x[i].expand(9, -1), wrong).tolist() == [True] + 8 * [False]
    renamed = (y % 9) + 1  # a valid grid, but every given is changed
    assert lrpi.sudoku_solved(y * 0, renamed).all() and not lrpi.sudoku_solved(x, renamed).any()
    assert not lrpi.sudoku_solved(x, torch.where(torch.arange(81) == 40, 10, y)).any(), "10 is the mask token"
    for said, valid in (([1, 2, 3, 4, 3, 4, 1, 2, 2, 3, 4, 1, 4, 1, 2, 3], True),
                        ([1, 2, 3, 4, 2, 3, 4, 1, 3, 4, 1, 2, 4, 1, 2, 3], False)):  # fmt: skip
        assert lrpi.sudoku_solved(torch.zeros(1, 16), torch.tensor([said])).item() is valid, "boxes count"


def queens_solutions(size):
    """All placements, as boards in reading order, by trying all permutations."""
    for p in itertools.permutations(range(size)):
        if len({r + c for r, c in enumerate(p)}) == len({r - c for r, c in enumerate(p)}) == size:
            yield [int(col == p[row]) for row in range(size) for col in range(size)]


@pytest.mark.parametrize("size", [4, 5, 6, 8])
def test_queens_are_parts_of_valid_placements_and_labels_are_the_first_completion(size):
    solutions = list(queens_solutions(size))
    assert lrpi.placements(size).tolist() == solutions
    puzzles = lrpi.make_queens(300, size, "train", seed=2)
    for i, (board, label) in enumerate(zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True)):
        first = next(s for s in solutions if all(b <= a for a, b in zip(s, board, strict=True)))
        assert 1 <= sum(board) <= size - 1 and label == first
        rows = [slice(k * size, k * size + size) for k in range(size)]
        empty = [row for row in rows if not any(board[row])]
        for r in range(len(empty) + 1):  # the solver goes row by row
            for row in empty[:r]:
                board[row] = label[row]
            assert stage(puzzles, r)[i].tolist() == board
    assert lrpi.queens_solved(puzzles.x, puzzles.y).all()


def test_queens_solved_accepts_every_completion_and_nothing_else():
    """All boards of 4 x 4 with up to 5 queens, and 8 x 8 placements with one queen moved, added or removed."""
    boards = [
        [int(i in cells) for i in range(16)]
        for k in range(6)
        for cells in itertools.combinations(range(16), k)
    ]
    said = lrpi.queens_solved(torch.zeros(len(boards), 16), torch.tensor(boards)).tolist()
    valid = list(queens_solutions(4))
    assert said == [board in valid for board in boards] and sum(said) == 2
    valid, rng, near = list(queens_solutions(8)), random.Random(0), []
    for board in valid:
        for _ in range(20):
            other, (a, b) = list(board), rng.sample(range(64), 2)
            other[a], other[b] = other[b], other[a]
            near += [other, [*board[:a], 1 - board[a], *board[a + 1 :]]]
    said = lrpi.queens_solved(torch.zeros(len(near), 64), torch.tensor(near)).tolist()
    assert said == [other in valid for other in near] and not all(said)
    corner = (torch.arange(64) == 0).expand(92, -1).to(torch.uint8)  # asks for a queen in the corner
    assert lrpi.queens_solved(corner, torch.tensor(valid)).tolist() == [bool(board[0]) for board in valid]
    assert not lrpi.queens_solved(
        corner * 0, torch.where(torch.arange(64) == 9, 2, torch.tensor(valid))
    ).any()


@pytest.mark.parametrize("task, size", [("maze", 7), ("sudoku", 6), ("sudoku", 9), ("nqueens", 6)])
def test_views_are_symmetries_that_take_the_solver_along(task, size):
    """Every view is a solved puzzle, the solver takes the same rounds for it, and views differ."""
    of = lrpi.TASKS[task]
    puzzles = of.make(30, size, "train", 0)
    seen = [lrpi.Views(puzzles, of.views, size)[torch.arange(30)] for _ in range(10)]
    for view in seen:
        assert of.solved(view.x, view.y).all() and not torch.equal(view.x, puzzles.x)
        if (
            task != "nqueens"
        ):  # there, the first completion of a view need not be a view of the first completion
            again = of.solve(view.x, view.y)
            assert all(torch.equal(a, b) for a, b in zip(view, again, strict=True))
    assert all(len({tuple(view.x[i].tolist()) for view in seen}) > 2 for i in range(30))
    if task == "maze":
        every = [
            {tuple(itertools.chain(*v)) for v in symmetric_views(row, size)} for row in puzzles.x.tolist()
        ]
        assert all(tuple(view.x[i].tolist()) in every[i] for view in seen for i in range(30))


# ------------------------------------------------------------------------------------------------------------
# Model


def tiny(**given):
    return lrpi.configure(**{"size": 5, "width": 16, "ffn": 24, "heads": 2, **given})


def model_and_state(cfg, B=3):
    torch.manual_seed(0)
    model = lrpi.LoopedModel(cfg)
    for p in model.parameters():  # weights that are zero at first would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    L = math.prod(cfg.shape)
    y, z = torch.randn(2, B, L, cfg.width)
    return model, torch.randint(0, 4, (B, L), dtype=torch.uint8), y, z, torch.ones(B, dtype=torch.long)


@pytest.mark.parametrize("scheme, passes", [("dis", 18), ("dis-margin", 18), ("final", 18), ("one-pass", 18),
                                            ("trm", 336), ("trm-medium", 48)])  # fmt: skip
def test_forward_passes_are_counted(scheme, passes):
    model, calls = lrpi.LoopedModel(tiny(scheme=scheme, width=8, ffn=8)), []
    for net in model.nets:
        net.register_forward_hook(lambda *_: calls.append(1))
    assert lrpi.evaluate(model, lrpi.make_mazes(6, 5, "test"))["passes"] == passes
    assert model.forward_passes == len(calls) == passes


def rms(v):
    return v / (v.square().mean() + 1e-5).sqrt()


def swiglu(W, name, v):
    gate, up = (W[f"{name}.gate_up.weight"] @ v).chunk(2)
    return W[f"{name}.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def plain_attention(W, name, h, cfg):
    """TRM's attention cell by cell; rotary positions are complex rotations."""
    D, d, L = cfg.width, cfg.width // cfg.heads, len(h)

    def turn(v, position):
        angles = [position * 10_000 ** (-2 * i / d) for i in range(d // 2)]
        pairs = torch.complex(v[: d // 2], v[d // 2 :])
        pairs = pairs * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
        return torch.cat([pairs.real, pairs.imag])

    qkv, mixed = [W[f"{name}.qkv.weight"] @ cell for cell in h], [[] for _ in h]
    for head in range(cfg.heads):
        q, k, v = ([cell[part * D + head * d :][:d] for cell in qkv] for part in range(3))
        q, k = ([turn(cell, i) for i, cell in enumerate(of)] for of in (q, k))
        for i in range(L):
            p = [math.exp((q[i] @ k[j]).item() / math.sqrt(d)) for j in range(L)]
            mixed[i].append(sum(p[j] * v[j] for j in range(L)) / sum(p))
    return [W[f"{name}.out.weight"] @ torch.cat(heads) for heads in mixed]


def plain_conv(W, name, h, cfg):
    """The separable convolution cell by cell: weights w2[i] w1[j] of the cells i rows and j columns away."""
    (H, width), K = cfg.shape, cfg.kernel // 2
    w1, w2 = W[f"{name}.convs.0.weight"][:, 0, 0], W[f"{name}.convs.1.weight"][:, 0, :, 0]
    mixed = []
    for r, c in itertools.product(range(H), range(width)):
        near = itertools.product(
            range(max(0, r - K), min(H, r + K + 1)), range(max(0, c - K), min(width, c + K + 1))
        )
        mixed.append(sum(w2[:, i - r + K] * w1[:, j - c + K] * h[i * width + j] for i, j in near))
    return mixed


def plain_step(model, x, y, z, s):
    """One step on one puzzle in float64, without autograd: the recursion of TRM, block by block and cell by cell."""
    cfg, W = model.cfg, {name: w.double() for name, w in model.state_dict().items()}

    def net(h):
        for layer in range(cfg.layers):
            name = f"nets.0.{layer}"
            if cfg.mixer == "mlp":  # along the cells, channel by channel; so is its norm
                h = torch.stack([rms(v + swiglu(W, f"{name}.mix", v)) for v in h.T]).T
            else:
                mix = {"attention": plain_attention, "conv": plain_conv}[cfg.mixer](W, f"{name}.mix", h, cfg)
                h = torch.stack([rms(cell + other) for cell, other in zip(h, mix, strict=True)])
            h = torch.stack([rms(cell + swiglu(W, f"{name}.swiglu", cell)) for cell in h])
        return h

    e = W["tokens.weight"][x.long()] + (W["step_table.weight"][s - 1] if cfg.step_index else 0)
    e, y, z = math.sqrt(cfg.width) * e, y.double(), z.double()
    for _ in range(cfg.T):
        for _ in range(cfg.n):
            z = net(z + (y + e))
        y = net(y + z + (e + W["role"] if cfg.recall else 0))
    return y, z


@pytest.mark.parametrize("mixer, given", [("attention", {"heads": 4}), ("mlp", {}), ("conv", {"kernel": 3}),
    ("conv", {"T": 2, "n": 2, "layers": 1, "recall": True, "step_index": True, "kernel": 5})])  # fmt: skip
def test_a_step_is_that_of_trm(mixer, given):
    """With equal weights, one step of T = 3, n = 6 with two layers, in float32: atol 1e-5."""
    cfg = tiny(**{"T": 3, "n": 6, "layers": 2, "recall": False, "mixer": mixer, **given})
    model, x, y, z, s = model_and_state(replace(cfg, shape=(3, 4)), B=2)
    got = model(x, y, z, 2 * s)
    for b in range(2):
        for ours, plain in zip(got, plain_step(model, x[b], y[b], z[b], 2), strict=True):
            assert torch.allclose(ours[b].double(), plain, atol=1e-5)


def test_only_the_last_cycle_carries_gradient():
    """Gradients are those of a recursion whose first cycles are cut off (1e-5), and none reaches the state before."""
    model, x, y, z, s = model_and_state(tiny(T=3, n=2))
    out = model(x, y.requires_grad_(), z, s)[0]
    weights = torch.randn_like(out)
    parameters = [p for p in model.parameters() if p is not model.readout.weight]
    found = torch.autograd.grad((out * weights).sum(), [*parameters, y], allow_unused=True)
    assert found[-1] is None
    e = 4 * model.tokens(x.int())  # sqrt(16) = 4
    for _ in range(3):
        y, z = y.detach(), z.detach()
        for _ in range(2):
            z = model.nets[0](e + y + z)
        y = model.nets[0](e + model.role + y + z)
    for a, b in zip(found, torch.autograd.grad((y * weights).sum(), parameters), strict=False):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4) and a.abs().max() > 0
    model, x, y, z, s = model_and_state(tiny(T=1))
    assert torch.autograd.grad(model(x, y.requires_grad_(), z, s)[0].square().sum(), y)[0].abs().max() > 0


def test_initial_weights_have_the_stated_spread():
    """std 1 / sqrt(fan-in), truncated at two sigmas of the normal before the cut (1 / 0.88). 5 sigma of the estimate."""
    torch.manual_seed(0)
    model = lrpi.LoopedModel(vocab=500, width=256, n_sup=60, step_index=True, act=True)
    for name, fan_in in (("tokens", 256), ("step_table", 256), ("readout", 256), ("nets.0.0.swiglu.down", 128),
                         ("nets.0.0.swiglu.gate_up", 256), ("nets.0.0.mix.convs.0", 7)):  # fmt: skip
        w = model.get_parameter(f"{name}.weight") * math.sqrt(fan_in)
        assert abs(w.std().item() - 1) < 5 / math.sqrt(2 * w.numel()) and 2 < w.abs().max() < 2.28, name
    assert torch.sigmoid(model.halting(torch.randn(5, 256))).max() < 0.01, "nothing counts as solved at first"


def test_the_step_index_is_added_to_the_tokens_and_held_past_the_last_step():
    """A step's row counts as much as a token: adding it to every token's embedding is the same."""
    model, x, y, z, s = model_and_state(tiny(step_index=True))
    plain = lrpi.LoopedModel(tiny())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "step_table" not in k})
    for k in (1, 2, 6, 24):
        weight = model.tokens.weight + model.step_table.weight[min(k, 6) - 1]
        plain.tokens.weight.data.copy_(weight.detach())
        assert torch.allclose(model(x, y, z, k * s)[0], plain(x, y, z, s)[0], atol=1e-5)


def test_feedback_shows_the_last_answer_instead_of_the_puzzle():
    model, x, y, z, s = model_and_state(tiny(feedback=True))
    plain = lrpi.LoopedModel(model.cfg, feedback=False)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x, y, z, s)[0], plain(x, y, z, s)[0])
    shown = model.readout(y).argmax(-1)
    assert torch.equal(model(x, y, z, s + 1)[0], plain(shown, y, z, s + 1)[0]) and not torch.equal(shown, x)


def test_one_pass_has_separate_weights_for_every_pass():
    """18 nets, each used once; the recursion written out, atol 1e-6."""
    model, x, y, z, s = model_and_state(tiny(scheme="one-pass"))
    assert len(model.nets) == 18 and len({net[0].swiglu.down.weight.sum().item() for net in model.nets}) == 18
    got, e = model(x, y, z, s)[0], 4 * model.tokens(x.int())
    for k in range(17):
        z = model.nets[k](e + y + z)
    assert torch.allclose(got, model.nets[17](e + model.role + y + z), atol=1e-6)


def test_stablemax_is_the_published_one():
    """Against s(v) = v + 1 from 0 on, 1 / (1 - v) below, in float64, atol 1e-5; at 0, log s has slope 1."""
    readout = lrpi.LoopedModel(tiny(stablemax=True)).readout
    h = 30 * torch.randn(50, 16, generator=generator())
    v = h.double() @ readout.weight.double().T
    s = torch.where(v >= 0, v + 1, 1 / (1 - v))
    assert torch.allclose(readout(h).softmax(-1).double(), s / s.sum(-1, keepdim=True), atol=1e-5)
    zero = torch.zeros(1, 16, requires_grad=True)
    assert torch.allclose(torch.autograd.grad(readout(zero)[0, 0], zero)[0][0], readout.weight[0])


@pytest.mark.parametrize("mixer", ["conv", "attention", "mlp"])
def test_bfloat16_is_for_matrix_products_only(mixer):
    """States, logits and weights stay float32, and differ a little (mean below 0.05) from those without bf16."""
    outputs = []
    for bf16 in (False, True):
        model, x, y, z, s = model_and_state(tiny(mixer=mixer))
        model.bf16, inside = bf16, set()
        model.nets[0][0].swiglu.down.register_forward_hook(lambda *a, inside=inside: inside.add(a[2].dtype))
        out = model(x, y, z, s)[0]
        out.square().sum().backward()
        assert inside == {torch.bfloat16 if bf16 else torch.float32}
        assert model.readout(out).dtype == out.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.nets.parameters())
        outputs.append(out)
    gap = (outputs[0] - outputs[1]).abs()
    assert 0 < gap.max() and gap.mean() < 0.05


def test_a_compiled_net_computes_the_same(monkeypatch):
    """With the backend that needs no compiler, atol 1e-6; the weights keep their names."""
    compiled, plain = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net: (compiled.append(net), plain(net, backend="eager"))
    )
    model, x, y, z, s = model_and_state(tiny())
    expected, names = model(x, y, z, s)[0], list(model.state_dict())
    model.cfg = replace(model.cfg, compile=True)
    assert torch.allclose(lrpi.place(model, CPU)(x, y, z, s)[0], expected, atol=1e-6)
    assert compiled == list(model.nets) and list(model.state_dict()) == names


def test_a_model_of_another_shape_has_the_same_weights():
    """A convolution on a 5 x 5 grid is that of the 9 x 7 grid which holds it amid zeros; atol 1e-5."""
    model, *_ = model_and_state(tiny())
    larger = lrpi.resized(model, (9, 7))
    assert larger.cfg.shape == (9, 7)
    assert all(torch.equal(v, larger.state_dict()[k]) for k, v in model.state_dict().items())
    h = torch.zeros(1, 9, 7, 16)
    h[:, 2:7, 1:6] = torch.randn(1, 5, 5, 16)
    inner = larger.nets[0][0].mix(h.flatten(1, 2)).unflatten(1, (9, 7))[:, 2:7, 1:6]
    assert torch.allclose(inner.flatten(1, 2), model.nets[0][0].mix(h[:, 2:7, 1:6].flatten(1, 2)), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Policy improvement


def two_logits(seed=0, shape=(4, 5), V=7, scale=3.0):
    g = generator(seed)
    u, c = (scale * torch.randn(*shape, V, dtype=torch.float64, generator=g) for _ in range(2))
    return u, c, torch.randint(0, V, shape, generator=g)


def test_proposition_4_1_against_autograd_and_differences():
    """3,000 random cases in float64: margin = -dL/dw, and d²L/dw²; autograd 1e-10, central differences 1e-5."""
    u, c, y = two_logits(3, (3000,), 6, 4.0)
    w = (4 * torch.rand(3000, dtype=torch.float64, generator=generator(1)) - 1).requires_grad_()

    def loss(w):
        return F.cross_entropy(u + w[:, None] * (c - u), y, reduction="none")

    slope = torch.autograd.grad(loss(w).sum(), w, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), w)[0]
    got = lrpi.derivatives(u, c, y, w.detach()[:, None])
    assert torch.allclose(got[0], slope, atol=1e-10) and torch.allclose(got[1], curvature, atol=1e-10)
    assert torch.equal(lrpi.margin(u, c, y, w.detach()[:, None]), -got[0])
    at = w[0].item()  # a w that all positions share
    assert torch.allclose(lrpi.margin(u, c, y, at)[0], -slope[0], atol=1e-10)
    with torch.no_grad():
        below, here, above = (loss(w + d) for d in (-1e-4, 0, 1e-4))
    assert torch.allclose(got[0], (above - below) / 2e-4, atol=1e-5)
    assert torch.allclose(got[1], (above - 2 * here + below) / 1e-8, atol=1e-5)
    assert (got[1] >= 0).all() and (got[1] > 0).any(), "L is convex"


def test_guidance_is_a_geometric_mixture_of_policies():
    u, c, _ = two_logits()
    for w in (-0.5, 0.0, 0.3, 1.0, 2.0):
        mixture = u.softmax(-1) ** (1 - w) * c.softmax(-1) ** w
        mixture = mixture / mixture.sum(-1, keepdim=True)
        assert torch.allclose(lrpi.guide(u, c, w).softmax(-1), mixture, atol=1e-12)


def test_advantage_divergence_and_change_against_torch_distributions():
    """atol 1e-12; and a shift of the logits changes nothing, 1e-9."""
    u, c, y = two_logits()
    pi_u, pi_c = torch.distributions.Categorical(logits=u), torch.distributions.Categorical(logits=c)
    expected = torch.distributions.kl_divergence(pi_c, pi_u)
    assert torch.allclose(lrpi.divergence(u, c), expected, atol=1e-12)
    taken = lrpi.advantage(u, c).gather(-1, y[..., None]).squeeze(-1)
    assert torch.allclose(taken, pi_c.log_prob(y) - pi_u.log_prob(y), atol=1e-12)
    change = (pi_u.probs - pi_c.probs).abs().amax(-1)
    assert torch.allclose(lrpi.largest_change(u, c), change, atol=1e-12)
    for other in ((u + 7.0, c - 13.0 * torch.rand(4, 5, 1).double()), (u.log_softmax(-1), c.log_softmax(-1))):
        for f in (lrpi.divergence, lrpi.largest_change, lrpi.advantage):
            assert torch.allclose(f(*other), f(u, c), atol=1e-9), f
        assert torch.allclose(lrpi.margin(*other, y, 0.7), lrpi.margin(u, c, y, 0.7), atol=1e-9)
        assert abs(lrpi.best_guidance(*other, y) - lrpi.best_guidance(u, c, y)) < 1e-9


@pytest.mark.parametrize("scale, lean", [(1.0, 0.5), (3.0, 1.5), (8.0, 3.0), (0.05, 0.02), (100.0, 60.0)])
def test_best_guidance_against_a_grid_search(scale, lean):
    """For 30 sets of positions each: neither a grid nor the neighbours on both sides have a lower loss than w*."""
    for seed in range(30):
        u, c, y = two_logits(seed, (40,), 5, scale)
        c.scatter_add_(1, y[:, None], torch.full((40, 1), lean, dtype=torch.float64))

        def loss(w, u=u, c=c, y=y):
            return F.cross_entropy(u + w * (c - u), y, reduction="sum").item()

        w = lrpi.best_guidance(u, c, y)
        grid = [*(k / 10 for k in range(-40, 80)), w - 1e-3, w + 1e-3]
        assert min(map(loss, grid)) >= loss(w) - 1e-9 * abs(loss(w))
        slope, curvature = (d.sum().item() for d in lrpi.derivatives(u, c, y, w))
        assert abs(slope / curvature) < 1e-9


def test_best_guidance_in_degenerate_cases():
    u, y = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 1])
    towards = u + F.one_hot(y, 3)
    away, nan = 2 * u - towards, math.nan
    half = torch.tensor([0, -100])  # negative labels are ignored
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
def test_best_guidance_far_from_1(scale):
    """Two tokens, where w* is known: pi_w(0) must be the share of positions with label 0; rtol 1e-6.

    With l_u = (k, 0) and l_c = (k - d, 0), L is least at k - w d = log(share / (1 - share)). Curvatures span
    hundreds of orders of magnitude between w = 1 and w*.
    """
    for k, d in itertools.product((-300.0, 0.5, 40.0, 2000.0), (scale, -scale)):
        u = torch.tensor([k, 0.0], dtype=torch.float64).expand(8, 2)
        c = torch.tensor([k - d, 0.0], dtype=torch.float64).expand(8, 2)
        expected = (k - math.log(3)) / d
        w = lrpi.best_guidance(u, c, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
        assert abs(w - expected) < 1e-6 * max(1.0, abs(expected))


def test_best_guidance_in_exponential_tails():
    """Slopes of e^-w and e^(w - far): the minimum lies in the middle, 249 and 499 plain Newton steps away; 1e-6."""
    u, c = torch.tensor([[20.0, 0.0, -500.0]]), torch.tensor([[20.0, -1.0, -499.0]])
    assert abs(lrpi.best_guidance(u.double(), c.double(), torch.tensor([0])) - 250) < 1e-6
    u, c = torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([[1.0, 0.0], [999.0, 0.0]])
    assert abs(lrpi.best_guidance(u.double(), c.double(), torch.tensor([0, 0])) - 500) < 1e-6


def test_ignored_positions_count_for_nothing():
    u, c, y = two_logits()
    some = y.clone()
    some[::2] = -100
    for part, whole in zip(lrpi.derivatives(u, c, some, 0.3), lrpi.derivatives(u, c, y, 0.3), strict=True):
        assert (part[::2] == 0).all() and torch.equal(part[1::2], whole[1::2])
    assert abs(lrpi.best_guidance(u, c, some) - lrpi.best_guidance(u[1::2], c[1::2], y[1::2])) < 1e-12


@pytest.mark.parametrize("V", [2, 5, 50_000])
def test_extreme_logits_stay_finite(V):
    """Entries of +-1e4, against float64: rtol 2%, as float32 knows l_w up to 7e4 to 0.008; atol 1e-2."""
    u, c, y = two_logits(V, (6,), V, 5e3)
    u, c = u.clamp(-1e4, 1e4).float(), c.clamp(-1e4, 1e4).float()
    u[0], c[0], u[1], c[1] = 1e4, -1e4, -1e4, 1e4  # constant rows
    pairs = [
        (f(u, c), f(u.double(), c.double())) for f in (lrpi.advantage, lrpi.divergence, lrpi.largest_change)
    ]
    for w in (-0.5, 0.0, 1.0, 3.0):
        exact = lrpi.derivatives(u.double(), c.double(), y, w)
        pairs += zip(lrpi.derivatives(u, c, y, w), exact, strict=True)
    for got, exact in pairs:
        assert got.isfinite().all() and torch.allclose(got.double(), exact, rtol=2e-2, atol=1e-2)
    assert (lrpi.divergence(u, c) >= 0).all() and (lrpi.largest_change(u, c) <= 1).all()
    assert not math.isnan(lrpi.best_guidance(u, c, y))


@pytest.mark.parametrize("u, c, y, said", [
    (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3).long(), ["[3, 4]", "[3, 5]"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2).long(), ["[2]", "[3, 4]"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3), ["match"]),
    (torch.zeros(3, 4), torch.full((3, 4), math.nan), torch.zeros(3).long(), ["finite"]),
    (torch.full((3, 4), math.inf), torch.zeros(3, 4), torch.zeros(3).long(), ["finite"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 4, 1]), ["below 4"]),
])  # fmt: skip
def test_best_guidance_refuses_bad_logits_and_labels(u, c, y, said):
    with pytest.raises(ValueError, match=".") as e:
        lrpi.best_guidance(u, c, y)
    assert all(words in str(e.value) for words in said) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------
# Targets


def targets_of(puzzles, cfg, steps, target=None, seed=0):
    u = torch.rand(len(puzzles), 2, puzzles.x.shape[1], generator=generator(seed))
    phi = lrpi.TARGETS[target or cfg.target]
    return [phi(puzzles, torch.full((len(puzzles),), s), u, cfg) for s in steps]


@pytest.mark.parametrize("task, size", [("maze", 11), ("sudoku", 6), ("nqueens", 8)])
@pytest.mark.parametrize("target", ["final", "reveal", "mask", "replace", "edits"])
def test_targets_are_nested_come_closer_and_end_in_the_solution(target, task, size):
    cfg = lrpi.configure(task=task, size=size, target=target, power=1.0, pace=1)
    puzzles = lrpi.TASKS[task].make(60, size, "train")
    targets = targets_of(puzzles, cfg, range(1, 10))
    distance = [(t != puzzles.y).sum(1) for t in targets]
    assert all(torch.equal(t, puzzles.y) for t in targets[5:]), "y* at step 6 = N_sup, and after it"
    assert target == "final" or distance[0].double().mean() > 1, "it does not begin with y*"
    for a, b in itertools.pairwise(targets):
        assert (b == puzzles.y)[a == puzzles.y].all(), "what was right stays right"
    assert all(t.shape == puzzles.y.shape and 0 <= t.min() <= t.max() < cfg.vocab for t in targets)


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_reveal_shows_the_stated_number_of_cells_and_every_row_has_its_own_step(power):
    """Rounded down, as in the authors' code: float32 may round either way within 2e-4."""
    puzzles, cfg = lrpi.make_mazes(50, 11, "train"), lrpi.configure(target="reveal", power=power)
    targets = targets_of(puzzles, cfg, range(7))
    for s, target in enumerate(targets):
        assert ((target == puzzles.x) | (target == puzzles.y)).all()
        differs = (puzzles.x != puzzles.y).sum(1).tolist()
        for n, left in zip(differs, (target != puzzles.y).sum(1).tolist(), strict=True):
            shown = n * (s / 6) ** power
            assert n - left in (math.floor(shown), math.floor(shown + 2e-4))
    u, s = torch.rand(50, 2, 121, generator=generator()), torch.arange(50) % 7
    mixed = lrpi.TARGETS["reveal"](puzzles, s, u, cfg)
    assert all(torch.equal(mixed[i], targets[i % 7][i]) for i in range(50))


def test_reveal_takes_cells_at_random():
    """Each of the differing cells is among the first half equally often: 2,000 draws, 5 sigma."""
    puzzles, cfg = lrpi.make_mazes(200, 11, "train"), lrpi.configure(target="reveal", n_sup=2, power=1.0)
    i = (puzzles.x != puzzles.y).sum(1).argmax()
    same, cells = puzzles[i.expand(2000)], puzzles.x[i] != puzzles.y[i]
    shown = targets_of(same, cfg, [1])[0] == same.y
    p = math.floor(cells.sum().item() / 2) / cells.sum().item()
    assert (shown[:, cells].float().mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("pace", [1, 8])
def test_edits_obey_the_lyapunov_bound(pace):
    """A.2: wrong cells fall by `pace` a step at least until none is left: in V0 / pace steps, rounded up."""
    cfg = lrpi.configure(pace=pace, n_sup=130)  # large, so that no puzzle ends because N_sup is reached
    puzzles = lrpi.make_mazes(100, 11, "train", seed=4)
    first = before = (puzzles.draft != puzzles.y).sum(1)
    for s, target in enumerate(targets_of(puzzles, cfg, range(1, 130 // pace)), 1):
        wrong = (target != puzzles.y).sum(1)
        assert torch.equal(target, stage(puzzles, pace * s))
        assert ((wrong <= before - pace) | (wrong == 0)).all() and (
            wrong[s >= torch.ceil(first / pace)] == 0
        ).all()
        before = wrong
    late = targets_of(puzzles, lrpi.configure(pace=pace, n_sup=2), [2])[0]
    assert torch.equal(late, puzzles.y), "the last target is y*, even where the solver needs more rounds"


def test_mask_and_replace_corrupt_at_the_rate_of_the_schedule():
    """Rate 1 - s / 6 with power 1, s = 2; 5 sigma. Replaced cells carry any token equally often."""
    puzzles = lrpi.make_queens(3000)
    cfg = lrpi.configure(task="nqueens", target="mask", power=1.0)
    assert cfg.vocab == 3
    masked = targets_of(puzzles, cfg, [2])[0] == 2
    assert abs(masked.double().mean().item() - 2 / 3) < 5 * math.sqrt(2 / 9 / masked.numel())
    cfg = lrpi.configure(task="nqueens", target="replace", power=1.0)
    replaced = targets_of(puzzles, cfg, [2])[0]
    assert (replaced == puzzles.y)[~masked].all(), "the same cells are hit"
    for drawn in (replaced[masked], replaced[masked & (puzzles.y == 1)]):
        assert abs(drawn.double().mean().item() - 1 / 2) < 5 * math.sqrt(1 / 4 / len(drawn))


# ------------------------------------------------------------------------------------------------------------
# Training


def trained_model(data, cfg, callback=None, seed=0, **given):
    torch.manual_seed(seed)
    model = lrpi.LoopedModel(cfg)
    return lrpi.train(model, data, cfg, callback, **given), model


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_learns_7x7_mazes():
    """Untrained, the model solves none of these mazes; after 15 seconds, it solves most of them."""
    cfg, seen = lrpi.configure(size=7, examples=3000), []
    model, _ = trained_model(lrpi.make_mazes(3000, 7), cfg, lambda run, loss: seen.append((run.step, loss)))
    losses = [loss for _, loss in seen if loss is not None]
    assert seen[-1][0] == len(seen) == 1500 and 190 <= len(losses) <= 200, "12 rows, 6 steps each"
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    found = lrpi.evaluate(model, lrpi.make_mazes(300, 7, "test"), lrpi.maze_solved)
    assert (
        found["exact"][-1] > 0.8
        and found["exact"][-1] > found["exact"][0]
        and found["logp"][-1] > found["logp"][0]
    )


@pytest.mark.parametrize("given", [
    {"mixer": "attention"}, {"mixer": "mlp"}, {"mixer": "attention", "scheme": "trm", "n_sup": 3, "layers": 2, "ffn": 0},
    {"target": "mask", "feedback": True}, {"target": "replace", "linear": True}, {"awr": 1.0, "hinge": 1.0},
    {"target": "reveal", "step_index": True}, {"scheme": "one-pass", "stablemax": True}, {"ema": 0.0, "cosine": False},
    {"task": "sudoku", "size": 4, "scheme": "trm-medium"}, {"task": "nqueens", "size": 5, "mixer": "conv"},
])  # fmt: skip
def test_every_kind_of_model_learns(given):
    """That the loss falls by a tenth at least within 50 updates."""
    cfg, losses = lrpi.configure(**{"size": 5, "width": 32, "ffn": 32, "batch_size": 12, **given}), []
    cfg = replace(cfg, examples=50 * 12 // cfg.n_sup, warmup=0, lr=0.01)
    data = lrpi.make_puzzles(cfg, 300, "train")
    trained_model(data, cfg, lambda run, loss: losses.extend([] if loss is None else [loss]))
    assert len(losses) >= 40 and sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("target", ["final", "edits", "reveal"])
def test_training_is_a_pair_of_nested_loops(target, monkeypatch):
    """Targets in plain loops, AdamW, warm-up and cosine by hand. Weights move by 0.03; atol 1e-5."""
    cfg = tiny(
        target=target,
        examples=12,
        n_sup=3,
        batch_size=4,
        warmup=2,
        ema=0.0,
        noise=0.0,
        pace=2,
        step_index=True,
    )
    data, phi, calls = lrpi.make_mazes(40, 5), lrpi.TARGETS[target], []

    def spy(puzzles, s, u, cfg):
        calls.append(([t.clone() for t in puzzles], u.clone()))
        assert s.tolist() == [(len(calls) - 1) % 3 + 1] * 4
        return phi(puzzles, s, u, cfg)

    monkeypatch.setitem(lrpi.TARGETS, target, spy)
    torch.manual_seed(0)
    model = copy.deepcopy(trained := lrpi.LoopedModel(cfg))
    lrpi.train(trained, data, cfg)
    seen = [tuple(row) for (x, *_), _ in calls[::3] for row in x.tolist()]
    assert len(calls) == 9 and len(set(seen)) == 12 and set(seen) <= {tuple(row) for row in data.x.tolist()}
    assert not any((calls[i][1] == calls[j][1]).any() for i, j in ((0, 3), (3, 6))), (
        "new noise for every rollout"
    )

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, ((x, y_star, draft, order), u) in enumerate(calls):
        assert all(
            torch.equal(a, b) for a, b in zip(calls[step // 3 * 3][0], (x, y_star, draft, order), strict=True)
        )
        assert torch.equal(calls[step // 3 * 3][1], u), "a rollout keeps its puzzles and its noise"
        s, label = step % 3 + 1, y_star.clone()
        y, z = (y.detach(), z.detach()) if s > 1 else (model.y0.expand(4, 25, -1), model.z0.expand(4, 25, -1))
        if target == "reveal":
            for b in range(4):
                differing = [cell for cell in range(25) if x[b, cell] != y_star[b, cell]]
                differing.sort(key=lambda cell, b=b, u=u: u[b, 0, cell].item())
                hidden = differing[math.floor(len(differing) * (s / 3) ** cfg.power + 1e-4) :]
                label[b, hidden] = x[b, hidden]
        if target == "edits" and s < 3:
            label[order > 2 * s] = draft[order > 2 * s]
        y, z = model(x, y, z, torch.full((4,), s))
        loss = F.cross_entropy(model.readout(y).transpose(1, 2), label.long())
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = (
            cfg.lr * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / 9)) / 2
        )
        loss.backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.allclose(trained.state_dict()[name], weight, atol=1e-5), name


def test_rows_leave_when_halting_says_so_and_the_next_puzzles_enter(monkeypatch):
    """Against a queue by hand, with a halting rule that draws lots: puzzles, steps, noise and states, row by row."""
    cfg = replace(tiny(scheme="trm", T=1, n=1, n_sup=4, examples=60, batch_size=3), target="spy")
    data, rng, forward, updates, lots = (
        lrpi.make_mazes(7, 5),
        random.Random(0),
        lrpi.LoopedModel.forward,
        [],
        [],
    )

    def phi(puzzles, s, u, cfg):
        updates.append(SimpleNamespace(x=puzzles[0].tolist(), s=s.tolist(), u=u.clone()))
        return puzzles[1]

    def spy(self, x, y, z, s):
        assert y.grad_fn is None and z.grad_fn is None, "no gradient crosses steps"
        updates[-1].before, updates[-1].after = (y, z), forward(self, x, y, z, s)
        return updates[-1].after

    def halting(model, y, *_):
        lots.append([rng.random() < 0.4 for _ in range(3)])
        return 0 * y.sum(), torch.tensor(lots[-1])

    monkeypatch.setitem(lrpi.TARGETS, "spy", phi)
    monkeypatch.setattr(lrpi.LoopedModel, "forward", spy)
    monkeypatch.setattr(lrpi, "halting_loss", halting)
    seen = []
    _, model = trained_model(data, cfg, lambda run, loss: seen.append(run.seen.item()))
    line, last = [], updates[0]
    for k, now in enumerate(updates):
        for row in range(3):
            if k == 0 or lots[k - 1][row] or last.s[row] == 4:
                line.append(now.x[row])
                assert now.s[row] == 1 and (k == 0 or not torch.equal(now.u[row], last.u[row]))
                assert all(
                    torch.equal(h[row], s)
                    for h, s in zip(now.before, (m[0] for m in model.start(1)), strict=True)
                )
            else:
                assert (
                    now.x[row] == last.x[row]
                    and now.s[row] == last.s[row] + 1
                    and torch.equal(now.u[row], last.u[row])
                )
                assert all(torch.equal(h[row], o[row]) for h, o in zip(now.before, last.after, strict=True))
        last = now
        assert seen[k] == len(line)
    assert sorted(line[:7]) == sorted(data.x.tolist()) and all(
        line[i] == line[i - 7] for i in range(7, len(line))
    )
    assert 60 <= len(line) <= 65 and len({tuple(lot) for lot in lots}) > 4


def test_the_noise_of_training_has_the_stated_spread(monkeypatch):
    """Added to y and z before each step, but not to the reference policy; 5 sigma."""
    forward, gaps, last = lrpi.LoopedModel.forward, [], []

    def spy(self, x, y, z, s):
        gaps.extend([y - last[0], z - last[1]] if s[0] > 1 else [y - self.y0, z - self.z0])
        last[:] = out = forward(self, x, y, z, s)
        return out

    monkeypatch.setattr(lrpi.LoopedModel, "forward", spy)
    data = TensorDataset(*lrpi.make_mazes(10, 5))  # any data set will do
    trained_model(data, tiny(examples=40, batch_size=10, noise=0.3))
    noise = torch.stack(gaps).detach()
    assert (
        abs(noise.std().item() / 0.3 - 1) < 5 / math.sqrt(2 * noise.numel()) and noise[0].ne(noise[1]).all()
    )


@pytest.mark.parametrize("given", [{}, {"linear": True}, {"awr": 0.7}, {"hinge": 1.5},
                                   {"linear": True, "awr": 2.0, "hinge": 0.1}])  # fmt: skip
def test_the_loss_of_a_step_against_plain_loops(given):
    """Its value cell by cell in float64, and its gradient by central differences; atol 1e-6."""
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

    held = c.detach().clone()
    loss = lrpi.step_loss(u, c.requires_grad_(), y, s, cfg)
    assert abs(loss.item() - by_hand(held, held)) < 1e-6
    gradient = torch.autograd.grad(loss, c)[0].flatten()
    for i in range(0, held.numel(), 7):
        nudge = torch.zeros(held.numel(), dtype=torch.float64)
        nudge[i] = 1e-5
        slope = (by_hand(held + nudge.view_as(held), held) - by_hand(held - nudge.view_as(held), held)) / 2e-5
        assert abs(gradient[i].item() - slope) < 1e-6


def test_the_loss_uses_the_advantage_and_the_margin_of_section_2(monkeypatch):
    (u, c, y), s = two_logits(), torch.ones(4)
    plain = lrpi.step_loss(u, c, y, s, tiny())
    monkeypatch.setattr(lrpi, "advantage", lambda u, c: torch.full_like(u, math.log(3.0)))
    monkeypatch.setattr(lrpi, "margin", lambda u, c, y, w=1.0: torch.full(y.shape, -5.0))
    assert torch.allclose(lrpi.step_loss(u, c, y, s, tiny(awr=1.0)), 3 * plain)
    assert torch.allclose(lrpi.step_loss(u, c, y, s, tiny(hinge=2.0)), plain + 10)


def test_halting_loss_and_who_may_leave():
    """Binary cross-entropy, half of it, 1e-4; one row in ten has to stay for 2 to N_sup steps, 5 sigma."""
    model, B = lrpi.LoopedModel(tiny(scheme="trm", n_sup=4)), 4000
    torch.manual_seed(0)
    torch.nn.init.normal_(model.halting.weight, std=5.0)
    y, s, y_star = torch.randn(B, 25, 16), torch.randint(1, 5, (B,)), torch.randint(0, 5, (B, 25))
    logits = F.one_hot(y_star, 5).float()
    logits[::2, 7] = logits[::2, 7].roll(1, -1)  # every second answer has one wrong cell
    loss, leaves = lrpi.halting_loss(model, y, logits, y_star, s)
    q, right = model.halting(y[:, 0])[:, 0], torch.arange(B) % 2 == 1
    expected = -0.5 * torch.where(right, F.logsigmoid(q.double()), F.logsigmoid(-q.double())).mean()
    assert abs(loss.item() - expected.item()) < 1e-4 and not leaves[q <= 0].any()
    for k, share in ((1, 0.1), (2, 0.1 * 2 / 3), (3, 0.1 / 3), (4, 0.0)):
        stayed = (~leaves[(q > 0) & (s == k)]).double()
        assert abs(stayed.mean().item() - share) <= 5 * math.sqrt(share * (1 - share) / len(stayed))


def test_averaged_weights_follow_the_decay_and_the_seed_decides():
    data, trail = lrpi.make_mazes(30, 5), []
    last, model = trained_model(
        data, tiny(examples=10, ema=0.0), lambda run, _: trail.append(run.model.tokens.weight.clone())
    )
    expected = trail[0]
    for weight in trail[1:]:
        expected = 0.7 * expected + 0.3 * weight
    averaged, again = trained_model(data, tiny(examples=10, ema=0.7))
    assert len(trail) == 5 and torch.allclose(averaged.tokens.weight, expected, atol=1e-6)
    assert same(model, again) and same(last, model) and not same(averaged, again)
    assert not same(model, trained_model(data, tiny(examples=10), seed=1)[1])


def test_a_budget_of_seconds_ends_training():
    cfg, shares = tiny(budget_seconds=0.3, examples=1), []
    trained_model(lrpi.make_mazes(50, 5), cfg, lambda run, loss: shares.append((run.seconds, run.share)))
    assert shares == sorted(shares) and shares[-2][1] < 1 <= shares[-1][1] and shares[-1][0] >= 0.3


def fitted(cfg, monkeypatch, after=lambda run: None, interrupts=()):
    """`fit`, with something done after each update and before the watch sees it."""
    call = lrpi.Watch.__call__
    monkeypatch.setattr(
        lrpi.Watch, "__call__", lambda self, run, loss: (after(run), call(self, run, loss))[1]
    )
    return lrpi.fit(cfg, CPU, interrupts)


def test_a_lost_loss_stops_training_with_weights_that_worked(monkeypatch, capsys):
    """Weights are spoilt after update 20 of 400, of which every second loss is looked at."""
    seen = {}

    def spoil(run):
        seen[run.step] = copy.deepcopy(run.averaged.module)
        if run.step == 20:
            run.model.tokens.weight.data.fill_(math.inf)

    model, facts, failed = fitted(tiny(examples=800, warmup=0, ema=0.0, test_size=5), monkeypatch, spoil)
    assert "no longer finite at update 22" in facts["stopped"] and facts["steps_done"] == 22 and not failed
    assert any(same(model, seen[k]) for k in (18, 20)) and "Error" not in capsys.readouterr().out


def test_an_interrupt_ends_training_in_order(monkeypatch):
    interrupts = []
    cfg = tiny(examples=800, test_size=5)
    _, facts, _ = fitted(
        cfg, monkeypatch, lambda run: interrupts.extend([True] * (run.step == 7)), interrupts
    )
    assert facts["stopped"] == "interrupted" and 6 <= facts["steps_done"] <= 7


@pytest.mark.parametrize("given", [{}, {"ema": 0.0, "cosine": False}, {"scheme": "trm", "T": 1, "n": 1}])
def test_resumed_equals_uninterrupted_bit_for_bit(given):
    """Stopped twice in the middle of a rollout, through the bytes of a file."""
    cfg, data, saved = tiny(**{"examples": 60, "batch_size": 4, **given}), lrpi.make_mazes(70, 5), []
    expected, steps = trained_model(data, cfg, lambda run, loss: saved.append(run.step))[0], 0

    def stop(run, loss):
        if run.step == steps:
            torch.save(lrpi.snapshot(run, cfg, []), buffer := io.BytesIO())
            saved.append(buffer.getvalue())
        return run.step == steps

    resume = None
    for steps in (7, 20, None):
        model = trained_model(data, cfg, stop, resume=resume)[0]
        content = torch.load(io.BytesIO(saved[-1]), weights_only=True) if steps else None
        resume = lambda run, content=content: (torch.rand(9), lrpi.restore(run, content))  # noqa: E731
    assert saved[-3] > 40 and same(expected, model)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def synthetic(monkeypatch, puzzles, leans, spread=0.0, seed=0):
    """Makes every rollout give logits that lean towards the label by leans[s] after step s; returns them [N, S + 1]."""
    lean = F.one_hot(puzzles.y.long(), 5).float()[:, None] * torch.tensor(leans)[:, None, None]
    logits = lean + spread * torch.randn(lean.shape, generator=generator(seed))
    keys = {tuple(row): i for i, row in enumerate(puzzles.x.tolist())}

    def rollout(model, x, steps=None, stop=None):
        rows = torch.tensor([keys[tuple(row)] for row in x.tolist()])
        for s in steps or range(1, len(leans)):
            yield lrpi.Step(torch.arange(len(x)), logits[rows, s - 1], logits[rows, s], None)

    monkeypatch.setattr(lrpi, "rollout", rollout)
    return logits


def test_evaluation_against_plain_loops(monkeypatch):
    """Every measure of every puzzle and step, cell by cell in float64, atol 1e-5; their means, and the passes."""
    puzzles, ws = lrpi.make_mazes(12, 5, "test"), [0.0, 1.0, 2.5]
    logits = synthetic(monkeypatch, puzzles, [0.0, 3.0, 3.5, 4.0], 1.0).double()
    found = lrpi.evaluate(lrpi.LoopedModel(tiny()), puzzles, lrpi.maze_solved, ws=[ws] * 3)
    assert 0 < found["exact"][1] < 1

    def exact(i, said):
        whole = START in said and GOAL in said
        return whole and solved_by_hand(puzzles.x[i].tolist(), said, 5)

    for i, s in itertools.product(range(12), range(3)):
        want, bins = defaultdict(float), [0.0] * (len(lrpi.MARGIN_EDGES) + 1)
        u, c, label = logits[i, s], logits[i, s + 1], puzzles.y[i].tolist()
        answer = c.argmax(-1).tolist()
        want["exact"], want["label"] = exact(i, answer), answer == label
        for cell, a in enumerate(label):
            pu, pc = u[cell].softmax(-1).tolist(), c[cell].softmax(-1).tolist()
            A = [math.log(q / p) for p, q in zip(pu, pc, strict=True)]
            kl = sum(q * b for q, b in zip(pc, A, strict=True))
            for name, value in {"cells": answer[cell] == a, "logp": math.log(pc[a]), "gain": A[a], "kl": kl,
                                "margin": A[a] - kl, "margin_positive": A[a] > kl}.items():  # fmt: skip
                want[name] += value / 25
            bins[sum(A[a] - kl > edge for edge in lrpi.MARGIN_EDGES)] += 1 / 25
            want["change"] = max(want["change"], *(abs(q - p) for p, q in zip(pu, pc, strict=True)))
        guided = [u + w * (c - u) for w in ws]
        want |= {
            "margins": bins,
            "guided_exact": [float(exact(i, l_w.argmax(-1).tolist())) for l_w in guided],
        }
        logps = [l_w.log_softmax(-1) for l_w in guided]
        want["guided_logp"] = [sum(logp[k, a].item() for k, a in enumerate(label)) / 25 for logp in logps]
        assert set(want) == set(found["each"])
        for name, value in want.items():
            got = found["each"][name][i, s].double()
            assert torch.allclose(got, torch.tensor(value).double(), atol=1e-5), name
    for name, each in found["each"].items():
        assert torch.allclose(torch.tensor(found[name]), each.mean(0), atol=1e-5)


def test_a_rollout_can_be_longer_than_in_training_and_does_not_depend_on_the_batch():
    model, x, *_ = model_and_state(tiny(n_sup=6))
    seen = list(lrpi.rollout(model, x, range(1, 10)))
    assert len(seen) == 9 and len(list(lrpi.rollout(model, x))) == 6 and not seen[0].logits_u.requires_grad
    for a, b in itertools.pairwise(seen):
        assert torch.equal(a.logits_c, b.logits_u) and torch.equal(b.logits_c, model.readout(b.y))
    puzzles = lrpi.make_mazes(700, 5, "test")
    whole, part = lrpi.evaluate(model, puzzles), lrpi.evaluate(model, puzzles[:50])
    for name, each in part["each"].items():
        assert torch.allclose(whole["each"][name][:50], each, atol=1e-4), name


def test_verdicts_on_steps_built_to_improve_do_nothing_or_harm(monkeypatch):
    """With noise of 1 on every logit: a step that only draws new noise is dead, however large its KL."""
    puzzles, model = lrpi.make_mazes(600, 5, "test"), lrpi.LoopedModel(tiny(n_sup=5))
    test, valid = puzzles[:300], puzzles[300:]
    synthetic(monkeypatch, puzzles, [0.0, 2.0, 2.0, 3.0, 2.0, 2.0], spread=1.0)
    found = lrpi.diagnose(model, test, valid, lrpi.maze_solved)
    assert found["verdict"] == ["improves", "dead", "improves", "harms", "dead"]
    assert "step 4 harms" in found["summary"] and "40% of the forward passes" in found["summary"]
    assert found["kl"][1] > 0.1 and found["step_size"][3] == "overshoots"
    synthetic(monkeypatch, puzzles, [0.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    found = lrpi.diagnose(model, test, valid, lrpi.maze_solved)
    assert found["verdict"] == ["improves", "dead", "dead", "dead", "improves"]
    assert found["step_size"][0] == found["step_size"][4] == "too timid", "all residuals favour the label"
    assert found["w_star"][0] == math.inf and all(math.isnan(w) for w in found["w_star"][1:4])
    assert found["cut"] == {"changed": 0, "lost": 0, "won": 0} and set(found["halting"]) == {
        "none",
        "kl",
        "change",
    }


def test_verdicts_err_as_seldom_as_they_say():
    """100 sets of 5 dead steps: in 95 of them on average, no interval excludes 0; 3 sigma: 88."""
    values = torch.randn(100, 60, 5, generator=generator())
    right = sum(all(low <= 0 <= high for low, high in lrpi.intervals(v, 1000)) for v in values)
    assert 88 <= right < 100
    for N in (1, 5, 6):
        assert all(math.isfinite(end) is (N > 5) for ends in lrpi.intervals(values[0, :N]) for end in ends)


def test_intervals_against_a_plain_bootstrap():
    """98.33% each of three steps, to a tenth of their width."""
    values, rng = torch.randn(200, 3, generator=generator()).exp(), random.Random(0)
    for s, (low, high) in enumerate(lrpi.intervals(values)):
        column = values[:, s].tolist()
        means = sorted(sum(rng.choices(column, k=200)) / 200 for _ in range(4000))
        assert abs(low - means[33]) + abs(high - means[-34]) < 0.2 * (high - low)


@pytest.mark.parametrize("rule", ["kl", "change", "head"])
def test_halting_gives_the_answers_of_the_plain_rollout_at_the_halting_step(rule):
    """Bit for bit; and puzzles that left cost nothing: only the rest of the batch goes through the net."""
    model, *_ = model_and_state(tiny(act=True, n_sup=9))
    puzzles, sizes = lrpi.make_mazes(80, 5, "test"), []
    plain = list(lrpi.rollout(model, puzzles.x))
    scores = torch.stack([lrpi.HALTS[rule](model, step) for step in plain], 1)  # [80, 9]
    threshold = scores.quantile(0.3).item()
    model.nets[0].register_forward_hook(lambda net, args, out: sizes.append(len(out)))
    answers, taken = lrpi.answer(model, puzzles.x, stop=lrpi.stopping(rule, threshold))
    for i in range(80):
        first = next((s for s in range(9) if scores[i, s] <= threshold), 8)
        assert taken[i] == first + 1
        assert torch.equal(answers[i].long(), plain[first].logits_c[i].argmax(-1))
    assert len(taken.unique()) > 2 and sum(sizes) == 3 * taken.sum().item()


def test_halting_scores_by_hand():
    """Mean KL of the cells; largest change of any cell; TRM's head with its sign turned; atol 1e-5."""
    model, *_ = model_and_state(tiny(act=True))
    step = lrpi.Step(None, torch.randn(4, 25, 5), torch.randn(4, 25, 5), torch.randn(4, 25, 16))
    p, q = step.logits_u.softmax(-1), step.logits_c.softmax(-1)
    head = step.y[:, 0] @ model.halting.weight[0] + model.halting.bias
    by_hand = {"kl": (q * (q / p).log()).sum(-1).mean(1), "change": (q - p).abs().amax((1, 2)), "head": -head}
    assert set(by_hand) == set(lrpi.HALTS)
    for rule, expected in by_hand.items():
        assert torch.allclose(lrpi.HALTS[rule](model, step), expected, atol=1e-5)


def test_the_halting_threshold_is_the_cheapest_that_loses_little():
    """Against a search by plain loops: no other quantile is cheaper without losing more than the stated share."""
    g = generator(1)
    scores, solved = (
        torch.rand(400, 6, generator=g),
        torch.rand(400, 6, generator=g) < torch.linspace(0.3, 0.9, 6),
    )
    solved = solved.cummax(1).values  # a solved puzzle stays solved
    curve = lrpi.halting_curve(scores, solved, loss=0.02)

    def outcome(threshold):
        steps, right = 0, 0
        for row, ok in zip(scores.double().tolist(), solved.tolist(), strict=True):
            s = next((s for s in range(5) if row[s] <= threshold), 5)
            steps, right = steps + s + 1, right + ok[s]
        return steps / 400, right / 400

    steps, right = outcome(curve["threshold"])
    assert right >= solved[:, -1].double().mean() - 0.02 and 1 < steps < 6
    assert (steps, right) in zip(curve["steps"], curve["exact"], strict=True), "to the last digit"
    for threshold in scores.flatten().double().quantile(torch.linspace(0, 1, 50).double()).tolist():
        other = outcome(threshold)
        assert other[0] >= steps - 0.05 or other[1] < max(curve["exact"]) - 0.02


def test_of_several_puzzles_the_one_with_the_longest_solution_is_kept():
    cfg = lrpi.configure(size=7, pick=3)
    kept, every = lrpi.make_puzzles(cfg, 20, "train", 5), lrpi.make_mazes(60, 7, "train", 5)
    lengths = (every.x != every.y).sum(1).view(20, 3)
    assert (kept.x != kept.y).sum(1).equal(lengths.amax(1)) and lengths.amin(1).lt(lengths.amax(1)).any()
    groups = [{tuple(row) for row in rows} for rows in every.x.view(20, 3, 49).tolist()]
    assert all(tuple(row) in group for row, group in zip(kept.x.tolist(), groups, strict=True))
    assert lrpi.make_puzzles(cfg, 20, "test", 5).x.equal(lrpi.make_mazes(20, 7, "test", 5).x), (
        "test puzzles are not picked"
    )
