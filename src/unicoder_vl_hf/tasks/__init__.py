"""The tasks, a folder each: data, collator, losses, metrics, training, evaluation, pictures. None imports another."""

from ..lazy import lazily

__getattr__, __dir__ = lazily(__name__, dict.fromkeys(("pretraining", "retrieval", "vcr"), ()))

__all__: list[str] = []
