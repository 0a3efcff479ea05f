"""Lessons: claims about normalization, each measured by a short script in `examples/lessons`."""

from __future__ import annotations

from normwise.lessons.lesson import Chart, Check, Lesson, Size, about
from normwise.lessons.script import tell

__all__ = ["Chart", "Check", "Lesson", "Size", "about", "tell"]
