"""Record → store → encode → train → generate → evaluate: read the files in that order.

Names are loaded at their first use, so that `import ltdi_peft` costs nothing.
"""

import importlib

PUBLIC = {
    "Task": "task",
    "TaskSuite": "task",
    "Example": "task",
    "AdapterSpec": "spec",
    "BrokenAdapterError": "spec",
    "SpecMismatchError": "spec",
    "UnsupportedAdapterError": "spec",
    "TrajectoryStore": "store",
    "TrajectoryRecorder": "record",
    "record": "record",
    "Schedule": "recording",
    "collect": "collect",
    "Generator": "generator",
    "train_generator": "train",
    "generate_adapter": "generate",
    "evaluate": "evaluate",
}
__all__ = sorted(PUBLIC)  # noqa: PLE0605  # built from the table so that the two cannot differ
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'ltdi_peft' has no attribute {name!r}; public names are {__all__}")
    return getattr(importlib.import_module(f"ltdi_peft.{PUBLIC[name]}"), name)
