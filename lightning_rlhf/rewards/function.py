"""Rewards that are plain functions, with the signature of TRL: ``f(prompts, completions, **columns)``."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments that every function may take; all others are columns of the rows."""


class FunctionReward(AbstractReward):
    """A function in TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, sync or async.

    ``prompts`` and ``completions`` are texts; of conversations, lists of messages, the completion being
    ``[{"role": "assistant", "content": ...}]``. Each column is a list with the value of every response's row, None
    where a row lacks it. A function without ``**kwargs`` gets the columns that it names. ``completion_ids``, a list of
    token ids for each response, is available, too. None in place of a number says that the reward does not apply.

    An async function may ask a judge about all responses at once.

    Args:
        function: the function, or its import path, ``my_module.my_function``, in a file of the working folder or on
            PYTHONPATH. A class is made without arguments and called.
        unscored: reward of a response to which the function does not apply; 0 leaves a sum as it is, as in TRL.

    Raises:
        ValueError: if there is no such function, or ``unscored`` is not finite.
    """

    def __init__(self, function: str | Callable[..., object], unscored: float = 0.0) -> None:
        if not math.isfinite(unscored):
            raise ValueError(f"FunctionReward.unscored must be finite; got {unscored}")
        self.unscored = unscored
        self._function = function_at(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise ValueError(f"FunctionReward.function must be a function or its import path; got {function!r:.80}")
        self.name = str(getattr(self._function, "__name__", type(self._function).__name__))
        """Name of its curve."""

    @property
    def own_functions(self) -> tuple[object, ...]:
        """The function, whose code the ledger notes."""
        return (self._function,)

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine."""
        # of an object, the method that makes it callable
        called = self._function if inspect.isroutine(self._function) else type(self._function).__call__
        return inspect.iscoroutinefunction(called)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that some row has each column that the function requires.

        Raises:
            ValueError: naming the column, and those that the rows have.
        """
        known = _column_names(prompts)
        required = [
            name
            for name, parameter in _parameters(self._function).items()
            if parameter.default is inspect.Parameter.empty and name not in GIVEN and not _is_variadic(parameter)
        ]
        missing = [name for name in required if name not in known]
        if missing:
            raise ValueError(
                f"{self.name} reads the column {missing[0]!r}, and the rows have {known or 'no other columns'}: rename "
                f"the argument, add the column, or give the argument a default"
            )

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """Columns that the function names; all, for one with ``**kwargs``."""
        parameters = _parameters(self._function)
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return set(names) if takes_all else set(names) & set(parameters)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Call the function on the batch.

        Raises:
            TypeError: if it does not return numbers.
            ValueError: if it does not return one per response.
        """
        self.check_prompts(prompts)
        arguments: dict[str, list[object]] = {
            "prompts": [p.text if p.messages is None else list(p.messages) for p in prompts],
            "completions": [_completion(p, r) for p, r in zip(prompts, responses, strict=True)],
            "completion_ids": [list(response.ids) for response in responses],
        }
        arguments |= {name: [p.columns.get(name) for p in prompts] for name in _column_names(prompts)}
        parameters = _parameters(self._function)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        made = self._function(**arguments)
        if inspect.isawaitable(made):
            made = _finished(made)
        values = self._checked(made, len(responses))
        # NaN marks responses to which the function does not apply
        raw = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
        applies = torch.tensor([value is not None for value in values])
        mean = torch.where(applies, raw, torch.tensor(self.unscored, dtype=torch.float64))
        return RewardOutput(mean, parts={self.name: raw})

    def _checked(self, made: object, count: int) -> list[float | None]:
        expected = "return a list with a number, or None, for each completion, in order"
        if not isinstance(made, Iterable) or isinstance(made, str | dict):
            raise TypeError(f"{self.name} returned a {type(made).__name__}; {expected}")
        values = list(made)
        if len(values) != count:
            raise ValueError(f"{self.name} returned {len(values)} values for {count} completions; {expected}")
        try:
            return [None if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name} returned a list that holds other things than numbers; {expected}") from error


def function_at(path: str) -> Callable[..., object]:
    """Import a function by its path; a class is made without arguments.

    Args:
        path: ``module.function``.

    Raises:
        ValueError: if there is no such module or function.
    """
    module, _, name = path.rpartition(".")
    remedy = "write module.function, the module being a file in the working folder or on PYTHONPATH"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, ValueError) as error:
        # another module that the user's own file imports may be missing
        if isinstance(error, ModuleNotFoundError) and error.name not in (module, module.partition(".")[0]):
            raise
        raise ValueError(f"FunctionReward.function: there is no module {module!r} for {path!r}: {remedy}") from error
    except AttributeError as error:
        raise ValueError(f"FunctionReward.function: {module} has no {name!r}: {remedy}") from error
    return cast(Callable[..., object], found() if isinstance(found, type) else found)


def _completion(prompt: Prompt, response: Response) -> object:
    return response.text if prompt.messages is None else [{"role": "assistant", "content": response.text}]


def _column_names(prompts: Sequence[Prompt]) -> list[str]:
    """Names of the columns of some rows, in the order of their appearance."""
    names: dict[str, None] = {}
    for prompt in prompts:
        names |= dict.fromkeys(prompt.columns)
    return [name for name in names if name not in GIVEN]


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _finished(result: Awaitable[object]) -> object:
    """The result of a coroutine, also where an event loop runs already, as in a notebook."""

    async def awaited() -> object:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # in this thread, so that Ctrl-C ends it
        return asyncio.run(awaited())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, awaited()).result()
