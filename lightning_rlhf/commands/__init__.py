"""The commands of ``lightning-rlhf``.

Import the modules one by one: this file stays empty, so that no import cycle can form.
"""
