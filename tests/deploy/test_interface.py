"""What `import abmll` offers, pinned: a change here is a change for users."""

import inspect
import subprocess
import sys

import abmll

SIGNATURES = {
    "MetaModel.load": "(run: 'str | Path', overrides: 'Sequence[str]' = (), device: 'str | torch.device | None' = None)"
    " -> 'MetaModel'",
    "MetaModel.adapt": "(self, examples: 'Sequence[Example | tuple[str, str]]', task: 'str' = 'task', folds: 'int' = 4,"
    " steps: 'int | None' = None) -> 'TaskModel'",
    "MetaModel.adapt_all": "(self, tasks: 'Mapping[str, Sequence[Example | tuple[str, str]]]', folds: 'int' = 4,"
    " steps: 'int | None' = None, tell: 'Callable[[int, int], None] | None' = None)"
    " -> 'dict[str, TaskModel]'",
    "MetaModel.unadapted": "(self, options: 'Sequence[str] | None', task: 'str' = 'task') -> 'TaskModel'",
    "TaskModel.predict": "(self, texts: 'Sequence[str | Example]', samples: 'int' = 0, calibrated: 'bool' = False)"
    " -> 'list[Prediction]'",
    "TaskModel.evaluate": "(self, examples: 'Sequence[Example]', samples: 'int' = 0, calibrated: 'bool' = False)"
    " -> 'Scores'",
    "TaskModel.suggest": "(self, texts: 'Sequence[str | Example]', count: 'int' = 4, samples: 'int' = 0)"
    " -> 'list[int]'",
    "TaskModel.save": "(self, folder: 'str | Path') -> 'Path'",
    "TaskModel.export": "(self, folder: 'str | Path', format: 'str' = 'peft') -> 'Path'",
    "load_task_models": "(folders: 'Sequence[str | Path]', overrides: 'Sequence[str]' = (),"
    " device: 'str | torch.device | None' = None) -> 'list[TaskModel]'",
    "Prediction": "(label: 'str', confidence: 'float', probabilities: 'dict[str, float]', entropy: 'float',"
    " variance: 'float | None' = None, mutual_information: 'float | None' = None,"
    " truncated: 'bool' = False) -> None",
    "Example": "(input: 'str', options: 'tuple[str, ...]', output: 'str', demonstrations: 'tuple[Example, ...]' = ())"
    " -> None",
}


def test_the_signatures():
    for path, expected in SIGNATURES.items():
        found = abmll
        for name in path.split("."):
            found = getattr(found, name)
        assert str(inspect.signature(found)) == expected, path
    assert {path.split(".")[0] for path in SIGNATURES} == set(abmll.__all__)


def test_importing_it_loads_no_model_code():
    code = (
        "import sys, abmll; print([name for name in ('torch', 'transformers') if name in sys.modules], dir(abmll)[:0])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[] []"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(abmll, "MetaModels")
