"""Distil a student from a teacher, or train it alone (distill.mode=normal).

accelerate launch recipes/distill.py --config recipes/quickstart.yaml
accelerate launch recipes/distill.py --config RECIPE.yaml --resume auto train.global_batch=64 optim.lr=5e-4

Exit codes: 0 finished; 2 something outside the program is wrong; 75 stopped by SIGTERM or SIGUSR1, saved, and to be
started again; 130 interrupted by Ctrl-C, without a checkpoint of that step.
"""

import argparse
import faulthandler
import os
import sys
from pathlib import Path

from fpd_accel.config import accumulation_steps, load_recipe
from fpd_accel.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Preempted, UserError
from fpd_accel.log import fail, say
from fpd_accel.stop import StopRequest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="what to do; see recipes/")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto (default): go on from the newest whole checkpoint, if there is one; none: refuse a run that has "
        "begun; DIR: go on from this checkpoint",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values in place of the recipe's")
    arguments = parser.parse_intermixed_args()
    with StopRequest() as stop:
        return distill(arguments, stop)


def distill(arguments: argparse.Namespace, stop: StopRequest) -> int:
    try:
        recipe = load_recipe(arguments.config, arguments.overrides)
        accumulation_steps(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        error.local = os.environ.get("LOCAL_RANK", "0") == "0" and _reads_well_without_files(arguments)
        return fail(error)
    try:
        from fpd_accel.processes import leave  # torch comes in here, behind every check that does not need it
        from fpd_accel.run import run

        try:
            run(recipe, resume=arguments.resume, stop=stop)
        except Preempted as reason:
            say(str(reason))
            leave()
            return EXIT_PREEMPTED
        leave()
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoint")
        return EXIT_INTERRUPTED
    return 0


def _reads_well_without_files(arguments: argparse.Namespace) -> bool:
    """Whether what is wrong may be wrong on this machine alone: files that it lacks, the recipe among them."""
    try:
        accumulation_steps(
            load_recipe(arguments.config, arguments.overrides, check_files=False),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
    except UserError:
        return not Path(arguments.config).is_file()
    return True


if __name__ == "__main__":
    faulthandler.enable()  # where no message is possible, as of a file cut short that is mapped: at least the place
    sys.exit(main())
