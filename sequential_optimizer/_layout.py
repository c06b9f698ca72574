"""How a SequentialOptimizer describes itself, and the rule for what it may load.

A layout is plain data: the JSON object that says which optimizers, which arrays and
which trained variables there are. This module reads no file and sets no variable.

**The rule**, the same for every format: the children that a file and an optimizer both
have must be the same (class with its module, name, variables), in the same order. More
or fewer at the end is fine, with a warning. Anything else is refused, and changes
nothing.

A name that Keras made up (`adam_1`) counts as none, because it depends on what else the
process created; so only one child of a class may go without a name of its own. Layers
are told apart by their paths, where Keras' numbers count only relative to the lowest of
a class. If the model comes to train different layers of the same shapes, name them.
"""

import base64
import json
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
    # By key: the prefix of the array's optimizer; the trained variable that the array
    # is for and the role, or "" if the array's name does not tell; its shape.
    "arrays": {str: (str, str, [int])},
    # Path, the path to compare by (see `_trained_by`), shape. Empty before `build`.
    "trained": [(str, str, str)],
    # The bytes of each note, in base64; none in a Keras file.
    "bytes": {str: str},
}

Layout = dict[str, Any]


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


def keys_for(saved: Layout, now: Layout) -> dict[str, str] | None:
    """Returns a dict from each array's key to its key in the saved layout.

    Or `None` if the children are to start afresh.

    Raises:
        ValueError: if what was saved must not be loaded.
    """
    _check_rule(saved, now)
    in_order = _is_same_order(saved, now)
    if not in_order and not (_are_same_weights(saved, now) and _names_tell(saved, now)):
        return None
    keys: dict[str, str] = {}
    # An optimizer that is not built has only some of its variables.
    both_built = saved["trained"] and now["trained"]
    for prefix in saved["optimizers"].keys() & now["optimizers"].keys():
        old, new = (_arrays_of(one, prefix, not in_order) for one in (saved, now))
        common = old.keys() & new.keys()
        same_shapes = all(old[name][1] == new[name][1] for name in common)
        if not same_shapes or (both_built and old.keys() != new.keys()):
            child = now["optimizers"][prefix]
            raise ValueError(
                "The variables of an optimizer must be those that were saved. "
                f"Received: {len(old)} arrays for {len(new)} variables of "
                f"`{child['name'] or child['class']}`, or other shapes. Create it with "
                "the arguments that it was saved with, and all variables in `build`."
            )
        keys |= {new[name][0]: old[name][0] for name in common}
    return keys


def _arrays_of(layout: Layout, prefix: str, by_name: bool) -> dict[str, Any]:
    """Returns the key and shape of each array of one optimizer, by key or by name."""
    return {
        (by_name and name) or key: (key, shape)
        for key, (of, name, shape) in layout["arrays"].items()
        if of == prefix
    }


def _names_tell(saved: Layout, now: Layout) -> bool:
    """Whether the name of each array, but for scalars, tells the trained variable."""
    silent = {of for of, name, shape in now["arrays"].values() if shape and not name}
    return silent.isdisjoint(saved["optimizers"])


def _is_same_order(saved: Layout, now: Layout) -> bool:
    """Whether shapes and paths are the same, up to models that layers are nested in.

    A path may begin with the names of these models; Keras drops them when it loads one.
    Also true if either optimizer was not built: then there is nothing to compare.
    """
    before, current = _plain(saved), _plain(now)
    same_shapes = [shape for _, shape in before] == [shape for _, shape in current]
    is_same = same_shapes and all(
        f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")
        for (path, _), (other, _) in zip(before, current, strict=True)
    )
    return is_same or not before or not current


def _plain(layout: Layout) -> list[Any]:
    return [row[1:] for row in layout["trained"]]


def _are_same_weights(saved: Layout, now: Layout) -> bool:
    """Whether the trained variables are the same ones, in any order.

    Raises:
        ValueError: if none has the end of its path and its shape in common.
    """
    if sorted(_plain(saved)) == sorted(_plain(now)):
        return True
    before, current = (
        {(*path.split("/")[-2:], shape) for path, _, shape in one["trained"]}
        for one in (saved, now)
    )
    if before & current:
        return False
    raise ValueError(
        "The state of an optimizer must be of the model that it trains. Received: "
        f"{_listed(saved)}, now {_listed(now)}. Load it into the model that was saved."
    )


def _listed(layout: Layout) -> str:
    paths = [path for path, _, _ in layout["trained"]]
    some = f"{len(paths)} variables {paths[:3]}"
    return some if paths else "none, saved before the optimizer was built"


def check_by_position(saved: Layout, now: Layout) -> None:
    """Raises unless TensorFlow will put all variables where they belong."""
    keys_for(saved, now)
    has_trained = max(start for _, start in now["optimizers"][""]["phases"]) >= 0
    # One saved before `build` would reset the counters, and restore nothing else.
    if (has_trained and not saved["trained"]) or not _is_same_order(saved, now):
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
