"""Distil a student from a teacher, or train it alone (distill.mode=normal).

accelerate launch recipes/distill.py --config recipes/quickstart.yaml
accelerate launch recipes/distill.py --config RECIPE.yaml --resume auto train.global_batch=64 optim.lr=5e-4

Exit codes: 0 finished; 2 an error outside the program, with a message; 75 preempted by SIGTERM or SIGUSR1 after saving
a checkpoint, to be started again; 130 interrupted by Ctrl-C, without a checkpoint of that step.
"""

import argparse
import faulthandler
import os
import sys
from pathlib import Path

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.plan import accumulation_steps
from fpd_accel.console import fail, say
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Preempted, UserError


def main() -> int:
    """Parse the command line and run the recipe; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe to run; see recipes/")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto (default): continue from the newest whole checkpoint, if there is one; none: refuse a run that has "
        "begun; DIR: continue from this checkpoint",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values in place of those of the recipe")
    arguments = parser.parse_intermixed_args()
    with StopSignal() as stop:
        return distill(arguments, stop)


def distill(arguments: argparse.Namespace, stop: StopSignal) -> int:
    """Run the recipe; return the exit code, after a message for any `UserError`."""
    try:
        recipe = load_recipe(arguments.config, arguments.overrides)
        accumulation_steps(recipe.train, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        error.this_rank_only = os.environ.get("LOCAL_RANK", "0") == "0" and _wrong_on_this_machine_alone(arguments)
        return fail(error)
    try:
        # torch is imported here, after every check that does not need it
        from fpd_accel.distributed.accelerator import shutdown
        from fpd_accel.training.run import run

        try:
            run(recipe, resume=arguments.resume, stop=stop)
        except Preempted as reason:
            say(str(reason))
            shutdown()
            return EXIT_PREEMPTED
        shutdown()
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted; the same command continues from the last checkpoint")
        return EXIT_INTERRUPTED
    return 0


def _wrong_on_this_machine_alone(arguments: argparse.Namespace) -> bool:
    """Return whether the recipe may be wrong on this machine alone, because files are missing here."""
    try:
        recipe = load_recipe(arguments.config, arguments.overrides, check_files=False)
        accumulation_steps(recipe.train, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError:
        return not Path(arguments.config).is_file()
    return True


if __name__ == "__main__":
    faulthandler.enable()  # prints the place of crashes that no message can report, such as a truncated mapped file
    sys.exit(main())
