"""One network that is teacher and student: build it, call it as either, fuse it, take it apart again."""

from arcflow.student.build import build, remove
from arcflow.student.fuse import fuse, unfuse
from arcflow.student.state import trainable
from arcflow.student.views import predict, teacher

__all__ = ["build", "fuse", "predict", "remove", "teacher", "trainable", "unfuse"]
