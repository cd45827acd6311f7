"""How a language model is asked for a judgment, and how its answer is read, for all AI labelers and rewards."""

from lightning_rlhf.judging.options import ChainOfThought, JudgeOptions, Prices, RequestOptions
from lightning_rlhf.judging.prompts import JudgePrompt, Sample, pair_prompt, rating_prompt
from lightning_rlhf.judging.server import JudgeServer, ServerError
from lightning_rlhf.judging.task import Exemplar, PairTask, RatingTask, Task, load_task, task_names


__all__ = [
    "ChainOfThought",
    "Exemplar",
    "JudgeOptions",
    "JudgePrompt",
    "JudgeServer",
    "PairTask",
    "Prices",
    "RatingTask",
    "RequestOptions",
    "Sample",
    "ServerError",
    "Task",
    "load_task",
    "pair_prompt",
    "rating_prompt",
    "task_names",
]
