"""Complete runs by name (``quickstart``, ``dpo_online``, ...) and overlays (``sampler/...``, ``trainer/...``).

YAML only. Installed as ``lightning_rlhf.configs``; the command line finds the files with `importlib.resources`, so that
``--config NAME`` works from any directory.
"""
