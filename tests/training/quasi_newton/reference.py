"""The search written once more, in NumPy and float64, as in the papers.

LBFGS here is the two-loop recursion over a list of pairs, SSBroyden the update of a
dense matrix as it is printed. `Search` moves one vector and knows no TensorFlow.
"""

import numpy as np


class LBFGSMemory:
    def __init__(self, history_size=50):
        self.history_size = history_size
        self.pairs = []

    def forget(self):
        self.pairs = []

    def learn(self, s, y, bs):
        self.pairs = [*self.pairs, (s, y)][-self.history_size :]

    def product(self, g):
        """H g: Nocedal and Wright, Numerical Optimization, algorithm 7.4."""
        q, alphas = g, []
        for s, y in reversed(self.pairs):
            alphas.append(s @ q / (y @ s))
            q = q - alphas[-1] * y
        s, y = self.pairs[-1]
        r = (s @ y) / (y @ y) * q
        for (s, y), alpha in zip(self.pairs, reversed(alphas), strict=True):
            r = r + s * (alpha - y @ r / (y @ s))
        return r


class SSBroydenMemory:
    def __init__(self):
        self.h = None

    def forget(self):
        self.h = None

    def learn(self, s, y, bs):
        if self.h is None:
            scale = (y @ s) / (y @ y)
            self.h, bs = scale * np.eye(len(s)), s / scale
        ys, hy = y @ s, self.h @ y
        yhy = y @ hy
        tau, phi = self._factors(bs @ s / ys, yhy / ys, len(s))
        v = s / ys - hy / yhy
        bracket = self.h - np.outer(hy, hy) / yhy + phi * yhy * np.outer(v, v)
        self.h = bracket / tau + np.outer(s, s) / ys

    def _factors(self, b, h, n):
        """Urban, Stefanou and Pons, arXiv 2405.04230, equations 13 to 23."""
        a = max(h * b - 1, np.finfo(float).eps)
        low = min(1, h * (1 - np.sqrt(a / (a + 1))))
        theta = min(max((low - 1) / a, (1 - b) / b), 1 / low)
        sigma = 1 + a * theta
        e = sigma ** (-1 / max(n - 1, 1))
        tau = min(1, 1 / b)
        tau = tau * min(e, 1 / theta) if theta > 0 else min(tau * e, sigma)
        return tau, (1 - theta) / sigma

    def product(self, g):
        return self.h @ g


class Search:
    """One vector of weights, moved by one gradient per call.

    Attributes:
        weights: where the model is.
        events: what each call did.
    """

    def __init__(self, memory, weights, learning_rate, tolerance=0.0):
        self.memory, self.weights = memory, weights
        self.learning_rate, self.tolerance = learning_rate, tolerance
        self.x = self.g = self.d = None
        self.t, self.rejected, self.knows = 0.0, 0, False
        self.events = []

    def __call__(self, h):
        self.events.append(self._call(h))
        if self.d is not None:
            self.weights = self.x + self.t * self.d

    def _call(self, h):
        is_trial = self.t > 0 and np.allclose(self.weights, self.x + self.t * self.d)
        if not is_trial:
            self.x, self.t, self.rejected = self.weights, 0.0, 0
            return self._accept(h) if np.isfinite(h).all() else "stays"
        if not np.isfinite(h).all():
            if self.rejected == 10:
                self._forget()
                return "resets"
            return self._reject(self.t / 10, "not finite")
        before, behind = self.g @ self.d, h @ self.d
        overshot = behind > 0.9 * abs(before)
        if overshot and self.rejected < 10:
            secant = self.t * before / (before - behind)
            return self._reject(np.clip(secant, self.t / 10, self.t / 2), "overshot")
        event = self._accept(h)
        return "gives in" if overshot else event

    def _reject(self, t, event):
        self.t, self.rejected = t, self.rejected + 1
        return event

    def _accept(self, h):
        event = "starts"
        if self.t > 0:
            s, y = self.t * self.d, h - self.g
            event = "skips the pair"
            if y @ s > 1e-8 * np.linalg.norm(s) * np.linalg.norm(y):
                self.memory.learn(s, y, -self.t * self.g)
                self.knows, event = True, "accepts"
            self.x = self.x + s
        self.g = h
        if np.abs(h).max() <= self.tolerance:
            self.t, self.rejected = 0.0, 0
            self.d = np.zeros_like(h)
            return "converged"
        d = -self.memory.product(h) if self.knows else None
        if d is None or not d @ h < 0:
            self._forget()
            return "forgets" if d is not None else event
        self._turn(d)
        return event

    def _forget(self):
        self.memory.forget()
        self.knows = False
        self._turn(-self.g * min(1, 1 / np.abs(self.g).sum()))

    def _turn(self, d):
        largest = self.learning_rate * np.sqrt(len(d))
        self.d, self.rejected = d, 0
        self.t = min(1, largest / np.linalg.norm(d))
