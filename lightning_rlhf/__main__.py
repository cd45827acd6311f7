"""Where the command line starts: ``lightning-rlhf``, and ``python -m lightning_rlhf``."""

import sys

from lightning_rlhf.runtime import preemption


def main() -> None:
    """Run the command line."""
    if preemption.is_worker():
        # first of all: a launcher may die in the seconds that the imports below take
        preemption.end_with_parent()
    if sys.argv[1:2] == ["annotate"]:
        # a page for people needs no torch, and is up in a second without it
        from lightning_rlhf.commands.annotate import main as annotate

        annotate(sys.argv[2:])
        return
    from lightning_rlhf.cli import main as run
    from lightning_rlhf.runtime.distributed import end_with

    try:
        run()
    except SystemExit as ended:
        # a text is the message of an error
        if isinstance(ended.code, int):
            end_with(ended.code)
        raise
    end_with(0)


if __name__ == "__main__":
    main()
