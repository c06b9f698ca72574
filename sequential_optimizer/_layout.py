"""How a SequentialOptimizer describes itself, and the rule for what it may load.

A layout is plain data: the JSON object that says which optimizers, which arrays and
which trained variables there are. This module reads no file and sets no variable.

**The rule**, the same for every format: the children that a file and an optimizer both
have must be the same (class with its module, name, variables), in the same order. More
or fewer at the end is fine, with a warning. Anything else is refused, and changes
nothing.

A name that Keras made up (`adam_1`) counts as none, because it depends on what else the
process created; so only one child of a class may go without a name of its own. Layers
are told apart by their names without numbers, and by their order; with a warning if the
numbers do not count alike from the lowest, or if what holds the layers has other names.
If the model comes to train different layers of the same shapes, give them names that
differ in more than a number.
"""

import base64
import json
import re
import warnings
from typing import Any

import numpy as np

VERSION = 1

# `[x]` is a list of any length, `(x, y)` a list of two, `{str: x}` has any keys.
# Only a sequence has settings, and phases: the child and the start of each.
_ENTRY = {"class": str, "name": str | None, "settings": dict, "phases": [(int, int)]}
FORM: Any = {
    "version": int,
    "optimizers": {str: _ENTRY},  # by prefix
    "arrays": {str: (str, [int])},  # by key: the prefix of its optimizer, and its shape
    # Path, the path to compare by (see `_trained_by`), shape. Empty before `build`.
    "trained": [(str, str, str)],
    "notes": {str: str},  # dtype and shape
    # The bytes of each note, in base64; none in a Keras file.
    "bytes": {str: str},
}

Layout = dict[str, Any]

# What is not compared: all but the last two names of a path, and numbers.
_LOOSE = r"^.*/(?=[^/]*/)|_\d+(?=/|$)"


# --- the form ---------------------------------------------------------------


def parse(text: bytes) -> Layout:
    """Parses and checks a layout, and decodes the notes in it."""
    try:
        layout = json.loads(text)
        _check_form(layout, FORM)
        for key, content in layout["bytes"].items():
            decoded = base64.b64decode(content, validate=True)
            layout["bytes"][key] = np.frombuffer(decoded, np.uint8)
        optimizers = layout["optimizers"]
        for prefix, one in optimizers.items():
            needed = {f"{prefix}children/{i}/": _ENTRY for i, _ in one["phases"]}
            _check_form(optimizers, needed)
        if layout["version"] != VERSION or not optimizers[""]["phases"]:
            raise ValueError("another version, or no sequence")
    except Exception as error:  # A text that is not a layout may raise anything.
        raise ValueError(
            "The saved layout of a `SequentialOptimizer` must be one that this version "
            f"of sequential_optimizer writes (version {VERSION}). Received: "
            f"{text[:200]!r}. Load it with the version that saved it, if it is intact."
        ) from error
    return layout


def _check_form(value: Any, form: Any) -> None:
    if isinstance(form, dict):
        for key in value.keys() if str in form else form:
            _check_form(value[key], form.get(str) or form[key])
    elif not isinstance(value, list if isinstance(form, list | tuple) else form):
        raise TypeError(form)
    elif isinstance(value, list):
        forms = form if isinstance(form, tuple) else form * len(value)
        for one, its_form in zip(value, forms, strict=True):
            _check_form(one, its_form)
    elif form is int:
        np.int64(value)  # Raises if it does not fit.


# --- the rule ----------------------------------------------------------------


def _check_rule(saved: Layout, now: Layout) -> None:
    """Raises unless the optimizers in both layouts are the same."""
    for prefix, current in now["optimizers"].items():
        before = saved["optimizers"].get(prefix, current)
        which = f"child {prefix.split('/')[-2]}" if prefix else "the sequence"
        # The name of the whole is the user's.
        for what in ["class", "name"] * bool(prefix) + ["settings"]:
            was, is_now = before[what], current[what]
            if was != is_now:
                raise ValueError(
                    "The children that a saved `SequentialOptimizer` and this one both "
                    "have must be the same (class, name, variables), in the same "
                    f"order. Received: {_described(saved)}, now {_described(now)}, "
                    f"with another {what} of {which}: {was!s:.200}, now {is_now!s:.200}"
                    ". Load it into the same sequence, then use its children here."
                )


def _described(layout: Layout) -> str:
    optimizers = layout["optimizers"]
    names = [one["class"].rpartition(">")[2] for key, one in optimizers.items() if key]
    phases = [[child for child, _ in one["phases"]] for one in optimizers.values()]
    return f"children {names} in phases {', '.join(map(str, filter(None, phases)))}"


def keys_in_both(saved: Layout, now: Layout) -> set[str] | None:
    """Returns the keys of the arrays to load, or `None` for children to start afresh.

    Warns if only their order tells which variables are the same.

    Raises:
        ValueError: if what was saved must not be loaded.
    """
    _check_rule(saved, now)
    # What a checkpoint restores before `build` is half of what the children need.
    began = any(start >= 0 for _, start in saved["optimizers"][""]["phases"])
    if not _is_same_order(saved, now) or (began and not saved["trained"]):
        return None
    if not _is_same_order(saved, now, strictly=True):
        warnings.warn(
            "Layers that differ only in a number, or in the name of what holds them, "
            f"are told apart by their order. Received: {_listed(saved)}, now "
            f"{_listed(now)}. If they are not the same, create a new optimizer.",
            stacklevel=2,
        )
    both = saved["optimizers"].keys() & now["optimizers"].keys()
    old = {key: shape for key, (of, shape) in saved["arrays"].items() if of in both}
    new = {key: shape for key, (of, shape) in now["arrays"].items() if of in both}
    # An optimizer that is not built has only some of its variables.
    both_built = saved["trained"] and now["trained"]
    for key in {**old, **new} if both_built else old.keys() & new.keys():
        if old.get(key) != new.get(key):
            raise ValueError(
                "The variables of an optimizer must be those that were saved. Received:"
                f" shape {old.get(key)} of array `{key}`, now {new.get(key)}. Create it"
                " with the arguments that it had, and all variables in `build`."
            )
    return old.keys() & new.keys()


def _is_same_order(saved: Layout, now: Layout, strictly: bool = False) -> bool:
    """Whether shapes are the same, and the names of the variables and their layers.

    Also true if either optimizer was not built: then there is nothing to compare.

    Args:
        saved: the layout that was saved.
        now: the layout of the optimizer.
        strictly: whether to compare whole paths, with numbers. But Keras numbers layers
            in the order of their creation, and a model may have been renamed.
    """
    before, current = saved["trained"], now["trained"]
    is_same = len(before) == len(current) and all(
        old[2] == new[2] and _are_alike(old[1], new[1], strictly)
        for old, new in zip(before, current, strict=True)
    )
    return is_same or not before or not current


def _are_alike(path: str, other: str, strictly: bool) -> bool:
    # A path may begin with the names of models; Keras drops them when it loads one, and
    # so layers of one name that were in two models may be in one.
    if not strictly or path.count("/") != other.count("/"):
        path, other = (re.sub(_LOOSE, "", one) for one in (path, other))
    return f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")


def _listed(layout: Layout) -> str:
    paths = [path for path, _, _ in layout["trained"]]
    some = f"{len(paths)} variables {paths[:3]}"
    return some if paths else "none, saved before the optimizer was built"


def check_by_position(saved: Layout, now: Layout) -> None:
    """Raises unless TensorFlow will put all variables where they belong."""
    keys = keys_in_both(saved, now)
    both = [*saved["optimizers"][""]["phases"], *now["optimizers"][""]["phases"]]
    has_trained = max(start for _, start in both) >= 0
    # One saved before `build` would reset the counters, and restore nothing else; or it
    # has counters alone, of a file that was loaded before.
    if keys is None or (has_trained and not saved["trained"]):
        raise ValueError(
            "A checkpoint must be of the same variables, trained in the same order, by "
            f"which TensorFlow tells them apart. Received: {_listed(saved)}, now "
            f"{_listed(now)}. Restore into a new optimizer for the model as it was."
        )


def warn_of_changes(saved: Layout, now: Layout, starts_afresh: bool) -> None:
    """Warns of what is not loaded, or stays as it is."""
    was, is_now = _described(saved), _described(now)
    if was != is_now:
        warnings.warn(
            f"A `SequentialOptimizer` saved with {was} is loaded into one with "
            f"{is_now}. Its iterations, and the children that both have, continue "
            "where they were; a child that was not saved stays as it is.",
            stacklevel=2,
        )
    if starts_afresh:
        warnings.warn(
            "The model does not train the variables that it trained when its optimizer "
            f"was saved: {_listed(saved)}, now {_listed(now)}. The iterations and the "
            "phase are loaded, and every child starts afresh. To load a model without "
            "its optimizer, pass `compile=False` to `load_model`.",
            stacklevel=2,
        )
