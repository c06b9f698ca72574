"""DeepXDE's own example of Burgers' equation, trained by Adam and by what follows it.

The domain, the numbers of points, the network and Adam's learning rate are those of its
documentation. Its module can be imported only where the backend has been chosen.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import sequential_optimizer
from benchmarks.workloads.pinn import Burgers, relative_error
from benchmarks.workloads.pinn_runs import as_json
from sequential_optimizer import SequentialOptimizer

ADAM, DOCUMENTED = "Adam", 'Adam, then compile("L-BFGS")'
OURS = ("LBFGS", "SSBroyden")
RATE = 1e-3
END = 0.99  # of the time
GRID = 100  # points along each coordinate, for the error


def run_seed(
    report: Callable[[Any], None], seed: int, adam: int, iterations: int
) -> None:
    """Reports a row for each way of training. To be called in a process of its own.

    Each has the same points, first weights and number of gradients: those that Adam
    and DeepXDE's L-BFGS ask for.

    Args:
        report: function to call with each row.
        seed: int, of the points on the border and of the first weights.
        adam: int, iterations of Adam before a second phase.
        iterations: int, the most that DeepXDE's L-BFGS makes.
    """
    import deepxde as dde

    dde.config.set_default_float("float64")  # as it advises for L-BFGS
    dde.optimizers.config.set_LBFGS_options(maxiter=iterations)
    # Of the points on the border, which NumPy draws, and of the weights.
    keras.utils.set_random_seed(seed)
    data = make_data(dde)
    first = make_model(dde, data).net.get_weights()

    def row_of(name: str, model: Any, evaluations: int) -> dict[str, Any]:
        loss = float(np.sum(model.train_state.loss_train))
        return {
            "contender": name,
            "seed": seed,
            "evaluations": evaluations,
            "error": as_json(error_of(model)),
            "loss": as_json(loss),
        }

    model = make_model(dde, data, first)
    train(model, "adam", adam)
    budget = adam + search_as_documented(model)
    report(row_of(DOCUMENTED, model, budget))

    model = make_model(dde, data, first)
    train(model, "adam", budget)
    report(row_of(ADAM, model, budget))

    for name in OURS:
        children = [keras.optimizers.Adam(RATE), getattr(sequential_optimizer, name)()]
        optimizer = SequentialOptimizer(children, boundaries=[adam])
        model = make_model(dde, data, first)
        train(model, optimizer, budget)
        # As `fit` does at its end: the last point that was accepted.
        optimizer.finalize_variable_values(model.net.trainable_variables)
        model._test(verbose=0)  # takes the loss there
        report(row_of(f"{ADAM}, then {name}", model, budget))


def make_data(dde: Any) -> Any:
    """Returns the equation with its conditions and points."""

    def equation(x: Any, u: Any) -> Any:
        u_x, u_t = (dde.grad.jacobian(u, x, j=j) for j in range(2))
        return u_t + u * u_x - Burgers.nu * dde.grad.hessian(u, x, i=0, j=0)

    domain = dde.geometry.GeometryXTime(
        dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, END)
    )
    conditions = [
        dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_border: on_border),
        dde.icbc.IC(
            domain, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, at_start: at_start
        ),
    ]
    return dde.data.TimePDE(
        domain, equation, conditions, num_domain=2540, num_boundary=80, num_initial=160
    )


def make_model(dde: Any, data: Any, weights: Any = None) -> Any:
    """Returns a model with the network of the example, and these weights."""
    net = dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")
    net(np.zeros((1, 2)))
    if weights is not None:
        net.set_weights(weights)
    return dde.Model(data, net)


def train(model: Any, optimizer: Any, iterations: int) -> None:
    """Trains by gradients, without output."""
    model.compile(optimizer, lr=RATE, verbose=0)
    model.train(iterations=iterations, display_every=iterations, verbose=0)


def search_as_documented(model: Any) -> int:
    """Trains by DeepXDE's L-BFGS; returns how many gradients it asked for."""
    evaluations = 0
    model.compile("L-BFGS", verbose=0)
    step = model.train_step

    def counted(*args: Any) -> Any:
        nonlocal evaluations
        results = step(*args)
        evaluations += int(results.num_objective_evaluations)
        return results

    model.train_step = counted
    model.train(verbose=0)
    return evaluations


def error_of(model: Any) -> float:
    """Returns the relative error on a grid."""
    x, t = np.meshgrid(np.linspace(-1, 1, GRID), np.linspace(0, END, GRID))
    exact = Burgers.solution(x.ravel(), t.ravel())
    values = model.predict(np.stack([x.ravel(), t.ravel()], axis=1))[:, 0]
    return relative_error(values, exact)
