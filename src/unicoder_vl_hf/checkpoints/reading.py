"""Reads checkpoints of others, of a folder, a file or a repository of the Hub: tensors, settings and words, no code."""

import pickle
import re
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizer

from ..name_lists import check_model_name, hub_options, read_json, read_names
from ..regions.formats import restricted_pickle

# Kinds of files with weights, the preferred first, and files that a training leaves beside them.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.th")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")
OTHER_FILES = ["*.json", "vocab.txt", "README.md"]
NESTED = ("state_dict", "model_state_dict", "model")  # under which some files keep the weights
# Tokenizers of BERT by their number of words, for checkpoints that come without one.
TOKENIZERS = {28996: "google-bert/bert-base-cased", 30522: "google-bert/bert-base-uncased"}


def read_answers(path: str | PathLike[str]) -> list[str]:
    """
    Reads a file of answers, in the order of the logits of a model that chooses among them.

    Args:
        path (`str` or `os.PathLike`): A json or pickle of {answer: label} or of a list, such as the common
            `trainval_ans2label.pkl` and `trainval_label2ans.pkl`, of which nothing is executed; or a .txt of one a
            line.

    Raises:
        `ValueError`: the file holds something else, or labels that are not 0, 1, 2 and so on.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return read_names(path)
    is_pickle = path.suffix in (".pkl", ".pickle", ".p")
    content = restricted_pickle.load(path.read_bytes(), str(path)) if is_pickle else read_json(path)
    if isinstance(content, dict):
        if not all(isinstance(label, int) for label in content.values()):
            raise ValueError(f"{path}: {next(iter(content.items()))!r:.80} …; expected answers with labels, numbers.")
        by_label = {label: answer for answer, label in content.items()}
        if len(by_label) < len(content) or by_label.keys() != set(range(len(content))):
            raise ValueError(f"{path}: labels {list(by_label)[:5]} …; expected 0 to {len(content) - 1}, each once.")
        content = [by_label[label] for label in range(len(by_label))]
    if not isinstance(content, list) or not all(isinstance(answer, str) for answer in content):
        found = restricted_pickle.brief(content)
        raise ValueError(f"{path} holds {found}; expected {{answer: label}} or a list of answers.")
    return content


@dataclass
class Source:
    """
    A checkpoint as it was found.

    Args:
        name (`str`): The folder, file or repository, as it was asked for.
        folder (`Path`): The folder that holds it here.
        files (list of `Path`): The files with its weights.
        config (`dict`): Its `config.json`, empty where there is none.
        revision, licence (`str`, *optional*): The commit, and the licence that its repository states.
    """

    name: str
    folder: Path
    files: list[Path]
    config: dict[str, Any]
    revision: str | None = None
    licence: str | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        Reads the weights, by their keys.

        Raises:
            `ValueError`: a file is damaged, or holds something else than tensors.
        """
        return {key: tensor for path in self.files for key, tensor in _read_tensors(path).items()}


def find_source(name: str | PathLike[str], revision: str | None = None) -> Source:
    """
    Finds a checkpoint, and downloads it where it is a repository of the Hub.

    Args:
        name (`str` or `os.PathLike`): A folder, a file of weights, whose folder may hold `config.json` and a
            vocabulary, or a repository.
        revision (`str`, *optional*): Branch, tag or commit of the repository.

    Raises:
        `ValueError`: there is no such checkpoint, or it is none of PyTorch, or several.
        `OSError`: the repository does not exist, or cannot be reached.
    """
    check_model_name(name)
    path, commit = Path(name), None
    if not path.exists():
        if "/" not in str(name):
            raise ValueError(f"There is no {name}: give a folder, a file, or a repository of the Hub, owner/name.")
        path = _download(str(name), revision)
        commit = path.name
    elif revision is not None:
        raise ValueError(f"{name} is on this disk and has no revision {revision!r}: leave it out.")
    folder, files = (path.parent, [path]) if path.is_file() else (path, _weight_files(path))
    if not files:
        raise ValueError(f"{name} holds no weights of PyTorch: expected a file such as {', '.join(WEIGHTS)}.")
    if len(files) > 1 and not list(folder.glob("*.index.json")):
        raise ValueError(f"{name} holds several checkpoints, {', '.join(file.name for file in files)}: give one file.")
    path_of_config, card = folder / "config.json", folder / "README.md"
    config = read_json(path_of_config) if path_of_config.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path_of_config} holds a {type(config).__name__}, expected an object.")
    licence = None
    with suppress(Exception):  # of a card without a header that YAML reads
        licence = ModelCard.load(card).data.get("license") if card.exists() else None
    return Source(
        name=str(name),
        folder=folder,
        files=files,
        config=config,
        revision=commit,
        licence=licence,
    )


def load_tokenizer(source: Source, num_words: int, given: str | None = None) -> tuple[BertTokenizer, str]:
    """
    Loads the tokenizer of a checkpoint: the one given, that of its folder, or, where it has BERT's number of words,
    BERT's from the Hub. Words with capitals in its vocabulary make it a cased one.

    Returns:
        The tokenizer, and where it comes from.

    Raises:
        `ValueError`: there is none, or it has no words, or more tokens than the checkpoint has word embeddings.
    """
    has_words = any((source.folder / name).exists() for name in ("vocab.txt", "tokenizer.json"))
    origin = given or (str(source.folder) if has_words else TOKENIZERS.get(num_words))
    remedy = "Give the tokenizer that the model was trained with, --tokenizer FOLDER or REPOSITORY"
    if origin is None:
        raise ValueError(
            f"{source.name} comes without a vocabulary, and its {num_words:,} words are not those of a BERT, 28,996 "
            f"cased or 30,522 uncased ones. {remedy}."
        )
    try:
        options = hub_options(origin)
        tokenizer = BertTokenizer.from_pretrained(origin, **options)
        if set(tokenizer.get_vocab()) == set(tokenizer.all_special_tokens):  # transformers found no vocabulary
            raise OSError("it gives no words")
        cased = any(word != word.lower() for word in tokenizer.get_vocab() if not word.startswith("["))
        tokenizer = BertTokenizer.from_pretrained(origin, do_lower_case=not cased, **options)
    except OSError as error:
        raise ValueError(
            f"{source.name} is to have the words of {origin}, which cannot be loaded here "
            f"({str(error).splitlines()[0]}). {remedy}, such as a folder with its vocab.txt."
        ) from error
    if (tokens := max(tokenizer.get_vocab().values()) + 1) > num_words:
        raise ValueError(f"{origin} has {tokens:,} tokens, but {source.name} {num_words:,} words. {remedy}.")
    return tokenizer, "its own" if origin == str(source.folder) else origin


def _download(name: str, revision: str | None) -> Path:
    for kind in WEIGHTS:
        patterns = [kind, *OTHER_FILES]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if _weight_files(folder):
            break
    return folder


def _weight_files(folder: Path) -> list[Path]:
    for kind in WEIGHTS:
        if files := [path for path in sorted(folder.glob(kind)) if not NO_WEIGHTS.fullmatch(path.name)]:
            return files
    return []


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path} is damaged, or no file of weights: {reason}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and is not opened: it could run code of strangers. Open it where you "
            "trust it, and save its state dict by safetensors."
        ) from error
    for name in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    strange = None if isinstance(loaded, dict) else type(loaded).__name__
    for key, value in {} if strange else loaded.items():
        if not isinstance(value, torch.Tensor):
            strange = f"{key!r}, a {type(value).__name__}"
    if strange:
        raise ValueError(f"{path} holds {strange}; expected a state dict, that is tensors by their keys.")
    return loaded
