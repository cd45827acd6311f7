"""Lets ``python -m lightning_rlhf`` stand for the ``lightning-rlhf`` command."""

from lightning_rlhf.cli import main


if __name__ == "__main__":
    main()
