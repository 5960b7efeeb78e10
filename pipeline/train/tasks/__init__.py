"""Tasks: the kinds of runs that go through the one training loop."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.train.tasks.base import Task, Work

__all__ = ["Task", "Work", "make_task", "task_class"]


def make_task(config: RunConfig) -> Task:
    """The task of a run; its libraries are imported only then."""
    return task_class(config.task.kind)(config)


def task_class(kind: str) -> type[Task]:
    """The task that `task.kind` asks for."""
    if kind == "language":
        from pipeline.train.tasks.language import LanguageTask

        return LanguageTask
    from pipeline.train.tasks.classify import ClassifyTask

    return {"classify": ClassifyTask}[kind]
