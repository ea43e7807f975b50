"""
Registers our classes with transformers' Auto classes, without importing transformers before anyone needs it.

`AutoModel.register` takes a class. Calling it in `import unicoder_vl_hf` would load PyTorch and transformers, which
takes seconds, even for `--help` or to validate a store. So [`install`] puts a finder before the others of
`sys.meta_path`: it finds what they find, and notices when a module of transformers has been executed. When the
outermost such module is done, our classes are registered with the Auto classes that came with it. Auto classes that
were loaded before are served at once. So every Auto class knows our classes, whatever is imported first.

It has to be the outermost module: `transformers.modeling_layers`, which our model needs, imports `AutoModel` in its
first lines, and loading our model at that moment would be a circle. The same holds while our own files are executed, so
they count as well.

Moving the commands to a package of their own would not help: the stores would have to move along, or everybody who
imports `RegionStore` would wait these seconds.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
TASK = "image-text-matching"
# Module of transformers.models.auto -> its Auto classes, each with the class of ours to register.
AUTO_CLASSES = {
    "configuration_auto": {"AutoConfig": "UnicoderVLConfig"},
    "modeling_auto": {
        "AutoModel": "UnicoderVLModel",
        "AutoModelForPreTraining": "UnicoderVLForPreTraining",
        "AutoModelForSequenceClassification": "UnicoderVLForImageTextRetrieval",
        "AutoModelForMultipleChoice": "UnicoderVLForMultipleChoice",
        "AutoModelForVisualQuestionAnswering": "UnicoderVLForQuestionAnswering",
    },
    "feature_extraction_auto": {"AutoFeatureExtractor": "UnicoderVLFeatureExtractor"},
    "processing_auto": {"AutoProcessor": "UnicoderVLProcessor"},
}


class Registration:
    """A finder of modules that registers our classes. There is one in a process."""

    def __init__(self) -> None:
        self.depths: Counter[int] = Counter()  # thread -> number of nested modules that it is executing
        self.served: set[Any] = set()  # Auto classes with which ours is registered

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """
        Finds modules of transformers and of ours as the usual finder does, with a loader that calls
        [`~Registration.run`].
        """
        if name.partition(".")[0] not in ("transformers", PACKAGE):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self.run, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def run(self, execute: Callable[..., object], *arguments: Any) -> None:
        """Executes a module, then registers our classes if it was the outermost."""
        thread = threading.get_ident()
        self.depths[thread] += 1
        try:
            execute(*arguments)
            if self.depths[thread] == 1:
                self.register()
                self.register_pipeline()
        finally:
            self.depths[thread] -= 1
            if not self.depths[thread]:
                del self.depths[thread]

    def register(self) -> None:
        """Registers our classes with all Auto classes that are loaded. This may load further ones."""
        package: Any = sys.modules[PACKAGE]
        try:
            while pending := self.pending():
                auto, name = pending[0]
                config, ours = package.UnicoderVLConfig, getattr(package, name)
                auto.register(config.model_type if ours is config else config, ours)
                self.served.add(auto)
        except (ImportError, AttributeError):
            # Another thread has half executed a module and waits for this one: it will come here when it is done.
            if self.pending() and len(self.depths) == 1:
                raise

    def pending(self) -> list[tuple[Any, str]]:
        """Lists the Auto classes that are loaded and do not know our class yet, each with the name of our class."""
        found = []
        for name, classes in AUTO_CLASSES.items():
            module = sys.modules.get(f"transformers.models.auto.{name}")
            for auto, ours in classes.items():
                if hasattr(module, auto) and getattr(module, auto) not in self.served:
                    found.append((getattr(module, auto), ours))
        return found

    def register_pipeline(self) -> None:
        """Registers our pipeline with transformers' registry, if that is loaded and does not know it yet."""
        registry = getattr(sys.modules.get("transformers.pipelines"), "PIPELINE_REGISTRY", None)
        if registry is None or TASK in registry.supported_tasks:
            return
        from .pipeline_unicoder_vl import UnicoderVLPipeline

        def make_detector(*args: Any, **named: Any) -> Any:
            return sys.modules[PACKAGE].regions.RegionFinder(*args, **named)

        UnicoderVLPipeline.make_detector = staticmethod(make_detector)
        auto = sys.modules["transformers"].AutoModelForSequenceClassification
        registry.register_pipeline(TASK, pipeline_class=UnicoderVLPipeline, pt_model=auto)


def install() -> None:
    """Has our classes registered with the Auto classes that are loaded, now and later."""
    registration = Registration()
    sys.meta_path.insert(0, registration)
    registration.run(lambda: None)
