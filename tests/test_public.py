"""The front door: public names resolve, are documented, and cost nothing before their first use."""

import inspect
import subprocess
import sys
import time

import pytest

import ltdi_peft

PUBLIC = ltdi_peft.__all__


def run(program):
    """A fresh interpreter's stdout."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_are_public_names():
    doors = {"Task", "TrajectoryRecorder", "record", "train_generator", "generate_adapter", "refine"}
    assert set(PUBLIC) >= doors
    assert sorted(set(PUBLIC)) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_documented(name):
    found = getattr(ltdi_peft, name)
    assert callable(found), f"ltdi_peft.{name} is {found!r}"
    assert inspect.getdoc(found)
    assert found.__name__ == name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_documented(name):
    found = getattr(ltdi_peft, name)
    if inspect.isclass(found):
        own = {key: value for key, value in vars(found).items() if inspect.isfunction(value)}
        assert [key for key, value in own.items() if key[0] != "_" and not inspect.getdoc(value)] == []


def test_functions_named_like_their_modules_stay_functions():
    """An import of ltdi_peft.record makes Python put the module on the package, over the function."""
    program = """
import ltdi_peft, ltdi_peft.record, ltdi_peft.collect, ltdi_peft.evaluate, ltdi_peft.refine
from ltdi_peft import collect, evaluate, record, refine
for _ in range(2):
    assert all(map(callable, (ltdi_peft.record, ltdi_peft.collect, ltdi_peft.evaluate, ltdi_peft.refine)))
assert all(map(callable, (collect, evaluate, record, refine)))
"""
    run(program)


def test_import_loads_no_torch():
    program = "import sys, ltdi_peft; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert run(program).strip() == "[]"


def test_import_is_quick():
    program = "import time; t = time.perf_counter(); import ltdi_peft; print(time.perf_counter() - t)"
    assert float(run(program)) < 1.0  # seconds; torch alone takes longer


def test_tasks_need_no_torch():
    """A suite can be listed on a machine where nothing else is used."""
    began = time.perf_counter()
    assert run("import sys, ltdi_peft; ltdi_peft.Task; print('torch' in sys.modules)").strip() == "False"
    assert time.perf_counter() - began < 30  # a busy machine; what counts is the line above


def test_unknown_attribute_is_refused():
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_door'; public names are"):
        _ = ltdi_peft.no_such_door
