"""Runs a train step of TensorFlow with the client of JAX, on any of its devices.

TensorFlow hands its XLA program out (`experimental_get_compiler_ir`), and every XLA
runtime can compile it. So a step can be timed on a device that the TensorFlow at hand
was not built for. The program takes the batch and then the variables that the step
uses, and returns the loss and then the variables that it changes, in their places.

Imports JAX; nothing else may import this without asking whether JAX is installed. JAX
has no public way to run a program that is not its own: `compile_program` is tied to its
version.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client

from benchmarks.harness import hlo
from benchmarks.workloads.programs import Program

_ALIAS = re.compile(r"\{(\d+)\}: \((\d+),")


class StepOnDevice:
    """The compiled train step of a program, with its own copy of the variables.

    Args:
        program: made by TensorFlow, which is left as it is.
        batch: tuple of arrays.
        device: a device of JAX.
    """

    def __init__(self, program: Program, batch: Sequence[np.ndarray], device: Any):
        self._program = program
        self._batch = batch
        self._device = device
        function = program.function("xla")
        tensors = [tf.constant(array) for array in batch]
        ir = function.experimental_get_compiler_ir(*tensors)
        self._variables = variables_of(function.get_concrete_function(*tensors))
        self._executable = compile_program(ir(stage="hlo_serialized"), device)
        # The output that takes the place of each argument.
        aliases = ir(stage="hlo").partition("entry_computation_layout")[0]
        self._changed = {int(i): int(o) for o, i in _ALIAS.findall(aliases)}
        self._arguments: list[Any] = []

    def restart(self, phase: int = 0) -> None:
        """Sets all variables to their first values, in a phase of a sequence."""
        self._program.restart(phase)
        values = [*self._batch, *(variable.numpy() for variable in self._variables)]
        # Counts are 64 bits wide, which JAX makes 32 if it is not told to keep them.
        with jax.enable_x64(True):
            self._arguments = [jax.device_put(v, self._device) for v in values]
        jax.block_until_ready(self._arguments)

    def step(self) -> float:
        """Makes one update, and returns the loss when it is made."""
        results = self._executable.execute_sharded(self._arguments)
        outputs = [
            arrays[0] for arrays in results.disassemble_into_single_device_arrays()
        ]
        for argument, output in self._changed.items():
            self._arguments[argument] = outputs[output]
        jax.block_until_ready(outputs)
        return float(outputs[0])

    def median_seconds(self, phase: int, steps: int) -> float:
        """Returns the median seconds of a step, after one that is not counted."""
        self.restart(phase)
        self.step()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds))

    def weights(self) -> list[np.ndarray]:
        """Returns the variables of the model, in its order."""
        values = self._arguments[len(self._batch) :]
        by_variable = {
            id(variable): value
            for variable, value in zip(self._variables, values, strict=True)
        }
        return [
            np.asarray(by_variable[id(v.value)]) for v in self._program.model.weights
        ]

    def optimized(self) -> hlo.Module:
        """Returns the program that the device runs."""
        return hlo.Module(self._executable.hlo_modules()[0].to_string())


def variables_of(function: Any) -> list[tf.Variable]:
    """Returns the variables of a traced function, in the order of its arguments."""
    by_handle = {id(variable.handle): variable for variable in function.variables}
    return [by_handle[id(tensor)] for tensor in function.captured_inputs]


def compile_program(serialized: bytes, device: Any) -> Any:
    """Returns the executable of a serialized HLO module."""
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]])
    )
    module = xla_client._xla.mlir.hlo_to_stablehlo(serialized)
    with mlir.make_ir_context():
        return device.client.compile_and_load(
            mlir.ir.Module.parse(module),
            executable_devices=_jax.DeviceList((device,)),
            compile_options=options,
        )
