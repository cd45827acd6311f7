"""Completion in bash and zsh: ``--print_completion`` prints a script that knows commands, settings and classes.

The script holds a table of all settings, so that a completion starts no Python. It is our own: shtab's scripts do not
complete ``--setting=value``, and writing one for all nested classes of the parsers of jsonargparse takes minutes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import chain

import lightning as L

from lightning_rlhf.commands.annotate import annotate
from lightning_rlhf.commands.config_files import config_names
from lightning_rlhf.commands.evaluate import EvaluationRun
from lightning_rlhf.commands.exports import export
from lightning_rlhf.commands.fit import RLHFTrainer
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.commands.overview import COMMANDS, short_usage
from lightning_rlhf.commands.parts import Part, arguments_of, classes_of, type_of
from lightning_rlhf.commands.plan import plan_run
from lightning_rlhf.commands.votes import import_votes
from lightning_rlhf.experiments import CompareRun


DEEPEST = 3
"""Dots of the longest settings, as in ``--data.labeler.judge.model``."""
_FLAG = "!"
_RUN = (
    "--run_dir",
    "--checkpoint_every",
    "--checkpoint_every_steps",
    "--checkpoint_every_minutes",
    "--seed_everything",
)


def completion_script(shell: str = "bash") -> str:
    """The script of a shell.

    Args:
        shell: ``bash`` (3.2 and newer) or ``zsh``.

    Raises:
        ValueError: if there is none for the shell.
    """
    if shell not in _SCRIPTS:
        raise ValueError(
            f"there is no completion for {shell!r}: --print_completion writes one for {', '.join(_SCRIPTS)}"
        )
    flag = {"--help": [_FLAG]}
    tables: dict[str, dict[str, list[str]]] = {
        "fit": _run_table(),
        "compare": _table(_arguments(CompareRun)) | {"--config": _compare_names()},
        "evaluate": _table(_arguments(EvaluationRun)) | {"--config": []},
        "label": _table(_arguments(LabelRun)) | {"--config": []},
        "run": {"--run_dir": [], "--set": []},
        "annotate": _table(_hints(annotate)),
        "export": _table(_hints(export)),
        "import": _table(_hints(import_votes)),
        "plan": _table(_hints(plan_run)),
    }
    texts = []
    for command, table in tables.items():
        rows = [" ".join([option, *values]) for option, values in sorted((table | flag).items())]
        names = "fit|validate|sample" if command == "fit" else command
        # no name has a quote in it
        texts.append(f"    {names}) table='" + "\n".join(rows) + "' ;;")
    return _SCRIPTS[shell].replace("@TABLES@", "\n".join(texts)).replace("@COMMANDS@", " ".join(COMMANDS))


def print_completion(args: Sequence[str]) -> None:
    """Print the script that ``--print_completion``, ``--print_completion=zsh`` or ``--print_completion zsh`` asks for.

    Raises:
        SystemExit: with status 2, if there is none for the shell.
    """
    _, _, shell = args[0].partition("=")
    try:
        print(completion_script(shell or (args[1] if len(args) > 1 else "bash")), end="")
    except ValueError as error:
        print(f"error: {error}\n{short_usage()}", file=sys.stderr)
        raise SystemExit(2) from None


def settings(roots: Mapping[str, object]) -> dict[str, list[str]]:
    """Settings with the values that are known of each: classes by short name, literals, true and false.

    Args:
        roots: annotations of the first settings by path. Those of all classes that a setting allows follow.
    """
    found: dict[str, list[str]] = {}
    seen: set[tuple[str, type]] = set()
    waiting = list(roots.items())
    while waiting:
        path, annotation = waiting.pop()
        part = Part(path, [kind for kind in classes_of(annotation) if kind.__module__ != "builtins"], None)
        classes = part.classes()
        found[path] = sorted({*found.get(path, []), *classes, *_values(annotation)})
        groups = [kind for kind in part.kinds if dataclasses.is_dataclass(kind)]
        for kind in [*classes.values(), *groups]:
            if path.count(".") < DEEPEST and (path, kind) not in seen:
                seen.add((path, kind))
                waiting += [(f"{path}.{name}", annotation) for name, annotation in _arguments(kind).items()]
    return found


def _run_table() -> dict[str, list[str]]:
    trainer = {f"trainer.{name}": annotation for name, annotation in _arguments(RLHFTrainer).items()}
    table = _table({"model": L.LightningModule, "data": L.LightningDataModule, **trainer})
    options: dict[str, list[str]] = {name: [] for name in _RUN}
    return table | options | {"--config": config_names(), "--print_config": [_FLAG]}


def _table(roots: Mapping[str, object]) -> dict[str, list[str]]:
    return {f"--{path}": values for path, values in settings(roots).items()}


def _arguments(kind: type) -> dict[str, object]:
    return {name: type_of(kind, name) for name in arguments_of(kind)}


def _hints(function: Callable[..., object]) -> dict[str, object]:
    hints = typing.get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters}


def _values(annotation: object) -> Iterable[str]:
    if annotation is bool:
        return ("true", "false")
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [value for value in arguments if isinstance(value, str)]
    return chain.from_iterable(map(_values, arguments))


def _compare_names() -> list[str]:
    folder = resources.files("lightning_rlhf.configs").joinpath("compare")
    return sorted(f"compare/{entry.name[:-5]}" for entry in folder.iterdir() if entry.name.endswith(".yaml"))


_BASH = r"""# bash completion of lightning-rlhf, written by `lightning-rlhf --print_completion`
# a row of a table is a setting and its known values; "!" marks a setting that takes no value
_lightning_rlhf() {
  local line=${COMP_LINE:0:COMP_POINT} table= option= value= word words row choices rest found start=
  local IFS=$' \t\n'
  COMPREPLY=()
  word=${line##*[[:space:]]}
  read -r -a words <<< "$line"
  if [[ ${#words[@]} -lt 2 || ( ${#words[@]} -eq 2 && -n $word ) ]]; then
    COMPREPLY=( $(compgen -W "@COMMANDS@ --help --version --print_completion" -- "$word") )
    return
  fi
  case ${words[1]} in
@TABLES@
  esac
  if [[ $word == --*=* ]]; then
    option=${word%%=*} value=${word#*=}
    # bash breaks words at "=" unless it is told otherwise
    [[ $COMP_WORDBREAKS == *=* ]] || start="$option="
  elif [[ $word != -* ]]; then
    rest=${words[${#words[@]} - 1]}
    [[ -z $word ]] || rest=${words[${#words[@]} - 2]}
    [[ $rest != -* || $rest == *=* ]] || option=$rest
    value=$word
  fi
  option=${option%+}
  [[ $option != -c ]] || option=--config
  if [[ $word != -* || -n $option ]]; then
    while read -r row choices; do
      [[ $row != "$option" ]] || break
    done <<< "$table"
    [[ $row == "$option" ]] || choices=
    [[ $choices == "!" ]] || COMPREPLY=( $(compgen -W "$choices" -- "$value") )
    if [[ ${#COMPREPLY[@]} -eq 0 ]]; then
      compopt -o filenames 2> /dev/null
      IFS=$'\n' COMPREPLY=( $(compgen -f -- "$value") )
    fi
    COMPREPLY=( "${COMPREPLY[@]/#/$start}" )
    return
  fi
  # settings level by level, since there are hundreds
  compopt -o nospace 2> /dev/null
  while read -r row choices; do
    [[ $row == "$word"* ]] || continue
    rest=${row#"$word"}
    if [[ $rest == *.* ]]; then
      found="$word${rest%%.*}."
    elif [[ $choices == "!" ]]; then
      found=$row
    else
      found="$row="
    fi
    [[ " ${COMPREPLY[*]} " == *" $found "* ]] || COMPREPLY+=( "$found" )
  done <<< "$table"
}
complete -F _lightning_rlhf lightning-rlhf
"""
_ZSH = r"""#compdef lightning-rlhf
# zsh completion of lightning-rlhf, written by `lightning-rlhf --print_completion=zsh`
# a row of a table is a setting and its known values; "!" marks a setting that takes no value
_lightning_rlhf() {
  local table= option= row name rest previous
  local -a choices
  local -aU open flags
  if (( CURRENT == 2 )); then
    compadd -- @COMMANDS@ --help --version --print_completion
    return
  fi
  case ${words[2]} in
@TABLES@
  esac
  if [[ $PREFIX == --*=* ]]; then
    option=${PREFIX%%=*}
    # the text before the value is no part of the matches
    IPREFIX+="$option=" PREFIX=${PREFIX#*=}
  elif [[ $PREFIX != -* ]]; then
    previous=${words[CURRENT - 1]}
    [[ $previous != -* || $previous == *=* ]] || option=$previous
  fi
  option=${option%+}
  [[ $option != -c ]] || option=--config
  if [[ $PREFIX != -* || -n $option ]]; then
    for row in "${(@f)table}"; do
      [[ ${row%% *} != "$option" || $row != *" "* ]] || choices=( ${=row#* } )
    done
    [[ ${choices[1]} != "!" ]] || choices=()
    compadd -a choices || _files
    return
  fi
  # settings level by level, since there are hundreds
  for row in "${(@f)table}"; do
    name=${row%% *}
    [[ $name == "$PREFIX"* ]] || continue
    rest=${name#"$PREFIX"}
    if [[ $rest == *.* ]]; then
      open+=( "$PREFIX${rest%%.*}." )
    elif [[ $row == *" !" ]]; then
      flags+=( "$name" )
    else
      open+=( "$name=" )
    fi
  done
  compadd -Q -S "" -a open
  compadd -Q -a flags
  (( ${#open} + ${#flags} ))
}
if [[ ${zsh_eval_context[-1]} == loadautofunc ]]; then
  _lightning_rlhf "$@"
else
  compdef _lightning_rlhf lightning-rlhf
fi
"""


_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}
