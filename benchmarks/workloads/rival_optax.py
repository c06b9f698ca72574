"""The same training in JAX: `conditionally_transform` of optax under `jax.jit`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.transforms import conditionally_transform

from benchmarks.workloads.rival import Trainer, Trainers, Work


def make_trainers(work: Work) -> Trainers:
    """Returns the plain programs, and the one that switches."""
    return {
        "adam": make_trainer(work, make_adam(work)),
        "sgd": make_trainer(work, make_sgd(work)),
        "adam copy": make_trainer(work, make_adam(work)),
        "sgd copy": make_trainer(work, make_sgd(work)),
        "conditionally_transform": make_trainer(work, make_sequence(work)),
    }


def make_adam(work: Work) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(work.adam, eps=work.epsilon)


def make_sgd(work: Work) -> optax.GradientTransformation:
    """Returns SGD with momentum."""
    return optax.sgd(work.sgd, momentum=work.momentum)


def make_sequence(work: Work) -> optax.GradientTransformation:
    """Returns both, each of which lets the gradient through when it is not its turn."""
    return optax.chain(
        conditionally_transform(make_adam(work), lambda step: step < work.boundary),
        conditionally_transform(make_sgd(work), lambda step: step >= work.boundary),
    )


def loss_of(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the loss of the dense layers, as Keras defines it."""
    *hidden, kernel, bias = weights
    for i in range(0, len(hidden), 2):
        x = jax.nn.relu(x @ hidden[i] + hidden[i + 1])
    logits = x @ kernel + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_trainer(work: Work, optimizer: optax.GradientTransformation) -> Trainer:
    """Returns a trainer with one compiled function, which may reuse its arguments."""
    x, y = jnp.asarray(work.task.x), jnp.asarray(work.task.y)
    first = work.first_weights()
    weights: list[jax.Array] = []
    state: Any = None

    def update(weights: list[jax.Array], state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(weights, x, y)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def restart() -> None:
        nonlocal weights, state
        # Copies: what is donated is gone.
        weights = [jnp.array(weight) for weight in first]
        state = optimizer.init(weights)

    def step() -> None:
        nonlocal weights, state
        weights, state, loss = compiled(weights, state)
        jax.block_until_ready((weights, state, loss))

    return Trainer(restart, step, lambda: [np.asarray(weight) for weight in weights])


def make_lbfgs(curvatures: np.ndarray, history: int) -> Callable[[], None]:
    """Returns an update of L-BFGS without a line search, on a sum of squares."""
    optimizer = optax.lbfgs(1.0, memory_size=history, linesearch=None)
    factors = jnp.asarray(curvatures)
    weights = jnp.ones_like(factors)
    # Copies: some are one array, which cannot be given away twice.
    state = jax.tree.map(jnp.array, optimizer.init(weights))

    def update(weights: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        updates, state = optimizer.update(factors * weights, state, weights)
        return optax.apply_updates(weights, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal weights, state
        weights, state = compiled(weights, state)
        jax.block_until_ready((weights, state))

    return step
