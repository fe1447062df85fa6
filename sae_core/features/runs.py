"""Runs of equal rows in sorted columns, without loops."""

import numpy as np
from jaxtyping import Bool, Int64


def is_first(*sorted_keys: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Which rows differ in any key from the row before them; the keys are columns that were sorted together."""
    first = np.ones(len(sorted_keys[0]), bool)
    first[1:] = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    return first


def begins(*sorted_keys: np.ndarray) -> Int64[np.ndarray, " n"]:
    """For each row, where its run of equal rows begins."""
    first = np.flatnonzero(is_first(*sorted_keys))
    return np.repeat(first, np.diff(np.append(first, len(sorted_keys[0]))))


def rank(*sorted_keys: np.ndarray) -> Int64[np.ndarray, " n"]:
    """How many equal rows come before each row."""
    return np.arange(len(sorted_keys[0])) - begins(*sorted_keys)
