"""Where the command line starts: ``lightning-rlhf``, and ``python -m lightning_rlhf``."""

import os
import sys

from lightning_rlhf.runtime import preemption


def main() -> None:
    """Run the command line."""
    if preemption.is_worker():
        # first of all: a launcher may die in the seconds that the imports below take
        preemption.end_with_parent()
    from lightning_rlhf.commands.overview import answered

    # in a moment, since nothing is imported
    if answered(sys.argv[1:]):
        return
    if sys.argv[1:2] == ["annotate"]:
        # a page for people needs no torch, and is up in a second without it
        from lightning_rlhf.commands.annotate import main as annotate

        annotate(sys.argv[2:])
        return
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_rlhf.cli import main as run
    from lightning_rlhf.runtime.distributed import end_with

    try:
        run()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MisconfigurationException) as error:
        # Lightning's own word for a setting that is wrong: the text says which
        told = isinstance(error, MisconfigurationException) and not os.environ.get("LIGHTNING_RLHF_TRACEBACK")
        if not (told or told_by_us(error)):
            raise
        print(f"error: {error}\n(LIGHTNING_RLHF_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as ended:
        # a text is the message of an error
        if isinstance(ended.code, int):
            end_with(ended.code)
        raise
    end_with(0)


def told_by_us(error: BaseException) -> bool:
    """Whether an error was raised by this package, with cause and remedy in its text: no traceback is needed then."""
    if os.environ.get("LIGHTNING_RLHF_TRACEBACK"):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = os.path.dirname(os.path.abspath(__file__))
    return trace is not None and os.path.abspath(trace.tb_frame.f_code.co_filename).startswith(package + os.sep)


if __name__ == "__main__":
    main()
