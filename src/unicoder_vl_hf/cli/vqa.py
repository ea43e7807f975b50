"""The commands of questions about photos: asking, and checking a submission before it is sent."""

from argparse import Namespace

from .commands import Add, Commands, Result, add_detector_option, check_paths, detector_options, problems

commands = Commands()


def _ask_arguments(add: Add) -> None:
    add("image", help="photo, saved record (.npz), or image id of --regions")
    add("questions", nargs="+", metavar="question", help="question about it")
    add("--model", required=True, help="checkpoint that was fine-tuned for questions, with its processor")
    add("--regions", help="folder of the store in which image ids are looked up")
    add("--detector", metavar="FAMILY:NAME", help="detector of the photo (default: that of the training's regions)")
    add_detector_option(add, "grid_size=7")
    add("--top", type=int, default=5, help="answers to each question (default: 5)")
    add("--picture", metavar="FILE", help="PNG to draw the photo and the answers to the first question in")


@commands.register("ask", "Answers questions about a photo", _ask_arguments)
def _ask(args: Namespace) -> object:
    check_paths(args, "regions")
    options = detector_options(args, "trained_on")
    from pathlib import Path

    from ..tasks.vqa.asking import QuestionAnswerer

    if args.top < 1:
        raise ValueError(f"--top is {args.top}, expected at least 1.")
    if args.picture is not None and not Path(args.image).is_file():
        raise ValueError(f"--picture draws a photo, and {args.image} is no file of one.")
    answerer = QuestionAnswerer.from_pretrained(
        args.model, args.regions, detector=args.detector, detector_options=options
    )
    image = Path(args.image) if args.image.endswith(".npz") and Path(args.image).is_file() else args.image
    found = answerer(image, args.questions, args.top)
    lines, data = [], []
    for question, answers in zip(args.questions, found, strict=True):
        lines += [question, *(f"{probability:8.1%}  {answer}" for answer, probability in answers)]
        data.append(
            {
                "question": question,
                "answers": [dict(zip(("answer", "probability"), each, strict=True)) for each in answers],
            }
        )
    if args.picture is not None:
        from PIL import Image

        from ..pictures import draw_answers

        lines.append(
            str(draw_answers(args.picture, Image.open(args.image).convert("RGB"), args.questions[0], found[0]))
        )
    return Result("\n".join(lines), {"questions": data, "picture": args.picture})


def _check_arguments(add: Add) -> None:
    add("submission", help="JSON of the submission")
    add("--questions", required=True, metavar="FILE", help="questions of the submission: VQA's, OK-VQA's or GQA's")


@commands.register("vqa-check", "Would the server of VQA or GQA take this submission?", _check_arguments)
def _check(args: Namespace) -> object:
    from ..tasks.vqa.submission import check_submission

    return problems(check_submission(args.submission, args.questions))
