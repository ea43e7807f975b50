"""What every training script starts from: options in either spelling, and what is said before the first step."""

import dataclasses
import functools
import logging

import pytest
import small_world
import tiny
import torch
from transformers import AutoConfig, AutoTokenizer, TrainingArguments
from two_processes import run

from unicoder_vl_hf import (
    ImageTextScorer,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
)
from unicoder_vl_hf.regions.store import RegionStore
from unicoder_vl_hf.runs import arguments as arguments_module, setup
from unicoder_vl_hf.runs.arguments import parse_arguments, parse_evaluation
from unicoder_vl_hf.runs.evaluation import evaluation_dtype, evaluation_precision
from unicoder_vl_hf.runs.log import in_a_table
from unicoder_vl_hf.runs.model_card import TrainingRun
from unicoder_vl_hf.runs.trainer import training_defaults
from unicoder_vl_hf.scenes import questions as scenes_vcr
from unicoder_vl_hf.scoring.checkpoints import load_for_scoring
from unicoder_vl_hf.scripts.evaluate_pretraining import PretrainingEvaluationArguments
from unicoder_vl_hf.tasks.entailment.run_evaluation import EntailmentEvaluationArguments
from unicoder_vl_hf.tasks.grounding.run_evaluation import GroundingEvaluationArguments
from unicoder_vl_hf.tasks.nlvr2.run_evaluation import NLVR2EvaluationArguments
from unicoder_vl_hf.tasks.pretraining import run_trainer
from unicoder_vl_hf.tasks.pretraining.loop import PAPER, SCENES, LoopArguments
from unicoder_vl_hf.tasks.pretraining.setup import PretrainingArguments, prepare_pretraining
from unicoder_vl_hf.tasks.retrieval import training as finetuning
from unicoder_vl_hf.tasks.retrieval.losses import ContrastiveLoss, HardNegativeLoss
from unicoder_vl_hf.tasks.retrieval.run_evaluation import RetrievalEvaluationArguments
from unicoder_vl_hf.tasks.retrieval.run_gallery import GalleryArguments
from unicoder_vl_hf.tasks.retrieval.run_two_stage import TwoStageArguments
from unicoder_vl_hf.tasks.retrieval.training import RetrievalArguments, prepare_retrieval
from unicoder_vl_hf.tasks.vcr.pretraining import VCRPretrainingArguments, prepare_vcr_pretraining
from unicoder_vl_hf.tasks.vcr.run_evaluation import VCREvaluationArguments
from unicoder_vl_hf.tasks.vcr.training import VCRArguments, load_for_vcr, prepare_vcr
from unicoder_vl_hf.tasks.vqa.run_evaluation import VQAEvaluationArguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world.build(tmp_path_factory.mktemp("preparation"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small_world.save_bert(tmp_path_factory.mktemp("bert"), dropout=0.0)


# One spelling, and the other


def loop(*given):
    _, args = parse_arguments(
        (PretrainingArguments, LoopArguments), ["--output_dir", "o", *given], paper=PAPER, scenes=SCENES
    )
    return args


def trainer(*given):
    recipes = {"paper": training_defaults(PAPER), "scenes": training_defaults(SCENES)}
    _, args = parse_arguments(
        (PretrainingArguments, TrainingArguments), ["--output_dir", "o", "--use_cpu", *given], **recipes
    )
    return args


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], "auto"),
        (["--mixed_precision", "bf16"], "bf16"),
        (["--bf16"], "bf16"),
        (["--bf16", "True"], "bf16"),
        (["--bf16=False"], "no"),
        (["--fp16", "true"], "fp16"),
    ],
)
def test_precision_of_the_loop(given, expected):
    assert loop(*given).mixed_precision == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--mixed_precision", "bf16"], (True, False)),
        (["--mixed-precision=no"], (False, False)),
        (["--bf16"], (True, False)),
        (["--bf16", "False"], (False, False)),
    ],
)
def test_precision_of_trainer(given, expected):
    args = trainer(*given)
    assert (args.bf16, args.fp16) == expected


def test_auto_is_the_default_of_trainer():
    assert trainer("--mixed_precision", "auto").bf16 == trainer().bf16


EVALUATIONS = {
    PretrainingEvaluationArguments: "--captions c",
    RetrievalEvaluationArguments: "--captions c",
    TwoStageArguments: "--captions c",
    GalleryArguments: "--captions c --output o --photos p",
    VCREvaluationArguments: "--annotations a",
    EntailmentEvaluationArguments: "--annotations a",
    NLVR2EvaluationArguments: "--annotations a",
    VQAEvaluationArguments: "--questions q",
    GroundingEvaluationArguments: "--entities e --images i",
}


@pytest.mark.parametrize("arguments", EVALUATIONS)
def test_precision_of_evaluations(arguments, capsys):
    words = ["--model", "m", "--regions", "r", *EVALUATIONS[arguments].split()]

    def precision(*given):
        (args,) = arguments_module.make_parser(arguments).parse_args_into_dataclasses([*words, *given])
        return args.mixed_precision

    assert precision() == precision("--bf16", "False") == "no"
    assert (
        precision("--bf16") == precision("--mixed_precision", "bf16") == precision("--mixed-precision=bf16") == "bf16"
    )
    assert precision("--fp16") == "fp16"
    with pytest.raises(SystemExit):
        precision("--bf16", "--mixed_precision", "bf16")
    assert "give --mixed_precision alone" in capsys.readouterr().err


def test_the_dtype_of_an_evaluation():
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    dtypes = {name: evaluation_dtype(name, model) for name in ("no", "bf16", "fp16")}
    assert dtypes == {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    with pytest.raises(ValueError, match="'fp8', expected auto, no, bf16 or fp16"):
        evaluation_dtype("fp8", model)


def test_an_evaluation_in_bf16():
    model, inputs = tiny.model(UnicoderVLForImageTextRetrieval), tiny.padded_batch()
    model.config.padding_free = True
    with torch.no_grad(), evaluation_precision("no", model):
        full = model(**inputs).scores
    with torch.no_grad(), evaluation_precision("bf16", model):
        rounded = model(**inputs).scores
    difference = (full - rounded).abs().max()
    assert 0 < difference < 0.1


def test_the_table_that_ends_a_training():
    training = TrainingRun(steps=6, epochs=0.6, batch_size=8, learning_rate=1e-4, seed=0, mixed_precision="no")
    assert in_a_table("runs/mine", training, {"eval_recall_sum": 2.9, "eval_loss": 0.12345}).splitlines() == [
        "runs/mine is complete.",
        "  Steps          6 of 8 pairs (over all processes)",
        "  Epochs         0.6",
        "  Learning rate  0.0001 at its peak",
        "  Seed           0",
        "  Precision      float32",
        "  recall_sum     2.9",
        "  loss           0.1235",
    ]


def test_pairs_of_a_step_and_of_a_micro_batch(monkeypatch):
    accumulation = ["--gradient_accumulation_steps", "4"]
    assert loop("--per_device_train_batch_size", "12", *accumulation).train_batch_size == 48
    assert loop("--per_device_train_batch_size=12").train_batch_size == 12  # the scenes' accumulation
    assert trainer("--train_batch_size", "48", *accumulation).per_device_train_batch_size == 12
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loop("--per_device_train_batch_size", "12", *accumulation).train_batch_size == 96
    given = ["--train_batch_size", "48", *accumulation]
    (words,) = [arguments_module.in_our_spelling(given, arguments_module.make_parser(TrainingArguments))]
    assert words == ["--per_device_train_batch_size", "6", *accumulation]


def retrieval(*given):
    recipes = {
        "paper": training_defaults(finetuning.PAPER),
        "scenes": training_defaults(finetuning.SCENES),
    }
    words = ["--output_dir", "o", "--use_cpu", *given]
    args, _ = parse_arguments((RetrievalArguments, TrainingArguments), words, recipes=finetuning.RECIPES, **recipes)
    return args


@pytest.mark.parametrize("given", [["--recipe", "strong"], ["--recipe=strong"]])
def test_the_strong_recipe_is_a_set_of_defaults(given, capsys):
    """An option that is given replaces its own, wherever it stands; without it all is as the paper has it."""
    assert retrieval() == retrieval("--recipe", "paper") == RetrievalArguments()
    strong = retrieval(*given)
    assert strong == RetrievalArguments(**finetuning.STRONG)
    own = retrieval("--matching_head", "unicoder_vl", *given, "--loss", "binary")
    assert own == dataclasses.replace(strong, matching_head="unicoder_vl", loss="binary")
    assert isinstance(strong.training_loss, HardNegativeLoss)
    with pytest.raises(SystemExit):
        retrieval("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "strong: initializer_range 0.08, align_regions True" in told and "num_text_layers -1" in told
    with pytest.raises(SystemExit):
        retrieval("--recipe", "weak")
    assert "argument --recipe: invalid choice: 'weak'" in capsys.readouterr().err


def test_the_recipes_of_two_runs_are_those_of_the_results_page():
    """The second keeps the first stage that the first trains; both are the options that were measured."""
    first, second = retrieval("--recipe", "first-stage"), retrieval("--recipe", "second-stage")
    assert isinstance(first.training_loss, ContrastiveLoss) and first.num_text_layers == -1
    assert isinstance(second.training_loss, HardNegativeLoss) and second.training_loss.num_hard_negatives == 2
    assert second.freeze_first_stage and second.query_bank == 30_000 and not second.similarity_in_training
    for name, epochs in (("first-stage", 4), ("second-stage", 3)):
        words = ["--output_dir", "o", "--use_cpu", "--captions", "c", "--regions", "r", "--recipe", name]
        _, training = parse_arguments(
            (RetrievalArguments, TrainingArguments),
            words,
            paper=training_defaults(finetuning.PAPER),
            scenes=training_defaults(finetuning.SCENES),
            recipes=finetuning.RECIPES,
        )
        assert (training.num_train_epochs, training.learning_rate) == (epochs, 5e-4)
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (128, 1)


def test_all_of_a_bert_for_words(world, bert, tmp_path):
    """With two layers behind it, or as many as are asked for; a checkpoint that has text layers keeps them."""
    store = RegionStore(world / "regions")

    def load(name, **options):
        arguments = RetrievalArguments(model_name_or_path=name, num_text_layers=-1, **options)
        return setup.load_model(arguments, store, UnicoderVLForImageTextRetrieval)

    own = AutoConfig.from_pretrained(bert).num_hidden_layers
    model = load(str(bert))
    assert (model.config.num_hidden_layers, model.config.num_text_layers) == (own + 2, own)
    assert load(str(bert), num_hidden_layers=own + 3).config.num_hidden_layers == own + 3
    model.save_pretrained(tmp_path / "model")
    assert load(str(tmp_path / "model")).config.num_text_layers == own
    plain = UnicoderVLForImageTextRetrieval.from_bert(bert, region_feature_dim=store.feature_dim)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"--num_text_layers is -1, but the Unicoder-VL .* was made with 0.* give 0"):
        load(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="num_text_layers=-1 takes those of a BERT"):
        load(None)


def test_new_weights_of_another_deviation(world, bert):
    """Those of a new model, and those that a BERT lacks; what was trained stays."""
    store = RegionStore(world / "regions")

    def load(value, **options):
        arguments = PretrainingArguments(initializer_range=value, **options)
        return setup.load_model(arguments, store, UnicoderVLForPreTraining)

    new, of_bert, as_ever = load(0.08), *(load(value, model_name_or_path=str(bert)) for value in (0.08, None))
    for model, weights in ((new, new.bert.encoder), (of_bert, of_bert.region_head)):
        deviation = torch.cat([weight.flatten() for weight in weights.parameters() if weight.ndim == 2]).std()
        assert model.config.initializer_range == 0.08 and abs(deviation.item() - 0.08) < 0.01
    assert as_ever.config.initializer_range == 0.02
    for name, weight in of_bert.bert.encoder.named_parameters():
        assert weight.equal(as_ever.bert.encoder.get_parameter(name))
    for options in ({}, {"model_name_or_path": str(bert)}):
        model = load(0.08, location_initializer_range=1.0, **options)
        assert abs(model.bert.embeddings.region_embeddings.location_projection.weight.std().item() - 1) < 0.2


def test_the_joint_dropout_of_another_training_is_not_taken_over(world, bert, tmp_path):
    store = RegionStore(world / "regions")
    arguments = PretrainingArguments(model_name_or_path=str(bert))
    fields = {"joint_dropout_prob": 0.4}
    setup.load_model(arguments, store, UnicoderVLForImageTextRetrieval, **fields).save_pretrained(tmp_path / "told")
    arguments.model_name_or_path = str(tmp_path / "told")
    for more, wanted in ((fields, 0.4), ({}, 0.0)):
        model = setup.load_model(arguments, store, UnicoderVLForImageTextRetrieval, **more)
        assert model.config.joint_dropout_prob == wanted


def test_warm_up():
    assert loop("--warmup_steps", "0.2").warmup_ratio == 0.2 and trainer("--warmup_ratio", "0.2").warmup_steps == 0.2


@pytest.mark.parametrize(
    "script, given, says",
    [
        (loop, ["--mixed_precision", "no", "--bf16"], "--mixed_precision and --bf16: give --mixed_precision alone"),
        (trainer, ["--bf16", "--mixed_precision", "no"], "--mixed_precision and --bf16: give --mixed_precision alone"),
        (trainer, ["--mixed_precision", "half"], "--mixed_precision half: expected auto, no, bf16 or fp16"),
        (trainer, ["--train_batch_size", "9", "--gradient_accumulation_steps", "2"], "cannot hold so many pairs"),
        (loop, ["--warmup_steps", "100"], "--warmup_steps 100: expected a share of the steps, below 1"),
        (loop, ["--bf16", "perhaps"], "--bf16 perhaps: Truthy value expected"),
        (loop, ["--eval_steps", "0"], "eval_steps=0, expected at least 1"),
        (loop, ["--max_steps", "0"], "max_steps=0, expected at least 1, or -1"),
        (loop, ["--num_train_epochs", "0"], "num_train_epochs=0, expected at least 1"),
        (loop, ["--warmup_ratio", "5"], "warmup_ratio=5.0, expected a share"),
        (loop, ["--learning-rat", "1"], "there is no option --learning-rat. Did you mean '--learning-rate'? --help"),
        (trainer, ["--bogus"], "there is no option --bogus. --help lists the options"),
    ],
)
def test_what_contradicts_or_is_no_option(script, given, says, capsys):
    with pytest.raises(SystemExit) as ended:
        script(*given)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "HfArgumentParser" not in error


def test_steps_between_evaluations_are_not_passed_over():
    """Trainer evaluates by its strategy, which our recipes set to epochs."""
    assert trainer().eval_strategy == "epoch" and trainer("--eval_steps", "7").eval_strategy == "steps"
    assert trainer("--eval_steps", "7", "--eval_strategy", "no").eval_strategy == "no"
    assert trainer("--save_steps", "7").save_strategy == "steps"


def test_the_help_of_trainer_documents_the_one_spelling(capsys):
    with pytest.raises(SystemExit):
        trainer("--help")
    assert "--mixed_precision" in capsys.readouterr().out


# A tokenizer with more tokens than its model has rows


@pytest.fixture(scope="module")
def swollen(world, tmp_path_factory):
    """A BERT and checkpoints, each with a tokenizer of two tokens more."""
    folder = tmp_path_factory.mktemp("swollen")
    paths = {"bert": small_world.save_bert(folder / "bert", dropout=0.0)}
    small_world.save_retrieval(folder / "retrieval", world)
    paths["retrieval"] = folder / "retrieval"
    for path in paths.values():
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(["zebra", "giraffe"])
        tokenizer.save_pretrained(path)
    return paths


SAYS = r"the tokenizer has \d+ tokens, the model \d+ rows of word embeddings.*model\.resize_token_embeddings\(\d+\)"


@pytest.mark.parametrize("start", ["bert", "retrieval"])
@pytest.mark.parametrize(
    "classes, prepare",
    [(PretrainingArguments, prepare_pretraining), (RetrievalArguments, prepare_retrieval)],
)
def test_of_captions(world, swollen, tmp_path, start, classes, prepare):
    files = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions")}
    with pytest.raises(ValueError, match=SAYS):
        prepare(classes(**files, model_name_or_path=str(swollen[start])), tmp_path, seed=0)


@pytest.mark.parametrize(
    "classes, prepare",
    [(VCRArguments, prepare_vcr), (VCRPretrainingArguments, functools.partial(prepare_vcr_pretraining, seed=0))],
)
def test_of_questions(swollen, tmp_path, monkeypatch, classes, prepare):
    small = functools.partial(scenes_vcr.build_vcr_scenes, num_train=2, num_val=2, num_test=1)
    monkeypatch.setattr(scenes_vcr, "build_vcr_scenes", small)
    with pytest.raises(ValueError, match=SAYS):
        prepare(classes(model_name_or_path=str(swollen["bert"]), max_length=64), tmp_path)


def test_of_scores(swollen):
    """Search, mining, the first stage and evaluation load by the first of these."""
    with pytest.raises(ValueError, match=SAYS):
        load_for_scoring(swollen["retrieval"])
    processor = tiny.processor()
    processor.tokenizer.add_tokens(["zebra"])
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    with pytest.raises(ValueError, match="the tokenizer has 15 tokens, the model 14 rows"):
        ImageTextScorer(model, processor)
    model.resize_token_embeddings(15)
    ImageTextScorer(model, processor)


@pytest.mark.parametrize("head", [UnicoderVLForMultipleChoice, UnicoderVLForPreTraining])
def test_of_evaluations(head, world, tmp_path):
    processor = tiny.processor()
    processor.tokenizer.add_tokens(["zebra"])
    processor.save_pretrained(tmp_path)
    tiny.model(head).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 15 tokens, the model 14 rows"):
        if head is UnicoderVLForMultipleChoice:
            load_for_vcr(tmp_path, {})
        else:
            options = {"model": tmp_path, "captions": world / "captions.jsonl", "regions": world / "regions"}
            run("evaluate_pretraining", [word for name, value in options.items() for word in (f"--{name}", str(value))])


# Options and splits that would be passed over


@pytest.mark.parametrize(
    "options, says",
    [
        ({"num_hidden_layers": 1}, "--num_hidden_layers is 1, but the Unicoder-VL .* was made with 2"),
        ({"image_token": False}, "--image_token is False, but the Unicoder-VL .* was made with True"),
        ({"num_region_classes": 99}, "--num_region_classes is 99, but the Unicoder-VL .* was made with 12"),
    ],
)
def test_what_a_checkpoint_is_made_of_stays(world, bert, tmp_path, options, says):
    files = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions")}
    prepare_pretraining(
        PretrainingArguments(**files, model_name_or_path=str(bert)), tmp_path, seed=0
    ).model.save_pretrained(tmp_path / "model")
    arguments = PretrainingArguments(**files, model_name_or_path=str(tmp_path / "model"), **options)
    with pytest.raises(ValueError, match=says):
        prepare_pretraining(arguments, tmp_path, seed=0)


@pytest.mark.parametrize(
    "split, said", [("val", []), ("train", ["40 of the 40 images of the split 'train' are trained"])]
)
def test_a_validation_on_what_is_trained_on_is_said(world, bert, tmp_path, monkeypatch, split, said):
    warned = []
    monkeypatch.setattr(setup.logger, "warning", warned.append)
    files = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions")}
    arguments = RetrievalArguments(**files, model_name_or_path=str(bert), validation_split=split)
    prepare_retrieval(arguments, tmp_path, seed=0)
    assert [text.partition(" on, too")[0] for text in warned if "trained on, too" in text] == said


@pytest.mark.parametrize(
    "options, says",
    [
        ({"early_stopping_patience": 2, "max_validation_images": 0}, "needs a validation"),
        ({"loss": "softmax", "margin": 0.3}, "--loss softmax has none"),
        ({"loss": "binary", "image_weight": 0.0}, "--loss binary has none"),
    ],
)
def test_retrieval_options_without_effect(options, says):
    with pytest.raises(ValueError, match=says):
        RetrievalArguments(**options)


@pytest.mark.parametrize("script", ["run_pretraining_trainer", "run_retrieval"])
def test_too_few_rows_for_a_micro_batch(script, world, bert, tmp_path):
    """Trainer would end after no step, and save a model that has learned nothing."""
    options = {"per_device_train_batch_size": 81, "disable_tqdm": "true", "mixed_precision": "no"}
    arguments = small_world.arguments(world, bert, tmp_path / "run", **options)
    with pytest.raises(ValueError, match="The 80 pairs of training fill no micro-batch of 81"):
        run(script, arguments)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_other_captions_of_the_same_number_are_another_run(world, bert, tmp_path):
    options = {"train_batch_size": 4, "max_steps": 4, "save_steps": 2, "save_total_limit": 9, "max_validation_pairs": 0}
    options["mixed_precision"] = "no"
    run("run_pretraining", small_world.arguments(world, bert, tmp_path / "run", **options))
    lines = (world / "captions.jsonl").read_text().splitlines(keepends=True)
    changed = tmp_path / "captions.jsonl"
    changed.write_text("".join(line.replace("red", "blue") for line in lines))
    options |= {"captions": changed, "resume_from_checkpoint": tmp_path / "run" / "checkpoint-2"}
    with pytest.raises(ValueError, match=r"another run.*train_pairs_sha256"):
        run("run_pretraining", small_world.arguments(world, bert, tmp_path / "run", **options))


def test_what_a_checkpoint_lacks_is_said_in_a_line(world, bert, tmp_path, caplog, monkeypatch):
    """But for a first stage, which was asked for; and transformers logs no table of its own."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = {"captions": str(world / "captions.jsonl"), "regions": str(world / "regions")}
    arguments = RetrievalArguments(**config, model_name_or_path=str(bert))
    made = prepare_retrieval(arguments, tmp_path, seed=0)
    for name, model in (("whole", made.model), ("encoder", made.model.bert)):
        model.save_pretrained(tmp_path / name)
        made.processor.save_pretrained(tmp_path / name)
        arguments = RetrievalArguments(**config, model_name_or_path=str(tmp_path / name), contrastive_weight=1.0)
        caplog.clear()
        assert prepare_retrieval(arguments, tmp_path, seed=0).model.first_stage is not None
        said = [record.message for record in caplog.records if "new parameters" in record.message]
        head = "new parameters ['matching_head.bias', 'matching_head.weight']."
        assert [text.partition(": ")[2] for text in said] == ([head] if name == "encoder" else [])
        assert "REPORT" not in caplog.text and "are cut" not in caplog.text


# Evaluations


def test_the_folders_of_what_an_evaluation_writes_are_there_before_it_begins(tmp_path):
    words = ["--model", "m", "--captions", "c", "--regions", "r", "--output", str(tmp_path / "new" / "deep" / "x.json")]
    args = parse_evaluation(RetrievalEvaluationArguments, words)
    assert args.model == "m" and (tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is, or is below, a file"):
        parse_evaluation(RetrievalEvaluationArguments, [*words[:-1], str(tmp_path / "file" / "x.json")])


def test_trainer_keeps_the_best_pretraining_by_what_it_measures(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_trainer, "train", lambda *arguments: seen.append(arguments[3]))
    words = ["--captions", "c", "--regions", "r", "--output_dir", str(tmp_path), "--load_best_model_at_end", "True"]
    run_trainer.main([*words, "--eval_strategy", "steps", "--save_strategy", "steps"])
    assert (seen[0].metric_for_best_model, seen[0].greater_is_better) == ("matching_auc", True)
