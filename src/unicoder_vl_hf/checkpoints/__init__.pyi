from .importing import import_checkpoint as import_checkpoint
from .inspection import inspect_checkpoint as inspect_checkpoint
from .reading import read_answers as read_answers
