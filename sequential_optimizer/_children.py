"""Checks of the child optimizers that a SequentialOptimizer is given."""

import copy
import itertools
import re
import warnings
from collections.abc import Iterable
from typing import Any

import keras
from keras.optimizers import Optimizer

from sequential_optimizer._keras import key_of, trained_variables

# Part of an update rule, so each child has its own.
CLIPPING = "clipnorm", "clipvalue", "global_clipnorm"
CHILD_SETTINGS = {"learning_rate", "weight_decay", *CLIPPING}


def get_children(optimizers: Any) -> tuple[list[Optimizer], tuple[int, ...]]:
    """Returns each child once, and the index of each phase's child.

    Args:
        optimizers: list or tuple of what `keras.optimizers.get` accepts.

    Raises:
        ValueError: if an entry cannot be the child of a SequentialOptimizer.
    """
    if not isinstance(optimizers, list | tuple) or not optimizers:
        raise ValueError(
            "`optimizers` must be a list of at least one optimizer. Received: "
            f"optimizers={optimizers!r}. Pass `[optimizer]` for a single one."
        )
    of_phase = [_get_child(identifier) for identifier in optimizers]
    for child, following in itertools.pairwise(of_phase):
        if child is following:
            warnings.warn(
                "A boundary between phases of one instance changes nothing. Received: "
                f"`{child.name}` twice in a row. Another instance would start afresh.",
                stacklevel=3,
            )
    # Told apart by identity: two equal instances are two children.
    children = list({id(child): child for child in of_phase}.values())
    indices = {id(child): i for i, child in enumerate(children)}
    return children, tuple(indices[id(child)] for child in of_phase)


def _get_child(identifier: Any) -> Optimizer:
    child = cause = None
    # `get` edits a config in place.
    own = copy.deepcopy(identifier) if isinstance(identifier, dict) else identifier
    try:
        child = keras.optimizers.get(own)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = error
    if child is None:
        raise ValueError(
            "Each entry of `optimizers` must be what `keras.optimizers.get` takes. "
            f"Received: {identifier!r} of type `{type(identifier).__name__}`. Pass an "
            "instance, such as `keras.optimizers.Adam(1e-3)`."
        ) from cause
    if type(child).apply_gradients is not Optimizer.apply_gradients:
        raise ValueError(
            "A child in `optimizers` may not override `apply_gradients`, because a "
            f"SequentialOptimizer calls `apply`. Received: `{type(child).__name__}`. "
            "Override `apply` instead: Keras' own `apply_gradients` calls it."
        )
    check_loss_scale([child])
    return child


def check_loss_scale(children: Iterable[Optimizer]) -> None:
    """Raises ValueError if a child would scale the loss, or skip a step that counts."""
    for child in children:
        scales = type(child).scale_loss is not Optimizer.scale_loss
        if scales or child.loss_scale_factor is not None:
            raise ValueError(
                "A child may not be a `LossScaleOptimizer`, override `scale_loss`, or "
                "have a `loss_scale_factor`, because the loss is scaled once for all. "
                f"Received: `{child.name}`. Set `loss_scale_factor` on the "
                "SequentialOptimizer, or wrap that in a `LossScaleOptimizer`."
            )


def from_config(config: Any, custom_objects: dict[str, Any] | None) -> list[Optimizer]:
    """Creates the optimizer of each phase.

    Args:
        config: dict like those that `SequentialOptimizer.get_config` returns.
        custom_objects: dict from names to the user's classes and functions.

    Raises:
        ValueError: if there is no child, or no child for a phase.
    """
    children: Any = config.get("optimizers") if isinstance(config, dict) else None
    indices = list(range(len(children))) if isinstance(children, list | tuple) else []
    child_of_phase = config.get("child_of_phase", indices) if indices else None
    if (
        not isinstance(child_of_phase, list | tuple)
        or not all(type(i) is int for i in child_of_phase)
        or set(child_of_phase) != set(indices)
    ):
        raise ValueError(
            "`config` must have a list `optimizers` with the config of each child, and "
            "a list `child_of_phase` with the index of each phase's, if not one each. "
            f"Received: {config!r:.200}. Pass what `get_config` returned."
        )
    load = keras.saving.deserialize_keras_object
    # Keras edits nested configs in place.
    created = [load(child, custom_objects) for child in copy.deepcopy(children)]
    return [created[i] for i in child_of_phase]


def in_words(child: Optimizer) -> str:
    """Returns a child as its parent's `repr` shows it."""
    short = f"{type(child).__name__}(name={child.name!r})"
    return repr(child) if hasattr(child, "children") else short


def given_name(optimizer: Optimizer) -> str | None:
    """Returns the name, or `None` if Keras may have made it up (`adam_1`)."""
    names = optimizer.name, re.sub(r"_\d+$", "", optimizer.name)
    plain = [n.replace("_", "").lower() for n in (type(optimizer).__name__, *names)]
    return None if plain[0] in plain[1:] else optimizer.name


def check_names_differ(name: str, children: Iterable[Optimizer]) -> None:
    """Raises unless names tell the children apart, also in another process.

    Keras numbers the names that it makes in each process, so they say nothing there.
    """
    names = [name, *(child.name for child in children)]
    unnamed = [type(child) for child in children if given_name(child) is None]
    if len(set(names)) < len(names) or len(set(unnamed)) < len(unnamed):
        raise ValueError(
            "A SequentialOptimizer and its children must have different names, and of "
            "each class only one may have a name that Keras makes (`adam_1`). "
            f'Received: {names}. Name the others, as in `Adam(1e-4, name="late")`.'
        )


def check_settings(settings: dict[str, Any]) -> None:
    """Raises if a setting that belongs on a child is set on the parent.

    Args:
        settings: dict from the names of settings to their values.

    Raises:
        ValueError: if one of `CHILD_SETTINGS` is not `None`.
    """
    for name, value in settings.items():
        if name in CHILD_SETTINGS and value is not None:
            raise ValueError(
                f"`{name}` must be set on the children of a SequentialOptimizer. "
                f"Received: {name}={value!r}. Set `{name}` on the child optimizer."
            )


def check_built_on(variables: list[Any], children: Iterable[Optimizer]) -> None:
    """Raises if a child that is already built was built on other variables.

    Args:
        variables: the variables to train.
        children: optimizers, built or not.

    Raises:
        ValueError: if the variables of a built child differ.
    """
    for child in children:
        keys = {key_of(child, variable) for variable in variables}
        child_keys = {key_of(child, variable) for variable in trained_variables(child)}
        # None: a user's class may keep its own list.
        if child.built and child_keys and child_keys != keys:
            raise ValueError(
                "A child that is already built must have been built on the variables "
                f"to train. Received: `{child.name}`, built on {len(child_keys)} "
                f"variables, {len(child_keys & keys)} of them among the {len(keys)} to "
                "train. Pass a new instance instead."
            )
