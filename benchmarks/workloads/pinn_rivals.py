"""What else makes quasi-Newton steps after Adam: on one flat vector, with a search.

Each gets the same compiled function, the same history and no rule to stop early. What
counts is the best point that it has seen.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.workloads.pinn import PINN

HISTORY = 50
UNLIMITED = 10**9  # `SpentError` ends it


class SpentError(Exception):
    """The budget of gradients is spent."""


class FlatLoss:
    """The loss of a model as a function of one vector; counts, and keeps the best.

    Args:
        model: where it starts.
        points: what it is trained on.
        budget: int, how many gradients there are.
    """

    def __init__(self, model: PINN, points: Any, budget: int) -> None:
        self.evaluations = 0
        self.budget = budget
        self._model = model
        self._points = points
        self.first = np.concatenate([w.ravel() for w in model.get_weights()])
        self._best = np.inf, self.first
        self._compiled = tf.function(self._evaluate, jit_compile=True, autograph=False)
        self._compiled(self.first)

    @property
    def is_spent(self) -> bool:
        """Whether there is nothing left."""
        return self.evaluations >= self.budget

    def __call__(self, flat: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the loss and its gradient.

        Raises:
            SpentError: if there is nothing left.
        """
        if self.is_spent:
            raise SpentError
        self.evaluations += 1
        flat = np.array(flat, self.first.dtype)
        loss, gradient = (tensor.numpy() for tensor in self._compiled(flat))
        if loss < self._best[0]:
            self._best = loss, flat
        return loss, gradient

    def or_zeros(self, flat: Any) -> tuple[np.ndarray, np.ndarray]:
        """Like a call, but zeros if there is nothing left; those do not count.

        For searches inside of a program, which an error would not end.
        """
        if self.is_spent:
            return np.zeros((), self.first.dtype), np.zeros_like(self.first)
        return self(flat)

    def go_to_best(self) -> None:
        """Sets the weights that had the lowest loss."""
        self._set(tf.constant(self._best[1]))

    def _set(self, flat: tf.Tensor) -> None:
        weights = self._model.trainable_variables
        parts = tf.split(flat, [w.value.shape.num_elements() for w in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.assign(tf.reshape(part, weight.shape))

    def _evaluate(self, flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        self._set(flat)
        weights = self._model.trainable_variables
        with tf.GradientTape() as tape:
            loss = self._model.compute_residual_loss(self._points)
        gradients = tape.gradient(loss, weights)
        return loss, tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)


def scipy_search(method: str, **options: Any) -> Callable[[FlatLoss], None]:
    """Returns a search of SciPy, which computes in float64 whatever the model does."""

    def search(function: FlatLoss) -> None:
        from scipy.optimize import minimize

        unlimited = {"maxiter": UNLIMITED, "gtol": 0.0, **options}
        minimize(function, function.first, jac=True, method=method, options=unlimited)

    return search


def tfp_search(function: FlatLoss) -> None:
    """Searches with TensorFlow Probability, which calls the function from a graph."""
    import tensorflow_probability as tfp

    first = tf.constant(function.first)

    def evaluate(flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        loss, gradient = tf.numpy_function(
            function.or_zeros, [flat], [first.dtype, first.dtype]
        )
        return tf.ensure_shape(loss, []), tf.ensure_shape(gradient, first.shape)

    tf.function(tfp.optimizer.lbfgs_minimize, autograph=False)(
        evaluate,
        first,
        num_correction_pairs=HISTORY,
        tolerance=0.0,
        max_iterations=function.budget,
    )


def torch_search(function: FlatLoss) -> None:
    """Searches with PyTorch."""
    # Imported the way that module does it, PyTorch does not crash beside TensorFlow.
    from benchmarks.workloads.rival_torch import torch

    weights = torch.from_numpy(function.first.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        history_size=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> torch.Tensor:
        loss, gradient = function(weights.detach().numpy())
        weights.grad = torch.from_numpy(gradient)
        return torch.tensor(loss)

    while not function.is_spent:
        optimizer.step(evaluate)


def optax_search(function: FlatLoss) -> None:
    """Searches with optax, which calls the function from inside its program."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    first = jnp.asarray(function.first)
    shapes = (jax.ShapeDtypeStruct((), first.dtype), jax.ShapeDtypeStruct.like(first))

    @jax.custom_vjp
    def loss_of(flat: Any) -> Any:
        return jax.pure_callback(function.or_zeros, shapes, flat)[0]

    loss_of.defvjp(
        lambda flat: jax.pure_callback(function.or_zeros, shapes, flat),
        lambda gradient, factor: (factor * gradient,),
    )
    optimizer = optax.lbfgs(memory_size=HISTORY)
    value_and_grad = optax.value_and_grad_from_state(loss_of)

    @jax.jit
    def step(flat: Any, state: Any) -> Any:
        value, grad = value_and_grad(flat, state=state)
        updates, state = optimizer.update(
            grad, state, flat, value=value, grad=grad, value_fn=loss_of
        )
        return optax.apply_updates(flat, updates), state

    flat, state = first, optimizer.init(first)
    while not function.is_spent:
        before = function.evaluations
        flat, state = jax.block_until_ready(step(flat, state))
        if function.evaluations == before:
            return  # it has nothing left to ask


SEARCHES: dict[str, Callable[[FlatLoss], None]] = {
    "SciPy L-BFGS-B": scipy_search(
        "L-BFGS-B", maxcor=HISTORY, ftol=0.0, maxfun=UNLIMITED
    ),
    "SciPy BFGS": scipy_search("BFGS"),
    "TensorFlow Probability": tfp_search,
    "PyTorch": torch_search,
    "optax": optax_search,
}


def search(name: str, function: FlatLoss) -> None:
    """Lets a rival search until it gives up, or there is nothing left."""
    with contextlib.suppress(SpentError):
        SEARCHES[name](function)
