"""Loops over single numbers, compiled by numba.

Only their callers import this module, as numba takes a while to import.

Every function handles output channels one after another. So channels can be divided among threads
(`base.threads.shared`), and the result is the same for any number of threads. No float operation is reordered. Where a
product and a sum must be rounded once, the code calls `fma`; LLVM fuses no others, so all CPUs give the same bits.

Machine code is cached beside the package or in the user's cache folder (NUMBA_CACHE_DIR names another).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic


@intrinsic
def fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once; a CPU without the instruction uses the C library."""

    def written(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), written


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function now for arguments of one signature, or load the code that was compiled before."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except Exception:  # no folder can be written to, or its content is damaged
            with suppress(Exception):
                again = njit(nogil=True, cache=True)(function)
                again._cache.flush()  # type: ignore[attr-defined]  # replaces the damaged index by an empty one
                again.compile(signature)
                return again
            return njit(signature, nogil=True)(function)

    return make


@compiled("void(i8, i8, f4[:,::1], f4[:,::1], f4[::1], i8, u1[:,::1])")
def nearest_windows(first, last, wanted, m, values, bits, found):  # type: ignore[no-untyped-def]
    """Find the strings nearest to `wanted`: rows first..last of `trellis_search.nearest_values`.

    Viterbi's search: `cost` has the error of the best string so far that ends in each state. Every string begins in
    state 0.

    wanted, m: (n, K).
    values: (256,), VQK by window.
    found: (n, K), gets the windows that minimise sum m^2 (wanted - VQK)^2.
    """
    length, count = wanted.shape[1], values.shape[0]
    states = count >> bits
    cost, added = np.empty(states, np.float32), np.empty(count, np.float32)
    via = np.empty((length, states), np.int16)  # the last window of the best string to each state
    for row in range(first, last):
        cost[:] = np.inf
        cost[0] = 0
        for t in range(length):
            # every window extends the best string to the state it comes from
            for w in range(count):
                error = (wanted[row, t] - values[w]) * m[row, t]
                added[w] = error * error + cost[w >> bits]
            # of all windows that lead to a state, keep the cheapest
            for s in range(states):
                cost[s], via[t, s] = added[s], s
            for w in range(states, count, states):
                others = added[w : w + states]
                for s in range(states):
                    better = others[s] < cost[s]
                    cost[s] = others[s] if better else cost[s]
                    via[t, s] = np.int16(w + s) if better else via[t, s]
        # walk back from the cheapest last state
        s = cost.argmin()
        for t in range(length - 1, -1, -1):
            w = via[t, s]
            found[row, t] = w
            s = w >> bits


@compiled("void(i8, i8, f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], i8, i8[::1], f4[::1], i8, f4[::1], i8[:,::1])")
def follow(first, last, columns, upper, tried, after, own, state, values, bits, m, windows):  # type: ignore[no-untyped-def]
    """Choose m and the string of one group: rows first..last of `round_strings`.

    For every m that is tried, and every state, the best string to that state is kept (Viterbi's search). Each of these
    strings has its own copy of the columns that follow, changed by its own errors. With e[j] the error of column j in
    steps, and U the Cholesky factor, an error changes the columns t > j and costs

        w[t] -= e[j] U[j, t] / U[j, j],    cost = step^2 * sum over j of (e[j] / U[j, j])^2

    where the cost is what the string adds to J.

    columns: (cho, n), the group's columns and some of the next group, divided by CDSw.
    tried: (cho, tries), the m to try.
    after: (cho,), the m expected for the next group.
    own: how many columns are the group's.
    state: (cho,), where each string stands.
    m, windows: (cho,) and (cho, own), get the result.
    """
    length, count = columns.shape[1], values.shape[0]
    states = count >> bits
    inverse = np.empty(length, np.float32)
    for j in range(length):
        inverse[j] = np.float32(1) / upper[j, j]
    cost, added, error = np.empty(states, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    here, later, reached = np.empty(states, np.float32), np.empty(count, np.float32), np.empty(states, np.int32)
    waiting, moved = np.empty((states, length), np.float32), np.empty((states, length), np.float32)
    via = np.empty((length, states), np.int16)
    for row in range(first, last):
        least = np.float32(np.inf)
        for a in range(tried.shape[1]):
            step = tried[row, a]
            for t in range(length):
                waiting[0, t] = columns[row, t] / step
            for s in range(1, states):
                waiting[s] = waiting[0]
            ratio = after[row] / step  # the next group's VQK, in steps of this group
            for w in range(count):
                later[w] = ratio * values[w]
            cost[:] = np.inf
            cost[state[row]] = 0
            for j in range(length):
                square = inverse[j] * inverse[j]
                vqk = values if j < own else later
                for s in range(states):
                    here[s] = waiting[s, j]
                for w in range(count):
                    e = here[w >> bits] - vqk[w]
                    error[w] = e
                    added[w] = fma(e * e, square, cost[w >> bits])
                for s in range(states):
                    cost[s], reached[s] = added[s], s
                for w in range(states, count, states):
                    others = added[w : w + states]  # slices: numba checks no index for being negative, LLVM vectorises
                    for s in range(states):
                        better = others[s] < cost[s]
                        cost[s] = others[s] if better else cost[s]
                        reached[s] = np.int32(w) + np.int32(s) if better else reached[s]
                factors = upper[j, j + 1 :]
                for s in range(states):
                    w = reached[s]
                    via[j, s] = w
                    spent = -inverse[j] * error[w]
                    before, now = waiting[w >> bits, j + 1 :], moved[s, j + 1 :]
                    for t in range(length - j - 1):
                        now[t] = fma(spent, factors[t], before[t])
                waiting, moved = moved, waiting
            s = cost.argmin()
            total = cost[s] * (step * step)
            if a == 0 or total < least:
                least, m[row] = total, step
                for j in range(length - 1, -1, -1):
                    w = via[j, s]
                    s = w >> bits
                    if j < own:
                        windows[row, j] = w


@compiled("void(i8, i8, f8[:,::1], f8[::1], i8, f8[::1], f8[::1], f8[:,::1], f8[:,::1])")
def suit(first, last, rms, cds, most, levels, noise, m, errors):  # type: ignore[no-untyped-def]
    """Find the m of least expected error: rows first..last of `trellis_search.suited`.

    rms: (cho, n), root mean squares of the blocks.
    cds: (cho,), CDSw.
    most: the largest m.
    levels, noise: root mean squares in steps, rising, and the mean squared error there; above the last level values are
        also clipped.
    m, errors: (cho, n), get the best m and its expected error.
    """
    top = levels.shape[0] - 1
    for row in range(first, last):
        for block in range(rms.shape[1]):
            at, least = top, np.inf
            for tried in range(1, most + 1):  # the level falls as the step grows
                step = cds[row] * tried
                level = rms[row, block] / step
                while at > 0 and levels[at] > level:
                    at -= 1
                if level <= levels[0]:
                    error = noise[0]
                elif at == top:
                    error = noise[top]
                else:
                    slope = (noise[at + 1] - noise[at]) / (levels[at + 1] - levels[at])
                    error = slope * (level - levels[at]) + noise[at]
                beyond = max(level - levels[top], 0.0)
                error = (error + beyond * beyond) * (step * step)
                if error < least:
                    least, m[row, block] = error, tried
            errors[row, block] = least


STRING_ROWS = 8  # output channels handled together, so that they share reads of the Cholesky factor


@compiled(
    "void(i8, i8, f4[:,::1], f4[::1], f4[:,::1], i8, i8, i8, i8, i8, f4[::1], f8[::1], f8[::1], u1[:,::1], f8[:,::1])"
)
def round_strings(first, last, w, cds, upper, size, ahead, near, most, bits, values, levels, noise, codes, chosen):  # type: ignore[no-untyped-def]
    """Run GPTQ's loop along strings: rows first..last of `trellis_search.round_strings`.

    w: (cho, K), the target, which is overwritten.
    cds: (cho,), CDSw.
    upper: (K, K), the Cholesky factor.
    size: columns that share an m.
    ahead: columns of the next group that are searched too, before a group is decided.
    near: how far m may be from the one that suits a group.
    most: the largest m.
    codes, chosen: (cho, K) and (cho, groups), get the codes and the m.
    """
    length, states = w.shape[1], values.shape[0] >> bits
    count = min(most, 2 * near + 1)
    rows = min(STRING_ROWS, last - first)
    rms, suited, error = np.empty((rows, 2)), np.empty((rows, 2)), np.empty((rows, 2))
    scale, m = np.empty(rows), np.empty(rows, np.float32)
    tried, after = np.empty((rows, count), np.float32), np.empty(rows, np.float32)
    state, windows = np.empty(rows, np.int64), np.empty((rows, size), np.int64)
    for start in range(first, last, rows):
        here = min(rows, last - start)
        state[:] = 0
        for r in range(here):
            scale[r] = cds[start + r]
        for group in range((length + size - 1) // size):
            begin = group * size
            own = min(size, length - begin)
            end = min(begin + own + ahead, length)
            part = np.ascontiguousarray(upper[begin:end, begin:end])
            columns = np.empty((here, end - begin), np.float32)
            for r in range(here):
                row = w[start + r]
                for t in range(begin, end):
                    columns[r, t - begin] = row[t] / cds[start + r]
                for which in range(2):  # this group, and the next one if there is one
                    a = begin + own if which and end > begin + own else begin
                    b = min(a + size, length)
                    total = 0.0
                    for t in range(a, b):
                        total += np.float64(row[t]) * np.float64(row[t])
                    rms[r, which] = np.sqrt(total / (b - a))
            suit(0, here, rms, scale, most, levels, noise, suited, error)
            for r in range(here):
                lowest = min(max(suited[r, 0] - near, 1.0), np.float64(most - count + 1))
                after[r] = suited[r, 1]
                for a in range(count):
                    tried[r, a] = lowest + a
            follow(0, here, columns, part, tried[:here], after[:here], own, state[:here], values, bits, m, windows)
            for r in range(here):
                state[r] = windows[r, own - 1] % states
                chosen[start + r, group] = m[r]
            # the group is decided: spread its errors over all columns that follow
            for j in range(own):
                factors = upper[begin + j, begin + j + 1 :]
                for r in range(here):
                    row = w[start + r]
                    window = windows[r, j]
                    step = cds[start + r] * m[r]
                    left = -(row[begin + j] - step * values[window]) / upper[begin + j, begin + j]
                    codes[start + r, begin + j] = np.uint8(window & ((1 << bits) - 1))
                    rest = row[begin + j + 1 :]
                    for t in range(rest.shape[0]):
                        rest[t] = fma(left, factors[t], rest[t])


@compiled("void(i8, i8, f8[:,:], f8[::1], f8[:,::1], f8, f8, f8, f8[::1], f8[:,::1], f8[:,::1])")
def round_columns(first, last, columns, cds, upper, low, high, most, m, vqk, errors):  # type: ignore[no-untyped-def]
    """Round the columns of one group with every m, and keep the best: rows first..last of `free.Free.group`.

        errors[j] = (w[j] - step VQK[j]) / U[j, j],    w[t] -= errors[j] U[j, t],    J grows by sum errors^2

    low, high, most: the range of VQK, and the largest m.
    m, vqk, errors: (cho,) and (cho, n), get the result of the best m.
    """
    length = columns.shape[1]
    waiting, integers, spent = np.empty(length), np.empty(length), np.empty(length)
    for row in range(first, last):
        least = np.inf
        for tried in range(1, int(most) + 1):
            step = cds[row] * tried
            waiting[:] = columns[row]
            total = 0.0
            for j in range(length):
                integers[j] = min(max(np.rint(waiting[j] / step), low), high)
                error = (waiting[j] - step * integers[j]) / upper[j, j]
                for t in range(j + 1, length):
                    waiting[t] -= upper[j, t] * error
                spent[j] = error
                total += error * error
            if tried == 1 or total < least:
                least, m[row] = total, tried
                vqk[row] = integers
                errors[row] = spent


@compiled("void(f4[:,::1], f4[::1], f4, u1[::1], u1[:,::1])")
def requantize(sums, multipliers, zero, table, made):  # type: ignore[no-untyped-def]
    """Turn sums (cho, p) into integers and look them up: `graph.integer.integer_conv` and an activation in one pass.

    multipliers: (cho,), from sums to steps of the target grid.
    zero: the grid's zero point.
    table: (256,), the activation of each integer.
    made: (cho, p), gets the result.
    """
    count = sums.shape[1]
    places = np.empty(count, np.uint8)
    for o in range(sums.shape[0]):
        by = multipliers[o]
        for p in range(count):
            value = np.rint(sums[o, p] * by) + zero
            places[p] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))
        for p in range(count):
            made[o, p] = table[places[p]]


@compiled("void(f4[::1], i4[::1], f4[::1], f4, i8, i8, f8[::1], f8[::1])")
def sum_by_level(values, bits, gradient, least, shift, first, slope, total):  # type: ignore[no-untyped-def]
    """Sum gradients by level for `clipping.clip_effects`.

    values, bits: the values, and the same memory as integers.
    least: smaller values are skipped.
    slope, total: (levels + 1,), get the sums of g and of g * value, at the number of levels below each value.
    """
    most = slope.shape[0] - 1
    for i in range(values.shape[0]):
        if values[i] > least:
            level = min(max(((bits[i] - 1) >> shift) - first, 0), most)
            slope[level] += np.float64(gradient[i])
            total[level] += np.float64(gradient[i]) * np.float64(values[i])


@compiled("void(u1[:,:,::1], i8[::1], i8[::1], i8, i8, i8, f4, f4, f4[::1], f4[::1], f4[:,:])")
def gather(x, tops, lefts, high, wide, dilation, zero, scale, offsets, roots, found):  # type: ignore[no-untyped-def]
    """Unfold integers x (c, h, w) at p positions, as real numbers; outside of x is zero.

    tops, lefts: (p,), the first row and column of each position.
    high, wide, dilation: of the kernel.
    zero, scale: the grid of x.
    offsets: (c high wide,), subtracted.
    roots: (p,), multiplied.
    found: (c high wide, p), gets the result.
    """
    for k in range(found.shape[0]):
        plane, right = x[k // (high * wide)], k % wide * dilation
        down, offset = k // wide % high * dilation, offsets[k]
        for p in range(found.shape[1]):
            i, j = tops[p] + down, lefts[p] + right
            value = np.float32(0)
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                value = (np.float32(plane[i, j]) - zero) * scale
            found[k, p] = (value - offset) * roots[p]


ACROSS = 2048  # sums added to at once, so that they stay in the nearest cache


@compiled("void(f4[:,::1], f4[::1])")
def lengths(columns, found):  # type: ignore[no-untyped-def]
    """Write the length of each column of (n, p) into found (p,)."""
    count = found.shape[0]
    for first in range(0, count, ACROSS):
        sums = found[first : min(first + ACROSS, count)]
        sums[:] = 0
        for k in range(columns.shape[0]):
            row = columns[k, first : first + sums.shape[0]]
            for p in range(sums.shape[0]):
                sums[p] += row[p] * row[p]
        for p in range(sums.shape[0]):
            sums[p] = np.sqrt(sums[p])


@compiled("void(f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[:,::1], f8[::1])")
def grid_errors(values, targets, weights, scales, zeros, highs, tables, found):  # type: ignore[no-untyped-def]
    """Sum the weighted squared errors of values (n,) on each of several grids, for `measure.grids`.

    scales, zeros: (grids,), of the grids.
    highs: (grids,), larger values are skipped.
    tables: (grids, 256), what each integer of a grid becomes.
    targets, weights: (n,).
    found: (grids,), gets sum weight (table - target)^2.
    """
    last = np.float32(tables.shape[1] - 1)
    for k in range(found.shape[0]):
        scale, zero, high, table, total = scales[k], zeros[k], highs[k], tables[k], 0.0
        for i in range(values.shape[0]):
            if values[i] <= high:
                place = min(max(np.rint(values[i] / scale) + zero, np.float32(0)), last)
                error = table[np.uint8(place)] - targets[i]
                total += np.float64(error * error * weights[i])
        found[k] = total
