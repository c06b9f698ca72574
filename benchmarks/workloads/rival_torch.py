"""The same training in PyTorch: two optimizers and a Python `if`."""

import sys
from collections.abc import Callable

import numpy as np

# Triton, which comes with CUDA builds, crashes in a process with TensorFlow in it.
sys.modules.setdefault("triton", None)  # type: ignore[arg-type]

import torch  # noqa: E402

from benchmarks.workloads.rival import (  # noqa: E402
    NotAvailableError,
    Trainer,
    Trainers,
    Work,
)

SWITCHING = "two optimizers and an if"


def make_trainers(work: Work, compiled: bool = False) -> Trainers:
    """Returns the plain programs, and the one that switches.

    Raises:
        NotAvailableError: if they are to be compiled and that fails.
    """
    if not compiled:
        return make_all(work, compiled)
    # By default PyTorch gives up after having compiled the same method for 8
    # optimizers, and from then on runs it eagerly, without a word.
    torch._dynamo.config.recompile_limit = 64
    try:
        trainers = make_all(work, compiled)
        trainers[SWITCHING].train(work.boundary + 1)
    # PyTorch has no common class for all that can be missing: a C++ compiler, the
    # headers of Python, a processor it knows.
    except Exception as error:
        raise NotAvailableError(f"not compiled, {first_line(error)}") from error
    return trainers


def make_all(work: Work, compiled: bool) -> Trainers:
    """Returns all programs, which are compiled when they first run."""
    return {
        "adam": make_trainer(work, [make_adam], compiled),
        "sgd": make_trainer(work, [make_sgd], compiled),
        "adam copy": make_trainer(work, [make_adam], compiled),
        "sgd copy": make_trainer(work, [make_sgd], compiled),
        SWITCHING: make_trainer(work, [make_adam, make_sgd], compiled),
    }


def first_line(error: Exception) -> str:
    """Returns the beginning of the message of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def make_adam(work: Work, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Returns a new Adam."""
    return torch.optim.Adam(weights, lr=work.adam, eps=work.epsilon)


def make_sgd(work: Work, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Returns a new SGD with momentum."""
    return torch.optim.SGD(weights, lr=work.sgd, momentum=work.momentum)


def make_model(first: list[np.ndarray]) -> torch.nn.Sequential:
    """Returns the dense layers, of the right sizes."""
    layers: list[torch.nn.Module] = []
    for kernel in first[::2]:
        layers += [torch.nn.Linear(*kernel.shape), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def make_trainer(
    work: Work,
    makers: list[Callable[..., torch.optim.Optimizer]],
    compiled: bool,
) -> Trainer:
    """Returns a trainer with one optimizer, or two of which the second takes over."""
    x = torch.from_numpy(work.task.x)
    y = torch.from_numpy(work.task.y).long()
    first = work.first_weights()
    model = make_model(first)
    loss_of = torch.nn.CrossEntropyLoss()

    optimizers = [make(work, list(model.parameters())) for make in makers]
    updates = 0

    def compute_loss() -> torch.Tensor:
        return loss_of(model(x), y)

    steps = [optimizer.step for optimizer in optimizers]
    if compiled:
        # Apart, because the backward pass between them is not a part of either.
        compute_loss = torch.compile(compute_loss)
        steps = [torch.compile(step) for step in steps]

    def restart() -> None:
        nonlocal updates
        updates = 0
        with torch.no_grad():
            for weight, value in zip(model.parameters(), first, strict=True):
                # PyTorch keeps a kernel as (outputs, inputs).
                weight.copy_(torch.from_numpy(value.T))
        for optimizer in optimizers:
            set_to_zero(optimizer)

    def step() -> None:
        nonlocal updates
        second = len(steps) > 1 and updates >= work.boundary
        updates += 1
        model.zero_grad()
        compute_loss().backward()
        steps[1 if second else 0]()

    def weights() -> list[np.ndarray]:
        return [weight.detach().numpy().T.copy() for weight in model.parameters()]

    return Trainer(restart, step, weights)


def set_to_zero(optimizer: torch.optim.Optimizer) -> None:
    """Sets the state to what it is at first, in place: compiled code points to it."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def make_lbfgs(curvatures: np.ndarray, history: int) -> Callable[[], None]:
    """Returns an update of L-BFGS without a line search, on a sum of squares."""
    factors = torch.from_numpy(curvatures)
    weights = torch.ones_like(factors, requires_grad=True)
    # One evaluation per update, and none is left out because it has converged.
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=1,
        history_size=history,
        tolerance_grad=-1.0,
        tolerance_change=-1.0,
    )

    def evaluate() -> torch.Tensor:
        weights.grad = factors * weights.detach()
        return torch.zeros(())

    def step() -> None:
        optimizer.step(evaluate)

    return step
