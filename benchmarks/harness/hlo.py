"""Reads the text of a compiled XLA program: which branches of a switch copy what.

XLA updates a variable in place when nobody needs its old value any more. What a branch
of a `conditional` leaves as it is should therefore cost nothing. Where XLA cannot see
that, the branch copies the variable to hand it on unchanged: a `copy` of a part of its
parameter, right into the tuple that it returns. Those are counted here.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BYTES = {"pred": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_AND_FALSE = re.compile(
    r"true_computation=%?([\w.-]+).*false_computation=%?([\w.-]+)"
)
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line: its name, the text of its shape, its operation and the rest."""

    name: str
    shape: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands, beside which older versions write their shapes."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @property
    def bytes(self) -> int:
        """Size of the result, if it is no tuple."""
        found = _SHAPE.match(self.shape)
        kind, sizes = found.groups()
        return _BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)


@dataclass(frozen=True)
class Copies:
    """How many copies there are, and how large they are together."""

    number: int = 0
    bytes: int = 0


class Module:
    """A compiled program: its computations, each a list of instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                lines = self.computations.setdefault(head[1], {})
                if line.startswith("ENTRY"):
                    self.entry = head[1]
            # The numbers of the elements of long tuples: `/*index=5*/`.
            elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
                lines[found[1]] = Instruction(*found.groups())

    def conditionals(self) -> list[list[str]]:
        """Returns for each conditional the names of its branches, in their order."""
        found = []
        for instructions in self.computations.values():
            for line in instructions.values():
                if line.operation == "conditional":
                    found.append(_branches(line.rest))
        return found

    def copies(self, computation: str) -> Copies:
        """Returns all copies of a computation, and of those that it calls.

        A compiler for GPUs turns each copy into a separate computation.
        """
        lines = list(self.computations[computation].values())
        for line in self.computations[computation].values():
            if line.operation in ("fusion", "call"):
                for called in _CALLED.findall(line.rest):
                    lines += self.computations[called].values()
        return _total(line for line in lines if line.operation == "copy")

    def copies_handed_on(self, branch: str) -> Copies:
        """Returns the copies of what a branch gets and returns unchanged."""
        lines = self.computations[branch]
        *_, root = lines.values()
        returned = [lines[name] for name in root.operands if name in lines]
        return _total(
            line
            for line in returned
            if line.operation == "copy"
            and lines[line.operands[0]].operation == "get-tuple-element"
        )

    def scope_of(self, branch: str, names: Sequence[str]) -> str | None:
        """Returns which of the name scopes the operations of a branch are from."""
        texts = self._rests(branch)
        for computation in _CALLED.findall("\n".join(texts)):
            texts += self._rests(computation)
        for text in texts:
            scopes = re.search(r'op_name="([^"]*)"', text)
            for name in names:
                if scopes and name in scopes[1].split("/"):
                    return name
        return None

    def _rests(self, computation: str) -> list[str]:
        return [line.rest for line in self.computations.get(computation, {}).values()]


def _branches(rest: str) -> list[str]:
    if listed := _BRANCHES.search(rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    # With two branches and a boolean, 0 is false.
    when_true, when_false = _TRUE_AND_FALSE.search(rest).groups()
    return [when_false, when_true]


def _total(lines: Iterable[Instruction]) -> Copies:
    sizes = [line.bytes for line in lines]
    return Copies(len(sizes), sum(sizes))
