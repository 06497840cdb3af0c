"""The flags that name a task of labelled texts and say how its files are read."""

from absl import flags

from fmfl_jax.data.classification import LabelledText, read_labelled_text
from fmfl_jax.services import prompts

_TASK = flags.DEFINE_string("task", "topics", "topics (built in, with its texts), agnews, or a task's JSON file.")
_TEXT_COLUMN = flags.DEFINE_string("text_column", None, "The texts' column or field, where the files name columns.")
_LABEL_COLUMN = flags.DEFINE_string("label_column", None, "The labels' column or field.")
_TEMPLATE = flags.DEFINE_string(
    "template", None, "A template of the task; default: its first; auto: the best on a few public labelled texts."
)


def task_from_flags() -> tuple[prompts.TaskPrompts, prompts.Template | None]:
    """The task, and its template; None: the best one is to be chosen."""
    task = prompts.load_task(_TASK.value)
    if _TEMPLATE.value == "auto":
        return task, None
    return task, task.templates[0] if _TEMPLATE.value is None else task.template(_TEMPLATE.value)


def read_files(task: prompts.TaskPrompts, **paths: str | None) -> list[LabelledText] | None:
    """The texts of the files that these flags name; None where none is named and the task brings its own texts.

    Raises ValueError where a file is missing, and where the first lacks a class.
    """
    if None in paths.values():
        if task.name == "topics" and set(paths.values()) == {None}:
            return None
        needed = " and ".join(f"--{name}=FILE" for name in paths)
        raise ValueError(f"--task={task.name} needs {needed}")
    found = [read_labelled(path, task) for path in paths.values() if path is not None]
    prompts.check_labels(task, found[0].labels)
    return found


def read_labelled(path: str, task: prompts.TaskPrompts) -> LabelledText:
    """A file's texts (.tsv, .jsonl). Raises ValueError for lines that are no labelled text, and for other labels."""
    return read_labelled_text(path, task.classes, text_column=_TEXT_COLUMN.value, label_column=_LABEL_COLUMN.value)
