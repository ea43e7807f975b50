"""The command of visual commonsense reasoning, which checks a submission before it is sent."""

from argparse import Namespace

from .commands import Add, Commands, problems

commands = Commands()


def _check_arguments(add: Add) -> None:
    add("submission", help="CSV of the submission")
    add("--annotations", required=True, metavar="FILE", help="questions of the submission: VCR's test.jsonl")


@commands.register("vcr-check", "Would VCR's leaderboard take this submission?", _check_arguments)
def _check(args: Namespace) -> object:
    from ..tasks.vcr.metrics import check_submission

    return problems(check_submission(args.submission, args.annotations))
