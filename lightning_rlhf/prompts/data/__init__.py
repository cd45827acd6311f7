"""The prompts that `BuiltinPrompts` reads."""
