"""The loops behind the kernels of the CPU, compiled by numba at their first use and kept on disk from then on.

Each works on the range `first` to `end` of its rows, bags or pairs, so that threads can share the whole. Arrays go in
as they are; a loop releases the interpreter's lock. `no_type_check`: what checks shapes in tests cannot be compiled.
"""

from typing import no_type_check

import numba
import numpy as np

GROUP = 32
"""Entries of a row that are looked at together: nearly all such groups hold no place."""

compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True)


@compiled
@no_type_check
def kth_largest_or_less(keys: np.ndarray, k: int, rough: int) -> int:
    """The k-th largest, or up to `rough` less; 0 where it is not positive.

    By bisection: counting takes a few vector instructions, where sorting takes hundreds of branches.
    """
    low, high = np.int64(0), np.int64(max(keys.max(), 0)) + 1  # at least k keys are >= low (or it is 0), fewer >= high
    while high - low > rough + 1:
        middle = keys.dtype.type((low + high) >> 1)
        count = 0
        for i in range(len(keys)):
            count += keys[i] >= middle
        if count >= k:
            low = np.int64(middle)
        else:
            high = np.int64(middle)
    return low


@compiled
@no_type_check
def columns_above(
    first: int, end: int, keys: np.ndarray, k: int, near: int, counts: np.ndarray, found: np.ndarray
) -> int:
    """Columns of the entries above their row's limit, written to this part's own stretch of `found`, without gaps.

    Entries `width` apart form a group, so that the maxima of all groups are found together, lane by lane; nearly all
    groups hold no entry above the limit and are not looked at again. The limit is 0, or with `k` the k-th largest
    maximum, which the k-th largest entry cannot be below, less `near`.
    """
    d_sae = keys.shape[1]
    width = d_sae // GROUP
    step = max(width, 1)
    maxima, hits = np.empty(width, keys.dtype), np.empty(width, np.int32)
    start = at = first * d_sae
    for r in range(first, end):
        row, before, least = keys[r], at, keys.dtype.type(0)
        for group in range(width):
            maxima[group] = row[group]
        for base in range(step, GROUP * width, step):
            part = row[base : base + width]  # indexed from 0, or the loop would not become vector instructions
            for group in range(width):
                maxima[group] = part[group] if part[group] > maxima[group] else maxima[group]
        if k:
            least = keys.dtype.type(max(0, kth_largest_or_less(maxima, k, near // 4) - near))
        n_hits = 0
        for group in range(width):
            hits[n_hits] = group  # written always, kept where above: no branch to mispredict
            n_hits += maxima[group] > least
        for base in range(0, GROUP * width, step):
            for hit in range(n_hits):
                column = base + hits[hit]
                found[at] = column
                at += row[column] > least
        for column in range(GROUP * width, d_sae):
            found[at] = column
            at += row[column] > least
        counts[r] = at - before
    return at - start


@compiled
@no_type_check
def count_and_place(key: np.ndarray, order: np.ndarray, starts: np.ndarray) -> None:
    """Counting sort; `starts` comes as zeros, two longer than there are keys, and ends as the starts and the end."""
    for n in range(len(key)):
        starts[key[n] + 2] += 1
    for i in range(2, len(starts)):
        starts[i] += starts[i - 1]
    for n in range(len(key)):
        order[starts[key[n] + 1]] = n
        starts[key[n] + 1] += 1


@compiled
@no_type_check
def largest_of_rows(first: int, end: int, z: np.ndarray, starts: np.ndarray, k: int, found: np.ndarray) -> int:
    """Places of the k largest positive values of each row, in order, written to this part's own stretch of `found`."""
    start = at = starts[first]
    for r in range(first, end):
        here = starts[r]
        row = z[here : starts[r + 1]]
        least, spare = np.float32(0), len(row)
        if len(row) > k:
            least = np.partition(row, len(row) - k)[len(row) - k]
            spare = k  # of those equal to the least, as many as the larger ones leave room for
            for value in row:
                spare -= value > least
        for n in range(len(row)):
            is_tie = row[n] == least and spare > 0
            spare -= is_tie
            found[at] = here + n
            at += row[n] > 0 and (row[n] > least or is_tie)
    return at - start


@compiled
@no_type_check
def dots(
    first: int, end: int, order: np.ndarray, a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray, out: np.ndarray
) -> None:
    for n in order[first:end]:
        u, v = a[i[n]], b[j[n]]
        total = np.float32(0)
        for c in range(a.shape[1]):
            total += u[c] * v[c]
        out[n] = total


@compiled
@no_type_check
def weighted_sums(
    first: int, end: int, table: np.ndarray, index: np.ndarray, weight: np.ndarray, starts: np.ndarray, out: np.ndarray
) -> None:
    for bag in range(first, end):
        total = out[bag]
        total[:] = np.float32(0)
        for n in range(starts[bag], starts[bag + 1]):
            row, factor = table[index[n]], weight[n]
            for c in range(table.shape[1]):
                total[c] += factor * row[c]


@compiled
@no_type_check
def reconstruct(
    first: int, end: int, W_dec: np.ndarray, feature: np.ndarray, value: np.ndarray, starts: np.ndarray,
    target: np.ndarray, error: np.ndarray, pull: np.ndarray,
) -> None:  # fmt: skip
    for r in range(first, end):
        here = error[r]
        for c in range(len(here)):
            here[c] = -target[r, c]
        for n in range(starts[r], starts[r + 1]):
            row, factor = W_dec[feature[n]], value[n]
            for c in range(len(here)):
                here[c] += factor * row[c]
        for n in range(starts[r], starts[r + 1]):
            row = W_dec[feature[n]]
            total = np.float32(0)
            for c in range(len(here)):
                total += here[c] * row[c]
            pull[n] = total


@compiled
@no_type_check
def remove_parallel(first: int, end: int, gradient: np.ndarray, rows: np.ndarray) -> None:
    for r in range(first, end):
        g, row = gradient[r], rows[r]
        along = np.float32(0)
        for c in range(len(g)):
            along += g[c] * row[c]
        for c in range(len(g)):
            g[c] -= along * row[c]


@compiled
@no_type_check
def adam(
    first: int, end: int, weight: np.ndarray, gradient: np.ndarray, mean: np.ndarray, square: np.ndarray,
    scale: float, beta1: float, beta2: float, rate: float, root: float, epsilon: float, unit_rows: bool,
) -> None:  # fmt: skip
    one = np.float32(1)
    for r in range(first, end):
        w, g, m, s = weight[r], gradient[r], mean[r], square[r]
        length = np.float32(0)
        for c in range(len(w)):
            slope = scale * g[c]
            m[c] += (one - beta1) * (slope - m[c])
            s[c] = beta2 * s[c] + (one - beta2) * slope * slope
            w[c] -= rate * m[c] / (np.sqrt(s[c]) * root + epsilon)
            length += w[c] * w[c]
        if unit_rows:
            shrink = one / np.sqrt(length)
            for c in range(len(w)):
                w[c] *= shrink
