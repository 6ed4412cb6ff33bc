"""What Ray Data need not remember of a long stream.

Light to import, for every process that takes part in the stream imports it.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback


class ForgetBlocks(ExecutionCallback):
    """Drops the statistics of each block, which Ray Data keeps to sum them up at the end.

    A block is one rank's part of one step: in the stream's coordinator they would grow with the length of the run.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Ray Data calls this many times a second."""
        for operator in getattr(executor, "_topology", None) or ():
            getattr(operator, "_output_blocks_stats", []).clear()
