"""Tests of lrpi.py against independent oracles: brute force, plain loops, autograd, finite differences.

    python -m pytest -q

What is checked is computed a second time in this file, by other means; tolerances stand where they are used.
"""

import contextlib
import csv
import functools
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
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lrpi
from lrpi import GOAL, OPEN, PATH, START, WALL

HERE = Path(__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------
# Mazes


def neighbours_of(cell, side):
    r, c = divmod(cell, side)
    for i, j in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
        if 0 <= i < side and 0 <= j < side:
            yield i * side + j


def shortest_paths(maze, side):
    """By breadth-first search: the cells of a shortest path from start to goal; how many there are."""
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


@pytest.mark.parametrize("size, count", [(5, 60), (7, 40), (11, 60), (21, 10), (61, 2)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mazes_are_perfect_and_labels_are_their_unique_shortest_path(size, count, split):
    puzzles = lrpi.make_mazes(count, size, split, seed=3)
    assert puzzles.x.shape == puzzles.y.shape == (count, size * size) and puzzles.x.dtype == torch.uint8
    for maze, label in zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True):
        assert maze.count(START) == maze.count(GOAL) == 1 and PATH not in maze
        spaces = [cell for cell, token in enumerate(maze) if token != WALL]
        rooms = [r * size + c for r in range(0, size, 2) for c in range(0, size, 2)]
        assert set(rooms) <= set(spaces), "every room is open"
        assert maze.index(START) in rooms and maze.index(GOAL) in rooms
        edges = sum(maze[there] != WALL for here in spaces for there in neighbours_of(here, size)) // 2
        reached, stack = {spaces[0]}, [spaces[0]]
        while stack:
            for there in neighbours_of(stack.pop(), size):
                if maze[there] != WALL and there not in reached:
                    reached.add(there)
                    stack.append(there)
        assert len(reached) == len(spaces) == edges + 1, "connected, with one edge less than cells: a tree"
        path, ways = shortest_paths(maze, size)
        assert ways == 1
        assert label == [PATH if cell in path else token for cell, token in enumerate(maze)]


def test_stages_are_rounds_of_dead_end_filling_and_end_in_the_label():
    puzzles = lrpi.make_mazes(20, 11, "train", seed=1)
    rounds = puzzles.order.max().item()
    stages = [puzzles.stage(torch.full((20,), r)) for r in range(rounds + 2)]
    for i, maze in enumerate(puzzles.x.tolist()):
        answer = [PATH if token == OPEN else token for token in maze]
        for r in range(rounds + 2):
            assert stages[r][i].tolist() == answer
            dead = [
                cell
                for cell, token in enumerate(answer)
                if token == PATH
                and sum(answer[n] in (PATH, START, GOAL) for n in neighbours_of(cell, 11)) <= 1
            ]
            for cell in dead:
                answer[cell] = OPEN
    assert torch.equal(stages[-1], puzzles.y)


def test_spanning_trees_are_uniform():
    """The 3 x 3 grid has 192 spanning trees (Kirchhoff); chi-square with 191 degrees of freedom, 6 sigma."""
    N, laplacian = 9, torch.zeros(9, 9, dtype=torch.float64)
    for here in range(N):
        for there in neighbours_of(here, 3):
            laplacian[here, here] += 1
            laplacian[here, there] -= 1
    trees = round(torch.linalg.det(laplacian[1:, 1:]).item())
    assert trees == 192
    draws = 100 * trees
    parents = lrpi.spanning_trees(draws, 3, generator()).tolist()
    seen = {}
    for parent in parents:
        tree = frozenset((min(i, p), max(i, p)) for i, p in enumerate(parent) if i != p)
        seen[tree] = seen.get(tree, 0) + 1
    assert len(seen) == trees
    chi2 = sum((n - 100) ** 2 / 100 for n in seen.values())
    assert abs(chi2 - 191) < 6 * math.sqrt(2 * 191)


def test_start_and_goal_are_uniform():
    """72 ordered pairs of different rooms in a 5 x 5 maze; chi-square with 71 degrees of freedom, 6 sigma."""
    x = lrpi.carve(7200, 5, generator(1)).tolist()
    pairs = {}
    for maze in x:
        pair = maze.index(START), maze.index(GOAL)
        pairs[pair] = pairs.get(pair, 0) + 1
    assert len(pairs) == 72
    assert abs(sum((n - 100) ** 2 / 100 for n in pairs.values()) - 71) < 6 * math.sqrt(2 * 71)


def symmetric_views(maze, side):
    rows = [tuple(maze[r * side : (r + 1) * side]) for r in range(side)]
    for _ in range(4):
        rows = list(zip(*rows[::-1], strict=True))  # a quarter turn
        yield tuple(rows)
        yield tuple(row[::-1] for row in rows)


@pytest.mark.parametrize("size, count", [(5, 300), (7, 500), (11, 300)])
def test_splits_share_no_walls_under_the_8_symmetries(size, count):
    layouts = {split: set() for split in lrpi.SPLITS}
    for split, seen in layouts.items():
        for seed in (0, 1, 7):
            for maze in lrpi.make_mazes(count, size, split, seed).x.tolist():
                seen.add(min(symmetric_views([token == WALL for token in maze], size)))
    assert all(layouts.values())
    assert not layouts["train"] & layouts["test"]
    assert not layouts["train"] & layouts["valid"]
    assert not layouts["valid"] & layouts["test"]


def test_mazes_depend_on_the_seed_alone():
    a, b, c = (lrpi.make_mazes(50, 11, "train", seed).x for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(lrpi.make_mazes(10, 11, "train", 0).x, a[:10])
    assert len(a.unique(dim=0)) == 50


def test_hardest_keeps_the_longest_of_every_few():
    puzzles = lrpi.make_mazes(60, 7)
    lengths = [label.count(PATH) for label in puzzles.y.tolist()]
    for pick in (1, 2, 3):
        kept = lrpi.hardest(puzzles, pick)
        assert len(kept) == 60 // pick and (pick > 1 or torch.equal(kept.x, puzzles.x))
        for i, (maze, label) in enumerate(zip(kept.x.tolist(), kept.y.tolist(), strict=True)):
            group = range(pick * i, pick * i + pick)
            assert [maze, label] in [[puzzles.x[k].tolist(), puzzles.y[k].tolist()] for k in group]
            assert label.count(PATH) == max(lengths[k] for k in group)


def solved_by_hand(maze, answer, side):
    """Walk from the start along marked cells: it has to end at the goal and to take in all the marks."""
    for asked, said in zip(maze, answer, strict=True):
        if said != asked and not (asked == OPEN and said == PATH):
            return False
    marked = {cell for cell, token in enumerate(answer) if token in (PATH, START, GOAL)}
    walk = [answer.index(START)]
    while walk[-1] != answer.index(GOAL):
        onward = [n for n in neighbours_of(walk[-1], side) if n in marked and n not in walk]
        if len(onward) != 1:
            return False
        walk.append(onward[0])
    return set(walk) == marked


def test_solved_agrees_with_a_walk_along_the_marks():
    """True labels, labels with one cell changed, and random answers, on perfect mazes and on open fields."""
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
            x, said = torch.tensor([maze] * len(answers)), torch.tensor(answers)
            expected = [solved_by_hand(maze, answer, size) for answer in answers]
            assert lrpi.maze_solved(x, said).tolist() == expected
            verdicts += expected
    assert 120 < sum(verdicts) < len(verdicts) / 2, "both verdicts occurred"


def test_solved_rejects_a_path_with_a_separate_loop():
    W, O, S, G, P = WALL, OPEN, START, GOAL, PATH
    maze = [S, O, G, W, W, W, W, W, W, W, W, O, O, O, W, W, O, W, O, W, W, O, O, O, W]
    with_loop = [P if token == O else token for token in maze]
    without = [S, P, G, *maze[3:]]
    x = torch.tensor([maze, maze])
    assert lrpi.maze_solved(x, torch.tensor([with_loop, without])).tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------------
# Sudoku and queens

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def sudoku_peers(size):
    """The cells that must differ from each cell, by comparing all pairs."""
    height, width = BOX[size]
    place = [(i // size, i % size, i // size // height, i % size // width) for i in range(size**2)]
    return [
        [j for j, b in enumerate(place) if i != j and (a[0] == b[0] or a[1] == b[1] or a[2:] == b[2:])]
        for i, a in enumerate(place)
    ]


def sudoku_solutions(puzzle, size, limit):
    """Up to `limit` solutions, by plain backtracking over the cell with the fewest digits left."""
    peers, found, board = sudoku_peers(size), [], list(puzzle)

    def search():
        left = {
            i: [d for d in range(1, size + 1) if all(board[j] != d for j in peers[i])]
            for i in range(size**2)
            if not board[i]
        }
        if not left:
            found.append(list(board))
            return
        cell = min(left, key=lambda i: len(left[i]))
        for d in left[cell]:
            board[cell] = d
            search()
            board[cell] = 0
            if len(found) == limit:
                return

    search()
    return found


@pytest.mark.parametrize("size, blanks, count", [(4, 10, 60), (6, 24, 40), (9, 40, 12), (9, 54, 6)])
def test_sudokus_have_one_solution_and_it_is_the_label(size, blanks, count):
    puzzles = lrpi.make_sudokus(count, size, blanks, "train", seed=1)
    assert puzzles.x.dtype == puzzles.y.dtype == torch.uint8
    for puzzle, label in zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True):
        assert 1 <= puzzle.count(0) <= blanks
        assert sudoku_solutions(puzzle, size, 2) == [label]
    assert lrpi.sudoku_solved(puzzles.x, puzzles.y).all()


def test_the_number_of_blanks_is_uniform_where_nothing_is_given_back():
    """Of 9 x 9 sudokus with 1 to 12 blanks hardly any has a second solution; chi-square, 11 d.o.f., 6 sigma."""
    blanks = (lrpi.make_sudokus(1200, 9, 12).x == 0).sum(1)
    counts = torch.bincount(blanks, minlength=13)[1:].double()
    assert ((counts - 100) ** 2 / 100).sum() < 11 + 6 * math.sqrt(22)


def test_other_solutions_are_found_wherever_there_are_any():
    """Against backtracking, on 4 x 4 grids with many cells emptied at random."""
    g = generator(3)
    y = lrpi.sudoku_grids(120, 4, g)
    x = torch.where(torch.rand(y.shape, generator=g) < 0.7, 0, y)
    other, several = lrpi.other_solutions(x, y), []
    for puzzle, label, found in zip(x.tolist(), y.tolist(), other.tolist(), strict=True):
        solutions = sudoku_solutions(puzzle, 4, 300)
        several.append(len(solutions) > 1)
        assert found in solutions and (found != label) == several[-1]
    assert 20 < sum(several) < 120


@pytest.mark.parametrize("size, blanks", [(6, 24), (9, 54)])
def test_sudoku_stages_are_rounds_of_naked_and_hidden_singles(size, blanks):
    puzzles, peers, (height, width) = lrpi.make_sudokus(80, size, blanks), sudoku_peers(size), BOX[size]
    cells = range(size**2)
    rows = [[i for i in cells if i // size == k] for k in range(size)]
    cols = [[i for i in cells if i % size == k] for k in range(size)]
    wide = size // width
    boxes = [[i for i in cells if (i // size // height, i % size // width) == divmod(k, wide)]
             for k in range(size)]  # fmt: skip
    rounds, stuck = puzzles.order.max().item(), 0
    for i, (puzzle, label) in enumerate(zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True)):
        board = list(puzzle)
        for r in range(1, rounds + 2):
            free = {c: {d for d in range(1, size + 1) if all(board[j] != d for j in peers[c])}
                    for c in cells if not board[c]}  # fmt: skip
            new = {c: min(ds) for c, ds in free.items() if len(ds) == 1}
            for unit in rows + cols + boxes:
                for d in range(1, size + 1):
                    places = [c for c in unit if c in free and d in free[c]]
                    if len(places) == 1:
                        new[places[0]] = d
            if not new:  # propagation is stuck, or done: all else comes at once
                new, stuck = {c: label[c] for c in free}, stuck + len(free)
            for c, d in new.items():
                board[c] = d
            assert puzzles.stage(torch.full((80,), r))[i].tolist() == board
    assert torch.equal(puzzles.stage(torch.full((80,), rounds)), puzzles.y)
    assert rounds > 1 and (size < 9 or stuck), "both branches were taken"


def test_sudoku_checker_rejects_near_misses():
    puzzles = lrpi.make_sudokus(20, 9, 40)
    x, y = puzzles.x, puzzles.y
    assert lrpi.sudoku_solved(x, y).all() and not lrpi.sudoku_solved(x, x).any()
    g = generator()
    for i in range(20):
        cell = torch.randint(81, (1,), generator=g).item()
        wrong = y[i : i + 1].repeat(9, 1)
        wrong[:, cell] = (y[i, cell] + torch.arange(9)) % 10  # the first is right, the others are not
        assert lrpi.sudoku_solved(x[i].expand(9, -1), wrong).tolist() == [True] + 8 * [False]
    shuffled = (y % 9) + 1  # a valid grid, but with every given changed
    assert lrpi.sudoku_solved(y * 0, shuffled).all() and not lrpi.sudoku_solved(x, shuffled).any()
    masked = torch.where(torch.arange(81) == 40, 10, y)
    assert not lrpi.sudoku_solved(x, masked).any()
    two = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 3, 4, 1, 4, 1, 2, 3]])  # rows and columns, but not boxes
    assert lrpi.sudoku_solved(two * 0, two).all()
    two = torch.tensor([[1, 2, 3, 4, 2, 3, 4, 1, 3, 4, 1, 2, 4, 1, 2, 3]])
    assert not lrpi.sudoku_solved(two * 0, two).any()


def queens_solutions(size):
    """All placements, as the columns of the queens, row by row, by trying all permutations."""
    return [
        p
        for p in itertools.permutations(range(size))
        if len({r + c for r, c in enumerate(p)}) == len({r - c for r, c in enumerate(p)}) == size
    ]


@pytest.mark.parametrize("size", [4, 5, 6, 8])
def test_queens_are_asked_from_valid_placements_and_labels_are_the_first_completion(size):
    solutions = [[int(col == p[row]) for row in range(size) for col in range(size)]
                 for p in sorted(queens_solutions(size))]  # fmt: skip
    assert lrpi.placements(size).tolist() == solutions
    puzzles = lrpi.make_queens(300, size, "train", seed=2)
    for i, (board, label) in enumerate(zip(puzzles.x.tolist(), puzzles.y.tolist(), strict=True)):
        completions = [s for s in solutions if all(b <= a for a, b in zip(s, board, strict=True))]
        assert 1 <= sum(board) <= size - 1 and label == completions[0]
        for r in range(size + 1):  # row by row
            empty = [k for k in range(size) if not any(board[k * size : k * size + size])][:r]
            rows = [label[k * size : k * size + size] if k in empty else board[k * size : k * size + size]
                    for k in range(size)]  # fmt: skip
            assert puzzles.stage(torch.full((300,), r))[i].tolist() == [t for row in rows for t in row]
    assert lrpi.queens_solved(puzzles.x, puzzles.y).all()
    counts = torch.bincount(puzzles.x.sum(1).long())
    assert len(counts) <= size and (size < 8 or (counts[1:] > 0).all()), "small boards of a split are few"


def test_queens_checker_accepts_every_completion_and_nothing_else():
    """All boards of 4 x 4 with up to 5 queens, and 8 x 8 placements with one queen moved, added or removed."""
    boards = []
    valid = {tuple(int(c == p[r]) for r in range(4) for c in range(4)) for p in queens_solutions(4)}
    for k in range(6):
        for cells in itertools.combinations(range(16), k):
            boards.append(tuple(int(i in cells) for i in range(16)))
    said = lrpi.queens_solved(torch.zeros(len(boards), 16), torch.tensor(boards)).tolist()
    assert said == [board in valid for board in boards] and sum(said) == 2
    valid = {tuple(int(c == p[r]) for r in range(8) for c in range(8)) for p in queens_solutions(8)}
    every = lrpi.placements(8)
    rng = random.Random(0)
    for board in every.tolist():
        near = []
        for _ in range(20):
            other, (a, b) = list(board), rng.sample(range(64), 2)
            other[a], other[b] = other[b], other[a]
            near.append(other)
            near.append([*board[:a], 1 - board[a], *board[a + 1 :]])
        said = lrpi.queens_solved(torch.zeros(40, 64), torch.tensor(near)).tolist()
        assert said == [tuple(other) in valid for other in near]
    one = torch.zeros(92, 64, dtype=torch.uint8)
    one[:, 0] = 1  # asks for a queen in the corner
    assert lrpi.queens_solved(one, every).tolist() == [bool(board[0]) for board in every.tolist()]
    assert not lrpi.queens_solved(one * 0, torch.where(torch.arange(64) == 9, 2, every)).any()


@pytest.mark.parametrize("task, size", [("sudoku", 4), ("sudoku", 9), ("nqueens", 5), ("nqueens", 8)])
def test_splits_of_the_other_tasks_share_nothing(task, size):
    """No solved grid of sudoku, and no board of queens in any of its 8 views, is in two splits; and the
    puzzles depend on the seed alone."""
    cfg, seen = lrpi.configure(task=task, size=size, blanks=8), {}
    for split in lrpi.SPLITS:
        for seed in (0, 1):
            puzzles = lrpi.TASKS[task].make(cfg, 60, split, seed)
            of = puzzles.y if task == "sudoku" else puzzles.x
            seen.setdefault(split, set()).update(min(symmetric_views(cells, size)) for cells in of.tolist())
            again = lrpi.TASKS[task].make(cfg, 60, split, seed)
            assert torch.equal(puzzles.x, again.x) and torch.equal(puzzles.y, again.y)
    for a, b in itertools.combinations(seen.values(), 2):
        assert a and b and not a & b


def test_exchanged_sudokus_stay_valid_and_differ():
    for size in BOX:
        y = lrpi.sudoku_grids(1, size, generator()).expand(200, -1)
        other = lrpi.exchange(y, generator())
        assert lrpi.sudoku_solved(other, other).all()
        assert len(other.unique(dim=0)) > (30 if size == 4 else 199)
        x = torch.where(torch.rand(y.shape, generator=generator()) < 0.5, 0, y)
        assert ((lrpi.exchange(x, generator(1)) == 0).sum(1) == (x == 0).sum(1)).all(), "blanks stay blanks"


# ------------------------------------------------------------------------------------------------------------
# Model


def tiny(**given):
    return lrpi.configure(**{"size": 5, "width": 16, "ffn": 24, "heads": 2, **given})


def model_and_state(cfg, B=3, seed=0):
    torch.manual_seed(seed)
    model = lrpi.LoopedModel(cfg)
    for p in model.parameters():  # zero-initialised weights would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    L = cfg.size**2
    x = torch.randint(0, 4, (B, L), dtype=torch.uint8)
    return (
        model,
        x,
        torch.randn(B, L, cfg.width),
        torch.randn(B, L, cfg.width),
        torch.ones(B, dtype=torch.long),
    )


@pytest.mark.parametrize("scheme, passes", [("dis", 18), ("trm", 336), ("trm-medium", 48)])
def test_forward_passes_are_counted(scheme, passes):
    model = lrpi.LoopedModel(tiny(scheme=scheme))
    calls = []
    model.nets[0][0].register_forward_hook(lambda *_: calls.append(1))
    puzzles = lrpi.make_mazes(6, 5, "test")
    assert lrpi.evaluate(model, puzzles, batch=4)["passes"] == passes
    assert model.forward_passes == len(calls) == 2 * passes  # two batches


@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("T", [1, 3])
def test_a_step_is_the_recursion_written_out(T, recall):
    """Outputs and gradients equal those of the recursion in plain code; atol 1e-6."""
    model, x, y, z, s = model_and_state(tiny(T=T, n=2, recall=recall, step_index=True))
    got = model(x, y, z, s + 2)
    weights = torch.randn_like(got[0])
    gradients = torch.autograd.grad((got[0] * weights).sum(), list(model.parameters()), allow_unused=True)

    e = model.tokens.weight[x.long()] * 4 + model.step_table[2]  # sqrt(16) = 4; step 3 is row 2
    for t in range(T):
        for _ in range(2):
            z = model.nets[0](e + y + z)
        y = model.nets[0](e + model.role + y + z) if recall else model.nets[0](y + z)
        if t < T - 1:
            y, z = y.detach(), z.detach()
    expected = torch.autograd.grad((y * weights).sum(), list(model.parameters()), allow_unused=True)
    assert torch.allclose(got[0], y, atol=1e-6) and torch.allclose(got[1], z, atol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_no_gradient_from_the_first_cycles():
    for T, crosses in ((1, True), (2, False)):
        model, x, y, z, s = model_and_state(tiny(T=T))
        out = model(x, y.requires_grad_(), z, s)[0]
        gradient = torch.autograd.grad((out * torch.randn_like(out)).sum(), y, allow_unused=True)[0]
        assert out.requires_grad and (gradient is not None) is crosses
        assert not crosses or gradient.abs().max() > 1e-3


def test_the_state_is_detached_between_steps(monkeypatch):
    seen, forward = [], lrpi.LoopedModel.forward

    def spy(self, x, y, z, s):
        seen.append((s.tolist(), y.requires_grad, z.requires_grad, y.grad_fn, z.grad_fn))
        return forward(self, x, y, z, s)

    monkeypatch.setattr(lrpi.LoopedModel, "forward", spy)
    cfg = tiny(examples=5, batch_size=2, n_sup=3)
    lrpi.train(cfg, lrpi.make_mazes(10, 5))
    assert [s for s, *_ in seen] == [[1, 1], [2, 2], [3, 3]] * 2 + [[1, 1], [2, 2]]
    assert all(rest == [False, False, None, None] for _, *rest in seen)


def test_the_step_index_is_seen_and_held_past_the_last_step():
    model, x, y, z, s = model_and_state(tiny(step_index=True))
    out = [model(x, y, z, s * k)[0] for k in (1, 2, 6, 24)]
    assert not torch.allclose(out[0], out[1]) and torch.equal(out[2], out[3])


def test_attention_block_against_plain_loops():
    """Heads, rotary positions as complex rotations, softmax, SwiGLU, cell by cell in float64; atol 1e-5."""
    cfg = tiny(mixer="attention")
    torch.manual_seed(0)
    block, h = lrpi.Block(cfg, (5, 5)), torch.randn(2, 25, 16)
    H, d = 2, 8
    Wqkv, Wo = block.mix.qkv.weight.double(), block.mix.out.weight.double()
    Wgu, Wd = block.swiglu.gate_up.weight.double(), block.swiglu.down.weight.double()

    def rms(v):
        return v / math.sqrt(sum(a * a for a in v.tolist()) / len(v) + 1e-5)

    def turn(v, position):
        pairs = torch.complex(v[: d // 2], v[d // 2 :])
        angles = [position * 10_000 ** (-2 * i / d) for i in range(d // 2)]
        pairs = pairs * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
        return torch.cat([pairs.real, pairs.imag])

    for b in range(2):
        cells = h[b].double()
        qkv = [Wqkv @ cell for cell in cells]
        for i in range(25):
            mixed = []
            for head in range(H):
                at = slice(head * d, head * d + d)
                q = turn(qkv[i][:16][at], i)
                scores = [(q @ turn(qkv[j][16:32][at], j)).item() / math.sqrt(d) for j in range(25)]
                top = max(scores)
                p = [math.exp(score - top) for score in scores]
                mixed.append(sum(w * qkv[j][32:][at] for j, w in enumerate(p)) / sum(p))
            a = rms(cells[i] + Wo @ torch.cat(mixed))
            gate, up = (Wgu @ a)[:24], (Wgu @ a)[24:]
            expected = rms(a + Wd @ (gate / (1 + torch.exp(-gate)) * up))
            assert torch.allclose(block(h)[b, i].double(), expected, atol=1e-5)


def test_mlp_block_mixes_and_normalises_along_the_cells():
    """TRM's mixer for fixed lengths, channel by channel; atol 1e-5."""
    torch.manual_seed(0)
    block, h = lrpi.Block(tiny(mixer="mlp"), (5, 5)), torch.randn(2, 25, 16)
    assert block.mix.swiglu.gate_up.weight.shape == (512, 25)  # 4 * 25 * 2 / 3 = 67, rounded up to 256, twice
    out = torch.empty_like(h)
    for b in range(2):
        for channel in range(16):
            v = h[b, :, channel]
            gate, up = (block.mix.swiglu.gate_up.weight @ v).split(256)
            v = v + block.mix.swiglu.down.weight @ (F.silu(gate) * up)
            out[b, :, channel] = v / (v.square().mean() + 1e-5).sqrt()
    expected = F.rms_norm(out + block.swiglu(out), (16,), eps=1e-5)
    assert torch.allclose(block(h), expected, atol=1e-5)


def test_conv_mixer_against_plain_loops():
    torch.manual_seed(0)
    conv, h = lrpi.Conv(tiny(kernel=3), (5, 5)), torch.randn(1, 25, 16)
    got, weight = conv(h), conv.conv.weight
    for r in range(5):
        for c in range(5):
            expected = torch.zeros(16)
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= r + i < 5 and 0 <= c + j < 5:
                        expected += h[0, (r + i) * 5 + c + j] * weight[:, 0, i + 1, j + 1]
            assert torch.allclose(got[0, r * 5 + c], expected, atol=1e-5)


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    for weight, fan_in in ((lrpi.linear(64, 4000).weight, 64), (lrpi.lecun_(torch.empty(50_000), 1), 1)):
        assert abs(weight.std().item() * math.sqrt(fan_in) - 1) < 0.02  # 50,000 draws: one sigma is 0.3%
        assert weight.abs().max().item() * math.sqrt(fan_in) < 2.28  # two sigmas of the normal that was cut
    wide = lrpi.SwiGLU(512)
    assert wide.gate_up.weight.shape == (3072, 512) and wide.down.weight.shape == (512, 1536)


# ------------------------------------------------------------------------------------------------------------
# Policy improvement


def two_logits(seed=0):
    g = generator(seed)
    u, c = (3 * torch.randn(4, 5, 7, dtype=torch.float64, generator=g) for _ in range(2))
    return u, c, torch.randint(0, 7, (4, 5), generator=g)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.5])
def test_margin_is_minus_the_slope_of_the_loss(w):
    """Prop. 4.1 against autograd (1e-10) and central differences of step 1e-5 (1e-7)."""
    u, c, y = two_logits()

    def loss(w):
        return F.cross_entropy(lrpi.guide(u, c, w).flatten(0, 1), y.flatten(), reduction="none").view(4, 5)

    at = torch.full((4, 5), w, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(loss(at[..., None]).sum(), at)[0]
    margin = lrpi.margin(u, c, y, w)
    assert torch.allclose(margin, -slope, atol=1e-10)
    assert torch.allclose(margin, -(loss(w + 1e-5) - loss(w - 1e-5)) / 2e-5, atol=1e-7)


def test_guidance_is_a_geometric_mixture_of_policies():
    u, c, _ = two_logits()
    for w in (-0.5, 0.0, 0.3, 1.0, 2.0):
        mixture = u.softmax(-1) ** (1 - w) * c.softmax(-1) ** w
        assert torch.allclose(
            lrpi.guide(u, c, w).softmax(-1), mixture / mixture.sum(-1, keepdim=True), atol=1e-12
        )


def test_advantage_and_divergence_against_torch_distributions():
    u, c, y = two_logits()
    pi_u, pi_c = torch.distributions.Categorical(logits=u), torch.distributions.Categorical(logits=c)
    expected = torch.distributions.kl_divergence(pi_c, pi_u)
    assert torch.allclose(lrpi.divergence(u, c), expected, atol=1e-12)
    taken = lrpi.advantage(u, c).gather(-1, y[..., None]).squeeze(-1)
    assert torch.allclose(taken, pi_c.log_prob(y) - pi_u.log_prob(y), atol=1e-12)
    assert torch.allclose(lrpi.margin(u, u + 5.0, y), torch.zeros(4, 5, dtype=torch.float64), atol=1e-12)


def test_derivatives_are_those_of_the_loss():
    """Prop. 4.1 on 3,000 random cases in float64: autograd (1e-10), central differences (1e-5), convexity."""
    g = generator(3)
    u, c = (4 * torch.randn(3000, 6, dtype=torch.float64, generator=g) for _ in range(2))
    y = torch.randint(0, 6, (3000,), generator=g)
    w = (4 * torch.rand(3000, dtype=torch.float64, generator=g) - 1).requires_grad_()

    def loss(w):
        return F.cross_entropy(u + w[:, None] * (c - u), y, reduction="none")

    slope = torch.autograd.grad(loss(w).sum(), w, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), w)[0]
    for i in range(0, 3000, 500):  # w is one number for all positions
        at = w[i].item()
        got = lrpi.derivatives(u[i], c[i], y[i], at)
        assert abs(got[0] - slope[i]) < 1e-10 and abs(got[1] - curvature[i]) < 1e-10
    got = lrpi.derivatives(u, c, y, w.detach()[:, None])
    assert torch.allclose(got[0], slope, atol=1e-10) and torch.allclose(got[1], curvature, atol=1e-10)
    h = 1e-4
    with torch.no_grad():
        below, here, above = (loss(w + d) for d in (-h, 0, h))
    assert torch.allclose(got[0], (above - below) / (2 * h), atol=1e-5)
    assert torch.allclose(got[1], (above - 2 * here + below) / h**2, atol=1e-5)
    assert (got[1] >= 0).all() and (got[1] > 0).any()
    assert torch.equal(lrpi.margin(u, c, y, w.detach()[:, None]), -got[0])


def test_a_shift_of_the_logits_changes_nothing():
    """delta and A give one margin, one KL and one residual, and w* stays: atol 1e-9."""
    u, c, y = two_logits()
    shifted = u + 7.0, c - 13.0 * torch.rand(4, 5, 1, dtype=torch.float64)
    as_policies = u.log_softmax(-1), c.log_softmax(-1)
    for other in (shifted, as_policies):
        for f in (lrpi.divergence, lrpi.largest_change, lrpi.residual_norm, lrpi.advantage):
            assert torch.allclose(f(*other), f(u, c), atol=1e-9), f
        assert torch.allclose(lrpi.margin(*other, y, 0.7), lrpi.margin(u, c, y, 0.7), atol=1e-9)
        assert abs(lrpi.best_guidance(*other, y) - lrpi.best_guidance(u, c, y)) < 1e-9
    plain = (u.softmax(-1) - c.softmax(-1)).abs().max(-1).values
    assert torch.allclose(lrpi.largest_change(u, c), plain, atol=1e-12)
    delta = (c - u).view(20, 7)
    norms = [math.sqrt(sum((a - sum(d) / 7) ** 2 for a in d)) for d in delta.tolist()]
    assert torch.allclose(lrpi.residual_norm(u, c).flatten(), torch.tensor(norms).double(), atol=1e-12)


@pytest.mark.parametrize("scale, lean", [(1.0, 0.5), (3.0, 1.5), (8.0, 3.0), (0.05, 0.02), (100.0, 60.0)])
def test_best_guidance_against_a_grid_search(scale, lean):
    """For 30 sets of positions each: no point of a grid beats w*, nor do its neighbours on either side."""
    for seed in range(30):
        g = generator(seed)
        u, c = (scale * torch.randn(40, 5, dtype=torch.float64, generator=g) for _ in range(2))
        y = torch.randint(0, 5, (40,), generator=g)
        c.scatter_add_(1, y[:, None], torch.full((40, 1), lean, dtype=torch.float64))

        def loss(w, u=u, c=c, y=y):
            return F.cross_entropy(u + w * (c - u), y, reduction="sum").item()

        w = lrpi.best_guidance(u, c, y)
        best = loss(w)
        assert all(loss(k / 50) >= best - 1e-9 * abs(best) for k in range(-200, 400, 5))
        assert loss(w + 1e-3) >= best - 1e-9 * abs(best) and loss(w - 1e-3) >= best - 1e-9 * abs(best)
        slope, curvature = (d.sum().item() for d in lrpi.derivatives(u, c, y, w))
        assert abs(slope / curvature) < 1e-9


def test_best_guidance_where_there_is_no_minimum():
    u = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([0, 1])
    towards = u + F.one_hot(y, 3)
    assert lrpi.best_guidance(u, towards, y) == math.inf
    assert lrpi.best_guidance(u, 2 * u - towards, y) == -math.inf
    assert math.isnan(lrpi.best_guidance(u, u, y)) and math.isnan(lrpi.best_guidance(u, u + 5.0, y))
    assert math.isnan(lrpi.best_guidance(u + 1000, u + 1000 + 1e-4 * torch.rand(2, 3), y)), "only rounding"
    nobody = torch.full((2,), lrpi.IGNORE)
    assert math.isnan(lrpi.best_guidance(u, towards, nobody))
    assert math.isnan(lrpi.best_guidance(u[:0], u[:0], y[:0]))
    half = torch.tensor([0, lrpi.IGNORE])
    harmed = torch.cat([towards[:1], 2 * u[1:] - towards[1:]])
    assert lrpi.best_guidance(u, harmed, half) == math.inf, "what is ignored does not count"
    assert math.isfinite(lrpi.best_guidance(u, harmed, y))
    dead_but_one = torch.cat([u[:1], harmed[1:]])
    assert lrpi.best_guidance(u, dead_but_one, y) == -math.inf


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
def test_best_guidance_far_from_1(scale):
    """Two tokens, where w* is known: pi_w(0) must be the share of positions with label 0; rtol 1e-6.

    With l_u = (k, 0) and l_c = (k - d, 0), L is least at k - w d = log(share / (1 - share)). Curvatures span
    hundreds of orders of magnitude between w = 1 and w*.
    """
    for k in (-300.0, 0.5, 40.0, 2000.0):
        for d in (scale, -scale):
            u = torch.tensor([k, 0.0], dtype=torch.float64).expand(8, 2)
            c = torch.tensor([k - d, 0.0], dtype=torch.float64).expand(8, 2)
            y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
            expected = (k - math.log(3)) / d
            assert abs(lrpi.best_guidance(u, c, y) - expected) < 1e-6 * max(1.0, abs(expected))


def test_best_guidance_in_exponential_tails():
    """Slopes of e^-w and e^(w - far): the minimum lies in the middle, 249 and 499 steps of Newton away."""
    u, c = torch.tensor([[20.0, 0.0, -500.0]]), torch.tensor([[20.0, -1.0, -499.0]])
    assert abs(lrpi.best_guidance(u.double(), c.double(), torch.tensor([0])) - 250) < 1e-6
    u, c = torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([[1.0, 0.0], [999.0, 0.0]])
    assert abs(lrpi.best_guidance(u.double(), c.double(), torch.tensor([0, 0])) - 500) < 1e-6


def test_intervals_of_very_few_puzzles_say_nothing():
    model = lrpi.LoopedModel(tiny(n_sup=3))
    for n, known in ((1, False), (2, False), (3, False), (40, True)):
        found = lrpi.evaluate(model, lrpi.make_mazes(n, 5, "test"))
        assert all(math.isfinite(end) is known for ends in found["gain_interval"] for end in ends)
        assert known or lrpi.verdicts(found["gain_interval"], -1, 0, 1) == [0] * 3


def test_a_very_long_rollout_can_be_evaluated():
    """More steps times resamples than torch.quantile takes at once."""
    model = lrpi.LoopedModel(tiny(width=4, ffn=4, heads=1, n=1))
    assert len(lrpi.evaluate(model, lrpi.make_mazes(2, 5), range(1, 2200))["exact"]) == 2199


def test_ignored_positions_count_for_nothing():
    u, c, y = two_logits()
    some = y.clone()
    some[::2] = lrpi.IGNORE
    for w in (0.0, 1.0):
        for part, whole in zip(lrpi.derivatives(u, c, some, w), lrpi.derivatives(u, c, y, w), strict=True):
            assert (part[::2] == 0).all() and torch.equal(part[1::2], whole[1::2])
    assert abs(lrpi.best_guidance(u, c, some) - lrpi.best_guidance(u[1::2], c[1::2], y[1::2])) < 1e-12
    assert lrpi.margin(u[:0], c[:0], y[:0]).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 5, 50_000])
def test_extreme_logits_stay_finite(dtype, V):
    """Entries of +-1e4, against float64: rtol 2%, as float32 knows l_w up to 7e4 to 0.008; atol 1e-2."""
    g = generator(V)
    u, c = ((2e4 * torch.rand(6, V, generator=g) - 1e4).to(dtype) for _ in range(2))
    u[0], c[0], u[1], c[1] = 1e4, -1e4, -1e4, 1e4  # constant rows
    y = torch.randint(0, V, (6,), generator=g)
    assert lrpi.guide(u, c, 0.5).dtype == torch.float32, "bfloat16 is widened"
    for w in (-0.5, 0.0, 1.0, 3.0):
        for got, exact in zip(
            lrpi.derivatives(u, c, y, w), lrpi.derivatives(u.double(), c.double(), y, w), strict=True
        ):
            assert got.isfinite().all() and torch.allclose(got.double(), exact, rtol=2e-2, atol=1e-2)
    for f in (lrpi.advantage, lrpi.divergence, lrpi.largest_change, lrpi.residual_norm):
        got = f(u, c)
        assert got.isfinite().all()
        assert torch.allclose(got.double(), f(u.double(), c.double()), rtol=2e-2, atol=1e-2), f
    assert (lrpi.divergence(u, c) >= 0).all() and (lrpi.largest_change(u, c) <= 1).all()
    assert not math.isnan(lrpi.best_guidance(u, c, y))


@pytest.mark.parametrize("u, c, y, said", [
    (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3), ["[3, 4]", "[3, 5]"]),
    (torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3), ["[3, 1]", "V > 1"]),
    (torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0), ["[]"]),
    (torch.zeros(3, 4), torch.full((3, 4), math.nan), torch.zeros(3), ["logits_c", "[3, 4]", "12 are NaN"]),
    (torch.full((3, 4), math.inf), torch.zeros(3, 4), torch.zeros(3), ["logits_u", "12 are NaN or infinite"]),
    (torch.zeros(3, 4).long(), torch.zeros(3, 4), torch.zeros(3).long(), ["logits_u", "int64"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), ["[2]", "[3]"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3), ["float32", "whole"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 4, 1]), ["label 4", "0 to 3", "-100"]),
    (torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, -1, 1]), ["label -1", "0 to 3"]),
])  # fmt: skip
def test_bad_logits_and_labels_are_refused(u, c, y, said):
    for f in (lrpi.margin, lrpi.best_guidance, lrpi.derivatives):
        with pytest.raises(ValueError, match=".") as e:
            f(u, c, y)
        assert all(words in str(e.value) for words in said) and "\n" not in str(e.value)
    if "label" not in said[0] and len(u.shape) and "float32" not in said and y.shape == (3,):
        for f in (lrpi.advantage, lrpi.divergence, lrpi.largest_change, lrpi.residual_norm):
            with pytest.raises(ValueError, match="logits"):
                f(u, c)


# ------------------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_reveal_is_nested_monotone_and_exact_at_the_end(power):
    puzzles, n_sup, cfg = lrpi.make_mazes(50, 11, "train"), 6, lrpi.configure(power=power)
    x, y, noise = puzzles.x, puzzles.y, torch.rand(50, 121, generator=generator())
    before, differing = x, (x != y).sum(1)
    for s in range(1, n_sup + 1):
        target = lrpi.reveal(puzzles, torch.full((50,), s), cfg, noise)
        assert ((target == x) | (target == y)).all()
        assert (target[before == y] == y[before == y]).all(), "nested: what was shown stays shown"
        for n, left in zip(differing.tolist(), (target != y).sum(1).tolist(), strict=True):
            shown = n * (s / n_sup) ** power
            assert n - left in (math.ceil(shown - 1e-4), math.ceil(shown + 1e-4)), (
                "float32 may round either way"
            )
        before = target
    assert torch.equal(before, y)
    assert torch.equal(lrpi.reveal(puzzles, torch.full((50,), 9), cfg, noise), y), "and stays so"


def test_reveal_gives_every_row_its_own_step():
    puzzles, cfg, noise = lrpi.make_mazes(4, 11, "train"), lrpi.configure(), torch.rand(4, 121)
    target = lrpi.reveal(puzzles, torch.tensor([0, 3, 6, 7]), cfg, noise)
    assert torch.equal(target[0], puzzles.x[0]) and torch.equal(target[2:], puzzles.y[2:])
    nothing = lrpi.Puzzles(puzzles.y, puzzles.y, puzzles.draft, puzzles.order)
    same = lrpi.reveal(nothing, torch.full((4,), 3), cfg, noise)
    assert torch.equal(same, puzzles.y), "nothing differs, nothing to reveal"


def test_reveal_takes_cells_at_random():
    """Each of the k differing cells is among the first half equally often: 2,000 draws, 5 sigma."""
    puzzles = lrpi.make_mazes(200, 11, "train")
    i = (puzzles.x != puzzles.y).sum(1).argmax()
    same, cfg = puzzles[i.expand(2000)], lrpi.configure(n_sup=2, power=1.0)
    noise = torch.rand(2000, 121, generator=generator())
    shown = lrpi.reveal(same, torch.ones(2000), cfg, noise) == same.y
    cells = puzzles.x[i] != puzzles.y[i]
    p = math.ceil(cells.sum().item() / 2) / cells.sum().item()
    assert (shown[:, cells].float().mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("pace", [1, 8])
def test_edits_obey_the_lyapunov_bound(pace):
    """A.2: wrong cells fall by `pace` a step at least until none is left: in V0 / pace steps, rounded up."""
    cfg = lrpi.configure(pace=pace, n_sup=130)  # so that no puzzle is finished by N_sup's being reached
    puzzles = lrpi.make_mazes(100, 11, "train", seed=4)
    wrong = [(puzzles.draft != puzzles.y).sum(1)]
    for s in range(1, 130 // pace):
        target = lrpi.edits(puzzles, torch.full((100,), s), cfg, None)
        wrong.append((target != puzzles.y).sum(1))
        assert ((wrong[-1] <= wrong[-2] - pace) | (wrong[-1] == 0)).all()
        done = s >= torch.ceil(wrong[0] / pace)
        assert (wrong[-1][done] == 0).all()
    mixed = lrpi.edits(puzzles, torch.arange(100) % 7, cfg, None)
    for i in range(100):
        assert torch.equal(mixed[i], puzzles[i : i + 1].stage(torch.tensor([pace * (i % 7)]))[0]), (
            "row by row"
        )
    late = lrpi.edits(puzzles, torch.full((100,), 2), lrpi.configure(pace=pace, n_sup=2), None)
    assert torch.equal(late, puzzles.y), "the last target is y*, however slow the solver"


def trajectories(puzzles, S, seed=0):
    """Ways to y* that jump about: random tokens in fewer and fewer cells."""
    g, V = generator(seed), puzzles.y.max().item() + 1
    plan = torch.randint(0, V, (len(puzzles), S, puzzles.y.shape[1]), generator=g, dtype=torch.uint8)
    right = torch.rand(plan.shape, generator=g) < torch.linspace(0, 1, S)[:, None]
    return torch.where(right, puzzles.y[:, None], plan)


@pytest.mark.parametrize("task, size", [("maze", 11), ("sudoku", 6), ("nqueens", 8)])
@pytest.mark.parametrize("target", [*lrpi.TARGETS])
def test_targets_end_in_the_label_come_closer_and_are_frozen(target, task, size):
    """The mean Hamming distance to y* never grows, cells that are shown stay (but for `file`), and
    the same noise gives the same targets; past N_sup the target stays y*."""
    given = {"trajectories": "given"} if target == "file" else {}
    cfg = lrpi.configure(task=task, size=size, target=target, power=1.0, pace=1, blanks=20, **given)
    puzzles = lrpi.TASKS[task].make(cfg, 60, "train")
    puzzles.plan = trajectories(puzzles, 5)
    noise, kept = torch.rand(puzzles.x.shape, generator=generator()), puzzles.y.clone()
    targets = [lrpi.TARGETS[target](puzzles, torch.full((60,), s), cfg, noise) for s in range(1, 10)]
    again = [lrpi.TARGETS[target](puzzles, torch.full((60,), s), cfg, noise.clone()) for s in range(1, 10)]
    assert all(torch.equal(a, b) for a, b in zip(targets, again, strict=True))
    distance = [(t != puzzles.y).double().sum(1) for t in targets]
    assert all(torch.equal(t, puzzles.y) for t in targets[5:]), "y* at step 6 = N_sup, and after it"
    assert distance[0].mean() >= 0 and all(b.mean() <= a.mean() for a, b in itertools.pairwise(distance))
    if target not in ("final",):
        assert distance[0].mean() > 1, "it does not begin with y*"
    if target != "file":
        assert all((b <= a).all() for a, b in itertools.pairwise(distance)), "of every puzzle"
        for a, b in itertools.pairwise(targets):
            assert (b == kept)[a == kept].all(), "nested"
    assert all(
        t.shape == puzzles.y.shape and 0 <= t.min() <= t.max() < len(lrpi.legend(cfg)) for t in targets
    )


def test_mask_and_replace_corrupt_at_the_rate_of_the_schedule():
    """Rate beta_s = 1 - s / 6 with power 1; 5 sigma. Masked cells carry the token of their own, replaced ones
    any token equally often."""
    N, s = 3000, 2
    puzzles = lrpi.make_queens(N)
    noise = torch.rand(N, 64, generator=generator())
    cfg = lrpi.configure(task="nqueens", target="mask", power=1.0)
    assert list(lrpi.legend(cfg)) == ["empty", "queen", "masked"]
    masked = lrpi.mask(puzzles, torch.full((N,), s), cfg, noise) == 2
    sigma = math.sqrt(2 / 9 / (64 * N))
    assert abs(masked.double().mean().item() - 2 / 3) < 5 * sigma
    cfg = lrpi.configure(task="nqueens", target="replace", power=1.0)
    replaced = lrpi.replace_at_random(puzzles, torch.full((N,), s), cfg, noise)
    assert (replaced == puzzles.y)[~masked].all(), "the same cells are hit"
    drawn = replaced[masked].double()
    assert abs(drawn.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 4 / len(drawn))
    assert abs(drawn[puzzles.y[masked] == 1].mean().item() - 1 / 2) < 5 * math.sqrt(4 / len(drawn))


@pytest.mark.parametrize("S", [1, 3, 6, 11])
def test_a_trajectory_of_any_length_is_spread_over_the_steps(S):
    puzzles = lrpi.make_mazes(4, 5)
    puzzles.plan = trajectories(puzzles, S)
    cfg = tiny(target="file", trajectories="given")
    for s in range(1, 9):
        k = min(S, math.ceil(s * S / 6)) - 1
        target = lrpi.TARGETS["file"](puzzles, torch.full((4,), s), cfg, None)
        assert torch.equal(target, puzzles.plan[:, k])


# ------------------------------------------------------------------------------------------------------------
# Training


def record(into):
    """A `watch` that keeps every loss and stops nothing."""

    def watch(at, loss, model):
        into.extend([] if loss is None else [loss.item()])
        return ""

    return watch


def test_learns_7x7_mazes():
    """From scratch in half a minute: an untrained model solves none of these mazes, this one most of them."""
    cfg, losses = lrpi.configure(size=7, examples=3000), []
    model, facts = lrpi.train(cfg, lrpi.make_mazes(3000, 7), record(losses))
    curves = lrpi.evaluate(model, lrpi.make_mazes(300, 7, "test"))
    assert facts["steps_done"] == len(losses) == 1500 and facts["examples_seen"] == 1500 * 12 // 6
    assert sum(losses[-48:]) < 0.5 * sum(losses[:48])
    assert curves["exact"][-1] > 0.8
    assert curves["exact"][-1] > curves["exact"][0] and curves["logp"][-1] > curves["logp"][0]


@pytest.mark.parametrize("mixer", ["attention", "mlp"])
def test_other_mixers_learn(mixer):
    """They learn mazes slowly; here, that the loss on 5 x 5 mazes falls by a third at least."""
    losses = []
    lrpi.train(lrpi.configure(size=5, mixer=mixer, examples=300), lrpi.make_mazes(300, 5), record(losses))
    assert sum(losses[-24:]) < 0.67 * sum(losses[:24])


def test_same_seed_same_weights():
    cfg, data = tiny(examples=24), lrpi.make_mazes(30, 5)
    a, b = (lrpi.train(cfg, data)[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = lrpi.train(tiny(examples=24, seed=1), data)[0].state_dict()
    assert not torch.equal(a["tokens.weight"], c["tokens.weight"])


@pytest.mark.parametrize("target", ["final", "reveal", "edits"])
def test_training_without_halting_equals_nested_loops(target, monkeypatch):
    """Where all rows keep step, the loop over episodes does what loops over batches and steps do.

    Weights move by about 0.1 here; atol is 1e-3, as Muon works in bfloat16 and magnifies the last bits.
    """
    given = {"examples": 12, "n_sup": 3, "batch_size": 4, "target": target, "warmup": 2, "ema": 0.0}
    cfg = tiny(**given, noise=0.0, pace=2, step_index=True)
    data, phi, noises = lrpi.make_mazes(40, 5), lrpi.TARGETS[target], []

    def spy(puzzles, s, cfg, noise):
        noises.append(noise)
        return phi(puzzles, s, cfg, noise)

    monkeypatch.setitem(lrpi.TARGETS, target, spy)
    got = lrpi.train(cfg, data)[0].state_dict()
    for i, noise in enumerate(noises):
        assert torch.equal(noise, noises[i // 3 * 3]), "one noise for a whole rollout"
    assert not (noises[0] == noises[3]).any() and not (noises[3] == noises[6]).any(), "another for the next"

    torch.manual_seed(cfg.seed)
    model = lrpi.LoopedModel(cfg)
    matrices = [p for name, p in model.named_parameters() if "nets" in name and p.ndim == 2]
    names = {n for n, p in model.named_parameters() for m in matrices if p is m}
    others = [p for n, p in model.named_parameters() if n not in names]
    optimizers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)]  # fmt: skip
    assert cfg.muon_lr == cfg.lr == 0.01
    order, step = torch.randperm(40), 0
    for batch in range(3):
        rows = order[4 * batch : 4 * batch + 4]
        y, z = model.y0.expand(4, 25, -1), model.z0.expand(4, 25, -1)
        for s in range(1, 4):
            y, z = model(data.x[rows], y.detach(), z.detach(), torch.full((4,), s))
            x, label = data.x[rows], data.y[rows]
            if target == "reveal":
                for b in range(4):
                    differing = [cell for cell in range(25) if x[b, cell] != label[b, cell]]
                    differing.sort(key=lambda cell, b=b: noises[3 * batch][b, cell].item())
                    hidden = differing[math.ceil(len(differing) * (s / 3) ** cfg.power - 1e-5) :]
                    label[b, hidden] = x[b, hidden]
            if target == "edits":
                late = data.order[rows] > (2 * s if s < 3 else 10**4)
                label[late] = data.draft[rows][late]
            loss = F.cross_entropy(model.readout(y).transpose(1, 2), label.long())
            for optimizer in optimizers:
                optimizer.zero_grad()
                factor = min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / 9)) / 2
                optimizer.param_groups[0]["lr"] = 0.01 * factor
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            step += 1
    for name, weight in model.state_dict().items():
        assert torch.allclose(got[name], weight, atol=1e-3), name


@pytest.mark.parametrize("given", [{}, {"linear": True}, {"awr": 0.7}, {"hinge": 1.5},
                                   {"linear": True, "awr": 2.0, "hinge": 0.1}])  # fmt: skip
def test_the_loss_of_a_step_against_plain_loops(given):
    """Its value cell by cell in float64, and its gradient by central differences; atol 1e-6."""
    cfg = tiny(n_sup=5, **given)
    u, c, y = two_logits()
    s = torch.tensor([1, 2, 5, 7])

    def by_hand(c, held):  # weights see the logits `held` after the step, which carry no gradient
        total = 0.0
        for b in range(4):
            for cell in range(5):
                label = y[b, cell].item()
                A = held[b, cell].log_softmax(-1) - u[b, cell].log_softmax(-1)
                loss = -c[b, cell].log_softmax(-1)[label].item()
                loss *= min(20, math.exp(A[label].item() / cfg.awr)) if cfg.awr else 1
                now = c[b, cell].log_softmax(-1) - u[b, cell].log_softmax(-1)
                lack = (c[b, cell].softmax(-1) * now).sum() - now[label]
                loss += cfg.hinge * max(0.0, lack.item())
                total += loss * (s[b].item() / 3 if cfg.linear else 1) / 20  # 3 is the mean of 1 .. 5
        return total

    c.requires_grad_()
    loss = lrpi.step_loss(u, c, y.to(torch.uint8), s, cfg)
    held = c.detach()
    assert abs(loss.item() - by_hand(held, held)) < 1e-6
    gradient = torch.autograd.grad(loss, c)[0].flatten()
    for i in range(0, held.numel(), 7):
        nudge = torch.zeros(held.numel(), dtype=torch.float64)
        nudge[i] = 1e-5
        nudge = nudge.view_as(held)
        slope = (by_hand(held + nudge, held) - by_hand(held - nudge, held)) / 2e-5
        assert abs(gradient[i].item() - slope) < 1e-6


def test_schemes_start_from_the_same_weights_and_see_the_same_puzzles(monkeypatch):
    """The weights that two schemes share are equal at first, and so is the order of the puzzles."""
    data, seen, first = lrpi.make_mazes(30, 5), {}, {}
    arms = {name: {"scheme": name} for name in lrpi.SCHEMES} | {"index": {"step_index": True}}
    for name, given in arms.items():
        cfg, seen[name] = tiny(examples=12, n=2, **given), []
        advance = lrpi.Episodes.advance

        def spy(self, rows=seen[name], advance=advance):
            puzzles = advance(self)
            rows.append(self.row.clone())
            return puzzles

        def watch(at, loss, model, name=name):
            first.setdefault(name, {k: v.clone() for k, v in model.state_dict().items()})
            return ""

        monkeypatch.setattr(lrpi.Episodes, "advance", spy)
        lrpi.train(cfg, data, watch)
        monkeypatch.setattr(lrpi.Episodes, "advance", advance)
    for name, weights in first.items():
        assert torch.equal(seen[name][0], seen["dis"][0])
        for k, v in weights.items():
            net = "nets.0" + k[6:] if k.startswith("nets.") else k  # untied nets begin as copies of the first
            assert net not in first["dis"] or torch.equal(v, first["dis"][net]), (name, k)


def test_one_pass_has_weights_of_its_own_for_every_pass():
    """18 blocks, each used once; their recursion written out; atol 1e-6."""
    cfg = tiny(scheme="one-pass")
    model, x, y, z, s = model_and_state(cfg)
    assert len(model.nets) == 18
    got = model(x, y, z, s)[0]
    e = model.tokens.weight[x.long()] * 4
    for k in range(17):
        z = model.nets[k](e + y + z)
    assert torch.allclose(got, model.nets[17](e + model.role + y + z), atol=1e-6)
    assert torch.equal(model(x, y, z, s)[0], model(x, y, z, s)[0]), "the next rollout begins with the first"


def test_feedback_shows_the_last_answer_instead_of_the_puzzle():
    model, x, y, z, s = model_and_state(tiny(feedback=True))
    plain = lrpi.LoopedModel(tiny())
    plain.load_state_dict(model.state_dict())
    last = model.readout(y).argmax(-1)
    assert torch.equal(model(x, y, z, s)[0], plain(x, y, z, s)[0])
    assert torch.equal(model(x, y, z, s + 1)[0], plain(last, y, z, s + 1)[0])
    assert not torch.allclose(model(x, y, z, s)[0], model(x, y, z, s + 1)[0])


def test_a_budget_of_seconds_ends_training():
    """The clock is that of the training steps, without what `watch` does; and the rate falls with it."""
    cfg, rates = tiny(budget_seconds=0.5, examples=1), []

    def watch(at, loss, model):
        rates.append(at.share)
        return ""

    _, facts = lrpi.train(cfg, lrpi.make_mazes(50, 5), watch)
    assert 0.5 <= facts["train_seconds"] < 5 and facts["examples_seen"] > 1
    assert rates == sorted(rates) and rates[-2] < 1 <= rates[-1]


def test_averaged_weights_follow_the_decay():
    data, trail = lrpi.make_mazes(30, 5), []

    def watch(at, loss, model):
        trail.append(model.tokens.weight.detach().clone())
        return ""

    lrpi.train(tiny(examples=10, ema=0.0), data, watch)
    expected = trail[1]  # trail[0] is before the first step
    for weight in trail[2:]:
        expected = 0.7 * expected + 0.3 * weight
    averaged = lrpi.train(tiny(examples=10, ema=0.7), data)[0].tokens.weight
    assert len(trail) == 6 and torch.allclose(averaged, expected, atol=1e-6)


def test_puzzles_that_are_done_leave_and_all_others_stay():
    cfg, data = tiny(batch_size=3, act=True), lrpi.make_mazes(7, 5)
    batch = lrpi.Episodes(cfg, data, lrpi.LoopedModel(cfg))
    waiting, held, steps, rng = 20 * batch.line.tolist(), [None] * 3, [0] * 3, random.Random(0)
    assert sorted(waiting[:7]) == list(range(7)), "every puzzle is seen once before any is seen twice"
    done, state = [True] * 3, None
    for _ in range(30):
        puzzles = batch.advance()
        x, y_star = puzzles.x, puzzles.y
        for place in range(3):
            if done[place]:
                held[place], steps[place] = waiting.pop(0), 0
                assert torch.equal(batch.y[place], batch.model.y0.expand(25, -1))
            else:
                assert torch.equal(batch.y[place], state[place])
            steps[place] += 1
        assert batch.row.tolist() == held and batch.s.tolist() == steps
        assert torch.equal(x, data.x[held]) and torch.equal(y_star, data.y[held])
        state = torch.randn(3, 25, 16)
        done = [rng.random() < 0.4 for _ in range(3)]
        batch.y, batch.z, batch.done = state, state, torch.tensor(done)


def test_halting_head_loss_and_who_may_go():
    cfg = tiny(scheme="trm", n_sup=4)
    model = lrpi.LoopedModel(cfg)
    assert torch.sigmoid(model.halting(torch.randn(5, 16))).max() < 0.01, "nothing counts as solved at first"
    torch.manual_seed(0)
    torch.nn.init.normal_(model.halting.weight, std=5.0)
    B = 4000
    y, s = torch.randn(B, 25, 16), torch.randint(1, 5, (B,))
    y_star = torch.randint(0, 5, (B, 25), dtype=torch.uint8)
    logits = F.one_hot(y_star.long(), 5).float()
    logits[::2, 7] = logits[::2, 7].roll(1, -1)  # every second answer has one wrong cell
    loss, let_go = lrpi.act(model, y, logits, y_star, s)
    q = model.halting(y[:, 0])[:, 0]
    right = torch.arange(B) % 2 == 1
    expected = -0.5 * torch.where(right, F.logsigmoid(q.double()), F.logsigmoid(-q.double())).mean()
    assert abs(loss.item() - expected.item()) < 1e-4
    assert not let_go[q <= 0].any()
    kept = (~let_go[q > 0]).float()  # one in ten draws 2, 3 or 4 as its minimum and stays below it
    for k, share in ((1, 0.1), (2, 0.1 * 2 / 3), (3, 0.1 / 3), (4, 0.0)):
        of_k = kept[s[q > 0] == k]
        assert abs(of_k.mean().item() - share) <= 5 * math.sqrt(share * (1 - share) / len(of_k))


def test_puzzles_leave_when_the_halting_head_says_so(monkeypatch):
    """With a head that always says "solved", all but one in ten puzzles are replaced after one step."""
    cfg = tiny(scheme="trm", T=1, n=1, examples=800, batch_size=20, lr=1e-5, ema=0.0)
    init, starts = lrpi.LoopedModel.__init__, []

    def confident(self, cfg):
        init(self, cfg)
        torch.nn.init.constant_(self.halting.bias, 50.0)
        starts.append(self.halting.weight.clone())

    monkeypatch.setattr(lrpi.LoopedModel, "__init__", confident)
    model, facts = lrpi.train(cfg, lrpi.make_mazes(200, 5))
    rows = 20 * facts["steps_done"]
    assert 800 <= facts["examples_seen"] < 840 and 0.4 * rows < facts["examples_seen"] < 0.95 * rows
    assert not torch.equal(model.halting.weight, starts[0]), "its loss reaches the head"


def watched(interrupts=(), after=lambda step, model: None):
    watch = lrpi.Watch(lrpi.make_mazes(5, 5, "valid"), interrupts)

    def both(at, loss, model):
        said = watch(at, loss, model)
        after(at.steps_done, model)
        return said

    return both


def test_a_lost_loss_stops_training_with_weights_that_worked():
    """Weights are spoilt after step 20 of 400; losses are looked at after every second step."""
    seen = {}

    def spoil(step, model):
        seen[step] = {k: v.clone() for k, v in model.state_dict().items()}
        if step == 20:
            model.tokens.weight.data.fill_(math.inf)

    cfg = tiny(examples=800, warmup=0, ema=0.0)
    model, facts = lrpi.train(cfg, lrpi.make_mazes(30, 5), watched(after=spoil))
    assert facts["stopped"] == "the loss is no longer finite at step 21, kept is step 18"
    assert facts["steps_done"] == 22
    assert all(torch.equal(v, seen[18][k]) for k, v in model.state_dict().items())


def test_an_update_that_no_loss_has_proven_is_not_kept_if_it_is_not_finite():
    watch = watched()

    def spoil_last(at, loss, model):
        if at.steps_done == 10:
            model.tokens.weight.data.fill_(math.nan)
        return watch(at, loss, model)

    model, facts = lrpi.train(tiny(examples=20, ema=0.0), lrpi.make_mazes(30, 5), spoil_last)
    assert facts["stopped"] == "the loss is no longer finite at step 11, kept is step 8"
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_an_interrupt_ends_training_in_order():
    interrupts = []

    def after(step, model):
        if step == 3:
            interrupts.append(True)

    _, facts = lrpi.train(tiny(examples=100), lrpi.make_mazes(30, 5), watched(interrupts, after))
    assert facts["steps_done"] == 4 and facts["stopped"] == "interrupted"
    _, facts = lrpi.train(tiny(examples=100), lrpi.make_mazes(30, 5), watched([True]))
    assert facts["steps_done"] == 0 and facts["stopped"] == "interrupted"


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_against_plain_loops(monkeypatch):
    """Every metric, cell by cell in float64, atol 1e-5; the logits lean towards the label, more and more."""
    puzzles, g = lrpi.make_mazes(12, 5, "test"), generator()
    lean = F.one_hot(puzzles.y.long(), 5).float()
    logits = [k * lean + torch.randn(lean.shape, generator=g) for k in (0.0, 3.0, 3.5, 4.0)]

    def rollout(model, x, steps=()):
        rows = [(puzzles.x == row).all(1).nonzero()[0, 0].item() for row in x]
        return [lrpi.Step(None, logits[s][rows], logits[s + 1][rows], None) for s in range(3)]

    monkeypatch.setattr(lrpi, "rollout", rollout)
    ws = [[0.0, 1.0, 2.5]] * 3
    curves = lrpi.evaluate(lrpi.LoopedModel(tiny()), puzzles, ws=ws, batch=5)
    assert 0 < curves["exact"][1] < 1
    in_the_end = []
    for i in range(12):
        answer = logits[3][i].argmax(-1).tolist()
        whole = START in answer and GOAL in answer
        in_the_end.append(whole and solved_by_hand(puzzles.x[i].tolist(), answer, 5))
    assert 0 < sum(in_the_end) < 12
    for s in range(3):
        for of, rows in (
            (curves, range(12)),
            (curves["solved"], [i for i in range(12) if in_the_end[i]]),
            (curves["unsolved"], [i for i in range(12) if not in_the_end[i]]),
        ):
            sums, bins, guided = dict.fromkeys(lrpi.METRICS, 0.0), [0] * 13, [[0.0, 0.0] for _ in ws[0]]
            before, after = (logits[k].double().softmax(-1) for k in (s, s + 1))
            delta = logits[s + 1].double() - logits[s].double()
            for i in rows:
                answer = after[i].argmax(-1).tolist()
                whole = START in answer and GOAL in answer
                sums["exact"] += 25 * (whole and solved_by_hand(puzzles.x[i].tolist(), answer, 5))
                for k, w in enumerate(ws[0]):
                    l_w = logits[s][i].double() + w * delta[i]
                    said = l_w.argmax(-1).tolist()
                    whole = START in said and GOAL in said
                    guided[k][0] += 25 * (whole and solved_by_hand(puzzles.x[i].tolist(), said, 5))
                    for cell in range(25):
                        guided[k][1] += l_w.log_softmax(-1)[cell, puzzles.y[i, cell].item()].item()
                for cell in range(25):
                    label = puzzles.y[i, cell].item()
                    pu, pc = before[i, cell].tolist(), after[i, cell].tolist()
                    A = [math.log(c / u) for u, c in zip(pu, pc, strict=True)]
                    gain = A[label] - sum(c * a for c, a in zip(pc, A, strict=True))
                    sums["cells"] += answer[cell] == label
                    sums["logp"] += math.log(pc[label])
                    sums["gain"] += A[label]
                    sums["margin"] += gain
                    sums["kl"] += sum(c * a for c, a in zip(pc, A, strict=True))
                    sums["margin_positive"] += gain > 0
                    d = delta[i, cell].tolist()
                    sums["residual"] += math.sqrt(sum((a - sum(d) / 5) ** 2 for a in d))
                    bins[sum(gain > edge for edge in lrpi.MARGIN_EDGES)] += 1
            n = 25 * len(rows)
            for name, total in sums.items():
                assert abs(of[name][s] - total / n) < 1e-5, name
            if of is curves:
                assert torch.allclose(torch.tensor(of["margins"][s]), torch.tensor(bins) / n, atol=1e-6)
                for k in range(3):
                    assert abs(of["guided_exact"][s][k] - guided[k][0] / n) < 1e-6
                    assert abs(of["guided_logp"][s][k] - guided[k][1] / n) < 1e-5


def test_a_rollout_can_be_longer_than_in_training():
    model, x, *_ = model_and_state(tiny(n_sup=6))
    seen = list(lrpi.rollout(model, x, range(1, 10)))
    assert len(seen) == 9 and not seen[0].logits_u.requires_grad
    for before, after in itertools.pairwise(seen):
        assert torch.equal(before.logits_c, after.logits_u), "after a step is before the next"
    longer, _, _, _, _ = model_and_state(tiny(n_sup=6, think=9))
    assert torch.equal(list(lrpi.rollout(longer, x))[8].logits_c, seen[8].logits_c)
    for step in seen:
        assert torch.equal(step.logits_c, model.readout(step.y)) and step.rows.tolist() == [0, 1, 2]


def synthetic(monkeypatch, puzzles, leans, spread=0.0, seed=0):
    """Makes every rollout give logits that lean towards the label of its puzzle by leans[s] after step s."""
    noise = torch.randn(len(puzzles), len(leans), *puzzles.y.shape[1:], 5, generator=generator(seed))
    keys = {tuple(row): i for i, row in enumerate(puzzles.x.tolist())}

    def rollout(model, x, steps=(), stop=None):
        rows = torch.tensor([keys[tuple(row)] for row in x.tolist()])
        lean = F.one_hot(puzzles.y[rows].long(), 5).float()
        logits = [k * lean + spread * noise[rows, s] for s, k in enumerate(leans)]
        for s in range(1, len(leans)):
            yield lrpi.Step(torch.arange(len(x)), logits[s - 1], logits[s], None)

    monkeypatch.setattr(lrpi, "rollout", rollout)


def test_verdicts_on_steps_built_to_improve_do_nothing_or_harm(monkeypatch):
    """With noise of 1 on every logit: a step that only draws new noise is dead, however large its KL."""
    puzzles, valid = lrpi.make_mazes(300, 5, "test"), lrpi.make_mazes(300, 5, "test", 1)
    both = lrpi.Puzzles(
        *(torch.cat([getattr(p, f.name) for p in (puzzles, valid)]) for f in lrpi.fields(puzzles))
    )
    model = lrpi.LoopedModel(tiny(n_sup=5))
    synthetic(monkeypatch, both, [0.0, 2.0, 2.0, 3.0, 2.0, 2.0], spread=1.0)
    found = lrpi.diagnose(model, puzzles, valid)
    assert found["verdict"] == ["improves", "dead", "improves", "harms", "dead"]
    assert found["summary"] == (
        "step 1 improves, step 2 is dead, step 3 improves, step 4 harms, step 5 is dead: "
        "40% of the forward passes do the work"
    )
    assert found["kl"][1] > 0.1 and found["step_size"][3] == "overshoots"
    synthetic(monkeypatch, both, [0.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    found = lrpi.diagnose(model, puzzles, valid)
    assert found["verdict"] == ["improves", "dead", "dead", "dead", "improves"]
    assert found["step_size"][0] == found["step_size"][4] == "too timid", "all residuals favour the label"
    assert found["w_star"][0] == math.inf and all(math.isnan(w) for w in found["w_star"][1:4])
    assert found["cut"]["steps"] == [2, 3, 4] and found["cut"]["changed"] == 0


def test_verdicts_err_as_seldom_as_they_say(monkeypatch):
    """100 rollouts of 5 dead steps: all 5 are found dead in at least 95 of 100 on average; 3 sigma: 88."""
    puzzles, model, right = lrpi.make_mazes(60, 5, "test"), lrpi.LoopedModel(tiny(n_sup=5)), 0
    monkeypatch.setattr(lrpi, "RESAMPLES", 1000)
    for seed in range(100):
        synthetic(monkeypatch, puzzles, [2.0] * 6, spread=1.0, seed=seed)
        intervals = lrpi.evaluate(model, puzzles)["gain_interval"]
        right += lrpi.verdicts(intervals, "harms", "dead", "improves") == ["dead"] * 5
    assert right >= 88


def test_intervals_against_a_plain_bootstrap(monkeypatch):
    """Resampling 200 puzzles with replacement gives the same 98.33% interval, to a tenth of its width."""
    puzzles, model = lrpi.make_mazes(200, 5, "test"), lrpi.LoopedModel(tiny(n_sup=3))
    synthetic(monkeypatch, puzzles, [0.0, 1.0, 1.2, 1.1], spread=1.0)
    found = lrpi.evaluate(model, puzzles, batch=64)
    g = generator(5)
    for s, step in enumerate(lrpi.rollout(model, puzzles.x)):
        y = puzzles.y.long()[..., None]
        before, after = (logits.log_softmax(-1).gather(-1, y) for logits in step[1:3])
        gains = (after - before).mean((1, 2))
        means = gains[torch.randint(0, 200, (4000, 200), generator=g)].mean(1)
        expected = means.quantile(torch.tensor([0.05 / 6, 1 - 0.05 / 6])).tolist()
        low, high = found["gain_interval"][s]
        assert abs(low - expected[0]) + abs(high - expected[1]) < 0.2 * (high - low)


def test_sums_do_not_depend_on_the_batch():
    model, puzzles = lrpi.LoopedModel(tiny(n_sup=2)), lrpi.make_mazes(30, 5, "test")
    a, b = (lrpi.evaluate(model, puzzles, batch=batch) for batch in (7, 30))
    for name in lrpi.METRICS:
        assert torch.allclose(torch.tensor(a[name]), torch.tensor(b[name]), atol=1e-4), name


@pytest.mark.parametrize("rule", ["kl", "change", "head"])
def test_halting_gives_the_answers_of_the_plain_rollout_at_the_halting_step(rule):
    """Bit for bit, and who has stopped costs nothing: only what is left of the batch goes through the net."""
    model, *_ = model_and_state(tiny(act=True, n_sup=9))
    puzzles, sizes = lrpi.make_mazes(80, 5, "test"), []
    plain = list(lrpi.rollout(model, puzzles.x))
    scores = torch.stack([lrpi.HALTS[rule](model, step) for step in plain], 1)  # [80, 9]
    threshold = scores.quantile(0.3).item()
    model.nets[0][0].register_forward_hook(lambda block, args, out: sizes.append(len(out)))
    answers, taken = lrpi.answer(model, puzzles.x, stop=lrpi.stopping(rule, threshold), batch=50)
    for i in range(80):
        below = [s for s in range(9) if scores[i, s] <= threshold] or [8]
        assert taken[i] == below[0] + 1
        assert torch.equal(answers[i].long(), plain[below[0]].logits_c[i].argmax(-1))
    assert len(taken.unique()) > 2, "they stop at different steps"
    assert sum(sizes) == 3 * taken.sum().item()


def test_halting_by_hand():
    """KL summed over the cells; largest change of any cell; the head of TRM with its sign turned."""
    model, *_ = model_and_state(tiny(act=True))
    u, c = torch.randn(4, 25, 5), torch.randn(4, 25, 5)
    step = lrpi.Step(None, u, c, torch.randn(4, 25, 16))
    p, q = u.softmax(-1), c.softmax(-1)
    assert torch.allclose(lrpi.HALTS["kl"](model, step), (q * (q / p).log()).sum((1, 2)), atol=1e-4)
    assert torch.allclose(lrpi.HALTS["change"](model, step), (q - p).abs().amax((1, 2)), atol=1e-6)
    head = step.y[:, 0] @ model.halting.weight[0] + model.halting.bias
    assert torch.allclose(lrpi.HALTS["head"](model, step), -head, atol=1e-5)


def test_the_halting_threshold_is_the_cheapest_that_loses_little():
    """Against a search over all thresholds by plain loops."""
    g = generator(1)
    scores, solved = (
        torch.rand(400, 6, generator=g),
        torch.rand(400, 6, generator=g) < torch.linspace(0.3, 0.9, 6),
    )
    solved = solved.cummax(1).values  # a solved puzzle stays solved
    curve = lrpi.halting_curve(scores, solved)

    def outcome(threshold):
        steps, right = 0, 0
        for row, ok in zip(scores.double().tolist(), solved.tolist(), strict=True):
            s = next((s for s in range(5) if row[s] <= threshold), 5)
            steps, right = steps + s + 1, right + ok[s]
        return steps / 400, right / 400

    best = max(
        map(outcome, [-1.0, *scores.flatten().double().sort().values.tolist()[::5]]), key=lambda o: o[1]
    )[1]
    assert (curve["steps"][0], curve["exact"][0]) == outcome(-1.0), "the curve begins without halting"
    steps, right = outcome(curve["threshold"])
    assert right >= best - lrpi.HALT_LOSS - 0.005
    for threshold in scores.flatten().double().quantile(torch.linspace(0, 1, 50).double()).tolist():
        other = outcome(threshold)
        assert other[0] >= steps - 0.05 or other[1] < best - lrpi.HALT_LOSS


def test_a_model_of_another_size_computes_the_same():
    """On a 9 x 9 maze inside a wall of blank cells nothing is shared but the weights: they are the same."""
    model, *_ = model_and_state(tiny(size=5))
    larger = lrpi.resized(model, 9)
    assert larger.cfg.size == 9 and all(
        torch.equal(v, larger.state_dict()[k]) for k, v in model.state_dict().items()
    )
    h = torch.zeros(1, 9, 9, 16)
    h[:, 2:7, 2:7] = torch.randn(1, 5, 5, 16)
    inner = larger.nets[0][0].mix(h.flatten(1, 2)).unflatten(1, (9, 9))[:, 2:7, 2:7]
    assert torch.allclose(inner.flatten(1, 2), model.nets[0][0].mix(h[:, 2:7, 2:7].flatten(1, 2)), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Files and the command line


def cli(*args, cwd=HERE, env=(), timeout=180):
    command = [sys.executable, str(HERE / "lrpi.py"), *map(str, args)]
    env = {**os.environ, **dict(env)}
    return subprocess.run(
        command, cwd=cwd, env=env, text=True, capture_output=True, timeout=timeout, check=False
    )


QUICK = "--size 5 --examples 120 --train-size 200 --test-size 40 --width 16 --ffn 32".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run of the real command in an empty folder: the process and where its results lie."""
    folder = tmp_path_factory.mktemp("run")
    done = cli("--task", "maze", *QUICK, "--seed", "5", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "runs" / "maze-dis"


def test_the_command_writes_everything(trained):
    done, out = trained
    pictures = [
        "guidance.png",
        "halting.png",
        "improvement.png",
        "solution.gif",
        "solution.png",
        "thinking.png",
    ]
    names = sorted([*pictures, "metrics.json", "model.pt"])
    assert sorted(p.name for p in out.iterdir()) == names, "and no temporary files"
    metrics = json.loads((out / "metrics.json").read_text())
    facts = {"task": "maze", "scheme": "dis", "size": 5, "seed": 5, "passes": 18, "device": metrics["device"]}
    assert facts.items() <= metrics.items() and metrics["torch"] == torch.__version__
    assert (
        metrics["examples_seen"] == 120 and metrics["config"]["examples"] == 120 and metrics["stopped"] == ""
    )
    model = lrpi.load_checkpoint(str(out / "model.pt"))[0]
    assert metrics["params"] == sum(p.numel() for p in model.parameters())
    assert 0 < metrics["train_seconds"] < metrics["total_seconds"]
    for name in ("exact", "cells", "logp", "margin", "kl", "margin_positive", "gain", "residual"):
        assert len(metrics[name]) == 6 and all(map(math.isfinite, metrics[name]))
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("step  solved"))
    table = [line.split() for line in lines[at + 1 : at + 7]]
    assert [row[1] for row in table] == [f"{v:.1%}" for v in metrics["exact"]]
    assert [row[11].strip(",") for row in table] == metrics["verdict"]
    assert lines[at + 8] == metrics["summary"] and metrics["summary"].endswith("passes do the work")
    assert list(metrics["halting"]) == ["none", "kl", "change"] and len(metrics["w_star"]) == 6
    assert metrics["halting"]["none"] == {
        **metrics["halting"]["none"],
        "passes": 18,
        "exact": metrics["exact"][5],
    }
    assert list(metrics["thinking"]) == ["5", "15", "21", "31"]
    assert all(len(of["exact"]) == 24 and of["puzzles"] >= 5 for of in metrics["thinking"].values())
    for of in ("solved", "unsolved"):
        assert metrics[of] is None or len(metrics[of]["logp"]) == 6
    assert all(len(row) == len(metrics["ws"]) + 1 for row in metrics["guided_exact"] + metrics["guided_logp"])
    assert len([line for line in done.stdout.splitlines() if "held-out solved" in line]) == 10, (
        "sparse progress"
    )
    assert done.stderr == ""


def test_figures_are_pictures_and_the_animation_has_all_frames(trained):
    from PIL import Image

    _, out = trained
    for name in ("improvement.png", "guidance.png", "halting.png", "thinking.png", "solution.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG" and 700 < image.width < 1600
            assert len(image.convert("RGB").getcolors(10**6)) > 5, "something is drawn"
    with Image.open(out / "solution.gif") as image:
        assert image.format == "GIF" and 7 <= image.n_frames <= 9, "puzzle, six steps, solution"


def test_a_long_rollout_is_drawn_in_18_frames_at_most(tmp_path):
    from PIL import Image

    model = lrpi.LoopedModel(tiny(n_sup=40, width=8, ffn=8))
    lrpi.draw_solution(model, lrpi.make_mazes(1, 5), tmp_path)
    with Image.open(tmp_path / "solution.png") as image:
        assert image.width < 1600 and image.height < 1000
    with Image.open(tmp_path / "solution.gif") as image:
        assert 2 <= image.n_frames <= 18


def without_times(path):
    metrics = json.loads(path.read_text())
    for of in metrics["halting"].values():
        assert of.pop("puzzles_per_second") > 0
    return {k: v for k, v in metrics.items() if k not in ("total_seconds", "config")}


def test_eval_reproduces_the_metrics(trained):
    _, out = trained
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = cli("--eval", out / "model.pt")
    assert done.returncode == 0, done.stderr
    assert without_times(out / "metrics.json") == without_times(out / "eval" / "metrics.json")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before, (
        "nothing there was touched"
    )


def test_eval_can_halt_think_longer_and_change_the_size(trained, tmp_path, capsys):
    checkpoint = ["--eval", str(trained[1] / "model.pt"), "--no-figures", "--out", str(tmp_path)]
    assert lrpi.main([*checkpoint, "--halt", "--think", "9", "--size", "9"]) == 0
    metrics, said = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out
    assert len(metrics["exact"]) == 9 and metrics["passes"] == 27 and metrics["size"] == 9
    halted = metrics["halting"]["kl"]
    assert f"with {halted['passes']:.1f}".removesuffix(".0") + " of 27 forward passes each on average" in said
    assert "(--halt kl)" in said and list(metrics["thinking"]) == ["9", "15", "21", "31"]
    model, _ = lrpi.load_checkpoint(checkpoint[1], size=9)
    test = lrpi.make_mazes(40, 9, "test")
    stop = lrpi.stopping("kl", float(metrics["halt"]["kl"]["threshold"]))
    answers, taken = lrpi.answer(model, test.x, range(1, 10), stop)
    assert halted["passes"] == 3 * taken.double().mean()
    assert halted["exact"] == lrpi.maze_solved(test.x, answers).double().mean()
    for args, said in (
        (["--halt", "head"], "--act"),
        (["--size", "8"], "one of 5, 7, 9"),
        (["--think", "-2"], "from 0"),
    ):
        assert lrpi.main([*checkpoint, *args]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lrpi: {' '.join(args)}: ") and said in error and error.count("\n") == 1
    assert lrpi.main([*checkpoint[:3], "--test-size", "1", "--halt", "change", "--out", str(tmp_path)]) == 0
    assert "of 1 held-out" in capsys.readouterr().out


def test_what_is_made_for_one_size_keeps_it(tmp_path, capsys):
    args = [*QUICK, "--examples", "10", "--no-figures", "--out", str(tmp_path)]
    assert lrpi.main([*args, "--mixer", "mlp", "--act", "--halt", "head"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["thinking"]) == ["5"] and list(metrics["halting"]) == ["none", "kl", "change", "head"]
    assert "--halt head" in capsys.readouterr().out
    assert lrpi.main(["--eval", str(tmp_path / "model.pt"), "--size", "7"]) == 2
    assert "--size 7" in capsys.readouterr().err


def test_eval_does_not_inherit_where_training_wrote(tmp_path, capsys):
    assert lrpi.main([*QUICK, "--no-figures", "--out", str(tmp_path)]) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert lrpi.main(["--eval", str(tmp_path / "model.pt"), "--test-size", "20"]) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert (tmp_path / "eval" / "solution.png").exists(), "nor that it was to draw nothing"
    assert "of 20 held-out" in capsys.readouterr().out


@pytest.mark.parametrize("given", [
    ["--scheme", "trm", "--n-sup", "3"], ["--scheme", "trm-medium"], ["--size", "15"], ["--size", "21"],
    ["--mixer", "attention"], ["--mixer", "mlp"], ["--target", "final", "--no-recall"],
    ["--target", "reveal", "--step-index", "--noise", "0"],
    ["--layers", "2", "--ffn", "0", "--T", "2", "--n", "1", "--ema", "0.9"],
    ["--target", "mask", "--feedback"], ["--target", "replace", "--power", "1", "--linear"],
    ["--hinge", "1", "--awr", "1"], ["--scheme", "one-pass"], ["--scheme", "final", "--budget-seconds", "0.5"],
    ["--task", "sudoku"], ["--task", "sudoku", "--size", "6", "--mixer", "conv", "--scheme", "trm-medium"],
    ["--task", "nqueens"], ["--task", "nqueens", "--size", "6", "--target", "mask", "--scheme", "one-pass"],
    ["--preset", "paper-compact", "--batch-size", "8"], ["--task", "sudoku", "--size", "4", "--precision", "bf16",
     "--preset", "trm", "--mixer", "mlp", "--batch-size", "8", "--heads", "4", "--n-sup", "3", "--deterministic"],
])  # fmt: skip
def test_every_kind_of_model_trains(given, tmp_path, capsys):
    small = ["--examples", "10", "--train-size", "50", "--test-size", "8", "--width", "16", "--ffn", "32"]
    assert lrpi.main([*small, *given, "--no-figures", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    cfg = metrics["config"]
    assert metrics["passes"] == cfg["n_sup"] * cfg["T"] * (cfg["n"] + 1) and metrics["stopped"] == ""
    assert "forward passes each" in capsys.readouterr().out


@pytest.mark.parametrize("args, named", [
    (["--task", "chess"], ["--task", "chess", "maze"]),
    (["--scheme", "magic"], ["--scheme", "magic", "dis", "trm-medium"]),
    (["--target", "none"], ["--target", "none", "reveal"]),
    (["--mixer", "fft"], ["--mixer", "fft", "attention"]),
    (["--size", "12"], ["--size", "12", "5, 7, 9, .., 61"]),
    (["--size", "3"], ["--size", "3", "from 4 to 61"]),
    (["--size", "63"], ["--size", "63", "61"]),
    (["--size", "big"], ["--size", "big", "whole number"]),
    (["--examples", "0"], ["--examples", "0", "from 1"]),
    (["--examples", "1.5"], ["--examples", "1.5", "whole"]),
    (["--batch-size", "-4"], ["--batch-size", "-4", "from 1"]),
    (["--train-size", "0"], ["--train-size", "0", "from 1"]),
    (["--test-size", "0"], ["--test-size", "0", "from 1"]),
    (["--n-sup", "0"], ["--n-sup", "0", "from 1"]),
    (["--kernel", "4"], ["--kernel", "4", "odd"]),
    (["--lr", "nan"], ["--lr", "nan", "number"]),
    (["--lr", "inf"], ["--lr", "inf", "number"]),
    (["--lr", "-1"], ["--lr", "-1", "from 0"]),
    (["--ema", "1"], ["--ema", "1", "0.99"]),
    (["--mixer", "attention", "--heads", "5"], ["--heads", "5", "64"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["--pace", "0"], ["--pace", "0", "from 1"]),
    (["--noise", "-1"], ["--noise", "-1", "from 0"]),
    (["--think", "-1"], ["--think", "-1", "from 0"]),
    (["--halt", "never"], ["--halt", "never", "off, kl, change, head"]),
    (["--halt", "head"], ["--halt head", "--act"]),
    (["--eval", "nowhere.pt"], ["--eval", "nowhere.pt", "no such file"]),
    (["--out", "/dev/null/x"], ["--out", "/dev/null/x", "folder"]),
    (["--speed", "9"], ["--speed"]),
    (["--size"], ["--size", "argument"]),
    (["--eval", ""], ["--eval", "no such file"]),
    (["--task", "sudoku", "--size", "8"], ["--size 8", "for sudoku", "4, 6, 9"]),
    (["--task", "nqueens", "--size", "4"], ["--size 4", "for nqueens", "5, 6, 7, 8, 9, 10"]),
    (["--task", "nqueens", "--size", "11"], ["--size 11", "for nqueens", "5, 6, 7, 8, 9, 10"]),
    (["--blanks", "-1"], ["--blanks", "-1", "from 0 to 54"]),
    (["--blanks", "55"], ["--blanks", "55", "from 0 to 54"]),
    (["--task", "sudoku", "--size", "4", "--blanks", "11"], ["--blanks 11", "--size 4", "from 0 to 10"]),
    (["--budget-seconds", "0"], ["--budget-seconds 0", "more"]),
    (["--budget-seconds", "-1"], ["--budget-seconds", "-1", "from 0"]),
    (["--target", "file"], ["--target file", "--trajectories"]),
    (["--trajectories", "a.npz"], ["--target file", "--trajectories"]),
    (["--hinge", "-1"], ["--hinge", "-1", "from 0"]),
    (["--seeds", "2"], ["--seeds 2", "--compare"]),
    (["--compare", "dis", "--seeds", "0"], ["--seeds 0", "from 1 to 1000"]),
    (["--compare", "dis", "--seeds", "two"], ["--seeds two", "whole number"]),
    (["--compare", "dis,best"], ["--compare best", "--scheme best", "one of dis, dis-margin, final"]),
    (["--compare", ""], ["--compare", "--scheme", "one of"]),
    (["--compare", "dis,final,dis"], ["--compare dis,final,dis", "twice"]),
    (["--compare", "dis+noise=loud"], ["--compare dis+noise=loud", "--noise loud", "a number"]),
    (["--compare", "dis+budget-seconds=0"], ["--compare dis+budget-seconds=0", "--budget-seconds 0"]),
    (["--compare", "dis+eval=x"], ["--compare dis+eval=x", "--eval"]),
    (["--compare", "dis+task=sudoku"], ["--compare dis+task=sudoku", "--task"]),
    (["--compare", "dis", "--eval", "model.pt"], ["--eval", "--compare"]),
    (["--compare", "dis", "--size", "12"], ["--size", "12"]),
    (["--resume"], ["--resume", "there is no runs/maze-dis/training.pt"]),
    (["--resume", "--eval", "model.pt"], ["--resume", "--eval"]),
    (["--bench", "--compare", "dis"], ["--bench", "--compare"]),
    (["--bench", "--resume"], ["--resume", "--bench"]),
    (["--preset", "huge"], ["--preset huge", "none, paper-compact, paper-medium, trm"]),
    (["--precision", "fp8"], ["--precision fp8", "auto, fp32, tf32, bf16"]),
    (["--optimizer", "sgd"], ["--optimizer sgd", "muon, adamw, adam-atan2"]),
    (["--save-minutes", "-1"], ["--save-minutes", "-1", "from 0"]),
    (["--task", "arc"], ["--data DIR", "arc needs it"]),
    (["--task", "nqueens", "--data", "."], ["--data .", "maze, sudoku or arc"]),
    (["--data", "nowhere"], ["--data", "test.csv", "No such file"]),
    (["--data", os.devnull], ["--data", "test.csv", "Not a directory"]),
    (["--task", "arc", "--data", "nowhere"], ["--data nowhere", "challenges.json"]),
    (["--identifiers", "5"], ["--identifiers 5", "--task arc"]),
    (["--views", "0"], ["--views", "0", "from 1"]),
    (["--solve", "nowhere.txt"], ["--solve nowhere.txt", "No such file", "text file"]),
    (["--solve", "."], ["--solve .", "Is a directory", "text file"]),
    (["--solve", __file__], ["--solve", "runs/maze-*/model.pt", "--checkpoint"]),
    (["--solve", "-", "--eval", "m.pt"], ["--solve -", "--eval"]),
    (["--checkpoint", "m.pt"], ["--checkpoint m.pt", "--solve"]),
])  # fmt: skip
def test_bad_input_gets_one_clear_line(args, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lrpi.main(args) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and all(word in said.err for word in named), said.err
    assert not any(tmp_path.iterdir()), "refused before anything was written"


def test_bad_input_as_a_process():
    done = cli("--size", "10")
    assert (
        done.returncode == 2 and done.stderr == "lrpi: --size 10: for maze must be one of 5, 7, 9, .., 61\n"
    )
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(capsys, tmp_path):
    assert lrpi.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_bad_checkpoints(trained, tmp_path, capsys):
    whole = (trained[1] / "model.pt").read_bytes()
    content = torch.load(trained[1] / "model.pt", weights_only=True)
    cases = {f"cut{tenth}": whole[: len(whole) * tenth // 10] for tenth in range(10)} | {
        "text": b"not a model"
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"state_dict": {}}, tmp_path / "foreign")
    for name, other in {"list": [1, 2], "tensor": torch.ones(3), "int": 7}.items():
        torch.save(other, tmp_path / name)
    torch.save({**content, "facts": {}}, tmp_path / "no_facts")
    spoilt = {name: v * math.nan for name, v in content["model"].items()}
    torch.save({**content, "model": spoilt}, tmp_path / "not_finite")
    for at in range(100, len(whole), len(whole) // 20):
        flipped = bytearray(whole)
        flipped[at] ^= 255
        (tmp_path / f"flip{at}").write_bytes(flipped)
    torch.save({**content, "config": {**content["config"], "task": "chess"}}, tmp_path / "other_task")
    torch.save({**content, "config": {**content["config"], "colour": 3}}, tmp_path / "newer")
    torch.save({**content, "config": {**content["config"], "width": 20}}, tmp_path / "misfit")
    torch.save({**content, "facts": Path("x")}, tmp_path / "code")  # a class that weights_only refuses
    (tmp_path / "folder").mkdir()
    for path in sorted(tmp_path.iterdir()):
        if path.name.startswith(
            "flip"
        ):  # some flips only change a weight, and zip's checksums catch those, too
            assert lrpi.main(["--eval", str(path), "--no-figures", "--out", str(tmp_path / "flipped")]) in (
                0,
                2,
            )
            assert "Traceback" not in capsys.readouterr().err
            continue
        assert lrpi.main(["--eval", str(path), "--out", str(tmp_path / "out")]) == 2, path
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error, error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size_or_scheme(trained, capsys):
    checkpoint = str(trained[1] / "model.pt")
    for args, named in (
        (["--width", "11"], "11 16"),
        (["--scheme", "trm"], "trm dis"),
        (["--examples", "9"], "9 120"),
    ):
        assert lrpi.main(["--eval", checkpoint, *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in (args[0], checkpoint, *named.split()))


def test_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = cli(*QUICK, "--out", tmp_path / "out", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "matplotlib" in done.stderr and "--no-figures" in done.stderr
    done = cli(*QUICK, "--out", tmp_path / "out", "--no-figures", env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "model.pt"]


def test_an_unfinished_file_replaces_nothing(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), lrpi.replacing(path) as beside:
        beside.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_diverging_run_exits_with_2_and_keeps_a_good_model(tmp_path, capsys):
    args = [
        *QUICK,
        "--examples",
        "800",
        "--lr",
        "1e30",
        "--muon-lr",
        "1e30",
        "--no-figures",
        "--out",
        str(tmp_path),
    ]
    assert lrpi.main(args) == 2
    assert "no longer finite at step" in capsys.readouterr().err
    model, facts = lrpi.load_checkpoint(str(tmp_path / "model.pt"))
    assert all(v.isfinite().all() for v in model.state_dict().values()) and facts["steps_done"] < 400


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT as a terminal does")
def test_ctrl_c_saves_evaluates_and_exits_130(tmp_path):
    args = [*QUICK, "--examples", "40000", "--train-size", "1000", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(HERE / "lrpi.py"), *args], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while "held-out solved" not in process.stdout.readline():  # after a tenth of the steps
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and "held-out puzzles solved" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["stopped"] == "interrupted" and 2000 <= metrics["steps_done"] < 20000
    assert (tmp_path / "solution.gif").exists()
    assert lrpi.load_checkpoint(str(tmp_path / "model.pt"))[1]["steps_done"] == metrics["steps_done"]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_progress_is_rewritten_in_place_on_a_terminal(tmp_path):
    import pty

    master, slave = pty.openpty()
    args = [*QUICK, "--no-figures", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(HERE / "lrpi.py"), *args], stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    assert process.wait(timeout=120) == 0
    assert text.count(b"\r\x1b[K") == 60 and b"100%" in text and b"s left" in text


def test_every_option_is_a_flag_with_meaning_and_range():
    done = cli("--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and "--eval CHECKPOINT" in text
    for flag in "task scheme size seed examples batch-size device out n-sup T muon-lr".split():
        assert f" --{flag} VALUE " in text
    for said in (
        "an odd number from 1 to 31",
        "one of dis, dis-margin, final, one-pass, trm, trm-medium",
        "one of auto, cuda, mps, cpu",
        "--recall, --no-recall",
        "--halt [VALUE]",
        "a whole number from 1 to 1000 [6, one-pass: 1, trm: 16, trm-medium: 16]",
    ):
        assert said in text
    for f in lrpi.fields(lrpi.Config):
        assert len(f.metadata["help"]) > 8 and f.metadata["help"] in text


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_gives_one_line_and_keeps_the_old_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "model.pt").write_text("old")
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(Path("/dev/full"), data))
    assert lrpi.main([*QUICK, "--no-figures", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
    assert (tmp_path / "model.pt").read_text() == "old"


# ------------------------------------------------------------------------------------------------------------
# Trajectories and comparisons


def write_trajectories(path, count=30, steps=3, **changed):
    """A file of mazes of side 5 whose plan marks the path from the start on, a third more at each step."""
    puzzles = lrpi.make_mazes(count, 5)
    shown = torch.rand(puzzles.x.shape, generator=generator()) * steps
    plan = torch.stack([torch.where(shown <= s, puzzles.y, puzzles.x) for s in range(1, steps + 1)], 1)
    np.savez(path, **{"x": puzzles.x.numpy(), "plan": plan.numpy(), **changed})
    return puzzles, plan


def test_trajectories_are_the_targets_in_the_order_of_the_file(tmp_path, capsys):
    puzzles, plan = write_trajectories(tmp_path / "t.npz")
    options = ["--target", "file", "--trajectories", str(tmp_path / "t.npz")]
    given = {
        k: v for k, v in lrpi.parse(["--size", "5", *options]).items() if k in lrpi.Config.__annotations__
    }
    read = lrpi.load_trajectories(lrpi.configure(**given))
    assert torch.equal(read.x, puzzles.x) and torch.equal(read.y, puzzles.y) and torch.equal(read.plan, plan)
    assert lrpi.main([*QUICK, *options, "--no-figures", "--out", str(tmp_path)]) == 0
    (tmp_path / "t.npz").unlink()  # an evaluation does without the file
    assert lrpi.main(["--eval", str(tmp_path / "model.pt"), "--no-figures"]) == 0
    assert "--trajectories" not in capsys.readouterr().err


@pytest.mark.parametrize("changed, named", [
    ({"x": np.zeros((30, 24), np.uint8)}, ["x [30, 24]", "[N, 25]"]),
    ({"x": np.zeros((29, 25), np.uint8)}, ["x [29, 25]", "plan [30, 3, 25]"]),
    ({"x": np.array(3)}, ["x []"]),
    ({"plan": np.zeros((30, 25), np.uint8)}, ["plan [30, 25]", "[N, S, 25]"]),
    ({"plan": np.zeros((30, 0, 25), np.uint8)}, ["plan [30, 0, 25]", "1 or more"]),
    ({"plan": np.full((30, 3, 25), 5)}, ["plan has int64 from 5 to 5", "from 0 to 4"]),
    ({"x": np.full((30, 25), -1)}, ["x has int64 from -1 to -1"]),
    ({"x": np.zeros((30, 25))}, ["x has float64", "whole numbers"]),
    ({"plan": np.array([["a"]])}, ["plan [1, 1]"]),
    ({"x": np.array([None] * 30)}, ["must be an .npz file"]),  # would need pickle
])  # fmt: skip
def test_a_bad_trajectory_file_gets_one_clear_line(changed, named, tmp_path, capsys):
    path = tmp_path / "bad.npz"
    write_trajectories(path, **changed)
    options = ["--target", "file", "--trajectories", str(path), "--out", str(tmp_path / "out"), "--size", "5"]
    assert lrpi.main(options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in [f"--trajectories {path}", *named]), said


def test_a_trajectory_must_end_in_a_solution_and_the_file_be_whole(tmp_path, capsys):
    path, out = tmp_path / "bad.npz", tmp_path / "out"
    options = ["--target", "file", "--trajectories", str(path), "--out", str(out), "--size", "5"]
    puzzles, plan = write_trajectories(path)
    plan[7, -1] = plan[7, 0] = puzzles.x[7]
    np.savez(path, x=puzzles.x.numpy(), plan=plan.numpy())
    assert lrpi.main(options) == 2
    assert "the last answer of puzzle 7 does not solve it" in capsys.readouterr().err
    whole = path.read_bytes()
    path.unlink()
    assert lrpi.main(options) == 2
    assert f"--trajectories {path}: No such file" in capsys.readouterr().err
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert lrpi.main(options) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"--trajectories {path}" in said and ".npz" in said
    np.savez(path, x=puzzles.x.numpy())
    assert lrpi.main(options) == 2
    assert "the arrays x and plan" in capsys.readouterr().err
    np.save(tmp_path / "one.npy", puzzles.x.numpy())
    assert lrpi.main([*options[:3], str(tmp_path / "one.npy"), *options[4:]]) == 2
    assert "must be an .npz file" in capsys.readouterr().err


ARMS = "dis,trm-medium+n-sup=2,one-pass+n=5"
COMPARE = [*QUICK, "--compare", ARMS, "--seeds", "2"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One small comparison by the real command, in an empty folder."""
    folder = tmp_path_factory.mktemp("compare")
    done = cli("--task", "maze", *COMPARE, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "runs" / "maze-compare"


def test_a_comparison_writes_its_runs_and_what_they_come_to(compared):
    done, out = compared
    runs = [f"{arm}-{seed}" for arm in ARMS.split(",") for seed in (0, 1)]
    files = [f"{run}{end}" for run in runs for end in (".json", ".pt")]
    assert {p.name for p in out.iterdir()} == {*files, "compare.json", "compare.csv", "compare.png"}
    found = json.loads((out / "compare.json").read_text())["arms"]
    assert list(found) == ARMS.split(",")
    for arm, of in found.items():
        assert of["runs"] == [json.loads((out / f"{arm}-{seed}.json").read_text()) for seed in (0, 1)]
        last = [run["exact"][-1] for run in of["runs"]]
        assert (of["least"], of["most"]) == (min(last), max(last))
        assert math.isclose(of["exact"], sum(last) / 2, abs_tol=1e-12)
        assert f"{of['exact']:.1%}" in done.stdout
        assert [run["seed"] for run in of["runs"]] == [0, 1]
        assert all(len(run["curve"]) == 10 for run in of["runs"])
    assert [found[arm]["passes"] for arm in found] == [18, 6, 6]
    with (out / "compare.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 60 and {row["scheme"] for row in rows} == set(found)
    row = rows[-1]
    assert (row["scheme"], row["seed"]) == ("one-pass+n=5", "1")
    assert float(row["exact"]) == found["one-pass+n=5"]["runs"][1]["curve"][-1]["exact"]


def test_a_comparison_starts_all_from_the_same_weights_and_examples(monkeypatch):
    """What schemes share they share: the weights at the start, whatever each adds, and the puzzles' order."""
    data, starts, lines = lrpi.make_mazes(50, 5), [], []
    for given in ({}, {"act": True}, {"untied": True}, {"step_index": True, "recall": False}, {"n_sup": 2}):
        cfg = tiny(examples=24, **given)
        seen = []

        def watch(at, loss, model, seen=seen):
            if loss is None:
                starts.append({name: v.clone() for name, v in model.state_dict().items()})
            return ""

        def spy(self, seen=seen, advance=lrpi.Episodes.advance):
            fresh = self.done.clone()
            puzzles = advance(self)
            seen += self.row[fresh].tolist()
            return puzzles

        with monkeypatch.context() as patched:
            patched.setattr(lrpi.Episodes, "advance", spy)
            lrpi.train(cfg, data, watch)
        lines.append(seen[:24])
    common = set.intersection(*(set(start) for start in starts))
    assert len(common) > 5
    assert all(torch.equal(start[name], starts[0][name]) for start in starts for name in common)
    assert all(
        torch.equal(v, starts[2][re.sub(r"nets\.\d+", "nets.0", name)]) for name, v in starts[2].items()
    )
    assert len(lines[0]) == 24 and all(line == lines[0] for line in lines)


def test_a_comparison_goes_on_where_it_was_killed(compared, tmp_path):
    """Kill it as soon as its second run has begun; the same command keeps the first run, bit for bit."""
    command = [sys.executable, str(HERE / "lrpi.py"), *COMPARE]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "run 2 of 6" in line:
            process.kill()
    process.wait()
    process.stdout.close()
    out = tmp_path / "runs" / "maze-compare"
    first = out / "dis-0.json"
    kept = first.read_bytes()
    assert not (out / "compare.json").exists()
    done = cli(*COMPARE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run 1 of 6, is there already" in done.stdout and "run 2 of 6\n" in done.stdout
    assert first.read_bytes() == kept
    for arm in ARMS.split(","):  # interrupted or not, the same comes out
        for seed in (0, 1):
            a, b = (json.loads((folder / f"{arm}-{seed}.json").read_text()) for folder in (out, compared[1]))
            assert a["exact"] == b["exact"] and a["train_passes"] == b["train_passes"]


def test_a_comparison_keeps_runs_of_other_options_apart(compared, capsys):
    _, out = compared
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert lrpi.main([*COMPARE, "--out", str(out), "--noise", "0.1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "dis-0.json" in said and "--noise" in said and "--out" in said
    (out / "dis-0.json").write_text("{}")
    assert lrpi.main([*COMPARE, "--out", str(out)]) == 2
    assert "dis-0.json: not a run of --compare" in capsys.readouterr().err
    (out / "dis-0.json").write_bytes(before["dis-0.json"])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_an_interrupted_comparison_exits_130_and_keeps_what_is_finished(tmp_path):
    command = [sys.executable, str(HERE / "lrpi.py"), *COMPARE, "--examples", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    text = ""
    for line in process.stdout:
        text += line
        if "run 2 of 6" in line:
            process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait() == 130 and "1 of 6 runs are finished" in text
    assert {p.name for p in (tmp_path / "runs" / "maze-compare").iterdir()} == {"dis-0.json", "dis-0.pt"}


@pytest.mark.parametrize("task", ["sudoku", "nqueens"])
def test_the_other_tasks_train_and_draw(task, tmp_path):
    given = ["--task", task, "--size", "6", "--examples", "60", "--test-size", "20", "--out", str(tmp_path)]
    assert lrpi.main(given) == 0
    pictures = [*(p.name for p in tmp_path.glob("*.png")), *(p.name for p in tmp_path.glob("*.gif"))]
    assert sorted(pictures) == ["guidance.png", "halting.png", "improvement.png", "solution.gif",
                                "solution.png", "thinking.png"]  # fmt: skip
    assert lrpi.main(["--eval", str(tmp_path / "model.pt"), "--no-figures"]) == 0
    fresh, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("", "eval"))
    assert fresh["exact"] == again["exact"]


# ------------------------------------------------------------------------------------------------------------
# Puzzles of your own, as text

SUDOKU = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
TEXTS = {
    "maze": "S #\n# #\n  G\n\n#####\n#S.G#\n#####\n",
    "sudoku": SUDOKU + "\n" + "\n".join(SUDOKU[i : i + 9].replace(".", "0") for i in range(0, 81, 9)),
    "nqueens": "Q......." + "." * 56 + "\n\n" + "........\n" * 7 + ". . . . . Q . .",
}


@pytest.mark.parametrize("task", [*TEXTS])
def test_texts_are_read_cell_by_cell(task):
    cfg = lrpi.configure(task=task)
    first, second = (
        lrpi.tokens_of(rows, cfg).tolist() for rows in lrpi.boards(TEXTS[task], lrpi.TASKS[task])
    )
    if task == "maze":
        assert first == [[START, OPEN, WALL], [WALL, OPEN, WALL], [OPEN, OPEN, GOAL]]
        assert second == [[WALL] * 5, [WALL, START, OPEN, GOAL, WALL], [WALL] * 5]
    elif task == "sudoku":
        digits = [int(c) if c != "." else 0 for c in SUDOKU]
        assert first == second == [digits[i : i + 9] for i in range(0, 81, 9)]
        framed = "5 3 . | . 7 . | . . .\n------+-------+------\n"
        assert [c for *_, c in lrpi.boards(framed, lrpi.TASKS[task])[0][0]] == list("53..7....")
    else:
        assert (first[0][0], second[7][5]) == (1, 1) and sum(map(sum, first + second)) == 2


def test_solving_prints_what_a_plain_rollout_answers(trained, tmp_path, capsys):
    from PIL import Image

    maze = "  #  S\n# # # \n  #   \n ###  \n     G"  # 5 x 6: neither square nor odd
    (tmp_path / "mazes.txt").write_text(maze.replace("\n", "#\n") + "#\n" + "#" * 7 + "\n\nS G\n")
    args = ["--checkpoint", str(trained[1] / "model.pt"), "--out", str(tmp_path / "out"), "--think", "3"]
    assert lrpi.main(["--solve", str(tmp_path / "mazes.txt"), *args]) == 0
    said = capsys.readouterr().out
    model = lrpi.resized(lrpi.load_checkpoint(args[1])[0], shape=(5, 6))
    x = torch.tensor([["# SGo".index(c) for c in row] for row in maze.split("\n")], dtype=torch.uint8)
    last = x
    for s, step in enumerate(lrpi.rollout(model, x.view(1, -1), range(1, 4)), 1):
        now = step.logits_c.argmax(-1).view(5, 6)
        block = said.split(f"step {s}: ")[1].split("\n\n")[0].split("\n")
        assert block[0] == f"{(now != last).sum()} changed"
        shown = [line.ljust(14) for line in block[1:6]]  # the rim is put back, and never changes
        assert [[row[2 * j] for j in range(6)] for row in shown] == [
            ["# SGo"[t] for t in r] for r in now.tolist()
        ]
        marks = [[row[2 * j + 1] == "'" for j in range(6)] for row in shown]
        assert marks == (now != last).tolist() and block[6].split() == ["#"] * 7
        last = now
    sure = step.logits_c.softmax(-1).max(-1).values.min()
    verdict = "solved" if lrpi.maze_solved(x[None], last[None]).item() else "not solved"
    assert re.search(rf"puzzle 1, line 1: {verdict}, \d of 3 steps alive, confidence {sure:.1%}\n", said)
    assert "puzzle 2, line 8: " in said
    for k in (1, 2):
        with (
            Image.open(tmp_path / "out" / f"puzzle-{k}.png") as png,
            Image.open(png.filename[:-3] + "gif") as gif,
        ):
            assert png.format == "PNG" and gif.format == "GIF" and gif.n_frames > 1


def test_solving_takes_the_newest_checkpoint_and_standard_input(trained):
    done = subprocess.run(
        [sys.executable, str(HERE / "lrpi.py"), "--solve", "-"], cwd=trained[1].parent.parent, text=True,
        input="S.#\n#.G", capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "by runs/maze-dis/model.pt" in done.stdout.replace("\\", "/"), done.stderr


@pytest.mark.parametrize("task, text, said", [
    ("maze", "S #\n# x\n#G ", "line 2, column 3: 'x'; must be one of"),
    ("maze", "S G\n# #S", "line 2, column 4: 4 cells; must be 3, as in line 1"),
    ("maze", "S G\n#S#", "line 2, column 2: a second S"),
    ("maze", "###\n  G", "line 1, column 1: no S"),
    ("maze", "###\nS  ", "line 1, column 1: no G"),
    ("maze", "S#\n#G", "line 2, column 2: no way"),
    ("maze", "SoG", "line 1, column 2: an o"),
    ("sudoku", SUDOKU[:80], "line 1: 1 x 80 cells; must be 9 x 9, or 81"),
    ("sudoku", SUDOKU[:80] + "x", "line 1, column 81: 'x'"),
    ("sudoku", "." * 40 + "7" + "." * 8 + "7" + "." * 31, "line 1, column 50: 7 stands"),
    ("sudoku", "12345678........." + "9" + "." * 63, "no solution"),
    ("sudoku", "12\n34", "line 1: 2 x 2 cells"),
    ("nqueens", ("." * 8 + "\n") * 6 + "..Q.....\n...Q....", "line 8, column 4: another queen attacks"),
    ("nqueens", "Q......." + "..Q....." + "....Q..." + "." * 40, "line 1, column 1: these queens cannot"),
])  # fmt: skip
def test_a_bad_puzzle_is_located_and_the_rest_is_solved(task, text, said, tmp_path, capsys):
    small = {"width": 8, "ffn": 8, "n_sup": 2, "mixer": "conv"}
    model, good = lrpi.LoopedModel(lrpi.configure(task=task, **small)), TEXTS[task].split("\n\n")[0]
    lrpi.save_checkpoint(
        tmp_path / "m.pt", model, {"curve": [], **dict.fromkeys(lrpi.FACTS, 0), "stopped": ""} | {"curve": []}
    )
    (tmp_path / "p.txt").write_text(f"{text}\n\n{good}\n")
    args = ["--task", task, "--solve", str(tmp_path / "p.txt"), "--checkpoint", str(tmp_path / "m.pt")]
    assert lrpi.main([*args, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"lrpi: {tmp_path / 'p.txt'}, line ") and said in err, err
    assert "puzzle 2, line " in out and "steps alive" in out


def test_solving_shows_masked_cells_and_reads_what_windows_writes(tmp_path, capsys):
    model = lrpi.LoopedModel(lrpi.configure(target="mask", size=5, width=8, ffn=8))
    shown = lrpi.picture(model.cfg, torch.tensor([[START, 5], [PATH, WALL]]), torch.eye(2).bool().flip(0))
    assert shown == "S ?'\no'#"
    lrpi.save_checkpoint(
        tmp_path / "m.pt", model, {**dict.fromkeys(lrpi.FACTS, 0), "stopped": "", "curve": []}
    )
    (tmp_path / "p.txt").write_bytes("\N{BYTE ORDER MARK}S.\r\nG#\r\n".encode())
    args = ["--solve", str(tmp_path / "p.txt"), "--checkpoint", str(tmp_path / "m.pt"), "--think", "1"]
    assert lrpi.main([*args, "--device", "cpu"]) == 0 and "1 of task maze" in capsys.readouterr().out
    assert lrpi.main(["--task", "arc", *args[:2]]) == 2
    assert "--task arc: must be one of maze, sudoku, nqueens with --solve" in capsys.readouterr().err


def test_a_model_of_generated_mazes_is_evaluated_on_files(trained, tmp_path, capsys):
    """With a byte order mark and empty lines in them, too."""
    puzzles = lrpi.make_mazes(40, 5, "test")
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv", "maze", puzzles.x, puzzles.y)
        text = (tmp_path / f"{name}.csv").read_text().replace("source,", "", 1).replace("\nme,", "\n\n")
        (tmp_path / f"{name}.csv").write_text("\N{BYTE ORDER MARK}" + text, encoding="utf-8")
    args = [
        "--eval",
        str(trained[1] / "model.pt"),
        "--data",
        str(tmp_path),
        "--no-figures",
        "--test-size",
        "40",
    ]
    assert lrpi.main([*args, "--out", str(tmp_path / "out")]) == 0
    assert "of 40 held-out puzzles" in capsys.readouterr().out


def test_an_empty_file_and_a_bad_checkpoint_get_one_clear_line(trained, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    for file, checkpoint, said in (
        ("empty.txt", trained[1] / "model.pt", "empty.txt: empty; must be a text file with puzzles"),
        ("empty.txt", tmp_path / "empty.txt", "--checkpoint " + str(tmp_path / "empty.txt")),
    ):
        assert lrpi.main(["--solve", str(tmp_path / file), "--checkpoint", str(checkpoint)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error


# ------------------------------------------------------------------------------------------------------------
# Puzzles from files


def write_csv(path, task, x, y, header="source,question,answer,rating"):
    letters = lrpi.TASKS[task].letters
    text = [["".join(letters[t] for t in row) for row in of.tolist()] for of in (x, y)]
    path.write_text("\n".join([header, *(f"me,{q},{a},0" for q, a in zip(*text, strict=True))]) + "\n")


@pytest.fixture(scope="module")
def csvs(tmp_path_factory):
    """{task: (folder, its training puzzles, its test puzzles)}"""
    made = {}
    for task, given in (("sudoku", {"size": 4}), ("maze", {"size": 7})):
        folder, cfg = tmp_path_factory.mktemp(task), lrpi.configure(task=task, **given)
        made[task] = (
            folder,
            *(lrpi.TASKS[task].make(cfg, n, split) for n, split in ((300, "train"), (40, "test"))),
        )
        for puzzles, name in zip(made[task][1:], ("train", "test"), strict=True):
            write_csv(folder / f"{name}.csv", task, puzzles.x, puzzles.y)
    return made


@pytest.mark.parametrize("task", ["sudoku", "maze"])
def test_csv_files_hold_what_was_written_and_splits_share_nothing(task, csvs):
    folder, train, test = csvs[task]
    cfg = lrpi.configure(task=task, data=str(folder), examples=1000, train_size=100)
    make = lrpi.TASKS[task].make
    assert cfg.size**2 == train.x.shape[1] and cfg.pick == 1
    read = make(cfg, 10**6, "test")
    assert read.x.equal(test.x) and read.y.equal(test.y) and read.x.dtype == torch.uint8
    rows = {tuple(row) for row in train.x.tolist()}
    data, valid = make(cfg, 10**6, "train"), make(cfg, 10**6, "valid")
    assert {*map(tuple, valid.x.tolist())} | {*map(tuple, data.puzzles.x.tolist())} == rows
    assert (
        not {*map(tuple, valid.x.tolist())} & {*map(tuple, data.puzzles.x.tolist())} and 5 < len(valid) < 45
    )
    solver = lrpi.solve_mazes if task == "maze" else lrpi.solve_sudokus
    assert valid.order.to(torch.int16).equal(solver(valid.x, valid.y).order)
    some = make(cfg, 100, "train", 0)
    assert len(some.puzzles) == 100 and {*map(tuple, some.puzzles.x.tolist())} < rows
    assert len(some) == 100 * 11, "as many views as get seen: 1000 examples and a batch"
    assert not make(cfg, 100, "train", 1).puzzles.x.equal(some.puzzles.x)


def test_rows_are_kept_with_equal_probability(tmp_path):
    x = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]]).repeat(16, 1)
    y, x = x.clone(), x * (1 - torch.eye(16, dtype=torch.long))  # a blank each, at another place
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv", "sudoku", x, y)
    cfg, count = lrpi.configure(task="sudoku", data=str(tmp_path), target="final"), torch.zeros(16)
    for seed in range(400):
        count += (lrpi.read_csv(cfg, 4, "test", seed).x == 0).sum(0)
    assert count.sum() == 1600 and ((count - 100).abs() < 40).all(), "5 standard deviations of 8.7 are 43"


@pytest.mark.parametrize("task", ["sudoku", "maze"])
def test_views_are_symmetric_and_the_same_when_asked_again(task, csvs):
    cfg = lrpi.configure(task=task, data=str(csvs[task][0]), examples=2400)
    data = lrpi.TASKS[task].make(cfg, 300, "train")
    N, rows = len(data.puzzles), torch.arange(len(data))
    every, s = data[rows], torch.arange(len(data)) % cfg.n_sup + 1
    assert data.count >= 8 and every.x[:N].equal(data.puzzles.x), "view 0 is the puzzle itself"
    assert data[rows.flip(0)].x.flip(0).equal(every.x), "whatever the batch"
    assert lrpi.TASKS[task].solved(every.x, every.y).all()
    assert (every.x == every.y).sum(1).equal((data.puzzles.x == data.puzzles.y).sum(1).repeat(data.count))
    again = (lrpi.solve_mazes if task == "maze" else lrpi.solve_sudokus)(every.x, every.y)
    for v in range(data.count):  # the solver's rounds of a view are a view of its rounds
        of = slice(v * N, (v + 1) * N)
        assert lrpi.edits(every[of], s[of], cfg, None).equal(lrpi.edits(again[of], s[of], cfg, None))
    for i in range(0, N, 50):
        seen = {tuple(row) for row in every.x[i::N][:8].tolist()}
        if task == "maze":
            views = symmetric_views(data.puzzles.x[i].tolist(), 7)
            assert seen == {(*itertools.chain(*view),) for view in views}
        else:
            assert len(seen) > 5


def test_mazes_with_several_ways_are_solved_by_the_label_and_by_any_other_way():
    text = ["S   #", " ## #", "   G#", "#    ", "     "]
    x = torch.tensor([["# SGo".index(c) for c in row] for row in text], dtype=torch.uint8).view(1, -1)
    way = lambda cells: torch.where(torch.isin(torch.arange(25), torch.tensor(cells)), PATH, x)
    y, other = way([1, 2, 3, 8]).to(torch.uint8), way([5, 10, 11, 12]).to(torch.uint8)
    assert lrpi.maze_solved(x, y) and lrpi.maze_solved(x, other) and shortest_paths(x[0].tolist(), 5)[1] == 2
    puzzles, cfg = lrpi.solve_mazes(x, y), lrpi.configure(pace=1, n_sup=100)
    stages = [lrpi.edits(puzzles, torch.tensor([s]), cfg, None) for s in range(101)]
    wrong = [(stage != y).sum().item() for stage in stages]
    assert wrong[-1] == 0 and wrong == sorted(wrong, reverse=True) and puzzles.y.equal(y)
    logits = F.one_hot(other.long(), 5).float()
    found = lrpi.measure(lrpi.TASKS["maze"], puzzles, lrpi.Step(torch.tensor([0]), logits, logits, None))
    assert found["exact"] == 1 and found["label"] == 0, "valid, but not the label"


@pytest.mark.parametrize("change, said", [
    (lambda text: text.replace("question", "puzzle"), "line 1: 'source,puzzle,answer,rating'; must"),
    (lambda text: "", "line 1: ''; must be"),
    (lambda text: text.split("\n")[0], "has no rows"),
    (lambda text: text + "me,12.4,1234,0\n", "line 302: question of 4 characters; must be 16"),
    (lambda text: text.replace("me,", "me,1", 1), "line 2: question of 17 characters; must be those of a sq"),
    (lambda text: text + "me,12\n", "line 302: 2 columns; must be 4"),
    (lambda text: text + f"me,{'.' * 15}5,{'.' * 16},0\n", "line 302: question, character 16: '5'; must be"),
    (lambda text: text + f"me,{'.' * 16},{'1' * 16},0\n", "line 302: the answer does not solve the question"),
    (None, "train.csv: No such file"),
])  # fmt: skip
def test_a_bad_csv_file_gets_one_clear_line(change, said, csvs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = [(csvs["sudoku"][0] / f"{name}.csv").read_text() for name in ("train", "test")]
    (tmp_path / "test.csv").write_text(good[1])
    if change:
        (tmp_path / "train.csv").write_text(change(good[0]))
    assert lrpi.main(["--task", "sudoku", "--data", ".", "--no-figures", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lrpi: --data ") and said in error, error


def test_a_model_trains_on_files_and_is_evaluated_on_them_again(csvs, tmp_path, capsys):
    small = ["--examples", "20", "--test-size", "30", "--width", "16", "--ffn", "32", "--no-figures"]
    for args in (["--task", "sudoku"], ["--task", "maze", "--target", "reveal"]):
        data = ["--data", str(csvs[args[1]][0])]
        assert lrpi.main([*small, *args, *data, "--out", str(tmp_path)]) == 0
        first = without_times(tmp_path / "metrics.json")
        assert len(first["label"]) == 6 and "of 30 held-out puzzles" in capsys.readouterr().out
        assert lrpi.main(["--eval", str(tmp_path / "model.pt"), "--no-figures"]) == 0
        assert without_times(tmp_path / "eval" / "metrics.json") == first


# ------------------------------------------------------------------------------------------------------------
# ARC-AGI

REAL = HERE.parent / "shared" / "data"
SIZES = [(1, 1), (30, 30), (1, 30), (30, 1), (3, 4), (29, 7), (12, 12)]


def arc_task(rng, pairs=3, tests=1, sizes=SIZES):
    draw = lambda: rng.integers(0, 10, sizes[rng.integers(len(sizes))]).tolist()
    pair = lambda: {"input": draw(), "output": draw()}
    return {"train": [pair() for _ in range(pairs)], "test": [pair() for _ in range(tests)]}


def write_arc(folder, tasks, kind="training", solutions=True):
    asked = {
        n: {"train": t["train"], "test": [{"input": p["input"]} for p in t["test"]]} for n, t in tasks.items()
    }
    (folder / f"arc-agi_{kind}_challenges.json").write_text(json.dumps(asked))
    if solutions:
        known = {n: [p["output"] for p in t["test"]] for n, t in tasks.items()}
        (folder / f"arc-agi_{kind}_solutions.json").write_text(json.dumps(known))
    return folder


def plain_view(g, k, colours, top, left):
    """A grid as view on a canvas, cell by cell."""
    if k & 1:
        g = g[::-1]
    if k & 2:
        g = [row[::-1] for row in g]
    if k & 4:
        g = [list(column) for column in zip(*g, strict=True)]
    canvas = {(i + top, j + left): colours[c] for i, row in enumerate(g) for j, c in enumerate(row)}
    H, W = len(g), len(g[0])
    canvas |= {(top + H, left + j): 1 for j in range(W + 1)} | {(top + i, left + W): 1 for i in range(H + 1)}
    return [[canvas.get((i, j), 0) for j in range(30)] for i in range(30)]


def test_arc_views_against_plain_loops_and_back(tmp_path):
    rng = np.random.default_rng(0)
    write_arc(tmp_path, {f"t{i}": arc_task(rng, 8) for i in range(3)})
    cfg = lrpi.configure(task="arc", data=str(tmp_path), views=16)
    data = lrpi.make_arc(cfg, 10**6, "train")
    (turns, colours), base, N, tops = data.tables, data.puzzles, len(data.puzzles), set()
    for row in range(len(data)):
        p, v, task = data[torch.tensor([row])], row // N, (row % N) // 8
        number = int("".join(map(str, p.x[0, :16].tolist())))
        assert number == 16 * task + v and p.y[0, :16].equal(p.x[0, :16])
        k, new = turns[number].item(), colours[number, 2:].tolist()
        assert new[0] == 2 and sorted(new) == [*range(2, 12)] and (v > 0 or k == 0 and new == sorted(new))
        grids = [lrpi.crop(of[row % N, 16:].view(30, 30).numpy()).tolist() for of in (base.x, base.y)]
        shown = [of[0, 16:].view(30, 30).tolist() for of in (p.x, p.y)]
        top, left = (side.min() for side in np.nonzero(shown[0]))
        tops.add((top, left))
        assert [plain_view(g, k, new, top, left) for g in grids] == shown
        for canvas, g in zip(shown, grids, strict=True):
            seen = np.array(canvas)[top:, left:]
            found = lrpi.crop(np.pad(seen, ((0, top), (0, left))))
            back = lrpi.dihedral(np.array([new.index(c) for c in range(2, 12)])[found], k, inverse=True)
            assert back.tolist() == g
    assert len(tops) > 20 and set(turns.tolist()) == {*range(8)}


def test_arc_views_of_all_real_tasks_can_be_undone():
    if not REAL.exists():
        pytest.skip("the ARC files are not here")
    cfg = lrpi.configure(task="arc", data=str(REAL), views=8)
    tasks, tested = lrpi.read_arc(cfg.data)
    assert len(tasks) == 400 and tested == {*tasks}
    pairs = [(8 * i, *pair) for i, (shown, asked) in enumerate(tasks.values()) for pair in shown + asked]
    base, (view, tables) = lrpi.arc_puzzles(pairs), lrpi.arc_views(cfg)
    for v in range(8):
        p = view(base, *tables, torch.full((len(pairs),), v), torch.zeros(len(pairs)))
        for row, (number, *grids) in enumerate(pairs):
            old = tables[1][number + v, 2:].argsort().numpy()
            for g, of in zip(grids, (p.x, p.y), strict=True):
                found = lrpi.crop(of[row, 16:].view(30, 30).numpy())
                assert np.array_equal(lrpi.dihedral(old[found], tables[0][number + v].item(), True), g)


def test_crops_of_answers_that_are_not_quite_grids():
    canvas = np.zeros((30, 30), int)
    assert lrpi.crop(canvas) is None
    canvas[:, :] = 5
    assert lrpi.crop(canvas).shape == (30, 30)
    canvas[:] = 0
    canvas[:3, :4], canvas[1, 2] = 7, 1  # a hole: 1 x 4 or 3 x 2
    assert lrpi.crop(canvas).tolist() == [[5, 5]] * 3
    canvas[0, 0] = 0
    assert lrpi.crop(canvas) is None


def test_votes_by_hand():
    a, b, c = np.array([[1]]), np.array([[2]]), np.array([[1, 1]])
    votes = [(a, -0.5), (b, -0.2), (a, -0.1), (c, -0.01), (b, -0.3)]  # two each for a and b; b is surer
    assert [g.tolist() for g in lrpi.attempts(votes)] == [[[2]], [[1]]]
    assert [g.tolist() for g in lrpi.attempts([*votes, (c, -3.0), (c, -3.0)])] == [[[1, 1]], [[2]]]
    assert lrpi.attempts([]) == [] and len(lrpi.attempts([(a, 0.0)])) == 1


def test_votes_of_views_are_mapped_back(tmp_path, monkeypatch):
    """A model that answers every question with its own input must vote for the input in every view."""
    rng = np.random.default_rng(1)
    write_arc(tmp_path, {f"t{i}": arc_task(rng, 2, 2) for i in range(4)})
    cfg = lrpi.configure(task="arc", data=str(tmp_path), views=8, width=8, ffn=8, kernel=3)
    asked = [(8 * i, g) for i, (_, tests) in enumerate(lrpi.read_arc(cfg.data)[0].values()) for g, _ in tests]

    def echo(model, x, *_):
        logits = F.one_hot(x.long(), 12).float()
        yield lrpi.Step(torch.arange(len(x)), logits, logits, None)

    monkeypatch.setattr(lrpi, "rollout", echo)
    for votes, (_, g) in zip(lrpi.arc_votes(lrpi.LoopedModel(cfg), asked), asked, strict=True):
        assert len(votes) == 8 and all(np.array_equal(vote, g) for vote, _ in votes)
    assert all(len(of) == 3 for of in lrpi.arc_votes(lrpi.LoopedModel(lrpi.replace(cfg, votes=3)), asked))


def test_tests_of_tested_tasks_are_not_trained_on(tmp_path):
    rng = np.random.default_rng(2)
    write_arc(tmp_path, {"a": arc_task(rng, 3, 2), "b": arc_task(rng, 2, 1)})
    cfg = lrpi.configure(task="arc", data=str(tmp_path), views=4)
    count = lambda cfg, split: (
        len(getattr(lrpi.make_arc(cfg, 10**6, split), "puzzles", "")) or len(lrpi.make_arc(cfg, 10**6, split))
    )
    assert [count(cfg, split) for split in ("train", "valid", "test")] == [5, 5, 3], "a lone file is tested"
    other = tmp_path / "both"
    other.mkdir()
    write_arc(write_arc(other, {"a": arc_task(rng, 3, 2)}), {"c": arc_task(rng, 4, 1)}, "evaluation")
    cfg = lrpi.configure(task="arc", data=str(other), views=4)
    assert [count(cfg, split) for split in ("train", "valid", "test")] == [3 + 2 + 4, 7, 1]
    assert cfg.identifiers == 8


def test_embeddings_learn_by_the_sign_of_their_own_gradient_only():
    table = lrpi.Identifiers(6, 3)
    table.weight.copy_(torch.randn(6, 3, generator=generator()))
    before, x = table.weight.clone(), lrpi.spell(torch.tensor([4, 1, 4]))
    assert lrpi.spelt(lrpi.spell(torch.tensor([0, 399_999, 10**15]))).tolist() == [0, 399_999, 10**15]
    factor = torch.tensor([[1.0, -2, 0], [3, 1, -1], [-4, -1, 2]])
    (table(x, 16) * factor).sum().backward()
    optimizer = lrpi.SignSGD(table, lr=0.1, weight_decay=0.5)
    optimizer.step()
    expected = before.clone()
    for row, slope in ((4, factor[0] + factor[2]), (1, factor[1])):
        expected[row] = before[row] * (1 - 0.1 * 0.5) - 0.1 * slope.sign()
    torch.testing.assert_close(table.weight, expected)
    assert table.weight[[0, 2, 3, 5]].equal(before[[0, 2, 3, 5]])


@pytest.mark.parametrize("mixer", ["conv", "attention", "mlp"])
def test_every_mixer_lets_the_embedding_reach_the_grid(mixer, tmp_path):
    write_arc(tmp_path, {"a": arc_task(np.random.default_rng(5), 1, 1)})
    cfg = lrpi.configure(task="arc", data=str(tmp_path), views=2, width=8, heads=2, ffn=8, mixer=mixer)
    model, x = lrpi.LoopedModel(cfg), lrpi.make_arc(cfg, 1, "valid").x
    last = [[*lrpi.rollout(model, x, [1])][-1].logits_c[0, -1]]  # of the corner that is farthest
    model.puzzles.weight[0] += 1
    last.append([*lrpi.rollout(model, x, [1])][-1].logits_c[0, -1])
    assert x.shape == (1, 916) and (last[0] - last[1]).abs().max() > 1e-4


ARC_SMALL = [
    "--views",
    "4",
    "--width",
    "8",
    "--ffn",
    "8",
    "--kernel",
    "3",
    "--batch-size",
    "4",
    "--no-figures",
]


@pytest.mark.parametrize("given", [[], ["--feedback"]])
def test_arc_from_files_to_submission(given, tmp_path, capsys):
    rng = np.random.default_rng(3)
    tasks = {"a": arc_task(rng, 2, 2), "b": arc_task(rng, 2, 1)}
    write_arc(tmp_path, tasks, solutions="--feedback" not in given)
    args = ["--task", "arc", "--data", str(tmp_path), "--examples", "6", "--n-sup", "2"]
    assert lrpi.main([*args, *ARC_SMALL, *given, "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    submission = json.loads((tmp_path / "o" / "submission.json").read_text())
    assert {name: len(of) for name, of in submission.items()} == {"a": 2, "b": 1}
    for tries in itertools.chain(*submission.values()):
        assert [*tries] == ["attempt_1", "attempt_2"] and all(np.array(g).ndim == 2 for g in tries.values())
    assert "of 4 demonstrations reproduced" in said
    assert ("no solutions to score by" in said) == ("--feedback" in given)
    assert "pass@2" in said or "--feedback" in given
    model, _ = lrpi.load_checkpoint(str(tmp_path / "o" / "model.pt"))
    assert model.puzzles.weight.shape == (8, 8) and (model.puzzles.weight != 0).any()
    assert lrpi.main(["--eval", str(tmp_path / "o" / "model.pt"), "--no-figures", "--votes", "2"]) == 0
    assert "by 2 votes for each of 3 test grids" in capsys.readouterr().out
    write_arc(tmp_path, tasks, "test", solutions=False)  # the same tests, with no solutions: known ones stay
    lrpi.read_arc.cache_clear()
    again, _ = lrpi.read_arc(str(tmp_path))
    assert [y is None for _, y in again["a"][1]] == 2 * ["--feedback" in given]
    (tmp_path / "arc-agi_test_challenges.json").unlink()
    write_arc(tmp_path, tasks | {"c": arc_task(rng)})
    lrpi.read_arc.cache_clear()
    assert lrpi.main(["--eval", str(tmp_path / "o" / "model.pt"), "--no-figures"]) == 2
    assert "3 tasks with --views 4; the model was made for 8" in capsys.readouterr().err


@pytest.mark.parametrize("spoil, said", [
    (lambda t: t["train"][1]["input"].append([1] * 99), "task a, train 2 input, row 2: 99 cells; must be 1"),
    (lambda t: t["train"][0].update(output=[[1, 2], [3, 10]]), "train 1 output, row 2, column 2: 10; must"),
    (lambda t: t["train"][0].update(output=[[1, True]]), "column 2: True; must be a colour from 0 to 9"),
    (lambda t: t["test"][0].update(input=[[1] * 31]), "task a, test 1 input: 1 x 31 cells; must be"),
    (lambda t: t["test"][0].update(input=[]), "task a, test 1 input: 0 x 0 cells"),
    (lambda t: t["test"][0].update(input=7), "task a, test 1: input: 7; must be a list"),
    (lambda t: t.pop("train"), "task a: train: null; must be a list"),
    (lambda t: t["test"].append({}), "task a, test 2: input: null"),
    (None, "not JSON"),
    ("{}", "no tasks; must have some"),
    ("[" * 10**5, "not JSON"),
    ("[1, 2]", "[1, 2]; must be an object"),
])  # fmt: skip
def test_a_bad_arc_file_gets_one_clear_line(spoil, said, tmp_path, capsys, monkeypatch):
    tasks = {"a": arc_task(np.random.default_rng(4), 2, 1, [(1, 1)])}
    if callable(spoil):
        spoil(tasks["a"])
    path = tmp_path / "arc-agi_training_challenges.json"
    text = json.dumps(tasks) if callable(spoil) else spoil or '{"a": '
    path.write_text(text)
    assert lrpi.main(["--task", "arc", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"lrpi: --data {path}") and said in error, error


# ------------------------------------------------------------------------------------------------------------
# Speed: what is written by hand for it computes the same


@pytest.mark.parametrize(
    "B, size, D, K", [(12, 11, 8, 7), (1, 5, 16, 7), (40, 9, 3, 5), (5, 31, 4, 7), (3, 4, 4, 9)]
)
def test_gradients_of_the_convolution_are_those_of_torch(B, size, D, K):
    """In float64, rtol 1e-9; batches that are done in one piece and in several, kernels larger than the grid."""
    h, w, g = (torch.randn(shape, dtype=torch.float64, generator=generator(k), requires_grad=True)
               for k, shape in enumerate([(B, D, size, size), (D, 1, K, K), (B, D, size, size)]))  # fmt: skip
    ours, theirs = lrpi.DepthwiseConv.apply(h, w), F.conv2d(h, w, padding="same", groups=D)
    assert torch.allclose(ours, theirs, rtol=1e-9)
    for a, b in zip(
        torch.autograd.grad(ours, (h, w), g), torch.autograd.grad(theirs, (h, w), g), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("axis", [-1, -2])
def test_gradient_of_the_norm_against_finite_differences(axis):
    h = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: lrpi.rms_norm(h, axis), h)
    assert torch.allclose(lrpi.rms_norm(h, axis).square().mean(axis), torch.ones(()).double(), atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_takes_the_steps_of_torch(shape):
    """Its Newton-Schulz polynomial acts on singular values alone; torch works in bfloat16, so atol is 2% of lr."""
    m = torch.randn(shape, generator=generator())
    U, S, Vh = torch.linalg.svd(m.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    assert torch.allclose(lrpi.orthogonal(m).double(), U * S @ Vh, atol=1e-4)
    ours, theirs = (torch.nn.Parameter(torch.randn(shape, generator=generator(1))) for _ in range(2))
    optimizers = lrpi.Muon([ours], 0.1, 0.2), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2)
    for k in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator(2 + k))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=4 * 0.1 * 0.02)


def test_adam_atan2_against_plain_numbers():
    """Five steps of one weight by the formulas; rtol 1e-5."""
    p, lr, decay = torch.nn.Parameter(torch.tensor([0.7])), 0.1, 0.3
    optimizer, x, m, v = lrpi.AdamAtan2([p], lr, (0.9, 0.95), decay), 0.7, 0.0, 0.0
    for t, g in enumerate([3.0, -1.0, 0.0, 1e-30, 50.0], 1):
        p.grad = torch.tensor([g])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - lr * decay) - lr * math.atan2(m / (1 - 0.9**t), math.sqrt(v / (1 - 0.95**t)))
        assert math.isclose(p.item(), x, rel_tol=1e-5)


def test_stablemax_is_the_published_one():
    """Against s(v) = v + 1 from 0 on, 1 / (1 - v) below, in float64; the gradient at 0 is that of both sides."""
    readout = lrpi.LoopedModel(tiny(stablemax=True)).readout
    h = 30 * torch.randn(50, 16, generator=generator())
    v = h.double() @ readout.weight.double().T
    s = torch.where(v >= 0, v + 1, 1 / (1 - v))
    assert torch.allclose(readout(h).softmax(-1).double(), s / s.sum(-1, keepdim=True), atol=1e-5)
    zero = torch.zeros(1, 16)
    readout(zero)[0, 0].backward()  # log s has slope 1 at 0
    assert readout.weight.grad.abs().max() == 0
    gradient = torch.autograd.grad(readout(zero.requires_grad_())[0, 0], zero)[0]
    assert torch.allclose(gradient[0], readout.weight[0])


@pytest.mark.parametrize("preset, params", [("paper-compact", 0.8e6), ("paper-medium", 7e6), ("trm", 7e6)])
def test_presets_have_the_published_sizes(preset, params):
    for task in ("maze", "sudoku"):
        cfg = lrpi.configure(task=task, preset=preset)
        found = sum(p.numel() for p in lrpi.LoopedModel(cfg).parameters())
        assert abs(found / params - 1) < 0.1 and cfg.hinge == 0 and cfg.warmup == 2000
        assert cfg.n_sup * cfg.T * (cfg.n + 1) == (336 if preset == "trm" else 18)
    mixed = lrpi.configure(preset="paper-medium", scheme="trm", mixer="mlp", width=64)
    assert (mixed.T, mixed.target, mixed.layers, mixed.mixer, mixed.width) == (3, "final", 2, "mlp", 64)


@pytest.mark.parametrize("mixer", ["conv", "attention", "mlp"])
def test_bfloat16_is_for_matrix_products_only(mixer):
    """On the CPU, too: states, logits and weights stay float32, and differ a little from float32's (by 5%)."""
    outputs = {}
    for precision in ("fp32", "bf16"):
        model, x, y, z, s = model_and_state(tiny(mixer=mixer, precision=precision))
        inside = []
        model.nets[0][0].swiglu.down.register_forward_hook(
            lambda *a, inside=inside: inside.append(a[2].dtype)
        )
        outputs[precision] = model(x, y, z, s)[0]
        outputs[precision].square().sum().backward()
        assert model.readout(outputs[precision]).dtype == outputs[precision].dtype == torch.float32
        assert set(inside) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.nets.parameters())
    gap = (outputs["fp32"] - outputs["bf16"]).abs()
    assert 0 < gap.max() and gap.mean() < 0.05
    losses, cfg = [], tiny(mixer=mixer, examples=72, precision="bf16", lr=0.02, warmup=0)
    lrpi.train(cfg, lrpi.make_mazes(80, 5), record(losses))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_a_compiled_net_trains_the_same(monkeypatch):
    """With the backend that needs no compiler; atol 1e-5. The weights keep their names."""
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    )
    data, found = lrpi.make_mazes(30, 5), []
    for compile in (False, True):
        losses = []
        model = lrpi.train(tiny(examples=12, compile=compile), data, record(losses))[0]
        found.append((losses, model.state_dict()))
    assert np.allclose(*(losses for losses, _ in found), atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()


def test_a_gpu_evaluates_as_many_puzzles_as_fit(monkeypatch):
    """Twice the memory, twice the puzzles; four times the cells, a fourth of them; on a CPU, what is said."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    model = lrpi.LoopedModel(tiny())
    there = SimpleNamespace(y0=SimpleNamespace(device=torch.device("cuda")), nets=model.nets, cfg=model.cfg)
    free = 5 * 10**8
    some = lrpi.at_once(there, 100, 256)
    assert some * 100 * 4 * (8 * 16 + 4 * 32 + 40 * 5) == pytest.approx(free / 2, rel=0.01)
    assert lrpi.at_once(there, 400, 256) == some // 4 and lrpi.at_once(model, 100, 256) == 256
    free = 10**9
    assert lrpi.at_once(there, 100, 256) in (2 * some, 2 * some + 1)
    free = 10**13
    assert lrpi.at_once(there, 100, 256) == 4096


def test_bench_counts_what_the_shapes_say(tmp_path, monkeypatch, capsys):
    """FLOPs an update by hand: 3 passes, each as much again twice in the gradient; Muon's products within 10%."""
    monkeypatch.setattr(lrpi, "BENCH_SECONDS", 0.3)
    given = {"mixer": "attention", "size": 5, "width": 32, "ffn": 64, "batch-size": 64, "out": tmp_path}
    args = [f"--{name}={value}" for name, value in given.items()]
    assert lrpi.main([*args, "--bench"]) == 0
    found, D, N = json.loads((tmp_path / "bench.json").read_text()), 32, 64 * 25
    forward = 2 * N * (4 * D * D + 3 * D * 64) + 4 * N * 25 * D
    train, test = found["training"], found["evaluation"]
    assert train["flops_per_second"] / train["passes_per_second"] == pytest.approx(3 * forward, rel=0.1)
    assert test["flops_per_second"] / test["passes_per_second"] == pytest.approx(
        4 * forward, rel=0.1
    )  # of 256
    assert train["examples_per_second"] == pytest.approx(train["passes_per_second"] * 64 / 18, rel=1e-3)
    assert test["examples_per_second"] == pytest.approx(test["passes_per_second"] * 256 / 18, rel=1e-3)
    assert 0 < found["product_flops_per_second"] and 10**7 < train["peak_bytes"] <= test["peak_bytes"]
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json"} and "training" in capsys.readouterr().out


def test_bench_counts_alike_whatever_computes_the_gradient_of_the_convolution(tmp_path, monkeypatch):
    """By hand in fp32, by torch in bf16: the shapes are the same, and so are FLOPs a pass, to 5%."""
    monkeypatch.setattr(lrpi, "BENCH_SECONDS", 0.2)
    given, per_pass = ["--size=7", "--width=16", "--ffn=32", "--kernel=5", f"--out={tmp_path}", "--bench"], []
    for precision in ("fp32", "bf16"):
        assert lrpi.main([*given, "--precision", precision]) == 0
        found = json.loads((tmp_path / "bench.json").read_text())["training"]
        per_pass.append(found["flops_per_second"] / found["passes_per_second"])
    assert per_pass[0] == pytest.approx(per_pass[1], rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# Going on after an interruption


def stop_at(step):
    return lambda at, loss, model: "interrupted" if at.steps_done == step else ""


@pytest.mark.parametrize("given", [{}, {"ema": 0.0, "optimizer": "adamw", "cosine": False},
                                   {"scheme": "trm", "T": 1, "n": 1, "optimizer": "adam-atan2"}])  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(given, tmp_path):
    """Stopped twice, in the middle of rollouts; every weight and every fact of training is the same."""
    cfg, data = tiny(**{"examples": 60, **given}), lrpi.make_mazes(70, 5)
    model, facts = lrpi.train(cfg, data)
    for k, step in enumerate((7, 20, 10**9)):
        torch.manual_seed(k)  # whatever happened before
        keep = lrpi.Snapshots(tmp_path / "training.pt", cfg, resume=k > 0)
        again, found = lrpi.train(cfg, data, stop_at(step), keep)
    assert facts["steps_done"] > 20 and {**found, "train_seconds": 0} == {**facts, "train_seconds": 0}
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in model.state_dict().items())


RUN = ["--size", "5", "--width", "16", "--ffn", "32", "--n-sup", "2", "--test-size", "20", "--train-size", "200", "--no-figures"]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="kills as Unix does")
def test_kill_9_then_resume(tmp_path):
    """The killed and resumed command leaves the model of `fit` in this process, and no training.pt."""
    args = [*RUN, "--examples", "3000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, str(HERE / "lrpi.py"), *args, "--save-minutes", "1e-6"],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    while not (tmp_path / "out" / "training.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "model.pt").exists()
    done = cli(*args, "--resume", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    got, facts = lrpi.load_checkpoint(str(tmp_path / "out" / "model.pt"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums depends on it
    cfg = lrpi.configure(**{k: v for k, v in lrpi.parse(args).items() if k in lrpi.Config.__annotations__})
    expected, wanted = lrpi.fit(cfg, torch.device("cpu"), [])
    torch.set_num_threads(threads)
    assert facts["steps_done"] == 500 and [at["exact"] for at in facts["curve"]] == [
        at["exact"] for at in wanted["curve"]
    ]
    assert all(torch.equal(v, got.state_dict()[name]) for name, v in expected.state_dict().items())
    assert not (tmp_path / "out" / "training.pt").exists()


def test_a_bad_snapshot_gets_one_clear_line(tmp_path, capsys):
    cfg, path = tiny(examples=60, out=str(tmp_path)), tmp_path / "training.pt"
    lrpi.train(cfg, lrpi.make_mazes(70, 5), stop_at(10), lrpi.Snapshots(path, cfg))
    whole = path.read_bytes()
    given = {"size": 5, "width": 16, "ffn": 24, "heads": 2, "examples": 60, "out": tmp_path}
    same = [f"--{name}={value}" for name, value in given.items()] + ["--no-figures"]
    cases = {f"cut {tenth}": whole[: len(whole) * tenth // 10] for tenth in range(10)} | {"text": b"not one"}
    for data in cases.values():
        path.write_bytes(data)
        assert lrpi.main([*same, "--resume"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--resume: {path} is damaged" in error, error
    path.write_bytes(whole)
    assert lrpi.main([*same, "--resume", "--seed=3", "--lr=0.5", "--save-minutes=0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(--seed 3, not 0, --lr 0.5, not 0.01)" in error, error
    path.unlink()
    assert lrpi.main([*same, "--resume"]) == 2
    assert f"there is no {path}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_keeps_the_old_snapshot_and_training_goes_on(tmp_path, capsys, monkeypatch):
    cfg, data, path = tiny(examples=60, save_minutes=1e-9), lrpi.make_mazes(70, 5), tmp_path / "training.pt"
    path.write_text("old")
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(Path("/dev/full"), data))
    facts = lrpi.train(cfg, data, keep=lrpi.Snapshots(path, cfg))[1]
    error = capsys.readouterr().err
    assert facts["stopped"] == "" and "No space left" in error and str(path) in error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["training.pt"]


def test_determinism_is_asked_of_torch_and_taken_back():
    for deterministic in (True, False):
        lrpi.set_up(tiny(deterministic=deterministic), torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled() is deterministic


# ------------------------------------------------------------------------------------------------------------
# Several processes

WORK = """
import json, pathlib, sys, torch, lrpi
found = {}
with lrpi.joined_processes():
    N = lrpi.processes()[1]
    for name, given in json.loads(sys.argv[2]).items():
        cfg, losses = lrpi.configure(**given), []
        make = lrpi.TASKS[cfg.task].make
        model, facts = lrpi.train(cfg, make(cfg, 130, "train", 0), lambda at, loss, model: losses.append(loss) or "")
        test = make(cfg, 50, "valid")
        found[name] = {"losses": (lrpi.total(torch.stack(losses[1:])) / N).tolist(), "seen": facts["examples_seen"]}
        found[name] |= {"test": lrpi.evaluate(model, test, batch=20), "few": lrpi.evaluate(model, test[:3])}
        stop = lrpi.stopping("kl", 1e-3)
        found[name]["answers"] = [t.tolist() for t in lrpi.answer(model, test.x, stop=stop, batch=20)]
    if N == 2:
        cfg = lrpi.configure(**json.loads(sys.argv[2])["dis"])
        keep = lrpi.Snapshots(pathlib.Path("training.pt"), cfg)
        lrpi.train(cfg, lrpi.make_mazes(130, 5), lambda at, *_: "interrupted" * (at.steps_done == 20), keep)
    try:
        lrpi.check_share(lrpi.configure(batch_size=3))
    except lrpi.UserError as e:
        found["error"] = str(e)
    if lrpi.processes()[0] == 0:
        json.dump(found, open(sys.argv[1], "w"))
"""


def close(a, b, atol):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], atol) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(u, v, atol) for u, v in zip(a, b, strict=True))
    return a == b or (a is not None and b is not None and abs(a - b) <= atol)


def torchrun(*args, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([*command, *map(str, args)], cwd=cwd, env=env, text=True, capture_output=True,
                          timeout=300, check=False)  # fmt: skip


several = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)


@several
def test_two_processes_do_what_one_does(tmp_path):
    """Losses over 50 updates and more to 1e-5; the same puzzles; metrics to 1e-4, of 3 puzzles, too.

    What two have begun, one can go on with.
    """
    base = {"size": 5, "width": 16, "ffn": 32, "batch_size": 4, "examples": 34, "precision": "fp32"}
    runs = {"dis": {}, "untied": {"mixer": "attention", "hinge": 1.0, "T": 2, "untied": True, "examples": 10},
            "trm": {"scheme": "trm", "T": 2, "n": 1, "n_sup": 4, "examples": 50},
            "arc": {"task": "arc", "data": ".", "views": 2, "size": 30, "n_sup": 2, "examples": 24}}  # fmt: skip
    write_arc(tmp_path, {f"t{i}": arc_task(np.random.default_rng(i)) for i in range(2)})
    runs = json.dumps({name: {**base, **given} for name, given in runs.items()})
    (tmp_path / "work.py").write_text(WORK)
    done = torchrun("work.py", "two.json", runs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "work.py", "one.json", runs], cwd=tmp_path, env=env, check=True)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert two.pop("error") == "--batch-size 3: must be a multiple of the number of processes, 2"
    assert len(one["dis"]["losses"]) == 51 and len(one["trm"]["losses"]) >= 45
    for name in two:
        assert close(one[name]["losses"], two[name]["losses"], 1e-5), name
        assert one[name]["seen"] == two[name]["seen"] and one[name]["answers"] == two[name]["answers"]
        assert close(one[name]["test"], two[name]["test"], 1e-4), name
        assert close(one[name]["few"], two[name]["few"], 1e-4), name
    losses, cfg = [], lrpi.configure(**json.loads(runs)["dis"])
    keep = lrpi.Snapshots(tmp_path / "training.pt", cfg, resume=True)
    lrpi.train(cfg, lrpi.make_mazes(130, 5), record(losses), keep)
    assert close(losses, one["dis"]["losses"][20:], 1e-5)


@several
def test_torchrun_leaves_one_set_of_results(tmp_path):
    done = torchrun(HERE / "lrpi.py", *RUN, "--examples", "100", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out puzzles solved, with") == 1, "rank 0 speaks"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "model.pt"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["examples_seen"] >= 100


# ------------------------------------------------------------------------------------------------------------
# The tutorial: run as it stands in quick mode, without Jupyter, and its exercises with right and wrong answers

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
    assert 35 <= len(TUTORIAL) <= 50 and lines[len(lines) // 2] <= 10 and lines[-1] <= 25
    assert 8 <= sum(map(drawn, STORED.values())) <= 12
    assert (HERE / "tutorial.ipynb").stat().st_size < 2e6
    magic = re.search(r"^\s*[%!]", "\n".join(CODE.values()), re.MULTILINE)
    assert not magic, "plain Python, so that it runs anywhere"


def test_the_tutorial_names_only_what_there_is():
    text = PROSE + "\n".join(CODE.values())
    names = set(re.findall(r"\blrpi\.([A-Za-z_]\w*)", text)) - {"py", "zip"}
    assert len(names) > 20 and not {name for name in names if not hasattr(lrpi, name)}
    flags = {option for name in lrpi.Config.__annotations__ for option in (lrpi.flag(name), "--no-" + name)}
    named = set(re.findall(r"(?<=[\s`])--[a-z][a-z-]*", text))
    assert named and named <= flags | {"--compare", "--eval", "--seeds"}
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


WRONG = {  # what somebody may well write first
    1: ["def fill(maze): return maze", "def fill(maze): return [line.replace(' ', '#') for line in maze]"],
    2: [
        "def passes(n_sup, T, n): return n_sup * T * n, n_sup * n",
        "def passes(n_sup, T, n): return (n_sup * T * (n + 1),) * 2",
    ],
    3: ["def weights(D, V, k, inner): return 2 * V * D + D + k * k * D + 2 * D * inner"],
    4: [
        SOLUTIONS[3][1].replace("y.detach()", "y"),
        SOLUTIONS[3][1].replace("        optimizer.zero_grad()\n", ""),
        SOLUTIONS[3][1].replace("y = step", "new = step").replace("readout(y)", "readout(new)"),
        SOLUTIONS[3][1].replace("        optimizer.step()\n", ""),
    ],
    5: [
        "def guided(pi_u, pi_c, w): return [u ** (1 - w) * c**w for u, c in zip(pi_u, pi_c)]",
        "def guided(pi_u, pi_c, w): return [(1 - w) * u + w * c for u, c in zip(pi_u, pi_c)]",
    ],
    6: [
        SOLUTIONS[5][1].replace("r / beta", "r * beta"),
        SOLUTIONS[5][1].replace("p * math", "math"),
        "def improved(pi, reward, beta): return [0, 1, 0]",
    ],
    7: [SOLUTIONS[6][1].replace(" / mean", ""), "def rise(pi, success): return 0.1"],
    8: [
        SOLUTIONS[7][1].replace("u + w * d", "u + d"),
        SOLUTIONS[7][1].replace("return delta[y] -", "return -delta[y] +"),
    ],
    9: [
        re.sub(r"        while .*?2\n", "", SOLUTIONS[8][1], flags=re.DOTALL),
    ],
    10: [
        "def verdict(gains): return 'improves' if sum(gains) > 0 else 'harms'",
        "def verdict(gains): return 'dead'",
        SOLUTIONS[9][1].replace("[0.025, 0.975]", "[0.5, 0.5]"),
    ],
    11: [
        "def targets(x, y, order, n_sup): return [y] * n_sup",
        SOLUTIONS[10][1].replace("order[:", "sorted(order)[:"),
        SOLUTIONS[10][1].replace("range(1, n_sup + 1)", "range(n_sup)"),
    ],
    12: [
        "def lyapunov(V): return min(a - b for a, b in zip(V, V[1:])), len(V) - 1",
        SOLUTIONS[11][1].replace("math.ceil", "int"),
        SOLUTIONS[11][1].replace(" if b > 0", ""),
    ],
    13: ["def passes_needed(distance, kernel): return distance // (kernel // 2)"],
    14: ["def walk(path): return [path[:1], path[2:4], path]", "def walk(path): return [path, path, path]"],
}


@pytest.mark.parametrize("number, answer", [(n, a) for n, answers in WRONG.items() for a in answers])
def test_exercises_say_what_is_wrong(number, answer, tutorial):
    assert set(WRONG) == {int(number) for number, _ in SOLUTIONS}
    assert answer not in dict(SOLUTIONS).values()
    exec(answer, own := dict(tutorial[0]))  # noqa: S102
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        own["exercise"](types.FunctionType(own[f"check_{number}"].__code__, own))
    assert re.match(r"not yet: .{10,}", printed.getvalue())
