"""Where the command line starts: ``lightning-rlhf``, and ``python -m lightning_rlhf``."""

from lightning_rlhf.runtime import preemption


def main() -> None:
    """Run the command line."""
    if preemption.is_worker():
        # first of all: a launcher may die in the seconds that the imports below take
        preemption.end_with_parent()
    from lightning_rlhf.cli import main as run

    run()


if __name__ == "__main__":
    main()
