"""Record → store → encode → train → generate → evaluate: read the files in that order.

Names are loaded at their first use, so that `import ltdi_peft` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read; PUBLIC below is the same list at run time
    from ltdi_peft.collect import collect as collect
    from ltdi_peft.evaluate import evaluate as evaluate
    from ltdi_peft.generate import generate_adapter as generate_adapter
    from ltdi_peft.generator import Generator as Generator
    from ltdi_peft.importing import import_adapters as import_adapters
    from ltdi_peft.publish import push as push
    from ltdi_peft.record import TrajectoryRecorder as TrajectoryRecorder
    from ltdi_peft.record import record as record
    from ltdi_peft.recording import Schedule as Schedule
    from ltdi_peft.refine import refine as refine
    from ltdi_peft.spec import AdapterSpec as AdapterSpec
    from ltdi_peft.spec import BrokenAdapterError as BrokenAdapterError
    from ltdi_peft.spec import SpecMismatchError as SpecMismatchError
    from ltdi_peft.spec import UnsupportedAdapterError as UnsupportedAdapterError
    from ltdi_peft.store import TrajectoryStore as TrajectoryStore
    from ltdi_peft.task import Example as Example
    from ltdi_peft.task import Task as Task
    from ltdi_peft.task import TaskSuite as TaskSuite
    from ltdi_peft.train import train_generator as train_generator

PUBLIC = {
    "AdapterSpec": "spec",
    "BrokenAdapterError": "spec",
    "Example": "task",
    "Generator": "generator",
    "Schedule": "recording",
    "SpecMismatchError": "spec",
    "Task": "task",
    "TaskSuite": "task",
    "TrajectoryRecorder": "record",
    "TrajectoryStore": "store",
    "UnsupportedAdapterError": "spec",
    "collect": "collect",
    "evaluate": "evaluate",
    "generate_adapter": "generate",
    "import_adapters": "importing",
    "push": "publish",
    "record": "record",
    "refine": "refine",
    "train_generator": "train",
}
__all__ = list(PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


class _Package(ModuleType):
    """Keeps `ltdi_peft.record` the function: importing record.py would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'ltdi_peft' has no attribute {name!r}; public names are {__all__}")
    return getattr(importlib.import_module(f"ltdi_peft.{PUBLIC[name]}"), name)
