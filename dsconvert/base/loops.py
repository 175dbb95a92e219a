"""The fit's loops over single numbers, compiled by numba: only what runs them imports this module, as numba takes a
while to load.

Every function does one output channel after another, so channels can be divided among threads (`base.threads.shared`)
and come out the same on any number of them. No float operation is reordered. Where a product and a sum are to be
rounded once, `fma` says so; LLVM joins no others, so that all CPUs give the same bits.

Machine code is kept beside the package or in the user's cache folder (NUMBA_CACHE_DIR names another).
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
    """a b + c, rounded once: on a CPU without the instruction by the C library."""

    def written(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), written


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for arguments of one signature now, or load what was compiled before."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except Exception:  # no folder can be written to, or what lies there is damaged
            with suppress(Exception):
                again = njit(nogil=True, cache=True)(function)
                again._cache.flush()  # type: ignore[attr-defined]  # an empty index in the damaged one's place
                again.compile(signature)
                return again
            return njit(signature, nogil=True)(function)

    return make


@compiled("void(i8, i8, f4[:,::1], f4[:,::1], f4[::1], i8, u1[:,::1])")
def nearest_windows(first, last, wanted, m, values, bits, found):  # type: ignore[no-untyped-def]
    """Rows first..last of `trellis_search.nearest_values`: found (n, K) get the windows of least
    sum m^2 (wanted - VQK)^2 for wanted and m (n, K), `values` (256,) being VQK by window.

    Every string begins in state 0."""
    length, count = wanted.shape[1], values.shape[0]
    states = count >> bits
    cost, added = np.empty(states, np.float32), np.empty(count, np.float32)
    via = np.empty((length, states), np.int16)  # the window by which each state is reached best
    for row in range(first, last):
        cost[:] = np.inf
        cost[0] = 0
        for t in range(length):
            for w in range(count):
                error = (wanted[row, t] - values[w]) * m[row, t]
                added[w] = error * error + cost[w >> bits]
            for s in range(states):
                cost[s], via[t, s] = added[s], s
            for w in range(states, count, states):
                others = added[w : w + states]
                for s in range(states):
                    better = others[s] < cost[s]
                    cost[s] = others[s] if better else cost[s]
                    via[t, s] = np.int16(w + s) if better else via[t, s]
        s = cost.argmin()
        for t in range(length - 1, -1, -1):
            w = via[t, s]
            found[row, t] = w
            s = w >> bits


@compiled("void(i8, i8, f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], i8, i8[::1], f4[::1], i8, f4[::1], i8[:,::1])")
def follow(first, last, columns, upper, tried, after, own, state, values, bits, m, windows):  # type: ignore[no-untyped-def]
    """Rows first..last of `round_strings`: m (cho,) and windows (cho, own) get the string and m that add least to J.

    With e[j] the error of column j in steps, U the Cholesky factor, and what is still to come moved by
    w[t] -= e[j] U[j, t] / U[j, j], a string adds sum (e[j] / U[j, j])^2 times its step's square. Each state has the
    best string that leads to it, and so its own columns still to come."""
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
            ratio = after[row] / step  # the next group's VQK in this group's steps
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
                    others = added[w : w + states]  # slices: numba checks no index for being negative, LLVM vectorizes
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
    """Rows first..last of `trellis_search.suited`: for blocks of root mean squares rms (cho, n) and steps cds (cho,),
    of 1, 2 .. most the m (cho, n) of least expected error, and that error (cho, n). Of numbers of a root mean square in
    steps, `noise` has the error by `levels`; what is above the last level is cut."""
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


STRING_ROWS = 8  # output channels that go along the columns together: they share what is read of the Cholesky factor


@compiled(
    "void(i8, i8, f4[:,::1], f4[::1], f4[:,::1], i8, i8, i8, i8, i8, f4[::1], f8[::1], f8[::1], u1[:,::1], f8[:,::1])"
)
def round_strings(first, last, w, cds, upper, size, ahead, near, most, bits, values, levels, noise, codes, chosen):  # type: ignore[no-untyped-def]
    """Rows first..last of `trellis_search.round_strings`: codes (cho, K) and chosen (cho, groups), the m, of targets w
    (cho, K), which are used up. Groups of `size` columns have an m of 1..most, no further than `near` from what suits
    them; strings are followed `ahead` columns into the next group."""
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
                for which in range(2):  # this group, and the next where there is one
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
    """Rows first..last of `free.Free.group`: m (cho,), VQK and errors (cho, n) get, of m = 1, 2 .. most, the one of
    least sum errors^2: columns rounded one by one to low..high, the others moved by w[t] -= errors[j] U[j, t]."""
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
    """Sums (cho, p) times each channel's multiplier -> integers 0..255 on a grid, and made (cho, p) what the table
    (256,) has for them: `graph.integer.integer_conv` and an activation in one pass."""
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
    """Values above the least, `bits` being the same as integers: slope (levels + 1,) gets each one's gradient g, and
    total g times the value, at the number of levels that the value is above (see `clipping.LEVELS`)."""
    most = slope.shape[0] - 1
    for i in range(values.shape[0]):
        if values[i] > least:
            level = min(max(((bits[i] - 1) >> shift) - first, 0), most)
            slope[level] += np.float64(gradient[i])
            total[level] += np.float64(gradient[i]) * np.float64(values[i])


@compiled("void(u1[:,:,::1], i8[::1], i8[::1], i8, i8, i8, f4, f4, f4[::1], f4[::1], f4[:,:])")
def gather(x, tops, lefts, high, wide, dilation, zero, scale, offsets, roots, found):  # type: ignore[no-untyped-def]
    """Columns found (c high wide, p) of the unfolded integers x (c, h, w): taps of `high` by `wide`, that far apart,
    from row tops[p] and column lefts[p] on, real (zero and scale), less each row's offset, times each column's root.
    Outside of x is zero."""
    for k in range(found.shape[0]):
        plane, right = x[k // (high * wide)], k % wide * dilation
        down, offset = k // wide % high * dilation, offsets[k]
        for p in range(found.shape[1]):
            i, j = tops[p] + down, lefts[p] + right
            value = np.float32(0)
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                value = (np.float32(plane[i, j]) - zero) * scale
            found[k, p] = (value - offset) * roots[p]


ACROSS = 2048  # sums that are added to at once: they stay in the nearest cache


@compiled("void(f4[:,::1], f4[::1])")
def lengths(columns, found):  # type: ignore[no-untyped-def]
    """found (p,) gets the length of each of the columns (n, p)."""
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
    """For each of some grids, found (grids,) gets sum weight (table - target)^2 over the values (n,) up to its high:
    a value's place on a grid is that of its scale and zero, and its tables (grids, 256) say what is made there."""
    last = np.float32(tables.shape[1] - 1)
    for k in range(found.shape[0]):
        scale, zero, high, table, total = scales[k], zeros[k], highs[k], tables[k], 0.0
        for i in range(values.shape[0]):
            if values[i] <= high:
                place = min(max(np.rint(values[i] / scale) + zero, np.float32(0)), last)
                error = table[np.uint8(place)] - targets[i]
                total += np.float64(error * error * weights[i])
        found[k] = total
